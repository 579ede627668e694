"""What separates the miniature's prime.toml from the paper's recipe at full scale, knob by knob.

    python examples/paper/full_scale.py

prints the table of README.md. Every knob that differs must be of one of the `KINDS`; the rest, all
that makes the algorithm, is the same in both, and a test holds that.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_prime.config_file import flatten, load

HERE = Path(__file__).parent
FULL = HERE.parent / "qwen2.5-math-7b_8gpu" / "prime.toml"
KINDS = {
    "where things lie": ("run.folder", "model.hf", "data.train", "data.eval", "data.template"),
    "sizes": (
        "run.steps",
        "data.max_prompt_length",
        "rollout.prompts_per_step",
        "rollout.prompts_per_round",
        "rollout.max_response_length",
        "rollout.batch_size",
        "policy.mini_batch_size",
        "prm.mini_batch_size",
        "evaluate.every",
        "evaluate.max_prompts",
        "checkpoint.every",
        "checkpoint.keep",
    ),
    "step sizes that go with the model's size, and β with the response's length": (
        "policy.lr",
        "prm.lr",
        "prm.beta",
    ),
    "the machine": (
        "precision.policy.dtype",
        "precision.prm.dtype",
        "precision.reference.dtype",
        "rollout.engine",
        "rollout.tensor_parallel_size",
        "verify.workers",
        "policy.micro_batch_tokens",
        "prm.micro_batch_tokens",
        "megatron.tensor_model_parallel_size",
        "megatron.pipeline_model_parallel_size",
        "megatron.sequence_parallel",
    ),
    "what is kept to look at": ("debug.save_rollouts",),
}


def differences() -> dict[str, tuple[Any, Any]]:
    """Knobs that differ, of the miniature and of the full scale; None: not given."""
    mini, full = (
        flatten(load(path, []).model_dump(mode="json")) for path in (HERE / "prime.toml", FULL)
    )
    names = [*mini, *(name for name in full if name not in mini)]
    pairs = {name: (mini.get(name), full.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def table(found: Mapping[str, tuple[Any, Any]]) -> str:
    """As README.md has it; ValueError for a difference that is of no kind."""
    if unknown := set(found) - {name for names in KINDS.values() for name in names}:
        raise ValueError(
            f"found other values of {sorted(unknown)} in {FULL}, wanted those of prime.toml: they "
            "make another algorithm; or name them in full_scale.KINDS"
        )
    lines = ["| knob | miniature | full scale |", "|---|---|---|"]
    for kind, names in KINDS.items():
        lines += [f"| *{kind}* | | |"]
        lines += [f"| `{name}` | {_text(found[name][0])} | {_text(found[name][1])} |"
                  for name in names if name in found]  # fmt: skip
    return "\n".join(lines) + "\n"


def _text(value: Any) -> str:
    return "–" if value is None else str(value)


if __name__ == "__main__":
    print(table(differences()), end="")

"""A critic's values and updates in every layout against plain transformers with a linear head.

The reference below shares no code with the package: one process, one row at a time, the loss
written out. What the four ranks do is in critic_cases.py.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from critic_cases import EXPORTED, UPDATES
from launch import run_ranks
from layouts import LAYOUTS
from matrix import cases, in_turn, selected
from safetensors.torch import load_file, save_file

from megatron_prime.weights.convert import to_hf
from megatron_prime.weights.convert_plan import Options

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

MODELS = ["tied", "untied"]  # with and without shared embeddings, which a critic never has
ROWS = 16
WAYS = [*LAYOUTS, *(f"{name}-sp" for name, sizes in LAYOUTS.items() if sizes.tp > 1)]
FIRST = next(iter(LAYOUTS))
ALWAYS = [(name, layout) for layout in (FIRST, EXPORTED) for name in MODELS]
CASES = cases(MODELS, [*ALWAYS, *in_turn(MODELS, WAYS, every=2)], WAYS)


def make_job() -> dict[str, Any]:
    """Ragged rollouts with returns, and the knobs of the update."""
    generator = torch.Generator().manual_seed(11)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    sequences = []
    for _ in range(ROWS):
        prompt, response = integer(1, 6), integer(1, 9)
        ids = torch.randint(0, 61, (prompt + response,), generator=generator)
        sequences.append((ids.tolist(), prompt))
    width = max(len(ids) - prompt for ids, prompt in sequences)
    return {
        "models": MODELS,
        "sequences": sequences,
        "returns": torch.randn(ROWS, width, generator=generator),
        "to_come": torch.randn(ROWS, width, generator=generator),  # as if lambda were below 1
        "knobs": {
            # An epsilon far above the gradients' noise, or Adam would turn rounding into steps.
            "eps": 1e-3,
            "betas": (0.8, 0.9),
            "weight_decay": 0.1,
            "warmup_steps": 2,
            "lr": 2e-3,
            "clip_grad": 2.0,
            "mini_batch_size": 8,
            "micro_batch_tokens": 40,
            "value_clip": 0.02,
        },
    }


class Reference:
    """A critic trained in the most ordinary way."""

    def __init__(self, hf_dir: Path, knobs: dict[str, Any]) -> None:
        from transformers import AutoModel

        self.model = AutoModel.from_pretrained(hf_dir, dtype=torch.float32)
        head = load_file(hf_dir / "model.safetensors")["score.weight"]
        self.head, self.knobs = torch.nn.Parameter(head.float()), knobs
        parameters = [*self.model.parameters(), self.head]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.ndim > 1]},
                {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
            ],
            betas=knobs["betas"],
            eps=knobs["eps"],
            weight_decay=knobs["weight_decay"],
        )
        self.parameters = parameters

    def values(self, ids: list[int], prompt: int) -> torch.Tensor:
        """Before each response token."""
        hidden = self.model(torch.tensor([ids])).last_hidden_state[0, prompt - 1 : -1]
        return hidden @ self.head[0]

    def update(self, job: dict[str, Any], number: int) -> dict[str, Any]:
        with torch.no_grad():
            old = [self.values(*row) for row in job["sequences"]]
        returns = [row[: len(v)] for row, v in zip(job["returns"], old, strict=True)]
        for group in self.optimizer.param_groups:
            group["lr"] = self.knobs["lr"] * min(1.0, number / self.knobs["warmup_steps"])
        clip, size = self.knobs["value_clip"], self.knobs["mini_batch_size"]
        losses, norms, clipped = [], [], []
        for start in range(0, ROWS, size):
            terms = []
            for row in range(start, start + size):
                now = self.values(*job["sequences"][row])
                held = old[row] + (now - old[row]).clamp(-clip, clip)
                plain, other = (now - returns[row]) ** 2, (held - returns[row]) ** 2
                terms.append(torch.maximum(plain, other) / 2)
                clipped.append((other > plain).float())
            loss = torch.cat(terms).mean()
            self.optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.knobs["clip_grad"])
            self.optimizer.step()
            losses.append(float(loss.detach()))
            norms.append(float(norm))
        all_old, all_returns = torch.cat(old), torch.cat(returns)
        came = torch.cat([row[: len(v)] for row, v in zip(job["to_come"], old, strict=True)])
        return {
            "values": old,
            "critic/loss": sum(losses) / len(losses),
            "critic/grad_norm": sum(norms) / len(norms),
            "critic/clip_fraction": float(torch.cat(clipped).mean()),
            "critic/value_mean": float(all_old.mean()),
            "critic/return_mean": float(all_returns.mean()),
            "critic/explained_variance": float(1 - (came - all_old).var() / came.var()),
            "critic/lr": self.optimizer.param_groups[0]["lr"],
        }

    def weights(self) -> dict[str, torch.Tensor]:
        held = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        held["score.weight"] = self.head.detach()
        return {name: value.clone() for name, value in held.items()}


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("critic")
    tiny_models.make(path)
    for seed, name in enumerate(MODELS):
        shutil.copytree(path / name, path / f"{name}_critic")
        file = path / f"{name}_critic" / "model.safetensors"
        tensors = load_file(file)
        generator = torch.Generator().manual_seed(seed)
        tensors["score.weight"] = 0.2 * torch.randn(1, 64, generator=generator)
        save_file(tensors, file, metadata={"format": "pt"})
    wanted = dict.fromkeys([*ALWAYS, *selected(request)])
    torch.save(make_job() | {"cases": [*wanted]}, path / "job.pt")
    run_ranks(Path(__file__).with_name("critic_cases.py"), 4, [path], timeout_s=400)
    return path


@pytest.fixture(scope="module")
def truths(folder: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for name in MODELS:
        model, job = Reference(folder / f"{name}_critic", make_job()["knobs"]), make_job()
        start = model.weights()
        updates = [model.update(job, number + 1) for number in range(UPDATES)]
        found[name] = {"start": start, "updates": updates, "weights": model.weights()}
    return found


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[str, str]:
    """A model and a layout."""
    name, layout = request.param
    return name, layout


@pytest.fixture
def name(case: tuple[str, str]) -> str:
    return case[0]


@pytest.fixture
def found(folder: Path, case: tuple[str, str]) -> dict[str, Any]:
    return torch.load(folder / f"{'-'.join(case)}.pt", weights_only=False)


def test_values(found: dict[str, Any], truths: dict[str, Any], name: str) -> None:
    """Of before the first update and of after it; 0 on padding."""
    for values, truth in zip(found["values"], truths[name]["updates"], strict=True):
        for row, wanted in zip(values, truth["values"], strict=True):
            torch.testing.assert_close(row[: len(wanted)], wanted, atol=2e-5, rtol=0)
            assert not row[len(wanted) :].any()


def test_a_language_models_checkpoint_begins_with_values_of_0(found: dict[str, Any]) -> None:
    assert not found["untaught"].any()


def test_weights_after_two_updates(
    found: dict[str, Any], truths: dict[str, Any], name: str
) -> None:
    truth, start = truths[name]["weights"], truths[name]["start"]
    assert found["weights"].keys() == truth.keys()
    for tensor, value in found["weights"].items():
        torch.testing.assert_close(value, truth[tensor], atol=2e-5, rtol=0, msg=tensor)
    for tensor in ("score.weight", "model.embed_tokens.weight", "model.norm.weight"):
        assert (truth[tensor] - start[tensor]).abs().max() > 1e-3, "it learnt something"


def test_figures(found: dict[str, Any], truths: dict[str, Any], name: str) -> None:
    for metrics, truth in zip(found["metrics"], truths[name]["updates"], strict=True):
        assert metrics == pytest.approx(
            {key: value for key, value in truth.items() if key != "values"}, rel=2e-4, abs=2e-5
        )
        assert 0 < metrics["critic/clip_fraction"] < 1, "the clip should matter"


def test_bf16_follows_fp32(found: dict[str, Any]) -> None:
    for rounded, exact in zip(found["bf16"], found["metrics"], strict=True):
        assert rounded["critic/loss"] == pytest.approx(exact["critic/loss"], rel=0.05)


def test_a_checkpoint_of_another_layout(folder: Path, found: dict[str, Any], name: str) -> None:
    """Written by the first layout: weights bit for bit, and the next step is the same."""
    first = torch.load(folder / f"{name}-{FIRST}.pt", weights_only=False)
    for tensor, value in found["loaded"].items():
        assert torch.equal(value, first["weights"][tensor]), tensor
    assert found["goes_on"] == pytest.approx(first["goes_on"], rel=1e-3, abs=2e-5)


@pytest.mark.parametrize("name", MODELS)
def test_transformers_reads_the_export(folder: Path, name: str) -> None:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder / f"{name}_exported")
    wanted = torch.load(folder / f"{name}-{EXPORTED}.pt", weights_only=False)["weights"]
    assert model.state_dict().keys() == wanted.keys()
    for tensor, value in model.state_dict().items():
        assert torch.equal(value.float(), wanted[tensor]), tensor


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_becomes_a_model_that_transformers_reads(folder: Path, name: str) -> None:
    """Its config.json is a language model's until then: that is what the critic started from."""
    from transformers import AutoModelForSequenceClassification

    out = folder / f"{name}_converted"
    options = Options(verify=True)
    to_hf(folder / f"{name}_saved", folder / name, out, options, lambda *_, **__: None, critic=True)
    wanted = torch.load(folder / f"{name}-{FIRST}.pt", weights_only=False)["weights"]
    model = AutoModelForSequenceClassification.from_pretrained(out)
    assert model.state_dict().keys() == wanted.keys()
    for tensor, value in model.state_dict().items():
        assert torch.equal(value.float(), wanted[tensor]), tensor
    assert json.loads((out / "config.json").read_text())["architectures"] == [type(model).__name__]
    ids, prompt = make_job()["sequences"][0]
    with torch.no_grad():
        value = model.eval()(torch.tensor([ids[:prompt]])).logits
    assert value.shape == (1, 1), "one number, after the prompt"


@pytest.mark.parametrize("name", MODELS)
def test_a_skipped_batch_is_kept_for_replay(folder: Path, name: str) -> None:
    found = torch.load(folder / f"{name}-{EXPORTED}.pt", weights_only=False)["skipped"]
    assert found["step"] is None
    assert found["restored"]
    kept, job = found["kept"], make_job()
    assert kept.model == "critic"
    assert torch.equal(kept.batch.returns, job["returns"][[3, 1, 2, 5]])
    assert torch.equal(kept.batch.values, job["returns"][[3, 1, 2, 5]] + 1)
    assert torch.equal(kept.batch.to_come, job["to_come"][[3, 1, 2, 5]])
    wanted = [job["sequences"][row] for row in (3, 1, 2, 5)]
    assert [(list(s.token_ids), s.prompt_length) for s in kept.batch.rollouts.sequences] == wanted

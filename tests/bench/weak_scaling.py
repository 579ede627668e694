"""Bytes that the ranks of a real PRIME step exchange while work per rank stays the same.

    python tests/bench/weak_scaling.py [--ranks 1 2 4 8]

On 1, 2, 4 and 8 gloo ranks and in several layouts: a tiny model, 8 rollouts per rank, whatever the
ranks are; score, PRM update, policy update and weight sync by the real roles. All that is handed to
torch.distributed is counted (`counted.py`) and compared with the formulae of
`planner/exchanges.py` and of the reshard plan. Counted are whole tensors, which can't grow with the
data-parallel ranks; what each of these sends in a ring does, so it stands beside it. Prints a
Markdown table; exit status 1 if a count differs.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "distributed"))

from launch import run_ranks  # noqa: E402

from megatron_prime.planner.exchanges import on_the_wire  # noqa: E402

LAYOUTS = {
    1: ("dp",),
    2: ("dp", "dp.zero", "tp2", "tp2.sp", "pp2", "pp2.vpp2", "cp2"),
    4: ("dp", "dp.zero", "tp2.sp", "tp4.sp", "pp2", "pp4", "tp2.pp2.sp.zero", "tp2.cp2.sp.zero"),
    8: ("dp", "dp.zero", "tp2.sp", "pp2", "tp2.pp2.sp.zero", "tp2.pp2.cp2.sp.zero"),
}
MODEL = {  # Qwen3: tied embeddings, which stages share, and norms of heads
    "model_type": "qwen3",
    "hidden_size": 64,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "intermediate_size": 96,
    "vocab_size": 301,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
COLUMNS = ("tp", "pp", "dp", "cp", "others", "weight sync")
SENT = "dp, sent in a ring"


def count(folder: Path, ranks: int, layouts: tuple[str, ...], rows: str = "ragged") -> list[Any]:
    """What each rank found: {layout: {phase: {"counted", "formula", "planner"}}}."""
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model/config.json").write_text(json.dumps(MODEL))
    run_ranks(HERE / "weak_ranks.py", ranks, [folder, rows, *layouts], timeout_s=600)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=list(LAYOUTS))
    asked = parser.parse_args()
    print(f"| ranks | layout | {' | '.join(COLUMNS)} | {SENT} | counted is |")
    print("|---" * (len(COLUMNS) + 4) + "|")
    differences = 0
    for ranks in asked.ranks:
        with tempfile.TemporaryDirectory() as folder:
            found = count(Path(folder), ranks, LAYOUTS[ranks])
        for layout in LAYOUTS[ranks]:
            phases = [one[layout] for one in found]
            columns = [by_column(one) for one in phases]
            cells = [f"{max(one[name] for one in columns):,}" for name in COLUMNS]
            sent = max(sent_by_dp(one, ranks, layout) for one in phases)
            wrong = sum(
                one["counted"] != one["formula"] for rank in phases for one in rank.values()
            )
            differences += wrong
            verdict = "the formula" if not wrong else f"DIFFERENT {wrong} times"
            print(
                f"| {ranks} | {layout} | {' | '.join(cells)} | {sent:,.0f} | {verdict} |",
                flush=True,
            )
    return int(differences > 0)


def by_column(phases: dict[str, Any]) -> Counter[str]:
    """Bytes of a rank's step."""
    found: Counter[str] = Counter()
    for phase, both in phases.items():
        for what, nbytes in both["counted"].items():
            group = what.split()[0]
            column = {"ranks": "pp"}.get(group, group if group in COLUMNS else "others")
            found["weight sync" if phase == "sync_weights" else column] += nbytes
    return found


def sent_by_dp(phases: dict[str, Any], ranks: int, layout: str) -> float:
    """Bytes of gradients and weights that a rank sends in a step, in rings of data-parallel and
    context-parallel ranks."""
    sizes = {name: int(size) for name, size in re.findall(r"\b(tp|pp)(\d+)", layout)}
    group = ranks // (sizes.get("tp", 1) * sizes.get("pp", 1))
    sent = (on_the_wire(one["counted"], {"dp": group}).get("dp", 0.0) for one in phases.values())
    return sum(sent)


if __name__ == "__main__":
    sys.exit(main())

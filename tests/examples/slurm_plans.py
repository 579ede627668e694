"""The Slurm examples, the public models that they are for, and the plans in their READMEs.

`PYTHONPATH=. python tests/examples/slurm_plans.py` writes the plans into the READMEs anew.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
sys.path += [str(ROOT / "tools"), str(ROOT / "tests/planner")]

import plan  # noqa: E402
from public_models import CONFIGS  # noqa: E402

# Eurus-2-7B-SFT is a Qwen2.5-Math-7B, which attends to 4096 tokens; Llama 3.1 has Llama 3's sizes.
MODELS: dict[str, dict[str, Any]] = {
    "qwen2.5-math-7b_8gpu": CONFIGS["Qwen2.5-7B"] | {"max_position_embeddings": 4096},
    "qwen2.5-32b_32gpu": CONFIGS["Qwen2.5-32B"],
    "llama3.1-70b_64gpu": CONFIGS["Llama-3-70B"],
    "llama3.1-70b_128gpu": CONFIGS["Llama-3-70B"],
    "qwen2.5-72b_64gpu": CONFIGS["Qwen2.5-72B"],
    "qwen2.5-72b_128gpu": CONFIGS["Qwen2.5-72B"],
}
_PLAN = re.compile(r"(?<=<!-- plan -->\n).*?(?=<!-- end of plan)", re.DOTALL)


def ranks_of(name: str) -> int:
    """Tasks of the job, by its run.sbatch."""
    text = (EXAMPLES / name / "run.sbatch").read_text()
    nodes, tasks = (
        int(re.findall(rf"^#SBATCH --{option}=(\d+)$", text, re.MULTILINE)[0])
        for option in ("nodes", "ntasks-per-node")
    )
    return nodes * tasks


def model_of(name: str, folder: Path) -> Path:
    """A directory with the config.json of the example's model."""
    (folder / "config.json").write_text(json.dumps(MODELS[name]))
    return folder


def plan_output(name: str, hf: Path, *options: str) -> tuple[int, str]:
    """Exit status and output of `tools/plan.py step` for the example."""
    output = io.StringIO()
    toml = str(EXAMPLES / name / "prime.toml")
    common = ["--ranks", str(ranks_of(name)), "--gpu", "h100", f"--model.hf={hf}"]
    with contextlib.redirect_stdout(output):
        status = plan.main(["step", toml, *common, *options])
    return status, output.getvalue()


def plan_in_readme(name: str) -> str:
    """What stands in the example's README."""
    found = _PLAN.search((EXAMPLES / name / "README.md").read_text())
    return found.group() if found else ""


def plan_wanted(name: str, hf: Path) -> str:
    """What should stand there: the command, and what it prints today."""
    command = f"python tools/plan.py step examples/{name}/prime.toml --ranks {ranks_of(name)}"
    _, output = plan_output(name, hf)
    return f"```\n$ {command} --gpu h100 --model.hf=DIR\n{output}```\n"


def _write() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name in MODELS:
            wanted = plan_wanted(name, model_of(name, Path(folder)))
            readme = EXAMPLES / name / "README.md"
            readme.write_text(_PLAN.sub(lambda _, new=wanted: new, readme.read_text()))


if __name__ == "__main__":
    _write()

"""The Slurm examples: valid for their ranks, plans and manual up to date."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

sys.path.append(str(Path(__file__).parent))
from slurm_plans import EXAMPLES, MODELS, model_of, plan_in_readme, plan_output, plan_wanted
from slurm_plans import ranks_of as ranks_of_example

from megatron_prime.config import RunConfig
from megatron_prime.config_file import load
from megatron_prime.planner.lengths import Expectations
from megatron_prime.planner.memory import GIB, Machine
from megatron_prime.planner.rates import rates_of
from megatron_prime.planner.search import search
from megatron_prime.planner.seconds import predict
from megatron_prime.planner.table import plan_of
from megatron_prime.validate import check

NAMES = list(MODELS)
every_example = pytest.mark.parametrize("name", NAMES)
WITHIN = 1.03  # of the fastest predicted layout, as the READMEs say


def example(name: str, folder: Path) -> RunConfig:
    """The example's configuration, with files that exist."""
    data = folder / "data"
    data.touch()
    given = {"model.hf": model_of(name, folder), "data.train": data, "data.eval": data}
    toml = EXAMPLES / name / "prime.toml"
    return load(toml, [f"--{knob}={path}" for knob, path in given.items()])


def test_all_folders_are_tested() -> None:
    found = {path.parent.name for path in EXAMPLES.glob("*/run.sbatch")}
    assert found == {*NAMES, "quickstart"}
    for name in NAMES:
        assert name.endswith(f"_{ranks_of_example(name)}gpu")


@every_example
def test_files_are_short_and_bash_reads_them(name: str) -> None:
    folder = EXAMPLES / name
    for file in ("run.sbatch", "prime.toml"):
        assert len((folder / file).read_text().splitlines()) <= 60
    for script in (folder / "run.sbatch", EXAMPLES / "slurm/prime.sh"):
        subprocess.run(["bash", "-n", str(script)], check=True)


@every_example
def test_train_would_start(name: str, tmp_path: Path) -> None:
    config = example(name, tmp_path)
    check(config, "train", ranks_of_example(name))
    rollout, policy, prm = config.rollout, config.policy, config.prm
    assert (rollout.prompts_per_step, rollout.group_size, rollout.temperature) == (256, 4, 1.0)
    assert (config.data.max_prompt_length, rollout.max_response_length) == (1024, 3072)
    assert (policy.lr, prm.lr, prm.beta, config.preset) == (5e-7, 1e-6, 0.05, "released")
    assert (policy.mini_batch_size, prm.mini_batch_size) == (256, 256)


@every_example
def test_plan_fits_and_the_readme_has_it(name: str, tmp_path: Path) -> None:
    hf = model_of(name, tmp_path)
    assert plan_output(name, hf)[0] == 0
    assert plan_in_readme(name) == plan_wanted(name, hf), (
        "the README's plan is stale: PYTHONPATH=. python tests/examples/slurm_plans.py"
    )
    assert "No GPU has confirmed any of this" in (EXAMPLES / name / "README.md").read_text()
    seconds = re.findall(r"^a step: ([\d.]+ s)", plan_in_readme(name), re.MULTILINE)[0]
    rows = (EXAMPLES / "README.md").read_text().splitlines()
    row = next(line for line in rows if line.startswith(f"| [{name}]"))
    assert row.endswith(f"| {seconds} | not measured |"), "examples/README.md is stale"


@every_example
def test_layout_is_the_roomiest_of_the_fast_ones(name: str, tmp_path: Path) -> None:
    config, rates, ranks = example(name, tmp_path), rates_of("h100", []), ranks_of_example(name)
    machine = Machine(round(rates.memory_gib * GIB), round(config.memory.reserve_gib * GIB), True)
    expected = Expectations.of(config)
    table, plan = plan_of(config, ranks, machine)
    found = search(config, ranks, machine, rates, expected).layouts
    fast = [one for one in found if one.step.seconds <= WITHIN * found[0].step.seconds]
    seconds = predict(config, plan, table, rates, expected).seconds
    assert seconds <= WITHIN * found[0].step.seconds
    assert plan.peak.device == min(one.device_bytes for one in fast)


def test_the_manual_keeps_math_rows(tmp_path: Path) -> None:
    program = re.findall(r"<<'END'\n(.*?)END\n", (EXAMPLES / "README.md").read_text(), re.DOTALL)
    files = [str(tmp_path / name) for name in ("all.parquet", "math.parquet")]
    rows = {"ability": ["math", "code", "math"], "row": [0, 1, 2]}
    parquet.write_table(pyarrow.table(rows), files[0])
    subprocess.run([sys.executable, "-", *files], input=program[0], text=True, check=True)
    assert parquet.read_table(files[1])["row"].to_pylist() == [0, 2]


def test_the_manual_names_all_exit_codes() -> None:
    codes = re.findall(r"^ {2}(\d+)\)", (EXAMPLES / "slurm/prime.sh").read_text(), re.MULTILINE)
    assert codes == ["0", "2", "69", "70", "75", "78", "137"]
    manual = (EXAMPLES / "README.md").read_text()
    assert all(re.search(rf"^\| {code} \|", manual, re.MULTILINE) for code in codes)

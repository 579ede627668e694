"""The Slurm examples: valid for their ranks, plans up to date, and signals and requeues by real
bash between a stand-in srun and scontrol."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

sys.path.append(str(Path(__file__).parent))
from slurm_plans import EXAMPLES, MODELS, ROOT, model_of, plan_in_readme, plan_output, plan_wanted
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

SRUN = """#!/usr/bin/env bash
case " $* " in *' megatron_prime preflight '*)
  printf '%s\\n' "$@" > "$FAKE/preflight"
  trap 'echo USR1 >> "$FAKE/signals"; exit 75' USR1
  if [ "$REFUSAL" = wait ]; then for _ in {1..1200}; do sleep 0.05; done; fi
  exit "$REFUSAL" ;;
esac
printf '%s\\n' "$@" > "$FAKE/srun"
printenv LOCAL_WORLD_SIZE PYTHONPATH MASTER_ADDR > "$FAKE/environment"
for argument; do case $argument in --output=*) logs=${argument#--output=} ;; esac; done
echo 'the last words of rank 0' > "${logs/\\%5t/00000}"
trap 'echo USR1 >> "$FAKE/signals"; exit "${DIES:-75}"' USR1
trap 'echo TERM >> "$FAKE/signals"; exit 137' TERM
touch "$FAKE/started"
if [ -n "${SAVES:-}" ]; then mkdir -p "$SAVES"; fi
if [ "$CODE" != wait ]; then exit "$CODE"; fi
for _ in {1..1200}; do sleep 0.05; done # a minute, should nobody signal
"""
SCONTROL = """#!/usr/bin/env bash
case $* in
  'show hostnames gpu[1-8]') printf 'gpu%d\\n' {1..8}; exit ;;
  '-o show node gpu1') echo 'NodeName=gpu1 NodeAddr=10.0.0.1 Version=22.05'; exit ;;
  requeue*) echo "$*" >> "$FAKE/scontrol"; exit ;;
esac
echo "$3" > "$FAKE/asked"
echo "JobId=$3 JobName=prime"
echo "   JobState=$STATE Reason=None Dependency=(null)"
echo "   Command=$SCRIPT --run.steps=10"
"""


@dataclass(frozen=True)
class Cluster:
    """One job's shell with stand-ins for Slurm's commands."""

    folder: Path
    environment: dict[str, str]

    def submit(self, name: str, **changes: str) -> subprocess.Popen[str]:
        script = EXAMPLES / name / "run.sbatch"
        spooled = self.folder / "slurm_script"  # Slurm runs a copy that has another name
        shutil.copy(script, spooled)
        return subprocess.Popen(
            ["bash", str(spooled), "--run.steps=10"],
            env={**self.environment, "SCRIPT": str(script), **changes},
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, name: str = NAMES[0], **changes: str) -> tuple[int, str]:
        job = self.submit(name, **changes)
        output, _ = job.communicate(timeout=60)
        return job.returncode, output

    def said(self, file: str) -> list[str]:
        """Lines that a stand-in wrote."""
        path = self.folder / file
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "123", "SLURM_JOB_NODELIST": "gpu[1-8]", "SLURM_CPUS_PER_TASK": "12"}
    given = {"MODEL": "/m m", "TRAIN": "/t", "RUN": str(tmp_path / "run"), "PYTHON": "/p/python"}
    own = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "MASTER_"))}
    paths = {"PATH": f"{commands}:{os.environ['PATH']}", "FAKE": str(tmp_path)}
    job |= {"SLURM_NTASKS_PER_NODE": "8", "STATE": "RUNNING", "CODE": "0", "REFUSAL": "0"}
    return Cluster(tmp_path, {**own, **job, **given, **paths})


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


@every_example
def test_the_command_of_each_rank(name: str, cluster: Cluster) -> None:
    code, output = cluster.run(name)
    assert (code, cluster.said("scontrol")) == (0, []), output
    assert "exit code 0: done" in output
    words, run = cluster.said("srun"), cluster.environment["RUN"]
    assert words[words.index("/p/python") :] == [
        *("/p/python", "-m", "megatron_prime", "train", str(EXAMPLES / name / "prime.toml")),
        *("--model.hf=/m m", "--data.train=/t"),
        "--data.eval=/shared/data/eurus2/validation_math.parquet",
        *(f"--run.folder={run}", "--run.steps=10"),
    ]
    assert {"--kill-on-bad-exit=0", "--wait=400", "--cpus-per-task=12"} <= set(words)
    assert f"--output={run}/logs/123/rank_%5t.txt" in words
    assert (Path(run) / "logs/latest/rank_00000.txt").is_file()
    assert cluster.said("environment")[0] == "8"
    assert cluster.said("environment")[1].split(":")[0] == str(ROOT)
    assert cluster.said("environment")[2] == "10.0.0.1"


def test_the_nodes_are_looked_at_first(cluster: Cluster) -> None:
    code, output = cluster.run()
    assert code == 0, output
    words, train = cluster.said("preflight"), cluster.said("srun")
    start, began = words.index("/p/python"), train.index("/p/python")
    assert words[start : start + 4] == ["/p/python", "-m", "megatron_prime", "preflight"]
    assert words[start + 4 :] == train[began + 4 :], "with the same file and knobs"
    assert {"--kill-on-bad-exit=0", "--wait=400", "--cpus-per-task=12"} <= set(words)
    assert not any(word.startswith("--output") for word in words), "its table is in the job's"


def test_a_refusal_ends_the_job_before_any_rank_trains(cluster: Cluster) -> None:
    code, output = cluster.run(REFUSAL="78")
    assert (code, cluster.said("srun"), cluster.said("scontrol")) == (78, [], [])
    assert "exit code 78: refused for the reasons above" in output


def test_the_look_has_options_and_can_be_left_out(cluster: Cluster) -> None:
    cluster.run(PREFLIGHT="--seconds 120 --warn-only")
    words = cluster.said("preflight")
    toml = words.index(str(EXAMPLES / NAMES[0] / "prime.toml"))
    assert words[toml + 1 : toml + 4] == ["--seconds", "120", "--warn-only"]
    (cluster.folder / "preflight").unlink()
    code, _ = cluster.run(PREFLIGHT="no")
    assert (code, cluster.said("preflight")) == (0, [])
    assert cluster.said("srun")


def test_a_signal_during_the_look_requeues(cluster: Cluster) -> None:
    job = cluster.submit(NAMES[0], REFUSAL="wait")
    patience = time.monotonic() + 30
    while not cluster.said("preflight"):
        assert time.monotonic() < patience
        time.sleep(0.05)
    time.sleep(0.5)  # for its trap
    job.send_signal(signal.SIGUSR1)
    output, _ = job.communicate(timeout=30)
    assert (job.returncode, cluster.said("srun")) == (75, []), output
    assert cluster.said("scontrol") == ["requeue 123"]


def test_container_and_evaluation_are_optional(cluster: Cluster) -> None:
    source = (EXAMPLES / NAMES[0] / "run.sbatch").read_text()
    commented = re.findall(r"^# CONTAINER=\((.*)\)$", source, re.MULTILINE)[0]
    script = cluster.folder / "run.sbatch"
    script.write_text(re.sub(r"^CONTAINER=\(\)$", f"CONTAINER=({commented})", source, flags=re.M))
    folder = {"FOLDER": str(EXAMPLES / NAMES[0]), "EVAL": ""}
    subprocess.run(["bash", str(script)], env={**cluster.environment, **folder}, check=True)
    for file in ("preflight", "srun"):
        words = cluster.said(file)
        at = words.index(commented.split()[0])
        assert words[at : at + 2] == commented.split()
        assert at < words.index("/p/python")
    words = cluster.said("srun")
    assert not any(word.startswith("--data.eval") for word in words)


def test_array_has_a_folder_and_a_seed_each(cluster: Cluster) -> None:
    cluster.run(SLURM_ARRAY_TASK_ID="2")
    run = cluster.environment["RUN"]
    assert {f"--run.folder={run}/seed_2", "--run.seed=2"} <= set(cluster.said("srun"))


def test_last_task_of_an_array_requeues_itself_alone(cluster: Cluster) -> None:
    """Its SLURM_JOB_ID is the array's number, which means all tasks."""
    cluster.run(CODE="75", SLURM_ARRAY_TASK_ID="2", SLURM_ARRAY_JOB_ID="123")
    assert cluster.said("asked") == ["123_2"]
    assert cluster.said("scontrol") == ["requeue 123_2"]


def test_starts_that_save_nothing_are_not_requeued_for_ever(cluster: Cluster) -> None:
    checkpoint = Path(cluster.environment["RUN"]) / "checkpoints/step_000001"
    for saves in ["", "", "", "", str(checkpoint), "", "", "", ""]:
        cluster.run(CODE="75", SAVES=saves)
    assert cluster.said("scontrol") == ["requeue 123"] * 9
    assert "5 starts in a row have saved nothing: not requeued" in cluster.run(CODE="75")[1]
    assert cluster.said("scontrol") == ["requeue 123"] * 9


@pytest.mark.parametrize(("code", "requeued"), [("138", True), ("143", True), ("137", False)])
def test_ranks_that_die_of_the_signal_at_their_start(
    code: str, requeued: bool, cluster: Cluster
) -> None:
    job = cluster.submit(NAMES[0], CODE="wait", DIES=code)
    wait_for_start(cluster, job)
    job.send_signal(signal.SIGUSR1)
    output, _ = job.communicate(timeout=30)
    assert cluster.said("scontrol") == (["requeue 123"] if requeued else []), output
    assert job.returncode == (75 if requeued else int(code))


def test_where_the_folder_is_not_known(cluster: Cluster) -> None:
    code, output = cluster.run(SCRIPT="(null)")
    assert (code, cluster.said("srun")) == (2, [])
    assert "submit with FOLDER=" in output


@pytest.mark.parametrize(
    ("code", "state", "calls"),
    [
        (75, "RUNNING", ["requeue 123"]),
        (75, "COMPLETING", []),  # cancelled, or requeued by Slurm
        (0, "RUNNING", []),
        (1, "RUNNING", []),
        (2, "RUNNING", []),
        (69, "RUNNING", []),
        (70, "RUNNING", []),
        (137, "RUNNING", []),
        (143, "RUNNING", []),
    ],
)
def test_only_what_was_saved_is_requeued(
    code: int, state: str, calls: list[str], cluster: Cluster
) -> None:
    found, output = cluster.run(CODE=str(code), STATE=state)
    assert found == code
    assert cluster.said("scontrol") == calls
    assert f"exit code {code}: " in output
    assert ("the last words of rank 0" in output) == (code != 0)


def wait_for_start(cluster: Cluster, job: subprocess.Popen[str]) -> None:
    patience = time.monotonic() + 30
    while not cluster.said("srun") or not (cluster.folder / "started").exists():
        assert time.monotonic() < patience
        assert job.poll() is None
        time.sleep(0.05)


@pytest.mark.parametrize("sent", [signal.SIGUSR1, signal.SIGTERM])
def test_signals_reach_srun(sent: signal.Signals, cluster: Cluster) -> None:
    job = cluster.submit(NAMES[0], CODE="wait")
    wait_for_start(cluster, job)
    job.send_signal(sent)  # to the shell alone, as --signal=B: does
    output, _ = job.communicate(timeout=30)
    assert cluster.said("signals") == ["USR1"], "of TERM srun kills its tasks"
    assert cluster.said("scontrol") == ["requeue 123"]
    assert job.returncode == 75, output


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

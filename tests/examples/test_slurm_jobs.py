"""The shell of a Slurm job: signals, refusals and requeues, by real bash between a stand-in srun
and a stand-in scontrol."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
from slurm_plans import EXAMPLES, MODELS, ROOT
from stand_ins import Cluster, stand_ins

NAMES = list(MODELS)
every_example = pytest.mark.parametrize("name", NAMES)


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    commands = stand_ins(tmp_path)
    job = {"SLURM_JOB_ID": "123", "SLURM_JOB_NODELIST": "gpu[1-8]", "SLURM_CPUS_PER_TASK": "12"}
    given = {"MODEL": "/m m", "TRAIN": "/t", "RUN": str(tmp_path / "run"), "PYTHON": "/p/python"}
    own = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "MASTER_"))}
    paths = {"PATH": f"{commands}:{os.environ['PATH']}", "FAKE": str(tmp_path)}
    job |= {"SLURM_NTASKS_PER_NODE": "8", "STATE": "RUNNING", "CODE": "0", "REFUSAL": "0"}
    return Cluster(tmp_path, {**own, **job, **given, **paths})


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


@pytest.mark.parametrize(("timeout", "wait"), [("600", "700"), ("30", "400"), ("unknown", "400")])
def test_a_lost_node_is_slurms_to_notice(timeout: str, wait: str, cluster: Cluster) -> None:
    """srun waits longer for ranks than Slurm does for a node, whatever the site's SlurmdTimeout."""
    assert cluster.run(TIMEOUT=timeout)[0] == 0
    assert f"--wait={wait}" in cluster.said("srun")


def test_the_nodes_are_looked_at_first(cluster: Cluster) -> None:
    code, output = cluster.run()
    assert code == 0, output
    words, train = cluster.said("preflight"), cluster.said("srun")
    start, began = words.index("/p/python"), train.index("/p/python")
    assert words[start : start + 4] == ["/p/python", "-m", "megatron_prime", "preflight"]
    assert words[start + 4 :] == train[began + 4 :], "with the same file and knobs"
    assert {"--kill-on-bad-exit=0", "--wait=30", "--cpus-per-task=12"} <= set(words)
    assert not any(word.startswith("--output") for word in words), "its table is in the job's"


def test_a_refusal_ends_the_job_before_any_rank_trains(cluster: Cluster) -> None:
    code, output = cluster.run(REFUSAL="78")
    assert (code, cluster.said("srun"), cluster.said("scontrol")) == (78, [], [])
    assert cluster.said("looks") == ["look"]
    assert "exit code 78: refused for the reasons above" in output


@pytest.mark.parametrize("code", ["137", "143"])
def test_a_look_that_not_all_ranks_outlive_refuses(code: str, cluster: Cluster) -> None:
    """srun returns the highest code: of a rank that was killed, though rank 0 has refused."""
    found, output = cluster.run(REFUSAL=code)
    assert (found, cluster.said("srun"), cluster.said("scontrol")) == (78, [], []), output


@pytest.mark.parametrize("code", ["77", "137"])
def test_who_is_late_is_looked_at_once_more(code: str, cluster: Cluster) -> None:
    found, output = cluster.run(REFUSAL=code, SECOND="0")
    assert found == 0, output
    assert cluster.said("looks") == ["look"] * 2
    assert cluster.said("srun"), "it trains"
    assert f"exit code {code}: not all answered in time; a second look" in output


def test_who_is_late_twice_is_refused(cluster: Cluster) -> None:
    found, output = cluster.run(REFUSAL="77")
    assert (found, cluster.said("srun"), cluster.said("scontrol")) == (78, [], []), output
    assert cluster.said("looks") == ["look"] * 2


def test_the_look_has_options_and_can_be_left_out(cluster: Cluster) -> None:
    cluster.run(PREFLIGHT="--seconds 120 --warn-only")
    words = cluster.said("preflight")
    toml = words.index(str(EXAMPLES / NAMES[0] / "prime.toml"))
    assert words[toml + 1 : toml + 4] == ["--seconds", "120", "--warn-only"]
    (cluster.folder / "preflight").unlink()
    code, _ = cluster.run(PREFLIGHT="no")
    assert (code, cluster.said("preflight")) == (0, [])
    assert cluster.said("srun")


@pytest.mark.parametrize("looked", ["75", "0"])
def test_a_signal_during_the_look_requeues(looked: str, cluster: Cluster) -> None:
    """Also one that comes when the look is over, and training would begin."""
    job = cluster.submit(NAMES[0], REFUSAL="wait", LOOKED=looked)
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
    commented = re.findall(r"^# (CONTAINER=\((?:.*\n# )+.*\))$", source, re.MULTILINE)[0]
    given = commented.replace("\n#", "\n")
    script = cluster.folder / "run.sbatch"
    script.write_text(re.sub(r"^CONTAINER=\(\)$", given, source, flags=re.M))
    options = given.partition("(")[2].rstrip(")").replace("$SLURM_JOB_ID", "123").split()
    assert [option.partition("=")[0] for option in options] == [
        "--container-image",
        "--container-name",
        "--container-mounts",
        "--container-env",
    ]
    folder = {"FOLDER": str(EXAMPLES / NAMES[0]), "EVAL": ""}
    subprocess.run(["bash", str(script)], env={**cluster.environment, **folder}, check=True)
    for file in ("preflight", "srun"):
        words = cluster.said(file)
        at = words.index(options[0])
        assert words[at : at + len(options)] == options
        assert at < words.index("/p/python")
    words = cluster.said("srun")
    assert not any(word.startswith("--data.eval") for word in words)


def test_what_a_container_must_hear_is_exported(cluster: Cluster) -> None:
    """An image's own value wins over a variable that --container-env does not name."""
    text = (EXAMPLES / NAMES[0] / "run.sbatch").read_text()
    named = re.findall(r"--container-env=([\w,]+)", text)[0].split(",")
    shared = (EXAMPLES / "slurm/prime.sh").read_text()
    ours = re.findall(r"^export (.*)$", shared, re.MULTILINE)
    assert set(named) == set(re.findall(r"(\w+)=", " ".join(ours))) - {"PYTHONUNBUFFERED"}


def test_cores_are_optional(cluster: Cluster) -> None:
    """SLURM_CPUS_PER_TASK is not set in a job that asked for cores by --cpus-per-gpu."""
    del cluster.environment["SLURM_CPUS_PER_TASK"]
    assert cluster.run()[0] == 0
    assert not any(word.startswith("--cpus-per-task") for word in cluster.said("srun"))


def test_array_has_a_folder_and_a_seed_each(cluster: Cluster) -> None:
    cluster.run(SLURM_ARRAY_TASK_ID="2", SLURM_ARRAY_JOB_ID="123")
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


def test_a_busy_controller_is_asked_again(cluster: Cluster) -> None:
    """Neither of the job's state nor for a requeue does it answer at once."""
    code, output = cluster.run(CODE="75", BUSY="2")
    assert (code, cluster.said("scontrol")) == (75, ["requeue 123"]), output
    assert cluster.said("busy") == ["show", "show", "show", "requeue"]
    assert cluster.said("waited") == ["10", "10"]


@pytest.mark.parametrize("trouble", [{"BUSY": "99"}, {"REQUEUES": "1"}])
def test_a_requeue_that_fails_is_said(trouble: dict[str, str], cluster: Cluster) -> None:
    """The controller is gone, or the site allows no requeues."""
    code, output = cluster.run(CODE="75", **trouble)
    assert code == 75
    assert "could not requeue: the same sbatch command continues the run" in output
    assert len(cluster.said("waited")) == 6


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

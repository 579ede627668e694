"""What a healthy cluster may look like: a preflight must not refuse it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from made_up import NEEDS, healthy, spoil

sys.path.append(str(Path(__file__).parents[1] / "planner"))
from planned_runs import SGLANG_8B, run_config

from megatron_prime import __main__ as command_line
from megatron_prime.config import ConfigError
from megatron_prime.planner.door import check_fits
from megatron_prime.preflight import clocks, host, probes
from megatron_prime.preflight.checks import problems_of
from megatron_prime.preflight.collectives import PAIRS
from megatron_prime.preflight.exchange import Board
from megatron_prime.preflight.facts import GIB, Disk, Gpu, Memory, Reduced
from megatron_prime.preflight.findings import code_of, word
from megatron_prime.preflight.host import _half_of
from megatron_prime.preflight.needs import left_over, needs_of
from megatron_prime.preflight.shared_folder import Trial
from megatron_prime.preflight.steps import Times
from megatron_prime.preflight.table import report
from megatron_prime.runtime.rendezvous import Rendezvous

ROOT = Path(__file__).parents[2]


def refusals(found: object) -> list[str]:
    return [one.found for one in problems_of(found) if one.refuses]  # type: ignore[arg-type]


def test_a_go_ends_without_pythons_tidying(tmp_path: Path) -> None:
    """What would hang or fail after the verdict never comes."""
    (tmp_path / "run.toml").write_text(
        f'[run]\nfolder = "{tmp_path}/run"\n[model]\nhf = "{tmp_path}"\n'
        f'[data]\ntrain = "{tmp_path}"\n'
    )
    program = (
        "import atexit, os, sys\n"
        "from megatron_prime import __main__ as command_line\n"
        "from megatron_prime.preflight import door\n"
        "atexit.register(os._exit, 78)\n"
        "door.preflight = lambda *_: print('the verdict') or 0\n"
        f"sys.exit(command_line.main(['preflight', {str(tmp_path / 'run.toml')!r}]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "the verdict\n"), done.stderr


@pytest.mark.parametrize(
    ("environ", "asks"),
    [
        ({}, False),
        ({"CUDA_VISIBLE_DEVICES": ""}, False),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles", "SLURM_GPUS_ON_NODE": "0"}, False),
        ({"CUDA_VISIBLE_DEVICES": "0"}, True),
        ({"SLURM_JOB_GPUS": "0"}, True),
        ({"SLURM_GPUS_ON_NODE": "8"}, True),
    ],
)
def test_who_was_given_gpus(environ: dict[str, str], asks: bool) -> None:
    assert command_line._asks_for_gpus(environ) is asks


def test_a_cpu_run_on_a_node_that_has_gpus() -> None:
    found = healthy()
    for rank in found.facts:
        spoil(found, rank, gpu=None, has_gpu_device=True, asks_for_gpus=False)
    assert refusals(found) == []
    assert len(problems_of(found)) == 1


def test_who_is_late_is_not_refused() -> None:
    found = healthy()
    found.facts = {rank: one for rank, one in found.facts.items() if rank != 3}
    found.clocks, found.shared = {2: None}, {0: "", 2: None}
    found.stages, found.reduced, found.at = (), {}, {}
    problems = problems_of(found)
    assert {word(one) for one in problems} == {"LATE"}
    assert code_of(problems, 78, 77) == 77
    assert report(found, problems, 60.0, 77).endswith(
        "[preflight] late: 0 refusals, 0 warnings, 3 without an answer in time; 60.0 s"
    )
    spoil(found, 1, config_problem="other knobs")
    assert code_of(problems_of(found), 78, 77) == 78
    assert code_of(problems_of(healthy()), 78, 77) == 0


def test_silence_refuses_only_where_a_run_would_fail() -> None:
    for name in ("driver", "limits", "memory", "ports", "has_gpu_device"):
        found = spoil(healthy(), 2, **{name: None}, silent=(name,))
        assert [one.refuses for one in problems_of(found)] == [False], name
    problems = problems_of(spoil(healthy(), 2, sources=None, silent=("sources",)))
    assert [word(one) for one in problems] == ["LATE"]


def test_a_node_that_is_silent_leaves_time_to_the_others() -> None:
    """Facts and clocks have ends of their own, before that of what else nodes answer."""
    times = Times.of(0.0, 60.0)
    assert times.probes < times.facts < times.clocks < times.answers
    until = time.monotonic() + 8.0
    found = [clocks.ask(Board(dist.HashStore()), rank, _half_of(until)) for rank in (8, 16)]
    assert found == [None, None]
    assert time.monotonic() < until - 1.0


def test_pairs_are_left_out_when_time_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host.steps, "reduce", lambda *_: None)
    for left, wanted in {5.0: False, 20.0: True}.items():
        found, board = healthy(6), Board(dist.HashStore())
        now = time.monotonic()
        times = Times(now, now, now, now + left, now + left)
        monkeypatch.setattr(board, "read_all", lambda *_: {})
        host._reduce(Rendezvous(world_size=6), board, times, found, 60.0)
        assert any(stage.name == PAIRS for stage in found.stages) is wanted
        assert found.skips_pairs is not wanted


def test_sizes_of_one_kind_of_gpu_differ_a_little() -> None:
    found = spoil(healthy(), 3, gpu=Gpu("H100", "GPU-3", 79 * GIB + GIB // 3, 79 * GIB, 2))
    assert problems_of(found) == []
    spoil(found, 3, gpu=Gpu("H100", "GPU-3", 64 * GIB, 64 * GIB, 2))
    assert refusals(found) == ["GPU H100, 64 GiB"]


def test_what_train_accepts_by_start_anyway_is_a_warning() -> None:
    found = spoil(healthy(), 3, gpu=Gpu("H100", "GPU-3", 80 * GIB, 50 * GIB, 2))
    spoil(found, 2, memory=Memory(90 * GIB, 80 * GIB, GIB))
    found.needs = replace(NEEDS, no_room="a plan of 99 GiB")
    assert len(refusals(found)) == 3
    found.needs = replace(NEEDS, no_room="a plan of 99 GiB", start_anyway=True)
    assert (refusals(found), len(problems_of(found))) == ([], 3)


def test_the_plans_door_is_trains(tmp_path: Path) -> None:
    """With the reserve, and with the servers' room: as `check_fits` has it."""
    config = run_config(tmp_path, "Llama-3-8B", **SGLANG_8B)
    for gib in (80, 64, 48, 24, 16):
        try:
            check_fits(config, 8, gib * GIB, True)
            fits = True
        except ConfigError:
            fits = False
        assert (needs_of(config, 8, 8, gib * GIB, 0).no_room == "") is fits, gib
    assert needs_of(config, 8, 8, 80 * GIB, 0).no_room == ""
    assert needs_of(config, 8, 8, 16 * GIB, 0).no_room != ""


def test_a_visitor_makes_its_node_look_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an NFS client that believes a folder absent until something changes beside it."""
    looked: list[Path] = []
    host_trial, guest_trial = Trial(tmp_path / "run", "11"), Trial(tmp_path / "run", "11")
    made = tempfile.NamedTemporaryFile

    def changed(*arguments: object, **keywords: object) -> object:
        looked.append(Path(str(keywords["dir"])))
        assert host_trial.open() == ""
        return made(*arguments, **keywords)  # type: ignore[call-overload]

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", changed)
    assert guest_trial.visit("rank_2") == ""
    assert looked == [tmp_path]
    host_trial.close()
    assert list(tmp_path.iterdir()) == []


def test_what_tools_leave_beside_a_model_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "tokenizer.model").write_bytes(b"tokens")
    before = probes.source(tmp_path).digest
    for name in (".gitattributes", "README.md", ".nfs00012", ".cache.json", "notes.txt"):
        (tmp_path / name).write_text("of this node")
    assert probes.source(tmp_path).digest == before
    (tmp_path / "chat_template.jinja").write_text("of this node")
    assert probes.source(tmp_path).digest != before


def test_a_guess_of_shared_memory_warns() -> None:
    found = spoil(healthy(), 2, memory=Memory(900 * GIB, 800 * GIB, 64 * 2**20))
    assert (refusals(found), len(problems_of(found))) == ([], 1)
    found.needs = replace(NEEDS, shm_is_sure=True)  # SGLang's buffers on a CPU
    assert refusals(found) == ["0.06 GiB free in /dev/shm"]


def test_a_gpu_per_task_is_enough_for_servers_of_one() -> None:
    found = healthy()
    for rank in found.facts:
        spoil(found, rank, gpu=Gpu("H100", f"GPU-{rank}", 80 * GIB, 79 * GIB, 1))
    assert problems_of(found) == []
    found.needs = replace(NEEDS, gpus_seen=2)
    assert refusals(found) == ["1 visible GPUs"]


def test_one_gpu_for_two_ranks() -> None:
    found = spoil(healthy(), 3, gpu=Gpu("H100", "GPU-2", 80 * GIB, 79 * GIB, 1))
    assert refusals(found) == ["one GPU for 2 ranks"]
    for rank in (2, 3):
        spoil(found, rank, gpu=Gpu("H100", "", 80 * GIB, 79 * GIB, 2))
    assert problems_of(found) == [], "where torch does not tell, nobody is blamed"


def test_what_a_killed_save_left_is_free_for_the_next(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    for name, size in {"writing_step_4": 100, "removing_step_1": 20, "step_000003": 7}.items():
        (checkpoints / name / "policy").mkdir(parents=True)
        (checkpoints / name / "policy" / "weights").write_bytes(bytes(size))
    assert left_over(checkpoints) == 120
    assert left_over(tmp_path / "absent") == 0
    found = spoil(healthy(2), 0, disk=Disk(600 * GIB, 9000 * GIB))
    assert len(refusals(found)) == 1
    found.needs = replace(NEEDS, left_over=15 * GIB)
    assert problems_of(found) == []


def test_memory_that_a_job_before_frees_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    said = iter([(50 * GIB, 80 * GIB), (60 * GIB, 80 * GIB), (79 * GIB, 80 * GIB)])
    monkeypatch.setattr(probes, "AGAIN_S", 0.01)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    properties = SimpleNamespace(name="H100", uuid="7")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: next(said))
    found = probes.gpu(9, time.monotonic() + 60)
    assert found == Gpu("H100", "GPU-7", 80 * GIB, 79 * GIB, 8)
    said = iter([(50 * GIB, 80 * GIB)])
    taken = probes.gpu(0, time.monotonic())  # no time left: as it is
    assert taken is not None
    assert taken.free == 50 * GIB


def test_who_waited_in_vain_for_a_late_rank_is_late() -> None:
    found = healthy()
    for error, said in {"DistStoreError: timeout": "LATE", "RuntimeError: NCCL": "REFUSED"}.items():
        found.reduced = {**found.reduced, 2: Reduced((), error)}
        assert [word(one) for one in problems_of(found)] == [said]

"""Checkpoints of one rank: what is found, kept, restored, and said of damage.

Runs of several ranks that are killed and resumed are in tests/end_to_end/test_resume.py.
"""

from __future__ import annotations

import binascii
import json
import random
import re
import resource
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from megatron_prime.config import ParallelSizes, RunConfig
from megatron_prime.data.rows import DataError
from megatron_prime.runtime.compat import before_megatron_import
from megatron_prime.types import LoopState, Prompt, Rollout, VerifiedGroup, VersionSpan

before_megatron_import()

from megatron.core.dist_checkpointing import ShardedTensor  # noqa: E402

from megatron_prime.runtime.distributed import destroy, initialize  # noqa: E402
from megatron_prime.runtime.rendezvous import Rendezvous  # noqa: E402
from megatron_prime.weights import manifest  # noqa: E402
from megatron_prime.weights.checkpoint import (  # noqa: E402
    CheckpointError,
    RunCheckpoints,
    completed,
)

SURPLUS = VerifiedGroup(
    Prompt(7, (1, 2), "4", "math", "test"),
    (
        Rollout((3, 4), (-0.25, -1e-7), "stop", 5, "é4"),
        Rollout((3, 9), (-0.1, -0.5), "length", 5, "", (VersionSpan(1, 4),)),
    ),
    (1.0, 0.0),
    1,
)


class Engine:
    """A model of one tensor, and a schedule."""

    def __init__(self, value: float) -> None:
        self.weight, self.steps = torch.full((4, 3), value), int(value)

    def broken_weights(self) -> list[str]:
        return [] if self.weight.isfinite().all() else ["weight"]

    def sharded_state_dict(self, is_loading: bool) -> dict[str, Any]:
        weight = ShardedTensor.from_rank_offsets("weight", self.weight, replica_id=0)
        return {"model": {"weight": weight}, "schedule": {"steps": self.steps}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weight, self.steps = state["model"]["weight"], state["schedule"]["steps"]


class Counter:
    """The policy's version and the data's cursor."""

    def __init__(self, value: int) -> None:
        self.version = self.cursor = value

    def state_dict(self) -> dict[str, Any]:
        return {"cursor": self.cursor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.cursor = state["cursor"]


class Run:
    """Everything a checkpoint holds, with `value` written all over it."""

    def __init__(self, folder: Path, value: float = 0, **knobs: Any) -> None:
        self.policy, self.prm = Engine(value), Engine(value + 0.5)
        self.counter = Counter(int(value))
        config = {
            "run": {"folder": folder},
            "model": {"hf": "model"},
            "data": {"train": "train.jsonl"},
        }
        self.checkpoints = RunCheckpoints(
            {"policy": self.policy, "prm": self.prm},
            self.counter,
            self.counter,
            RunConfig.model_validate(config | knobs),
        )


@pytest.fixture(scope="module", autouse=True)
def _process_group() -> Iterator[None]:
    initialize(Rendezvous(), ParallelSizes(), seed=0, timeout_s=60)
    yield
    destroy()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A run folder with checkpoints of steps 1 and 2; returns the newest."""
    for step in (1, 2):
        Run(tmp_path, step).checkpoints.save(LoopState(step))
    return tmp_path / "checkpoints" / "step_000002"


def steps_in(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def draw() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


def test_completed_checkpoints_are_sorted_by_number_and_others_ignored(tmp_path: Path) -> None:
    steps = ["step_000009", "step_000010", "step_999999", "step_1000000"]
    others = ["writing_step_000011", "removing_step_000001", "step_12", "step_000013.bak", "step_x"]
    for name in [*reversed(steps), *others]:
        (tmp_path / name).mkdir()
    assert [path.name for path in completed(tmp_path)] == steps
    assert completed(tmp_path / "absent") == []


def test_without_a_checkpoint_there_is_nothing_to_resume(tmp_path: Path) -> None:
    run = Run(tmp_path, 3)
    assert run.checkpoints.resume() is None
    assert run.counter.version == 3


def test_the_newest_comes_back_whole(tmp_path: Path) -> None:
    for step in (1, 2):
        state = LoopState(step, (SURPLUS,) * step)
        Run(tmp_path, step).checkpoints.save(state)
    expected = draw()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    run = Run(tmp_path, 8)
    assert run.checkpoints.resume() == state
    assert draw() == expected
    assert run.policy.weight.tolist() == [[2.0] * 3] * 4
    assert run.prm.weight.tolist() == [[2.5] * 3] * 4
    assert (run.policy.steps, run.counter.version, run.counter.cursor) == (2, 2, 2)


def test_a_checkpoint_of_before_there_was_a_knob_or_a_field_is_read(tmp_path: Path) -> None:
    """The knob was at its default then, and all tokens were of the rollout's policy."""
    Run(tmp_path, 1).checkpoints.save(LoopState(1, (SURPLUS,)))
    saved = tmp_path / "checkpoints" / "step_000001"
    state = json.loads((saved / "run.json").read_text())
    del state["config"]["policy"]["old_logprobs"]
    for rollout in state["loop"]["surplus"][0]["rollouts"]:
        del rollout["older_spans"]
    (saved / "run.json").write_text(json.dumps(state))
    manifest.write(saved, {n: manifest.measure(saved / n) for n in manifest.files_in(saved)})
    whole = tuple(replace(rollout, older_spans=()) for rollout in SURPLUS.rollouts)
    found = Run(tmp_path, 5).checkpoints.resume()
    assert found == LoopState(1, (replace(SURPLUS, rollouts=whole),))
    with pytest.raises(CheckpointError, match="old_logprobs: began with 'trainer'"):
        Run(tmp_path, 5, policy={"old_logprobs": "rollout"}).checkpoints.resume()


def test_another_number_of_ranks_starts_new_random_streams(saved: Path) -> None:
    run_json = saved / "run.json"
    run_json.write_text(json.dumps(json.loads(run_json.read_text()) | {"world_size": 4}))
    manifest.write(saved, {n: manifest.measure(saved / n) for n in manifest.files_in(saved)})
    torch.manual_seed(1)
    expected = torch.rand(())
    torch.manual_seed(1)
    assert Run(saved.parents[1]).checkpoints.resume() == LoopState(2)
    assert torch.rand(()) == expected


@pytest.mark.parametrize(
    ("keep", "left"), [(1, [5]), (2, [4, 5]), (9, [1, 2, 3, 4, 5]), (0, [1, 2, 3, 4, 5])]
)
def test_the_newest_stay(tmp_path: Path, keep: int, left: list[int]) -> None:
    run = Run(tmp_path, checkpoint={"keep": keep})
    for step in range(1, 6):
        run.checkpoints.save(LoopState(step))
    assert steps_in(tmp_path) == [f"step_{step:06d}" for step in left]


def test_leftovers_of_a_killed_run_are_ignored_and_removed_by_the_next_save(saved: Path) -> None:
    for name in ("writing_step_000003", "removing_step_000001"):
        (saved.parent / name / "policy").mkdir(parents=True)
        (saved.parent / name / "policy" / "__0_0.distcp").write_bytes(b"half")
    run = Run(saved.parents[1])
    assert run.checkpoints.resume() == LoopState(2)
    run.checkpoints.save(LoopState(3))
    assert steps_in(saved.parents[1]) == ["step_000002", "step_000003"]


def test_a_step_saved_again_replaces_what_was_there(saved: Path) -> None:
    (saved / "policy" / "of_before").touch()
    Run(saved.parents[1], 6).checkpoints.save(LoopState(2))
    run = Run(saved.parents[1])
    assert run.checkpoints.resume() == LoopState(2)
    assert run.policy.weight[0, 0] == 6
    assert not (saved / "policy" / "of_before").exists()
    assert steps_in(saved.parents[1]) == ["step_000001", "step_000002"]


def test_saving_leaves_no_process_behind(tmp_path: Path) -> None:
    """Megatron's own way is a process per rank that lives on when the rank is killed."""
    before = set(psutil.Process().children(recursive=True))  # of other tests: servers, workers
    Run(tmp_path).checkpoints.save(LoopState(1))
    new = set(psutil.Process().children(recursive=True)) - before
    commands = [" ".join(child.cmdline()) for child in new]
    assert [command for command in commands if "multiprocessing" in command] == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_are_not_saved_and_cost_no_good_checkpoint(
    saved: Path, value: float
) -> None:
    before = contents(saved.parent)
    run = Run(saved.parents[1], 3, checkpoint={"keep": 1})
    run.prm.weight[1, 2] = value
    with pytest.raises(CheckpointError, match=r"^step 3 is not saved: .*rank 0: weight of prm\)"):
        run.checkpoints.save(LoopState(3))
    assert contents(saved.parent) == before
    assert steps_in(saved.parents[1]) == ["step_000001", "step_000002"]


def test_random_states_hold_no_pickled_objects(saved: Path) -> None:
    states = torch.load(saved / "rng" / "rank_00000.pt", weights_only=True)
    assert {"python", "numpy", "torch"} <= states.keys()


def flip(path: Path) -> None:
    """One bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped": (flip, "its bytes are not those that were written"),
    "cut": (cut, r"it has [\d,]+ bytes of [\d,]+"),
    "empty": (lambda path: path.write_bytes(b""), r"it has 0 bytes of [\d,]+"),
    "gone": (lambda path: path.unlink(), "it is missing"),
}
FILES = ["run.json", "rng/rank_00000.pt", "policy/.metadata", "policy/metadata.json"]
FILES += ["policy/common.pt", "prm/__0_0.distcp"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_with_the_command_that_goes_on(
    saved: Path, file: str, damage: str
) -> None:
    do, found = DAMAGES[damage]
    do(saved / file)
    with pytest.raises(CheckpointError) as raised:
        Run(saved.parents[1]).checkpoints.resume()
    message, command = str(raised.value).splitlines()
    assert re.fullmatch(
        f"checkpoint {saved} is damaged: {re.escape(file)}: {found}; "
        "step_000001 is whole; continue from it after",
        message,
    )
    subprocess.run(command, shell=True, check=True)
    assert Run(saved.parents[1]).checkpoints.resume() == LoopState(1)


MANIFESTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped": (
        lambda path: path.write_text(path.read_text().replace('": [\n   1', '": [\n   2', 1)),
        "its checksum is wrong",
    ),
    "cut": (cut, r"it can't be read \(JSONDecodeError: .*\)"),
    "other": (lambda path: path.write_text("[]"), r"it can't be read \(TypeError: .*\)"),
    "gone": (lambda path: path.unlink(), "it is missing"),
}


@pytest.mark.parametrize("damage", MANIFESTS)
def test_a_damaged_manifest_is_named(saved: Path, damage: str) -> None:
    do, found = MANIFESTS[damage]
    before = (saved / "manifest.json").read_bytes()
    do(saved / "manifest.json")
    assert (
        not (saved / "manifest.json").exists() or before != (saved / "manifest.json").read_bytes()
    )
    with pytest.raises(CheckpointError, match=rf"manifest\.json: {found}; step_000001 is whole"):
        Run(saved.parents[1]).checkpoints.resume()


def test_the_manifest_lists_every_file(saved: Path) -> None:
    files = json.loads((saved / "manifest.json").read_text())["files"]
    paths = [path for path in saved.rglob("*") if path.is_file() and path.name != "manifest.json"]
    assert {*FILES, "policy/__0_0.distcp", "prm/common.pt"} <= files.keys()
    expected = {
        str(path.relative_to(saved)): [path.stat().st_size, binascii.crc32(path.read_bytes())]
        for path in paths
    }
    assert files == expected


def test_several_damaged_checkpoints_are_passed_over(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        Run(tmp_path, step, checkpoint={"keep": 0}).checkpoints.save(LoopState(step))
    folder = tmp_path / "checkpoints"
    for step in (2, 3, 4):
        cut(folder / f"step_{step:06d}" / "run.json")
    flip(folder / "step_000004" / "prm" / "common.pt")
    with pytest.raises(CheckpointError) as raised:
        Run(tmp_path).checkpoints.resume()
    message, *commands = str(raised.value).splitlines()
    assert "prm/common.pt: its bytes are not those that were written (and 1 more file); " in message
    assert "step_000001 is whole" in message
    assert len(commands) == 3
    for command in commands:
        subprocess.run(command, shell=True, check=True)
    assert Run(tmp_path).checkpoints.resume() == LoopState(1)


def test_damage_to_the_only_checkpoint(tmp_path: Path) -> None:
    Run(tmp_path).checkpoints.save(LoopState(1))
    (tmp_path / "checkpoints" / "step_000001" / "run.json").unlink()
    with pytest.raises(CheckpointError, match=r"run\.json: it is missing; no other is whole; "):
        Run(tmp_path).checkpoints.resume()


def test_what_megatron_can_t_load_is_told_in_a_line(saved: Path) -> None:
    """Whole, as the manifest has it, but not of this program."""
    (saved / "policy" / "metadata.json").write_text('{"sharded_backend": "other"}')
    manifest.write(saved, {n: manifest.measure(saved / n) for n in manifest.files_in(saved)})
    with pytest.raises(CheckpointError) as raised:
        Run(saved.parents[1]).checkpoints.resume()
    message = str(raised.value)
    assert message.startswith(f"can't load checkpoint {saved}: ")
    assert message.endswith(f"; move it away to continue from {saved.with_name('step_000001')}")
    assert "\n" not in message


@pytest.fixture
def full_disk() -> Iterator[Callable[[int], None]]:
    """Sets how large a file may get; the kernel fails a write beyond, as on a full disk."""
    _, hard = before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room", [0, 600, 1100])
def test_a_full_disk_is_told_and_harms_no_checkpoint(
    saved: Path, full_disk: Callable[[int], None], room: int
) -> None:
    before = contents(saved.parent)
    run = Run(saved.parents[1], 3)
    full_disk(room)
    with pytest.raises(CheckpointError) as raised:
        run.checkpoints.save(LoopState(3))
    full_disk(resource.RLIM_INFINITY)
    message = str(raised.value)
    assert message.startswith(f"can't save {saved.with_name('step_000003')}: ")
    assert f"as they were, the newest is {saved}; make room below {saved.parent}" in message
    assert "\n" not in message
    assert (
        before.items()
        <= {p: p.read_bytes() for p in saved.parent.rglob("*") if p.is_file()}.items()
    )
    assert Run(saved.parents[1]).checkpoints.resume() == LoopState(2)
    run.checkpoints.save(LoopState(3))
    assert steps_in(saved.parents[1]) == ["step_000002", "step_000003"]


def test_a_run_goes_on_with_the_knobs_it_began_with(saved: Path) -> None:
    folder = saved.parents[1]
    changed = {"prm": {"beta": 0.1}, "rollout": {"group_size": 8, "max_rounds": 3}}
    with pytest.raises(CheckpointError) as raised:
        Run(folder, **changed).checkpoints.resume()
    assert str(raised.value).splitlines()[1:] == [
        "prm.beta: began with 0.05, found 0.1",
        "rollout.group_size: began with 4, found 8",
    ]


def test_knobs_that_change_nothing_computed_are_free(saved: Path) -> None:
    changed = {
        "run": {"folder": saved.parents[1], "steps": 500},
        "policy": {"micro_batch_tokens": 99},
        "verify": {"workers": 7},
        "checkpoint": {"every": 3},
        "megatron": {"tensor_model_parallel_size": 2},
    }
    assert Run(saved.parents[1], **changed).checkpoints.resume() == LoopState(2)


def test_another_commands_checkpoint_is_refused(saved: Path) -> None:
    """Also one of before commands were noted: then it was a run's."""
    run = Run(saved.parents[1])
    run.checkpoints.command = "sft"
    wanted = "holds checkpoints of the command train, which sft can't continue; take another run"
    with pytest.raises(CheckpointError, match=wanted):
        run.checkpoints.resume()
    state = json.loads((saved / "run.json").read_text())
    assert state.pop("command") == "train"
    (saved / "run.json").write_text(json.dumps(state))
    manifest.write(saved, {n: manifest.measure(saved / n) for n in manifest.files_in(saved)})
    assert Run(saved.parents[1]).checkpoints.resume() == LoopState(2)
    with pytest.raises(CheckpointError, match=wanted):
        run.checkpoints.resume()


def test_another_run_is_refused_before_anything_is_built(saved: Path) -> None:
    """By the run's state alone: no model is there yet, and damage is for `resume` to tell."""
    folder = saved.parents[1]

    def look(command: str = "train", data: Any = None, **knobs: Any) -> None:
        config = Run(folder, **knobs).checkpoints.config
        RunCheckpoints({}, None, data or Counter(0), config, command).refuse_others()

    class OtherData(Counter):
        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise DataError(f"found {state}")

    look()
    with pytest.raises(CheckpointError, match="of the command train, which train_prm can't"):
        look("train_prm")
    with pytest.raises(CheckpointError, match=r"prm\.beta: began with 0\.05, found 9"):
        look(prm={"beta": 9})
    with pytest.raises(DataError, match="'cursor': 2"):
        look(data=OtherData(0))
    (saved / "run.json").write_text("{}")
    look("train_prm")


def test_more_steps_would_bend_a_cosine(tmp_path: Path) -> None:
    cosine = {"policy": {"schedule": "cosine"}}
    Run(tmp_path, **cosine).checkpoints.save(LoopState(1))
    longer = {"run": {"folder": tmp_path, "steps": 500}}
    with pytest.raises(CheckpointError, match=r"run\.steps: began with 100, found 500"):
        Run(tmp_path, **cosine, **longer).checkpoints.resume()

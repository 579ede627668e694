"""Checkpoints of one rank: what is found, kept, restored, and said of damage.

Runs of several ranks that are killed and resumed are in tests/end_to_end/test_resume.py.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from megatron_prime.config import ParallelSizes, RunConfig
from megatron_prime.runtime.compat import before_megatron_import
from megatron_prime.types import LoopState, Prompt, Rollout, VerifiedGroup

before_megatron_import()

from megatron.core.dist_checkpointing import ShardedTensor  # noqa: E402

from megatron_prime.runtime.distributed import destroy, initialize  # noqa: E402
from megatron_prime.runtime.rendezvous import Rendezvous  # noqa: E402
from megatron_prime.weights.checkpoint import (  # noqa: E402
    CheckpointError,
    RunCheckpoints,
    completed,
)

SURPLUS = VerifiedGroup(
    Prompt(7, (1, 2), "4", "math", "test"),
    (
        Rollout((3, 4), (-0.25, -1e-7), "stop", 5, "é4"),
        Rollout((3,), (-0.1,), "length", 5, ""),
    ),
    (1.0, 0.0),
    1,
)


class Engine:
    """A model of one tensor, and a schedule."""

    def __init__(self, value: float) -> None:
        self.weight, self.steps = torch.full((4, 3), value), int(value)

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


def test_another_number_of_ranks_starts_new_random_streams(saved: Path) -> None:
    run_json = saved / "run.json"
    run_json.write_text(json.dumps(json.loads(run_json.read_text()) | {"world_size": 4}))
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
    Run(tmp_path).checkpoints.save(LoopState(1))
    commands = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]
    assert [command for command in commands if "multiprocessing" in command] == []


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
}
FILES = ["run.json", "rng/rank_00000.pt", "policy/.metadata", "policy/metadata.json"]
FILES += ["policy/common.pt", "prm/__0_0.distcp"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_told_in_a_line_with_what_to_do(saved: Path, file: str, damage: str) -> None:
    DAMAGES[damage](saved / file)
    with pytest.raises(CheckpointError) as raised:
        Run(saved.parents[1]).checkpoints.resume()
    message = str(raised.value)
    older = saved.with_name("step_000001")
    assert message.startswith(f"can't load checkpoint {saved}: ")
    assert message.endswith(f"; move it away to continue from {older}")
    assert "\n" not in message
    saved.rename(saved.parents[1] / "moved_away")
    assert Run(saved.parents[1]).checkpoints.resume() == LoopState(1)


def test_damage_to_the_only_checkpoint(tmp_path: Path) -> None:
    Run(tmp_path).checkpoints.save(LoopState(1))
    (tmp_path / "checkpoints" / "step_000001" / "run.json").unlink()
    with pytest.raises(CheckpointError, match=r"run\.json.*; it is the only one$"):
        Run(tmp_path).checkpoints.resume()


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


def test_more_steps_would_bend_a_cosine(tmp_path: Path) -> None:
    cosine = {"policy": {"schedule": "cosine"}}
    Run(tmp_path, **cosine).checkpoints.save(LoopState(1))
    longer = {"run": {"folder": tmp_path, "steps": 500}}
    with pytest.raises(CheckpointError, match=r"run\.steps: began with 100, found 500"):
        Run(tmp_path, **cosine, **longer).checkpoints.resume()

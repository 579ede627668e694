"""What is kept of a batch that broke comes back as it was, and reading it runs nothing."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prime.config import RunConfig
from megatron_prime.errors import NotFinite, RunError
from megatron_prime.runtime.compat import before_megatron_import
from megatron_prime.types import OldLogprobs, RolloutBatch, ScoredBatch, TokenSequence, TrainBatch

before_megatron_import()

from megatron_prime.models import guard  # noqa: E402

RUN = {"run": {"folder": "r"}, "model": {"hf": "m"}, "data": {"train": "t"}}
ROLLOUTS = RolloutBatch(
    (TokenSequence((5, 6, 7), 1), TokenSequence((8, 9), 1)),
    1,
    torch.tensor([[True, True], [True, False]]),
    torch.tensor([1.0, 0.0]),
    torch.tensor([[-0.5, -torch.inf], [-0.25, 0.0]]),
)
OLD = OldLogprobs.scored(ROLLOUTS, torch.tensor([1]), torch.tensor([[-torch.inf]]))
SCORED = ScoredBatch(ROLLOUTS, OLD, torch.ones(2, 2))
BATCHES = {
    "rollouts": ROLLOUTS,
    "scored": SCORED,
    "unscored": dataclasses.replace(SCORED, ref_logprobs=None),
    "train": TrainBatch(SCORED, torch.ones(2, 2), torch.zeros(2, 2)),
    "outcomes": TrainBatch(SCORED, None, torch.zeros(2, 2)),
}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5)) and a.dtype == b.dtype
    if dataclasses.is_dataclass(a):
        names = [field.name for field in dataclasses.fields(a)]
        return type(a) is type(b) and all(same(getattr(a, n), getattr(b, n)) for n in names)
    return bool(a == b) and type(a) is type(b)


@pytest.mark.parametrize("kind", BATCHES)
def test_every_kind_of_batch_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(guard.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(guard, "export_hf", lambda *_: None)
    engine: Any = type("Frozen", (), {"modules": (), "shape": None})()
    config = RunConfig.model_validate(RUN)
    guard.save(tmp_path / "kept", config, "reference", engine, BATCHES[kind])
    found = guard.load_batch(tmp_path / "kept")
    assert (found.model, found.loss_scale) == ("reference", None)
    assert same(found.batch, BATCHES[kind])


class Bomb:
    """A pickle that writes a file when it is read."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


def test_a_pickle_in_a_folder_that_somebody_sent_is_refused(tmp_path: Path) -> None:
    bomb = Bomb(tmp_path / "ran")
    torch.save({"model": "prm", "loss_scale": None, "batch": bomb}, tmp_path / "batch.pt")
    with pytest.raises(RunError, match=r"batch\.pt is no batch that a run kept \(Unpickling"):
        guard.load_batch(tmp_path)
    assert not bomb.target.exists()
    torch.load(tmp_path / "batch.pt", weights_only=False)
    assert bomb.target.exists(), "it was no bomb"


@pytest.mark.parametrize("content", [b"", b"no file of torch", pickle.dumps({"model": "prm"})])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "batch.pt").write_bytes(content)
    with pytest.raises(RunError, match=r"batch\.pt is no batch that a run kept"):
        guard.load_batch(tmp_path)


def test_skips_are_counted_per_update_and_may_not_be_all() -> None:
    keeper = guard.Guard(RunConfig.model_validate(RUN | {"debug": {"on_not_finite": "skip"}}), "p")
    keeper.skipped = 2
    assert keeper.end_update(1) == {"p/not_finite_steps": 2}
    assert keeper.end_update(3) == {"p/not_finite_steps": 0}
    keeper.skipped = 3
    with pytest.raises(NotFinite, match="p: all 3 mini-batches of an update were skipped"):
        keeper.end_update(0)
    assert guard.Guard(RunConfig.model_validate(RUN), "p").end_update(0) == {}

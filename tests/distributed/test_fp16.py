"""fp16 with loss scaling on real Megatron: what it learns, and what it does about overflows.

The truth is the same job in fp32, which test_training.py compares with plain torch. What the two
ranks do is in fp16_cases.py.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from launch import run_ranks
from test_training import make_job

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fp16")
    tiny_models.make(path)
    torch.save(make_job(), path / "job.pt")
    run_ranks(Path(__file__).with_name("fp16_cases.py"), 2, [path], timeout_s=400)
    return path


@pytest.fixture(params=["dp2", "tp2", "pp2", "pp2-vpp2", "cp2"])
def found(folder: Path, request: pytest.FixtureRequest) -> dict[str, Any]:
    return torch.load(folder / f"{request.param}.pt", weights_only=False)


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float((a[n].double() - b[n].double()).square().sum()) for n in a))


def test_fp16_learns_what_fp32_learns_and_more_closely_than_bf16(found: dict[str, Any]) -> None:
    trained = found["trained"]
    exact = trained["fp32"]
    moved = distance(exact["start"], exact["weights"])
    apart = {d: distance(trained[d]["weights"], exact["weights"]) for d in ("bf16", "fp16")}
    assert apart["fp16"] < 0.05 * moved
    assert apart["fp16"] < 0.5 * apart["bf16"]
    assert {t.dtype for t in trained["fp16"]["weights"].values()} == {torch.float16}
    assert trained["fp16"]["masters"] == {torch.float32}
    for half, full in zip(trained["fp16"]["metrics"], exact["metrics"], strict=True):
        assert math.isclose(half["prm/loss"], full["prm/loss"], rel_tol=3e-3)
        assert math.isclose(half["prm/grad_norm"], full["prm/grad_norm"], rel_tol=3e-2)
        assert (half["prm/loss_scale"], half["prm/skipped_steps"]) == (65536.0, 0)
        assert not {"prm/loss_scale", "prm/skipped_steps"} & full.keys()


def test_an_overflow_skips_the_step_halves_the_scale_and_the_next_step_trains(
    found: dict[str, Any],
) -> None:
    skipped, trained = found["overflow"]["steps"]
    assert skipped[:2] == (False, 256.0)
    assert math.isnan(skipped[2])
    assert math.isfinite(skipped[3])
    assert found["overflow"]["unchanged"]
    assert trained[:2] == (True, 128.0)
    assert 0 < trained[2] < math.inf
    assert found["overflow"]["moved"]


def test_the_scale_comes_back_from_a_checkpoint(found: dict[str, Any]) -> None:
    assert found["overflow"]["resumed"] == (128.0, 128.0, True)
    assert found["overflow"]["same_after_resume"]


@pytest.mark.parametrize("case", ["lowered", "smallest", "fixed", "nan"])
def test_what_no_smaller_scale_can_mend_stops_the_run(found: dict[str, Any], case: str) -> None:
    error, unchanged = found["refused"][case]
    assert "no weight was changed" in error
    assert unchanged


def test_infinite_weights_of_a_finite_step_are_named(found: dict[str, Any]) -> None:
    before, updated, after = found["broken_weights"]
    assert (before, updated) == ([], True)
    assert "embedding.word_embeddings.weight" in after


def test_a_policy_that_only_skipped_keeps_its_version(found: dict[str, Any]) -> None:
    skipped, good = found["policy"]["skipped"], found["policy"]["good"]
    assert found["policy"]["versions"] == (0, 1)
    assert skipped["policy/skipped_steps"] == 2
    assert skipped["policy/loss_scale"] == 65536.0 / 2
    assert math.isnan(skipped["policy/grad_norm"])
    assert good["policy/skipped_steps"] == 0
    assert good["policy/loss_scale"] == 65536.0 / 4
    assert math.isfinite(good["policy/grad_norm"])

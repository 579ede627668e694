"""Real servers beside a real trainer: after each sync both give sequences the same log-probs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))

import tiny_models
from launch import free_port, run_ranks

CASES = Path(__file__).with_name("engine_cases.py")
OTHERS = sorted(set(tiny_models.CONFIGS) - {"untied"})

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_models.make(folder, ffn_size=128)  # what SGLang need not pad for two ranks on a CPU
    return folder


def assert_equal_weights(monkeypatch, models, ranks, layout, tp, names, timeout_s) -> None:
    monkeypatch.setenv("STORE_PORT", str(free_port()))
    output = run_ranks(CASES, ranks, [models, layout, tp, *names], timeout_s=timeout_s)
    assert output.count("the servers have the trainer's weights") == len(names)


def test_pipeline_and_tensor_parallel_ranks_into_servers_of_two(monkeypatch, models) -> None:
    assert_equal_weights(monkeypatch, models, 4, "tp2-pp2", 2, ["untied"], 500)


@pytest.mark.slow
def test_tensor_parallel_ranks_into_servers_of_one(monkeypatch, models) -> None:
    assert_equal_weights(monkeypatch, models, 2, "tp2-pp1", 1, ["untied"], 500)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("tp", [1, 2])
def test_all_other_families(monkeypatch, models, tp) -> None:
    """Two ranks: pipeline stages into two servers of one, or tensor-parallel into one of two."""
    layout = {1: "tp1-pp2", 2: "tp2-pp1"}[tp]
    assert_equal_weights(monkeypatch, models, 2, layout, tp, OTHERS, 2500)

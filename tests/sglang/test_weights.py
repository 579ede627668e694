"""Real servers beside a real trainer: after each sync both give sequences the same log-probs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))

import tiny_models
from launch import free_port, run_ranks

CASES = Path(__file__).with_name("engine_cases.py")

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_models.make(folder, ffn_size=128)  # what SGLang need not pad for two ranks on a CPU
    return folder


def assert_equal_weights(
    monkeypatch, models, ranks, layout, tp, names, timeout_s, fate="well"
) -> None:
    monkeypatch.setenv("STORE_PORT", str(free_port()))
    output = run_ranks(CASES, ranks, [models, layout, tp, fate, *names], timeout_s=timeout_s)
    assert output.count("the servers have the trainer's weights") == len(names)


@pytest.mark.slow
def test_tensor_parallel_ranks_into_a_server_of_two_killed_in_a_sync(monkeypatch, models) -> None:
    assert_equal_weights(monkeypatch, models, 2, "tp2-pp1", 2, ["untied"], 500, "killed")


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", sorted(tiny_models.CONFIGS))
def test_all_families_from_tp2_pp2(monkeypatch, models, name, tp) -> None:
    """Four ranks: four servers of one, or two of two."""
    assert_equal_weights(monkeypatch, models, 4, "tp2-pp2", tp, [name], 1200)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_interleaved_stages_into_servers_of_one(monkeypatch, models) -> None:
    assert_equal_weights(monkeypatch, models, 2, "tp1-pp2-vpp2", 1, ["tied"], 1200)

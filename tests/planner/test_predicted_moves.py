"""Bytes between host and device, by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from planned_runs import SGLANG_8B, run_config

from megatron_prime.planner.lengths import Expectations
from megatron_prime.planner.memory import GIB, Machine, make_plan
from megatron_prime.planner.moves import Moves
from megatron_prime.planner.rates import GPUS
from megatron_prime.planner.residency import NEEDED, RESIDENT
from megatron_prime.planner.seconds import predict
from megatron_prime.planner.training import Trainer
from megatron_prime.weights.shape import ModelShape

H100 = GPUS["h100"]
PARAMETERS = 8.03e9
STEP = ("generate", "score", "update_prm", "update_policy", "sync_weights")


def seconds(folder: Path, phase: str, table=NEEDED) -> dict[str, float]:
    config = run_config(folder, "Llama-3-8B", **SGLANG_8B)
    plan = make_plan(config, 8, Machine(200 * GIB), table)
    shape = ModelShape.from_hf(config.model.hf, 2)
    policy = Trainer(
        shape, config.parallel, 4, config.precision.policy, config.megatron, config.policy, H100
    )
    moves = Moves(config, plan, table, policy)
    return moves.into(STEP, STEP.index(phase))


def test_what_is_resident_does_not_move(tmp_path: Path) -> None:
    assert seconds(tmp_path, "score", RESIDENT) == {}


def test_states_go_and_come(tmp_path: Path) -> None:
    """The PRM's masters and moments, 12 bytes of a parameter in all, leave; the policy's come."""
    found = seconds(tmp_path, "update_policy")
    assert found["pcie"] == pytest.approx(2 * 12 * PARAMETERS / 8 / (64e9 * 0.8), rel=1e-3)
    # Its weights, 2 bytes of half of the parameters, are gathered from four replicas.
    assert found["nvlink"] == pytest.approx(0.75 * PARAMETERS / (450e9 * 0.8), rel=1e-3)


def test_weights_need_masters_even_where_these_do_not_stay(tmp_path: Path) -> None:
    """Scoring: 4 bytes of an eighth for the policy's cast, 2 bytes of a half for the reference."""
    found = seconds(tmp_path, "score")
    expected = (4 / 8 + 2 / 2) * PARAMETERS / (64e9 * 0.8)
    assert found["pcie"] == pytest.approx(expected, rel=1e-3)


def test_the_reference_is_never_copied_back(tmp_path: Path) -> None:
    """To the PRM's update its own 12 bytes of an eighth come, and nothing goes."""
    found = seconds(tmp_path, "update_prm")
    assert found["pcie"] == pytest.approx(12 * PARAMETERS / 8 / (64e9 * 0.8), rel=1e-3)


def test_the_engine_is_dropped(tmp_path: Path) -> None:
    assert seconds(tmp_path, "generate") == {}


def test_a_step_counts_each_move_once(tmp_path: Path) -> None:
    """Both trained models' 12 bytes twice, masters for scoring, the reference once."""
    config = run_config(tmp_path, "Llama-3-8B", **SGLANG_8B)
    plan = make_plan(config, 8, Machine(), NEEDED)
    step = predict(config, plan, NEEDED, H100, Expectations.of(config))
    copied = sum(phase.moves.get("pcie", 0) for phase in step.phases)
    expected = (4 * 12 / 8 + 4 / 8 + 2 / 2) * PARAMETERS / (64e9 * 0.8)
    assert copied == pytest.approx(expected, rel=1e-3)

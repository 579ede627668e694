"""Bytes and predicted seconds of small plans, counted by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_prime.config import ParallelSizes
from megatron_prime.runtime.compat import before_megatron_import

before_megatron_import()

from megatron_prime.weights.placement import EngineLayout, TrainingLayout  # noqa: E402
from megatron_prime.weights.plan import make_plan  # noqa: E402
from megatron_prime.weights.shape import ModelShape  # noqa: E402
from megatron_prime.weights.traffic import Flow, Traffic, model_bytes, traffic  # noqa: E402

SHAPE = ModelShape("llama", 256, 8, 8, 8, 32, 512, 1024, 1024, 64, 1e-6, 1e4, False, False)
LAYER = 256 * 256 * 4 + 3 * 256 * 512 + 2 * 256
WHOLE = 2 * (8 * LAYER + 2 * 1024 * 256 + 256)


def flows(sizes: ParallelSizes, ranks: int, tp: int, per_node: int, bucket: int = 10**9) -> Traffic:
    shape = replace(SHAPE, padded_vocab_size=1024)
    plan = make_plan(
        shape, TrainingLayout(sizes, ranks), EngineLayout(tp, ranks), 2, bucket, per_node
    )
    return traffic(plan, per_node)


def test_the_models_bytes() -> None:
    assert model_bytes(SHAPE, 2) == WHOLE


def test_one_rank_moves_nothing() -> None:
    (flow,) = flows(ParallelSizes(), 1, 1, 8).ranks
    assert flow.own == flow.handed == pytest.approx(WHOLE, rel=0.01)  # checksums and alignment
    assert flow == Flow(own=flow.own)
    assert flow.seconds(1, 1) == 0


def test_two_stages_exchange_their_halves() -> None:
    """PP 2 into TP 1: each rank lacks the other's half; on two nodes it comes over the network."""
    inside, between = flows(ParallelSizes(pp=2), 2, 1, 2), flows(ParallelSizes(pp=2), 2, 1, 1)
    for flow in inside.ranks:
        assert flow.own == pytest.approx(WHOLE / 2, rel=0.01)
        assert flow.near == pytest.approx(WHOLE / 2, rel=0.01)
        assert (flow.far, flow.sent_far) == (0, 0)
    for near, far in zip(inside.ranks, between.ranks, strict=True):
        assert far == Flow(own=near.own, far=near.near, sent_far=near.sent_near)
    assert inside.seconds(2.0, 1.0) == pytest.approx(WHOLE / 2 / 2e9, rel=0.02)
    assert between.seconds(2.0, 1.0) == pytest.approx(WHOLE / 2 / 1e9, rel=0.02)


def test_what_is_sent_is_received() -> None:
    for sizes, tp in ((ParallelSizes(tp=2, pp=2), 4), (ParallelSizes(pp=4), 2)):
        found = flows(sizes, 8, tp, 4, bucket=200_000)
        assert len(found.rounds) > 3
        for of_ranks in (*found.rounds, found.ranks):
            assert sum(f.near for f in of_ranks) == sum(f.sent_near for f in of_ranks)
            assert sum(f.far for f in of_ranks) == sum(f.sent_far for f in of_ranks)


def test_the_busiest_rank_of_each_round_sets_the_time() -> None:
    rounds = ((Flow(near=6), Flow(sent_near=8)), (Flow(far=1), Flow(near=2, sent_far=3)))
    assert Traffic(rounds).seconds(2e-9, 1e-9) == 4 + 3
    assert Traffic(rounds).ranks == [Flow(near=6, far=1), Flow(near=2, sent_near=8, sent_far=3)]


def test_all_stages_send_in_every_round() -> None:
    """PP 4 × TP 2 into TP 2, 16 ranks: no round waits for the ranks of a single stage."""
    found = flows(ParallelSizes(tp=2, pp=4), 16, 2, 16, bucket=400_000)
    assert len(found.rounds) > 5
    whole_sync = max(flow.seconds(1, 1) for flow in found.ranks)
    assert found.seconds(1, 1) < 1.6 * whole_sync

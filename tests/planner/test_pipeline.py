"""The order of a schedule against Megatron's own tables, its time by hand, its packs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from public_models import shape_of

from megatron_prime.config import BatchSection, ParallelSizes, PrecisionOptions
from megatron_prime.data.packing import plan_micro_batches
from megatron_prime.planner.flops import load_of
from megatron_prime.planner.pipeline import Packed, Work, order, packed, run, update
from megatron_prime.planner.rates import GPUS
from megatron_prime.planner.training import Trainer


def numbers(works: list[Work]) -> list[int]:
    """As Megatron writes orders: chunks from 1 on, backwards negative."""
    return [-(work.chunk + 1) if work.backward else work.chunk + 1 for work in works]


@pytest.mark.parametrize(
    ("stages", "virtual", "count"), [(2, 2, 4), (4, 2, 4), (4, 5, 24), (4, 1, 6)]
)
def test_the_interleaved_order_is_megatrons(stages: int, virtual: int, count: int) -> None:
    from megatron_prime.runtime.compat import before_megatron_import

    before_megatron_import()
    from megatron.core.pipeline_parallel.schedules import (
        get_pp_rank_microbatches,
        get_schedule_table,
    )
    from megatron.core.transformer.cuda_graphs import convert_schedule_table_to_order

    table = get_schedule_table(count, virtual, stages)
    for stage in range(stages):
        group = SimpleNamespace(size=lambda: stages, rank=lambda stage=stage: stage)
        place = SimpleNamespace(
            pp_group=group, virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None
        )
        _, _, warm_up, _ = get_pp_rank_microbatches(count, virtual, stages, p2p_communicator=place)
        found = order(stage, stages, count, virtual)
        assert numbers(found) == convert_schedule_table_to_order(warm_up, virtual, table)
        forwards = [(work.micro_batch, work.chunk) for work in found if not work.backward]
        assert forwards == table


def test_1f1b_by_hand() -> None:
    """Three micro-batches on the first of two stages, and on the last."""
    first = [(work.backward, work.micro_batch) for work in order(0, 2, 3)]
    assert first == [(False, 0), (False, 1), (True, 0), (False, 2), (True, 1), (True, 2)]
    last = [(work.backward, work.micro_batch) for work in order(1, 2, 3)]
    assert last == [(False, 0), (True, 0), (False, 1), (True, 1), (False, 2), (True, 2)]
    assert [work.backward for work in order(0, 4, 2)] == [False, False, True, True]


@pytest.mark.parametrize("stages", [1, 2, 4, 8])
@pytest.mark.parametrize("virtual", [1, 2, 5])
@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_equal_parts_wait_as_the_closed_form_says(stages: int, virtual: int, rounds: int) -> None:
    """(p - 1) / (m v) of the work, with backwards twice as long as forwards."""
    count = stages * rounds
    found = run(stages, count, virtual, lambda _, work: 2.0 if work.backward else 1.0)
    assert found.busy == (3.0 * count * virtual,) * stages
    assert found.bubble == pytest.approx((stages - 1) / (count * virtual))


def test_unequal_parts_by_hand() -> None:
    """Two stages; forwards of 1, 3 and 1, backwards as long.

    Stage 0: F0 0-1, F1 1-4, B0 (stage 1: F0 1-2, B0 2-3) 4-5, F2 5-6, B1 (stage 1: F1 4-7,
    B1 7-10) 10-13, B2 (stage 1: F2 10-11, B2 11-12) 13-14.
    """
    lasts = (1.0, 3.0, 1.0)
    found = run(2, 3, 1, lambda _, work: lasts[work.micro_batch])
    assert (found.seconds, found.busy) == (14.0, (10.0, 10.0))
    slow_link = run(2, 1, 1, lambda _, __: 1.0, handing_on=10.0)
    assert slow_link.seconds == 24.0, "there and back"


def test_packs_are_those_of_the_packing_filled_up(tmp_path: Path) -> None:
    knobs = BatchSection(lr=1e-6, mini_batch_size=64, micro_batch_tokens=4096)
    sizes = ParallelSizes(tp=8, pp=4)
    shape = shape_of(tmp_path, "Llama-3-70B", 8)
    trainer = Trainer(shape, sizes, 2, PrecisionOptions(), {}, knobs, GPUS["h100"])
    responses = tuple(300 + 41 * row % 2700 for row in range(64))
    replicas = packed(100, responses, trainer)
    plan = plan_micro_batches([100 + length for length in responses], 2, 4096, stages=4)
    for replica, packs in zip(replicas, plan, strict=True):
        tokens = [sum(100 + responses[row] for row in pack) for pack in packs]
        assert [load.tokens for load in replica.loads] == [max(tokens)] * len(packs)
        assert sum(load.wanted for load in replica.loads) == sum(
            responses[row] for pack in packs for row in pack
        )
        seen = load_of(100, tuple(responses[row] for row in packs[0])).seen_keys
        fill = max(tokens) - tokens[0]
        assert replica.loads[0].seen_keys == seen + fill * (fill + 1) / 2

    # The last stage makes the logits, and the others wait for it.
    whole = load_of(100, responses) * (1 / 2)
    found = update(trainer, Packed.equal(whole, 12))
    assert found.busy[0] == pytest.approx(found.busy[2])
    work = sum(trainer.pass_seconds(whole, backward) for backward in (False, True))
    assert found.busy[3] == pytest.approx(work)
    assert found.busy[0] < 0.97 * work
    virtual = Trainer(
        shape, ParallelSizes(tp=8, pp=4, vpp=5), 2, trainer.precision, {}, knobs, GPUS["h100"]
    )
    assert update(virtual, Packed.equal(whole, 12)).busy == pytest.approx(found.busy)

"""Forwards and updates: by hand on simple layouts, and beside what others have measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from public_models import shape_of

from megatron_prime.config import BatchSection, ParallelSizes, PrecisionOptions
from megatron_prime.planner.flops import Load, forward_flops, load_of
from megatron_prime.planner.rates import GPUS
from megatron_prime.planner.training import Trainer

H100 = GPUS["h100"]


def trainer(
    folder: Path,
    model: str = "Llama-3-8B",
    sizes: ParallelSizes = ParallelSizes(),  # noqa: B008 (frozen)
    data_parallel: int = 1,
    batch: int = 128,
    tokens: int = 8192,
    precision: PrecisionOptions = PrecisionOptions(),  # noqa: B008 (frozen)
    **megatron: Any,
) -> Trainer:
    knobs = BatchSection(lr=1e-6, mini_batch_size=batch, micro_batch_tokens=tokens)
    shape = shape_of(folder, model, sizes.tp)
    return Trainer(shape, sizes, data_parallel, precision, megatron, knobs, H100)


@pytest.mark.parametrize(
    ("model", "sizes", "data_parallel", "tokens", "published", "tolerance"),
    [  # pre-training in FP8 on H100s at 8192 tokens, 128 sequences a step: tokens/s/GPU
        ("Llama-3-8B", ParallelSizes(cp=2), 4, 4096, 13_812, 0.02),  # the one fp8_share is made of
        ("Llama-3-70B", ParallelSizes(tp=4, pp=8, vpp=5), 2, 8192, 1_621, 0.2),
        ("Llama-3-70B", ParallelSizes(tp=4, pp=4, cp=2, vpp=5), 2, 4096, 1_524, 0.1),
    ],
)
def test_published_pre_training(
    model: str,
    sizes: ParallelSizes,
    data_parallel: int,
    tokens: int,
    published: int,
    tolerance: float,
    tmp_path: Path,
) -> None:
    """NVIDIA's: Megatron-LM's examples/llama/README.md, and NeMo 24.12's performance summary."""
    one = trainer(
        tmp_path,
        model,
        sizes,
        data_parallel,
        tokens=tokens,
        precision=PrecisionOptions(fp8="hybrid"),
        sequence_parallel=True,
        tp_comm_overlap=True,
    )
    load = load_of(0, (8192,) * 128)
    found = load.tokens / sum(one.update(load, 128).values()) / (sizes.replica * data_parallel)
    assert found == pytest.approx(published, rel=tolerance)


def test_a_forward_is_its_operations(tmp_path: Path) -> None:
    """0.55 of 989 TFLOP/s; a data-parallel rank has its share of the rows."""
    load = load_of(100, (900,) * 128)
    one = trainer(tmp_path, data_parallel=2)
    flops = forward_flops(one.shape, load).all
    assert one.forward(load, 128)["compute"] == pytest.approx(flops / 2 / (989e12 * 0.55))


def test_an_update_is_three_forwards_and_a_step(tmp_path: Path) -> None:
    load = load_of(100, (900,) * 256)
    one = trainer(tmp_path)
    update, forward = one.update(load, 256), one.forward(load, 256)
    assert update["compute"] == pytest.approx(3 * forward["compute"])
    # Two steps: Adam's 34 bytes and the gradients' 8 for each of 8.03 G parameters but the norms'.
    assert update["hbm"] == pytest.approx(2 * 42 * 8.03e9 / (3350e9 * 0.8), rel=1e-3)


def test_recomputation_computes_again(tmp_path: Path) -> None:
    load, full = load_of(0, (1000,) * 128), {"recompute_granularity": "full"}
    plain, again = trainer(tmp_path), trainer(tmp_path, **full)
    flops = forward_flops(plain.shape, load)
    ratio = again.update(load, 128)["compute"] / plain.update(load, 128)["compute"]
    assert ratio == pytest.approx((4 * flops.all - flops.head) / (3 * flops.all))
    half = {"recompute_method": "block", "recompute_num_layers": 16}
    some = trainer(tmp_path, **full, **half).update(load, 128)["compute"]
    both = again.update(load, 128)["compute"] + plain.update(load, 128)["compute"]
    assert some == pytest.approx(both / 2)


def test_the_pipeline_waits(tmp_path: Path) -> None:
    """Four stages, 16 micro-batches: 3 / 16 of a stage's work; interleaved, half of that."""
    load = load_of(0, (8192,) * 16)
    for virtual in (1, 2):
        one = trainer(tmp_path, sizes=ParallelSizes(pp=4, vpp=virtual), batch=16)
        assert one.micro_batches(load, 16) == 16
        found = one.forward(load, 16)
        hidden = virtual * 2 * 4096 * 16 * 8192 / (450e9 * 0.8)  # four ranks are one node
        assert found["pipeline"] == pytest.approx(
            found["compute"] * 3 / 16 / virtual + hidden, rel=1e-6
        )


def test_tensor_parallel_ranks_exchange_hidden_states(tmp_path: Path) -> None:
    """32 layers, four times, three quarters of 4096 bf16 values of each token."""
    load = load_of(0, (1000,) * 8)
    found = trainer(tmp_path, sizes=ParallelSizes(tp=4), sequence_parallel=True).forward(load, 8)
    assert found["nvlink"] == pytest.approx(32 * 4 * 0.75 * 2 * 4096 * 8000 / (450e9 * 0.8))
    hidden = trainer(tmp_path, sizes=ParallelSizes(tp=4), tp_comm_overlap=True).forward(load, 8)
    assert hidden["nvlink"] == 0


def test_gradients_are_hidden_behind_a_long_backward_pass_only(tmp_path: Path) -> None:
    """Two nodes of eight replicas: a ring uses eight adapters, 320 GB/s, less than NVLink."""
    one = trainer(tmp_path, data_parallel=16, batch=128)
    assert one.ring(16) == ("network", pytest.approx(8 * 50e9 * 0.8))
    assert one.ring(8) == ("nvlink", pytest.approx(450e9 * 0.8))
    long, short = load_of(0, (8000,) * 128), load_of(0, (10,) * 128)
    others = 8.03e9 * 15 / 16
    assert one.update(long, 128)["network"] == pytest.approx(2 * others / 320e9, rel=1e-3)
    exposed = one.update(short, 128)["network"]
    assert 2 * others / 320e9 < exposed < 6 * others / 320e9


def test_a_slow_network_shows(tmp_path: Path) -> None:
    one = trainer(tmp_path, sizes=ParallelSizes(tp=2, cp=8))
    load = Load(tokens=1e6, seen_keys=0, wanted=0)
    slow = replace(one, rates=replace(H100, network_gb_per_s=1))
    assert slow.forward(load, 128)["network"] > 20 * one.forward(load, 128)["network"] > 0


def test_micro_batches_are_those_of_the_packing(tmp_path: Path) -> None:
    """Against data/packing.py, on rows of one length."""
    from megatron_prime.data.packing import plan_micro_batches

    for stages, virtual, rows, length in [(1, 1, 64, 1000), (4, 1, 64, 1000), (4, 2, 96, 2000)]:
        sizes = ParallelSizes(pp=stages, vpp=virtual)
        one = trainer(tmp_path, sizes=sizes, data_parallel=2)
        multiple = stages if virtual > 1 else 1
        plan = plan_micro_batches([length] * rows, 2, 8192, stages, multiple)
        found = one.micro_batches(load_of(0, (length,) * rows), rows)
        assert found <= len(plan[0]) <= 1.15 * found  # whole rows fill packs less well

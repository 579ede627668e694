"""The reshard plan against slices of whole checkpoints that are cut by other code."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from engine_truth import random_checkpoint, sglang_parameters

from megatron_prime.config import ConfigError, ParallelSizes
from megatron_prime.runtime.compat import before_megatron_import

before_megatron_import()

from megatron_prime.weights.names import hf_shapes  # noqa: E402
from megatron_prime.weights.placement import (  # noqa: E402
    EngineLayout,
    Form,
    TrainingLayout,
    intersection,
    slices,
)
from megatron_prime.weights.plan import ReshardPlan, make_plan  # noqa: E402
from megatron_prime.weights.shape import ModelShape, padded  # noqa: E402

SMALL = ModelShape(
    family="llama",
    hidden_size=8,
    num_layers=8,
    num_heads=8,
    num_kv_heads=8,
    head_dim=2,
    ffn_size=16,
    vocab_size=67,
    padded_vocab_size=80,
    max_positions=64,
    norm_eps=1e-6,
    rope_theta=1e4,
    qkv_bias=False,
    tied_embeddings=False,
)
FAMILIES = {
    "llama": SMALL,
    "grouped": replace(SMALL, family="mistral", num_kv_heads=4, head_dim=6),
    "qwen2": replace(
        SMALL, family="qwen2", num_kv_heads=4, qkv_bias=True, tied_embeddings=True, vocab_size=131
    ),
    "qwen3": replace(SMALL, family="qwen3", num_kv_heads=4, qk_norm=True, head_dim=4),
}
LAYOUTS = [  # tp, pp, cp, vpp, ranks
    (1, 1, 1, 1, 8),
    (2, 2, 1, 1, 8),
    (4, 2, 1, 2, 8),
    (1, 4, 2, 2, 16),
    (4, 1, 1, 1, 8),
    (2, 1, 2, 1, 8),
]


def plan_of(
    shape: ModelShape,
    layout: tuple[int, int, int, int, int],
    engine_tp: int,
    bucket_bytes: int = 1 << 30,
    ranks_per_node: int = 8,
) -> ReshardPlan:
    tp, pp, cp, vpp, ranks = layout
    shape = replace(shape, padded_vocab_size=padded(shape.vocab_size, tp))
    training = TrainingLayout(ParallelSizes(tp, pp, cp, vpp), ranks)
    engine = EngineLayout(engine_tp, ranks)
    return make_plan(shape, training, engine, 4, bucket_bytes, ranks_per_node)


@pytest.mark.parametrize("engine_tp", [1, 2, 4, 8])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_element_arrives_once_and_nothing_else(
    family: str, layout: tuple[int, int, int, int, int], engine_tp: int
) -> None:
    plan = plan_of(FAMILIES[family], layout, engine_tp, bucket_bytes=1500)
    checkpoint = random_checkpoint(plan.shape)
    sizes = hf_shapes(plan.shape)
    by_hf = {
        hf: parameter.entry
        for parameter in plan.engine.parameters(plan.shape, 0)
        for hf in parameter.entry.hf
    }
    for receiver in range(plan.engine.world_size):
        wanted = sglang_parameters(checkpoint, plan.shape, engine_tp, receiver % engine_tp)
        found = {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}
        written = {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}
        for round_ in range(len(plan.rounds)):
            for message in plan.incoming(round_, receiver):
                assert message.receiver == receiver
                for piece in message.pieces:
                    entry = by_hf[piece.hf]
                    stage = message.sender // (plan.training.world_size // plan.training.sizes.pp)
                    assert stage in plan.training.stages_of(entry, plan.shape)
                    tp_rank = message.sender % plan.training.sizes.tp
                    held = plan.training.region(entry, sizes[piece.hf], plan.shape, tp_rank)
                    assert intersection(held, piece.region) == piece.region, "sent what it lacks"
                    values = checkpoint[piece.hf][slices(piece.region)]
                    assert values.numel() * 4 == piece.nbytes
                    found[piece.parameter][slices(piece.target)] = values
                    written[piece.parameter][slices(piece.target)] += 1
        for name, tensor in wanted.items():
            assert torch.equal(found[name], tensor), name
            assert torch.equal(written[name], (tensor != 0).float()), f"{name}: not exactly once"


def test_the_layouts_parameters_are_sglangs() -> None:
    for shape in FAMILIES.values():
        for tp in (1, 2, 4, 8):
            for rank in range(tp):
                truth = sglang_parameters(random_checkpoint(shape), shape, tp, rank)
                found = {p.name: p.size for p in EngineLayout(tp, tp).parameters(shape, rank)}
                assert found == {name: tuple(tensor.shape) for name, tensor in truth.items()}


def test_what_a_rank_holds_itself_is_never_sent() -> None:
    plan = plan_of(FAMILIES["llama"], (2, 1, 1, 1, 8), engine_tp=2)
    sent = [m for m in plan.messages(0) if m.sender != m.receiver]
    # Only rows of the vocabulary, which the two sides pad to different lengths.
    assert {piece.hf for m in sent for piece in m.pieces} == {
        "model.embed_tokens.weight",
        "lm_head.weight",
    }


def test_replicas_share_the_sending() -> None:
    """TP 2 × PP 2 × DP 4 into TP 2: each rank has half of what it needs, the others send."""
    plan = plan_of(FAMILIES["llama"], (2, 2, 1, 1, 16), engine_tp=2, ranks_per_node=16)
    sent = [0] * 16
    for round_ in range(len(plan.rounds)):
        for message in plan.messages(round_):
            if message.sender != message.receiver:
                sent[message.sender] += message.nbytes
    assert min(sent) > 0.7 * max(sent)


def test_the_same_node_sends_first() -> None:
    """TP 2 × PP 1 × DP 4 on two nodes into TP 1: nothing has to cross between them."""
    plan = plan_of(FAMILIES["llama"], (2, 1, 1, 1, 8), engine_tp=1, ranks_per_node=4)
    assert all(m.sender // 4 == m.receiver // 4 for m in plan.messages(0))


def test_rounds_stay_within_the_bucket_unless_a_row_is_larger() -> None:
    plan = plan_of(FAMILIES["qwen2"], (2, 2, 1, 1, 8), engine_tp=2, bucket_bytes=400)
    assert len(plan.rounds) > 10
    for round_ in plan.rounds:
        for pieces in round_:
            assert sum(piece.nbytes for piece in pieces) <= 400


@pytest.mark.parametrize(("engine_tp", "layout"), [(8, (8, 4, 1, 1, 64)), (4, (8, 4, 1, 1, 64))])
def test_a_rank_of_a_70b_engine_receives_its_share(
    engine_tp: int, layout: tuple[int, int, int, int, int]
) -> None:
    shape = ModelShape(
        "qwen2", 8192, 80, 64, 8, 128, 29568, 152064, 152064, 4096, 1e-6, 1e6, True, False
    )
    tp, pp, cp, vpp, ranks = layout
    training = TrainingLayout(ParallelSizes(tp, pp, cp, vpp), ranks)
    plan = make_plan(shape, training, EngineLayout(engine_tp, ranks), 2, 256 << 20, 8)
    whole = 2 * sum(torch.Size(size).numel() for size in hf_shapes(shape).values())
    for receiver in range(0, ranks, 7):
        received = sum(
            m.nbytes for i in range(len(plan.rounds)) for m in plan.incoming(i, receiver)
        )
        assert received <= 1.02 * whole / engine_tp


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_fp8_scales_cover_every_block_once(tp: int) -> None:
    shape = replace(
        SMALL, hidden_size=512, num_layers=1, head_dim=128, ffn_size=1536, num_kv_heads=4
    )
    training = TrainingLayout(ParallelSizes(8, 1, 1, 1), 8)  # cuts blocks: 1536 / 8 = 192
    plan = make_plan(shape, training, EngineLayout(tp, 8, fp8=True), 2, 1 << 30, 8)
    for receiver in range(tp):
        written = {
            p.name: torch.zeros(p.size)
            for p in plan.engine.parameters(shape, receiver)
            if p.form is not Form.VALUES
        }
        for message in plan.incoming(0, receiver):
            for piece in message.pieces:
                if piece.form is not Form.VALUES:
                    written[piece.parameter][slices(piece.target)] += 1
        assert written
        assert all(bool((count == 1).all()) for count in written.values())


def test_an_engine_that_cuts_blocks_is_refused() -> None:
    shape = replace(SMALL, hidden_size=256, head_dim=128, ffn_size=640)
    with pytest.raises(ConfigError, match=r"rollout\.fp8_weights: .*multiples of 128"):
        EngineLayout(2, 2, fp8=True).check(shape)
    EngineLayout(1, 2, fp8=True).check(shape)


@pytest.mark.parametrize(
    ("tp", "ranks", "message"),
    [(3, 8, "does not divide the run's 8 ranks"), (16, 16, "8 attention heads")],
)
def test_layouts_that_sglang_cant_have_are_refused(tp: int, ranks: int, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"rollout\.tensor_parallel_size: found {tp}.*{message}"):
        EngineLayout(tp, ranks).check(SMALL)

"""A whole sync on one rank without other ranks: checkpoint → plan → hand-over → engine's model."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_prime.runtime.compat import before_megatron_import

before_megatron_import()

from megatron_prime.config import ParallelSizes  # noqa: E402
from megatron_prime.rollout import weight_loader  # noqa: E402
from megatron_prime.rollout.weight_sync import Problem, WeightSync  # noqa: E402
from megatron_prime.weights.names import hf_shapes  # noqa: E402
from megatron_prime.weights.placement import EngineLayout, TrainingLayout  # noqa: E402
from megatron_prime.weights.plan import make_plan  # noqa: E402
from megatron_prime.weights.reshard import Reshard  # noqa: E402
from megatron_prime.weights.shape import ModelShape  # noqa: E402

SHAPE = ModelShape("qwen2", 8, 2, 4, 2, 2, 16, 67, 80, 64, 1e-6, 1e4, True, False)
CPU = torch.device("cpu")


class Model(torch.nn.Module):
    """SGLang's parameters, full of rubbish."""

    def __init__(self, sizes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.held = {
            name: torch.nn.Parameter(torch.full(size, 7.0), requires_grad=False)
            for name, size in sizes.items()
        }

    def named_parameters(self, *_, **__):
        return iter(self.held.items())


class Whole:
    """A rank that holds everything."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tensors = {
            name: torch.randn(size, generator=generator) for name, size in hf_shapes(SHAPE).items()
        }

    def stretch(self, hf: str) -> Tensor:
        return self.tensors[hf]

    def forget(self) -> None:
        pass


@pytest.fixture
def model() -> Model:
    return Model({p.name: p.size for p in EngineLayout(1, 1).parameters(SHAPE, 0)})


@pytest.fixture
def sync() -> Iterator[WeightSync]:
    weight_loader._open.clear()
    plan = make_plan(
        SHAPE, TrainingLayout(ParallelSizes(), 1), EngineLayout(1, 1), 4, 1000, ranks_per_node=1
    )
    assert len(plan.rounds) > 4
    yield WeightSync(Reshard(plan, 0, torch.float32), CPU, timeout_s=10)
    weight_loader._open.clear()


def run(sync: WeightSync, source: Whole, model: Model | None, servers=(0,)) -> Problem | None:
    payload = sync.begin()
    thread = None
    if model is not None:
        thread = threading.Thread(target=weight_loader.load, args=(model, pickle.loads(payload)))
        thread.start()
    problem = sync.run(source, servers, lambda: thread is not None)
    if thread:
        thread.join(10)
        assert not thread.is_alive()
    return problem


def is_loaded(model: Model, source: Whole) -> bool:
    hf = source.tensors
    layer = "model.layers.1."
    qkv = torch.cat([hf[f"{layer}self_attn.{x}_proj.weight"] for x in "qkv"])
    gate_up = torch.cat([hf[f"{layer}mlp.{x}_proj.weight"] for x in ("gate", "up")])
    embedding = model.held["model.embed_tokens.weight"]
    return (
        torch.equal(model.held[f"{layer}self_attn.qkv_proj.weight"], qkv)
        and torch.equal(model.held[f"{layer}mlp.gate_up_proj.weight"], gate_up)
        and torch.equal(embedding[:67], hf["model.embed_tokens.weight"])
        and bool((embedding[67:] == 0).all())
        and torch.equal(model.held["lm_head.weight"][:67], hf["lm_head.weight"])
    )


def test_the_engine_has_the_sources_weights_after_each_sync(sync, model) -> None:
    for seed in (1, 2, 3):
        assert run(sync, Whole(seed), model) is None
        assert is_loaded(model, Whole(seed))


def test_a_server_that_is_not_asked_for_is_left_alone(sync: WeightSync, model: Model) -> None:
    assert run(sync, Whole(1), None, servers=()) is None
    assert all(bool((held == 7).all()) for held in model.held.values())


def test_a_dead_engine_is_to_be_restarted_and_then_loaded(sync: WeightSync, model: Model) -> None:
    problem = run(sync, Whole(1), None)
    assert problem is not None
    assert problem.restart
    assert "died" in problem.text
    assert run(sync, Whole(1), model) is None
    assert is_loaded(model, Whole(1))


def test_a_model_of_another_size_is_told_by_name(sync: WeightSync, model: Model) -> None:
    model.held["model.norm.weight"] = torch.nn.Parameter(torch.zeros(9), requires_grad=False)
    problem = run(sync, Whole(1), model)
    assert problem is not None
    assert problem.restart
    assert "model.norm.weight: found [9], the plan has [8]" in problem.text


def test_a_wrong_checksum_names_the_tensor_and_needs_no_restart(
    sync: WeightSync, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    right = weight_loader.checksum

    def faulty(values: Tensor) -> Tensor:
        if values.data_ptr() == model.held[name].data_ptr():
            values[0, 0] += 1
        return right(values)

    monkeypatch.setattr(weight_loader, "checksum", faulty)
    problem = run(sync, Whole(1), model)
    assert problem == Problem(f"checksums of sent and loaded weights differ: {name}", restart=False)
    monkeypatch.undo()
    assert run(sync, Whole(1), model) is None
    assert is_loaded(model, Whole(1))


def test_weights_that_the_plan_was_not_made_for_are_refused(sync: WeightSync) -> None:
    source = Whole(1)
    source.tensors["model.norm.weight"] = torch.zeros(9)
    with pytest.raises(
        RuntimeError, match=r"model\.norm\.weight as \[9\].*the reshard plan has \[8\]"
    ):
        run(sync, source, None)


def test_a_sync_may_take_a_timeout_for_each_round(sync: WeightSync) -> None:
    shape = replace(SHAPE, num_layers=1)
    plan = make_plan(shape, TrainingLayout(ParallelSizes(), 1), EngineLayout(1, 1), 4, 10**9, 1)
    assert WeightSync(Reshard(plan, 0, torch.float32), CPU, timeout_s=10).longest_s == 20
    assert sync.longest_s > 50

"""Whole plans: against real engines' storages, by hand, and in their proportions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fake_ranks import fake_rank, megatron_options
from megatron.core import parallel_state
from planned_runs import run_config

from megatron_prime.config import ConfigError, ModelName, ParallelSizes
from megatron_prime.models.architecture import build_model
from megatron_prime.models.training import TrainableEngine
from megatron_prime.planner.memory import GIB, Machine, MemoryPlan, make_plan
from megatron_prime.planner.residency import ALL, KEPT, NEEDED, RESIDENT
from megatron_prime.runtime.compat import megatron_calls
from megatron_prime.weights.shape import ModelShape, shape_of

CPU = Machine(GIB, 0, on_gpu=False)
SGLANG = {"engine": "sglang", "tensor_parallel_size": 2}


def storages(tensors: list[torch.Tensor]) -> int:
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(found.values())


@pytest.mark.parametrize("rank", range(4))
def test_four_real_models_hold_what_the_plan_says(rank: int, tmp_path: Path) -> None:
    sizes = ParallelSizes(tp=2, pp=2)
    tables: dict[str, Any] = {
        "precision": {"prm": {"dtype": "fp32"}},
        "advantage": {"estimator": "gae"},
        "megatron": megatron_options(sizes),
    }
    config = run_config(tmp_path, **tables)
    shape = ModelShape.from_hf(config.model.hf, sizes.tp)
    real: dict[str, int] = {}
    with fake_rank(rank, 4, sizes):
        place = (
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_pipeline_model_parallel_rank(),
        )
        names: tuple[ModelName, ...] = ("policy", "prm", "critic")
        for name in names:
            options, own = config.precision.of(name), shape_of(config, name)
            models = build_model(own, options, config.megatron)
            engine = TrainableEngine(models, own, config.batches_of(name), 1.0, 10, options)
            for chunk in engine.chunks:
                for buffer in chunk.buffers:
                    buffer.grad_data.fill_(1.0)
            with megatron_calls():
                engine.optimizer.step()
            parameters = [p for chunk in engine.chunks for p in chunk.parameters()]
            masters = [p for group in engine.optimizer.param_groups for p in group["params"]]
            moments = [
                state[moment]
                for state in engine.optimizer.optimizer.state.values()
                for moment in ("exp_avg", "exp_avg_sq")
            ]
            weights = storages(parameters)
            real |= {
                f"{name}.weights": weights,
                f"{name}.gradients": storages(
                    [b.grad_data for chunk in engine.chunks for b in chunk.buffers]
                ),
                f"{name}.masters": storages([*parameters, *masters]) - weights,
                f"{name}.moments": storages(moments),
            }
        models = build_model(shape, config.precision.reference, config.megatron)
        real["reference.weights"] = storages([p for m in models for p in m.parameters()])
    found = make_plan(config, 4, CPU, RESIDENT).ranks[rank]
    assert (found.place.tp, found.place.pp) == place
    assert found.parameters == sum(p.numel() for m in models for p in m.parameters())
    assert {name: found.kept[name] for name in real} == real


def test_the_ranks_are_numbered_as_megatrons(tmp_path: Path) -> None:
    sizes = ParallelSizes(tp=2, pp=2, cp=2)
    config = run_config(tmp_path, megatron=megatron_options(sizes))
    ranks = make_plan(config, 16, CPU, RESIDENT).ranks
    for rank in ranks:
        with fake_rank(rank.rank, 16, sizes):
            assert rank.place == (
                parallel_state.get_tensor_model_parallel_rank(),
                parallel_state.get_context_parallel_rank(),
                parallel_state.get_data_parallel_rank(),
                parallel_state.get_pipeline_model_parallel_rank(),
            )


def plan_8b(folder: Path, offload: bool = False, **tables: Any) -> MemoryPlan:
    megatron = {"tensor_model_parallel_size": 4, "sequence_parallel": True}
    tables = {"rollout": SGLANG, "megatron": megatron, **tables}
    config = run_config(folder, "Llama-3-8B", **tables)
    return make_plan(config, 8, Machine(), NEEDED if offload else RESIDENT)


def test_key_value_cache_by_hand(tmp_path: Path) -> None:
    """Llama-3-8B in bf16 over two ranks: 32 layers, 4 heads of 128, keys and values."""
    kept = plan_8b(tmp_path, sglang={"max_total_tokens": 1000}).ranks[0].kept
    assert kept["engine.kv_cache"] == 1000 * 2 * 32 * 4 * 128 * 2
    free = plan_8b(tmp_path, offload=True, sglang={"mem_fraction_static": 0.5}).ranks[0].kept
    both = free["engine.kv_cache"] + free["engine.weights"]
    assert both == pytest.approx(0.5 * (80 - 6 - 2 * 0.25) * GIB, rel=1e-4)  # two sync buffers


def test_phases_add_up(tmp_path: Path) -> None:
    for offload in (False, True):
        plan = plan_8b(tmp_path, offload, sglang={"max_total_tokens": 100_000})
        for phase in plan.phases:
            rank = plan.ranks[phase.rank]
            table = NEEDED if offload else RESIDENT
            kept = sum(n for name, n in rank.kept.items() if name in table[phase.phase])
            work = rank.work[phase.working[0]] if phase.working[0] else 0
            assert phase.device == kept + work
        assert plan.peak.device == max(phase.device for phase in plan.phases)
        assert plan.fits == (plan.peak.device <= 74 * GIB)


def test_offloading_needs_less_of_the_device_and_some_of_the_host(tmp_path: Path) -> None:
    resident = plan_8b(tmp_path, sglang={"max_total_tokens": 100_000})
    offloaded = plan_8b(tmp_path, True, sglang={"max_total_tokens": 100_000})
    assert offloaded.peak.device < resident.peak.device
    # 12 bytes of an eighth of both trained models; of the reference 2 bytes of a quarter.
    expected = 8_030_261_248 * (2 * 12 / 8 + 2 / 4)
    assert offloaded.host_bytes == pytest.approx(expected, rel=1e-3)
    assert resident.host_bytes == 0


def test_whatever_leaves_later_everything_has_been_on_the_host(tmp_path: Path) -> None:
    """It makes room for the servers' start, and a page-locked copy is kept."""
    config = run_config(tmp_path, "Llama-3-8B", megatron={"pipeline_model_parallel_size": 2})
    plan = make_plan(config, 4, CPU, {**RESIDENT, "score": ALL - {"prm.moments"}})
    assert plan.host_bytes == max(
        sum(n for name, n in rank.kept.items() if name in KEPT) for rank in plan.ranks
    )
    assert plan.host_bytes > min(rank.host for rank in plan.ranks) > 0  # stages are unlike
    assert make_plan(config, 4, CPU, RESIDENT).host_bytes == 0


def test_a_run_on_outcomes_alone_has_one_model(tmp_path: Path) -> None:
    plan = plan_8b(tmp_path, advantage={"process_weight": 0.0})
    assert not any(name.startswith(("prm", "reference")) for name in plan.ranks[0].kept)
    assert "update_prm" not in {phase.phase for phase in plan.phases}


def test_a_tie_to_the_reference_loads_it_without_a_prm(tmp_path: Path) -> None:
    tied = {"process_weight": 0.0}
    plan = plan_8b(tmp_path, advantage=tied, policy={"loss": {"kl_coefficient": 0.1}})
    owners = {name.split(".")[0] for name in plan.ranks[0].kept}
    assert owners == {"policy", "reference", "engine", "sync"}
    assert "update_prm" not in {phase.phase for phase in plan.phases}


def test_a_critic_is_a_third_trained_model(tmp_path: Path) -> None:
    """As large as the PRM but for the output layer, at work in a phase of its own."""
    plan = plan_8b(tmp_path, True, advantage={"estimator": "gae"})
    without = plan_8b(tmp_path, True)
    kept, vocabulary = plan.ranks[0].kept, 128_256 * 4096 // 4
    lacks = kept["prm.weights"] - kept["critic.weights"]
    assert lacks == pytest.approx(2 * (vocabulary - 4096), abs=2 * 128)  # bf16, padded
    assert kept.keys() - without.ranks[0].kept.keys() == {
        name for name in kept if name.startswith("critic.")
    }
    (phase,) = [phase for phase in plan.phases if phase.phase == "update_critic"]
    assert phase.resident.keys() == {
        f"critic.{kind}" for kind in ("weights", "gradients", "masters", "moments")
    } | {"sync.buffers"}
    work = plan.ranks[0].work
    assert 0 < work["critic.activations"] < work["prm.activations"], "no logits"
    assert 0 < work["critic.scoring"] <= work["prm.scoring"]
    assert plan.host_bytes > without.host_bytes
    assert "update_critic" not in {phase.phase for phase in without.phases}
    alone = plan_8b(tmp_path, advantage={"estimator": "gae", "process_weight": 0.0})
    assert {name.split(".")[0] for name in alone.ranks[0].kept} == {
        "policy", "critic", "engine", "sync",
    }  # fmt: skip


def test_a_policy_that_is_the_reference_leaves_out_a_model(tmp_path: Path) -> None:
    cache = {"max_total_tokens": 1000}
    three = plan_8b(tmp_path, sglang=cache).ranks[0].kept
    two = plan_8b(tmp_path, sglang=cache, prm={"reference": "policy"}).ranks[0].kept
    gone = three.keys() - two.keys()
    assert gone == {"reference.weights", "reference.fp8_copies"}
    assert two == {name: n for name, n in three.items() if name not in gone}


def test_a_frozen_prm_has_no_optimizer(tmp_path: Path) -> None:
    """It is as large as the reference, and waits on the host as that does."""
    plan = plan_8b(tmp_path, True, prm={"forward": "frozen"})
    kept = plan.ranks[0].kept
    of_prm = {name: n for name, n in kept.items() if name.startswith("prm.")}
    assert of_prm.keys() == {"prm.weights", "prm.fp8_copies"}
    assert kept["prm.weights"] == kept["reference.weights"] > 0
    assert "prm.activations" not in plan.ranks[0].work
    assert plan.ranks[0].work["prm.scoring"] > 0
    one_trained = 8_030_261_248 * (12 / 8 + 2 * 2 / 4)
    assert plan.host_bytes == pytest.approx(one_trained, rel=1e-3)


def test_ranks_that_do_not_fit_a_replica_are_refused(tmp_path: Path) -> None:
    config = run_config(tmp_path, megatron={"tensor_model_parallel_size": 2})
    with pytest.raises(ConfigError, match="found 3 ranks, wanted a multiple of the 2"):
        make_plan(config, 3, CPU, RESIDENT)


def test_uneven_stages_are_refused(tmp_path: Path) -> None:
    megatron = {"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 1}
    wanted = "num_layers_in_first_pipeline_stage: found 1.* memory.start_anyway = true to run"
    with pytest.raises(ConfigError, match=wanted):
        make_plan(run_config(tmp_path, megatron=megatron), 2, CPU, RESIDENT)


def test_the_cache_takes_what_a_server_is_started_with() -> None:
    from megatron_prime.planner.engine_bytes import DEFAULT_FRACTION
    from megatron_prime.rollout.sglang_arguments import GPU_DEFAULTS

    assert GPU_DEFAULTS["mem_fraction_static"] == DEFAULT_FRACTION

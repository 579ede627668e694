"""Advice is what a plan with the change says, best first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from planned_runs import run_config

from megatron_prime.config import RunConfig
from megatron_prime.planner.advice import advise
from megatron_prime.planner.memory import GIB, Machine, make_plan
from megatron_prime.planner.residency import NEEDED
from megatron_prime.planner.table import plan_of


def run_8b(folder: Path, tp: int, offload: str, **megatron: Any) -> RunConfig:
    tables = {"memory": {"offload": offload}, "rollout": {"batch_size": 8}}
    megatron["tensor_model_parallel_size"] = tp
    return run_config(folder, "Llama-3-8B", megatron=megatron, **tables)


def test_each_change_does_what_it_promises(tmp_path: Path) -> None:
    config = run_8b(tmp_path, 2, "never")
    found = advise(config, 8, Machine())
    assert [advice.peak for advice in found] == sorted(advice.peak for advice in found)
    before = plan_of(config, 8, Machine())[1].peak.device
    assert all(advice.peak < before for advice in found)
    promised = {advice.change: advice for advice in found}
    changes = {
        "megatron.tensor_model_parallel_size = 4": run_8b(tmp_path, 4, "never"),
        "megatron.sequence_parallel = true": run_8b(tmp_path, 2, "never", sequence_parallel=True),
        'memory.offload = "auto"': run_8b(tmp_path, 2, "auto"),
    }
    for change, changed in changes.items():
        plan = plan_of(changed, 8, Machine())[1]
        assert (promised[change].peak, promised[change].fits) == (plan.peak.device, plan.fits)


def test_each_change_gets_the_table_that_a_run_with_it_would_get(tmp_path: Path) -> None:
    """On TP 2 all has to leave; on TP 4 some may stay, so the peak is not that of the least."""
    machine = Machine(56 * GIB)
    config = run_8b(tmp_path, 2, "auto")
    assert not plan_of(config, 8, machine)[1].fits
    promised = {advice.change: advice for advice in advise(config, 8, machine)}
    wider = run_8b(tmp_path, 4, "auto")
    plan = plan_of(wider, 8, machine)[1]
    advice = promised["megatron.tensor_model_parallel_size = 4"]
    assert advice.fits
    assert advice.peak == plan.peak.device
    assert advice.peak > make_plan(wider, 8, machine, NEEDED).peak.device


def test_where_servers_have_no_room_what_gives_them_some_is_advised(tmp_path: Path) -> None:
    tables = {"megatron": {"tensor_model_parallel_size": 8, "pipeline_model_parallel_size": 4}}
    rollout = {"engine": "sglang", "tensor_parallel_size": 4}
    config = run_config(tmp_path, "Llama-3-70B", rollout=rollout, **tables)
    changes = [advice.change for advice in advise(config, 64, Machine())]
    assert changes == ["rollout.tensor_parallel_size = 8"]


def test_where_activations_decide_recomputation_leads(tmp_path: Path) -> None:
    megatron = {"tensor_model_parallel_size": 8, "sequence_parallel": True}
    packs = {"micro_batch_tokens": 65536, "mini_batch_size": 256}
    tables = {"policy": packs, "prm": packs, "memory": {"offload": "always"}}
    config = run_config(tmp_path, "Llama-3-8B", megatron=megatron, **tables)
    changes = [advice.change for advice in advise(config, 8, Machine())]
    assert changes[0].startswith("megatron.recompute_granularity") or "micro_batch" in changes[0]
    assert "megatron.bias_activation_fusion = true" in changes


def test_what_can_not_be_cut_is_not_advised(tmp_path: Path) -> None:
    config = run_config(tmp_path, "Qwen2.5-7B", megatron={"tensor_model_parallel_size": 4})
    changes = " ".join(advice.change for advice in advise(config, 8, Machine()))
    assert "tensor_model_parallel_size = 8" not in changes  # 28 heads

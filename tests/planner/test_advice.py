"""Advice is what a plan with the change says, best first."""

from __future__ import annotations

from pathlib import Path

from planned_runs import run_config

from megatron_prime.planner.advice import advise
from megatron_prime.planner.memory import Machine, make_plan
from megatron_prime.planner.residency import NEEDED, RESIDENT


def test_each_change_does_what_it_promises(tmp_path: Path) -> None:
    config = run_config(tmp_path, "Llama-3-8B", megatron={"tensor_model_parallel_size": 2})
    found = advise(config, 8, Machine(), RESIDENT)
    assert [advice.peak for advice in found] == sorted(advice.peak for advice in found)
    before = make_plan(config, 8, Machine(), RESIDENT).peak.device
    assert all(advice.peak < before for advice in found)
    promised = {advice.change: advice.peak for advice in found}
    wider = run_config(tmp_path, "Llama-3-8B", megatron={"tensor_model_parallel_size": 4})
    change = "megatron.tensor_model_parallel_size = 4"
    assert promised[change] == make_plan(wider, 8, Machine(), RESIDENT).peak.device
    assert "megatron.sequence_parallel = true" in promised


def test_where_activations_decide_recomputation_leads(tmp_path: Path) -> None:
    megatron = {"tensor_model_parallel_size": 8, "sequence_parallel": True}
    packs = {"micro_batch_tokens": 65536, "mini_batch_size": 256}
    config = run_config(tmp_path, "Llama-3-8B", megatron=megatron, policy=packs, prm=packs)
    changes = [advice.change for advice in advise(config, 8, Machine(), NEEDED)]
    assert changes[0].startswith("megatron.recompute_granularity") or "micro_batch" in changes[0]
    assert "megatron.bias_activation_fusion = true" in changes


def test_what_can_not_be_cut_is_not_advised(tmp_path: Path) -> None:
    config = run_config(tmp_path, "Qwen2.5-7B", megatron={"tensor_model_parallel_size": 4})
    changes = " ".join(advice.change for advice in advise(config, 8, Machine(), RESIDENT))
    assert "tensor_model_parallel_size = 8" not in changes  # 28 heads

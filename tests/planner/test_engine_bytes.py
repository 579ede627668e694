"""How much key/value cache servers get, by hand, and when they get none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from planned_runs import run_config

from megatron_prime.config import RunConfig
from megatron_prime.planner.engine_bytes import NoRoomForServers, kv_tokens, weight_bytes
from megatron_prime.planner.memory import GIB, Machine, make_plan
from megatron_prime.planner.residency import NEEDED
from megatron_prime.planner.states import VALUE_BYTES
from megatron_prime.rollout.sglang_arguments import CPU_DEFAULTS
from megatron_prime.weights.shape import ModelShape

PER_TOKEN = 2 * 80 * 2 * 128 * 2  # Llama-3-70B over four ranks: keys and values, 2 of 8 heads


def run_70b(folder: Path, engine: str = "sglang", **sglang: float) -> RunConfig:
    megatron = {"tensor_model_parallel_size": 8, "pipeline_model_parallel_size": 4}
    width = 4 if engine == "sglang" else 1
    rollout = {"engine": engine, "tensor_parallel_size": width, "batch_size": 3}
    return run_config(folder, "Llama-3-70B", megatron=megatron, rollout=rollout, sglang=sglang)


def test_weights_that_leave_no_room_are_refused(tmp_path: Path) -> None:
    """A quarter of 70.55 G parameters in bf16 are 32.9 GiB; 0.4 of 73.5 GiB are 29.4."""
    with pytest.raises(NoRoomForServers) as refusal:
        make_plan(run_70b(tmp_path), 64, Machine(), NEEDED)
    message = str(refusal.value)
    assert "found 0.4 of the 73.5 GiB" in message
    assert "weights 32.9" in message
    assert "raise it to 0.46 or more, or rollout.tensor_parallel_size (now 4)" in message
    make_plan(run_70b(tmp_path, mem_fraction_static=0.46), 64, Machine(), NEEDED)
    with pytest.raises(NoRoomForServers):
        make_plan(run_70b(tmp_path, mem_fraction_static=0.45), 64, Machine(), NEEDED)


def test_never_names_the_knob_that_lets_models_leave(tmp_path: Path) -> None:
    config = run_70b(tmp_path)
    never = config.model_copy(
        update={"memory": config.memory.model_copy(update={"offload": "never"})}
    )
    shape = ModelShape.from_hf(config.model.hf)
    with pytest.raises(NoRoomForServers, match=r'or set memory\.offload = "auto"$'):
        kv_tokens(never, shape, 30 * GIB, on_gpu=True)


def test_one_sequence_is_enough_and_less_is_not(tmp_path: Path) -> None:
    config = run_70b(tmp_path, mem_fraction_static=0.5)
    shape = ModelShape.from_hf(config.model.hf)
    buffers, weights = 2 * 256 * 2**20, 2 * 70_553_706_496 / 4
    longest = 1024 + 3072
    enough = int((weights + longest * PER_TOKEN) / 0.5) + buffers + 2**20  # norms are not cut
    assert longest <= kv_tokens(config, shape, enough + 2**24, on_gpu=True) < longest + 100
    with pytest.raises(NoRoomForServers):
        kv_tokens(config, shape, enough - 2**24, on_gpu=True)


def test_a_cpu_s_servers_have_what_they_are_started_with(tmp_path: Path) -> None:
    config = run_70b(tmp_path)
    shape = ModelShape.from_hf(config.model.hf)
    started_with = CPU_DEFAULTS["max_total_tokens"]
    assert kv_tokens(config, shape, 0, on_gpu=False) == started_with
    assert kv_tokens(config, shape, 2**60, on_gpu=False) == started_with  # not a share of that


def test_what_is_asked_for_is_not_weighed(tmp_path: Path) -> None:
    """Bytes of it are in the plan; that is what says whether it fits."""
    config = run_70b(tmp_path, max_total_tokens=777)
    shape = ModelShape.from_hf(config.model.hf)
    assert kv_tokens(config, shape, 0, on_gpu=True) == 777
    kept = make_plan(config, 64, Machine(), NEEDED).ranks[0].kept
    assert kept["engine.kv_cache"] == 777 * PER_TOKEN


def test_the_local_engine_holds_a_batch_of_the_longest(tmp_path: Path) -> None:
    config = run_70b(tmp_path, engine="local")
    assert kv_tokens(config, ModelShape.from_hf(config.model.hf), 0, on_gpu=True) == 3 * 4096


@pytest.mark.parametrize("tied", [False, True])
def test_only_sglang_pads_the_vocabulary(tmp_path: Path, tied: bool) -> None:
    """67 tokens: 128 rows in a server, 67 in the local engine, which is a transformers model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    found = {}
    for engine in ("local", "sglang"):
        config = run_config(tmp_path, rollout={"engine": engine})
        file = config.model.hf / "config.json"
        small = {"vocab_size": 67, "hidden_size": 32, "tie_word_embeddings": tied}
        file.write_text(json.dumps(json.loads(file.read_text()) | small))
        found[engine] = weight_bytes(config, ModelShape.from_hf(config.model.hf))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config.model.hf))
    value = VALUE_BYTES[config.precision.policy.dtype]
    assert found["local"] == value * sum(p.numel() for p in model.parameters())
    assert found["sglang"] - found["local"] == value * (128 - 67) * 32 * (1 if tied else 2)

"""Which forwards a step has, and what it comes to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from planned_runs import SGLANG_8B, run_config

from megatron_prime.config import RunConfig
from megatron_prime.planner.flops import forward_flops, load_of
from megatron_prime.planner.lengths import Expectations, response_lengths
from megatron_prime.planner.memory import GIB, Machine, make_plan
from megatron_prime.planner.rates import GPUS
from megatron_prime.planner.residency import NEEDED, RESIDENT
from megatron_prime.planner.seconds import StepSeconds, predict
from megatron_prime.weights.shape import ModelShape

H100 = GPUS["h100"]


def step(config: RunConfig, world_size: int = 8, table=RESIDENT, rates=H100) -> StepSeconds:
    plan = make_plan(config, world_size, Machine(200 * GIB), table, one_per_stage=True)
    return predict(config, plan, table, rates, Expectations.of(config))


def run_8b(folder: Path, **tables: Any) -> RunConfig:
    return run_config(folder, "Llama-3-8B", **(SGLANG_8B | tables))


def forwards(config: RunConfig, phase: str) -> float:
    """A phase's computing, in forwards of all rows."""
    lengths = response_lengths(1024, 1024, 0.6, 3072)
    flops = forward_flops(ModelShape.from_hf(config.model.hf), load_of(256, lengths)).all
    found = step(config).of(phase)
    assert found is not None
    return found.work.get("compute", 0.0) * 8 * 989e12 * 0.55 / flops


@pytest.mark.parametrize(
    ("forward", "after", "expected"),
    [  # an update is three; loop.py's learn_process_rewards has the others
        ("single", False, 3),
        ("single", True, 4),
        ("single_strict", False, 4),
        ("single_strict", True, 5),
        ("double", False, 4),
        ("double", True, 4),
    ],
)
def test_forwards_of_the_prm(forward: str, after: bool, expected: int, tmp_path: Path) -> None:
    config = run_8b(tmp_path, prm={"forward": forward, "measure_after": after})
    assert forwards(config, "update_prm") == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("mini_batch", "weight", "expected"),
    [(256, 1, 1.75), (1024, 1, 1), (256, 0, 0.75), (1024, 0, 0)],
)
def test_forwards_of_scoring(
    mini_batch: int, weight: float, expected: float, tmp_path: Path
) -> None:
    """The reference's, if there is one, and the policy's of all mini-batches but the first."""
    config = run_8b(
        tmp_path,
        policy={"mini_batch_size": mini_batch},
        advantage={"process_weight": weight},
    )
    assert forwards(config, "score") == pytest.approx(expected, rel=1e-3)
    assert forwards(config, "update_policy") == pytest.approx(3, rel=1e-3)


@pytest.mark.parametrize(("loss", "expected"), [("ce_hard", 3), ("dpo", 4), ("nca", 4), ("kto", 4)])
def test_losses_that_compare_responses_cost_a_forward(
    loss: str, expected: int, tmp_path: Path
) -> None:
    config = run_8b(tmp_path, prm={"loss": loss})
    assert forwards(config, "update_prm") == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("mini_batch", [256, 1024])
def test_a_policy_that_is_the_reference_is_scored_whole(mini_batch: int, tmp_path: Path) -> None:
    policy = {"mini_batch_size": mini_batch}
    config = run_8b(tmp_path, policy=policy, prm={"reference": "policy"})
    assert forwards(config, "score") == pytest.approx(1, rel=1e-3)
    assert forwards(config, "update_prm") == pytest.approx(3, rel=1e-3)


def test_a_frozen_prm_is_a_forward(tmp_path: Path) -> None:
    config = run_8b(tmp_path, prm={"forward": "frozen"})
    assert forwards(config, "update_prm") == pytest.approx(1, rel=1e-3)
    waiting = step(config, table=NEEDED).of("update_prm")
    assert waiting is not None
    weights = 2 * 8_030_261_248 / 2  # bf16, over two ranks; they come and are never written
    assert waiting.moves == {"pcie": pytest.approx(weights / H100.pcie, rel=1e-3)}


def test_a_critic_is_asked_and_updated(tmp_path: Path) -> None:
    """Four forwards of a model that makes no logits; elsewhere nothing changes."""
    config = run_8b(tmp_path, advantage={"estimator": "gae"})
    critic = forward_flops(
        ModelShape.from_hf(config.model.hf).as_critic(),
        load_of(256, response_lengths(1024, 1024, 0.6, 3072)),
    )
    whole = forward_flops(
        ModelShape.from_hf(config.model.hf),
        load_of(256, response_lengths(1024, 1024, 0.6, 3072)),
    )
    assert critic.linears == whole.linears
    assert critic.head * 128_256 == pytest.approx(whole.head)
    found = forwards(config, "update_critic")
    assert found == pytest.approx(4 * critic.all / whole.all, rel=1e-3)
    assert forwards(config, "update_prm") == pytest.approx(3, rel=1e-3)
    without = step(run_8b(tmp_path))
    assert without.of("update_critic") is None
    moved = step(config, table=NEEDED).of("update_critic")
    assert moved is not None
    assert moved.moves["pcie"] > 0


def test_an_fp8_prm_looks_once_without(tmp_path: Path) -> None:
    plain, fp8 = (run_8b(tmp_path, precision={"prm": {"fp8": kind}}) for kind in (None, "hybrid"))
    a_quarter = run_8b(tmp_path, precision={"prm": {"fp8": "hybrid"}}, prm={"mini_batch_size": 512})
    assert forwards(fp8, "update_prm") < forwards(plain, "update_prm")
    more = forwards(a_quarter, "update_prm") - forwards(fp8, "update_prm")
    assert more == pytest.approx(0.25, rel=0.05)  # of a forward, for twice as many rows


def test_the_step_is_the_sum_and_tokens_are_those_trained_on(tmp_path: Path) -> None:
    found = step(run_8b(tmp_path))
    assert [phase.phase for phase in found.phases] == [
        "generate",
        "score",
        "update_prm",
        "update_policy",
        "sync_weights",
    ]
    assert found.seconds == pytest.approx(sum(phase.seconds for phase in found.phases))
    assert found.tokens == pytest.approx(1024 * (256 + 1024), rel=0.03)
    assert found.tokens_per_s_per_gpu == pytest.approx(found.tokens / found.seconds / 8)
    assert found.of("checkpoint") is None
    limits = {phase.phase: phase.limit for phase in found.phases}
    assert (limits["generate"], limits["update_policy"]) == ("hbm", "compute")


def test_published_steps_are_of_the_same_size(tmp_path: Path) -> None:
    """miles, a dense 27B model on 8 H200s: 478 tokens/s/GPU in all, 1855 tokens/s of decoding by
    an engine (docs/models/qwen/qwen3-8.md there; the whole recipe is not the same). A step of PRIME
    has a second trained model: it may have half of that, or twice with a faster engine."""
    tables = {
        "megatron": {"tensor_model_parallel_size": 4, "sequence_parallel": True},
        "rollout": {"engine": "sglang", "tensor_parallel_size": 4},
        "memory": {"offload": "always"},
    }
    config = run_config(tmp_path, "Qwen2.5-32B", **tables)
    found = step(config, table=NEEDED, rates=GPUS["h200"])
    assert 478 / 2 < found.tokens_per_s_per_gpu < 2 * 478


def test_no_prm_no_update_of_it(tmp_path: Path) -> None:
    found = step(run_8b(tmp_path, advantage={"process_weight": 0.0}))
    assert found.of("update_prm") is None


def test_recorded_rollouts_are_free(tmp_path: Path) -> None:
    config = run_8b(tmp_path, debug={"rollouts_from": str(tmp_path)})
    found = step(config)
    generate = found.of("generate")
    assert generate is not None
    assert (generate.seconds, generate.limit) == (0, "-")


def test_evaluation_is_told_when_its_size_is_known(tmp_path: Path) -> None:
    data = {"train": "none", "eval": "none"}
    assert step(run_8b(tmp_path, data=data)).of("evaluate") is None
    found = step(run_8b(tmp_path, data=data, evaluate={"max_prompts": 500}))
    evaluate = found.of("evaluate")
    assert evaluate is not None
    assert evaluate.seconds > 0
    assert evaluate not in found.phases


@pytest.mark.parametrize(
    ("sizes", "rollout_tp", "world_size"),
    [((8, 4, 1), 8, 64), ((8, 1, 1), 8, 16), ((4, 2, 1), 4, 16), ((2, 2, 2), 8, 16)],
)
def test_the_sync_is_that_of_the_reshard_plan(
    sizes: tuple[int, int, int], rollout_tp: int, world_size: int, tmp_path: Path
) -> None:
    """The exact plan's messages, round by round, take as long or up to a half longer."""
    from megatron_prime.rollout.sglang_setup import reshard_plan
    from megatron_prime.weights.traffic import traffic

    names = ("tensor_model", "pipeline_model", "context")
    megatron = {f"{name}_parallel_size": n for name, n in zip(names, sizes, strict=True)}
    rollout = {"engine": "sglang", "tensor_parallel_size": rollout_tp}
    config = run_config(tmp_path, "Llama-3-8B", megatron=megatron, rollout=rollout)
    found = step(config, world_size, rates=replace(H100, link_share=1.0)).of("sync_weights")
    assert found is not None
    links = sum(seconds for name, seconds in found.work.items() if name != "hbm")
    exact = traffic(reshard_plan(config, config.parallel, world_size, 8), 8).seconds(450, 50)
    assert links * 0.95 <= exact + 1e-3
    assert exact <= 1.5 * links + 0.01

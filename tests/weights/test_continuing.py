"""Which knobs may change between two starts of a command."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_prime.config import RunConfig
from megatron_prime.weights.continuing import changed_knobs


def config(**tables: dict[str, Any]) -> RunConfig:
    base = {"run": {"folder": "r"}, "model": {"hf": "m"}, "data": {"train": "t"}}
    return RunConfig.model_validate(base | tables)


def changed(command: str, before: RunConfig, now: RunConfig) -> list[str]:
    lines = changed_knobs(command, before.model_dump(mode="json"), now)
    return [line.partition(":")[0] for line in lines]


@pytest.mark.parametrize(
    ("command", "table", "knob", "counts"),
    [
        ("sft", "sft", {"lr": 0.1}, ["sft.lr"]),
        ("sft", "precision", {"policy": {"dtype": "fp32"}}, ["precision.policy.dtype"]),
        ("sft", "precision", {"prm": {"dtype": "fp32"}}, []),
        ("sft", "prm", {"lr": 0.1}, []),
        ("sft", "rollout", {"group_size": 8}, []),
        ("sft", "sft", {"output": "x", "data": "y", "micro_batch_tokens": 9}, []),
        ("sft", "megatron", {"tensor_model_parallel_size": 2}, []),
        ("train_prm", "prm", {"lr": 0.1, "loss": "dpo"}, ["prm.loss", "prm.lr"]),
        ("train_prm", "rollout", {"group_size": 8}, ["rollout.group_size"]),
        ("train_prm", "train_prm", {"reference": "loaded"}, ["train_prm.reference"]),
        ("train_prm", "train_prm", {"steps": 9, "data": "x"}, []),
        ("train_prm", "sft", {"lr": 0.1}, []),
        ("train", "sft", {"lr": 0.1}, []),
        ("train", "train_prm", {"steps": 9}, []),
        ("train", "prm", {"lr": 0.1}, ["prm.lr"]),
    ],
)
def test_only_what_the_command_computes_with_counts(
    command: str, table: str, knob: dict[str, Any], counts: list[str]
) -> None:
    assert changed(command, config(), config(**{table: knob})) == counts


def test_more_steps_bend_a_cosine_and_nothing_else() -> None:
    """The cosine is the default of `sft`, a constant rate that of `[prm]`."""
    assert changed("sft", config(), config(sft={"steps": 9})) == ["sft.steps"]
    constant = {"schedule": "constant"}
    more = config(sft={"steps": 9} | constant)
    assert changed("sft", config(sft=constant), more) == []
    cosine = {"schedule": "cosine"}
    longer = config(prm=cosine, train_prm={"steps": 9})
    assert changed("train_prm", config(prm=cosine), longer) == ["train_prm.steps"]

"""Which knobs of the PRM go together."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_prime import prm_rules
from megatron_prime.config import RunConfig


def found(**tables: dict[str, Any]) -> list[str]:
    must = {"run": {"folder": "r"}, "model": {"hf": "m"}, "data": {"train": "t"}}
    return list(prm_rules.problems(RunConfig.model_validate({**must, **tables})))


@pytest.mark.parametrize("loss", ["ce", "ce_hard", "dpo", "nca", "kto"])
def test_every_loss_goes_with_whole_groups(loss: str) -> None:
    assert found(prm={"loss": loss, "mini_batch_size": 12}, rollout={"group_size": 4}) == []


@pytest.mark.parametrize("loss", ["dpo", "nca"])
def test_a_loss_of_pairs_needs_whole_groups(loss: str) -> None:
    (line,) = found(prm={"loss": loss, "mini_batch_size": 6}, rollout={"group_size": 4})
    assert line.startswith("prm.mini_batch_size: found 6, wanted a multiple of rollout.group_size")
    (line,) = found(prm={"loss": loss, "mini_batch_size": 6}, rollout={"group_size": 1})
    assert line.startswith("rollout.group_size: found 1, wanted 2 or more")
    for other in ("ce", "ce_hard", "kto"):
        assert found(prm={"loss": other, "mini_batch_size": 6}, rollout={"group_size": 4}) == []


def test_the_policy_is_a_reference_at_temperature_1_alone() -> None:
    assert found(prm={"reference": "policy"}) == []
    assert found(rollout={"temperature": 0.7}) == []
    (line,) = found(prm={"reference": "policy"}, rollout={"temperature": 0.7})
    assert line.startswith('rollout.temperature: found 0.7, wanted 1 with prm.reference = "policy"')


def test_a_frozen_prm_is_one_that_was_trained_elsewhere() -> None:
    offline = {"forward": "frozen", "hf": "eurus-prm"}
    assert found(prm=offline) == []
    assert found(prm={**offline, "reference": "policy"}) == []
    (line,) = found(prm={"forward": "frozen"})
    assert line.startswith('prm.hf: missing with prm.forward = "frozen"')


@pytest.mark.parametrize(
    ("knob", "tables"),
    [
        ("prm.measure_after", {"prm": {"measure_after": True}}),
        ("prm.loss", {"prm": {"loss": "dpo"}}),
        (
            "precision.prm.fp8_recipe",
            {"precision": {"prm": {"fp8": "hybrid", "fp8_recipe": "delayed"}}},
        ),
    ],
)
def test_what_only_an_update_would_use_is_refused(knob: str, tables: dict[str, Any]) -> None:
    prm = {"forward": "frozen", "hf": "eurus-prm", **tables.get("prm", {})}
    (line,) = found(**{**tables, "prm": prm})
    assert line.startswith(f"{knob}: found ")

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from megatron_prime.config import (
    ADVANTAGE_PRESETS,
    AdvantageOptions,
    ParallelSizes,
    RunConfig,
    Section,
)


def config_of(**tables):
    """The smallest configuration and `tables`."""
    smallest = {"run": {"folder": "runs/a"}, "model": {"hf": "m"}, "data": {"train": "t.jsonl"}}
    return RunConfig.model_validate(smallest | tables)


def test_three_paths_are_a_whole_config_with_the_released_values():
    config = config_of()
    assert config.run.folder == Path("runs/a")
    assert config.data.eval is None
    assert (config.rollout.group_size, config.rollout.prompts_per_step) == (4, 256)
    assert (config.filter.min_accuracy, config.filter.max_accuracy) == (0.2, 0.8)
    assert (config.policy.lr, config.policy.weight_decay, config.policy.loss.clip) == (
        5e-7,
        0.01,
        0.2,
    )
    assert (config.prm.lr, config.prm.beta, config.prm.clip_grad) == (1e-6, 0.05, 10.0)
    assert config.parallel == ParallelSizes()
    assert config.uses_prm


@pytest.mark.parametrize("preset", ["released", "paper"])
def test_a_preset_fills_the_advantage_table(preset):
    config = config_of(preset=preset)
    assert config.advantage == AdvantageOptions.preset(preset)
    chosen = config.advantage.model_dump()
    assert {key: chosen[key] for key in ADVANTAGE_PRESETS[preset]} == ADVANTAGE_PRESETS[preset]


def test_presets_are_the_documented_formulae():
    released, paper = AdvantageOptions.preset("released"), AdvantageOptions.preset("paper")
    assert (released.process_baseline, released.process_norm, released.whiten) == (
        "released",
        "batch_norm",
        True,
    )
    assert (paper.process_baseline, paper.process_norm, paper.whiten) == ("paper", "none", False)
    assert released == AdvantageOptions(), "released is the default"


def test_explicit_values_win_over_the_preset():
    given = {"whiten": True, "process_norm": "batch_norm"}
    advantage = config_of(preset="paper", advantage=given).advantage
    assert advantage.whiten is True
    assert advantage.process_norm == "batch_norm"
    assert advantage.process_baseline == "paper"


def test_without_process_weight_no_prm_takes_part():
    assert not config_of(advantage={"process_weight": 0.0}).uses_prm


def test_a_config_is_frozen():
    config = config_of()
    with pytest.raises(ValidationError, match="frozen"):
        config.rollout.group_size = 8


def sections(kind=RunConfig, name=""):
    yield name, kind
    for key, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from sections(field.annotation, f"{name}.{key}".lstrip("."))


@pytest.mark.parametrize(("name", "kind"), list(sections()), ids=[name for name, _ in sections()])
def test_every_knob_has_a_sentence(name, kind):
    assert kind.__doc__
    assert "\n" not in kind.__doc__, "the first line is all that `config` shows of a table"
    for key, field in kind.model_fields.items():
        if not (isinstance(field.annotation, type) and issubclass(field.annotation, Section)):
            assert field.description, f"{name}.{key} has no docstring"
            assert field.description.endswith("."), f"{name}.{key}: {field.description}"


def test_checking_a_config_imports_no_torch():
    """So that `--help` and a check on a login node are instant."""
    code = (
        "import sys, megatron_prime.config_file, megatron_prime.validate; "
        "print(sorted({'torch', 'transformers', 'megatron', 'numpy'} & sys.modules.keys()))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("knobs", "models", "frozen"),
    [
        ({}, ("policy", "prm", "reference"), {"reference"}),
        ({"prm": {"reference": "policy"}}, ("policy", "prm"), set()),
        ({"prm": {"forward": "frozen"}}, ("policy", "prm", "reference"), {"prm", "reference"}),
        ({"prm": {"forward": "frozen", "reference": "policy"}}, ("policy", "prm"), {"prm"}),
        ({"advantage": {"process_weight": 0.0}, "prm": {"forward": "frozen"}}, ("policy",), set()),
    ],
)
def test_models_of_a_run_and_those_that_never_train(knobs, models, frozen):
    config = config_of(**knobs)
    assert (config.models, config.frozen) == (models, frozen)
    assert config.policy_is_reference == ("prm" in models and "reference" not in models)

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_prime.config import ConfigError, ParallelSizes
from megatron_prime.config_file import describe, load

MINIMAL = """
[run]
folder = "runs/a"
[model]
hf = "models/qwen"
[data]
train = "train.jsonl"
"""


@pytest.fixture
def toml(tmp_path):
    def write(text):
        path = tmp_path / "run.toml"
        path.write_text(text)
        return path

    return write


def lines_of(path, overrides=()):
    """The lines of the ConfigError that `load` raises."""
    with pytest.raises(ConfigError) as raised:
        load(path, list(overrides))
    return str(raised.value).splitlines()


def test_values_of_the_file_are_taken(toml):
    config = load(
        toml(
            MINIMAL
            + "[policy]\nlr = 1e-4\nbetas = [0.9, 0.95]\n[policy.loss]\nclip = 0.1\n"
            + "[prm]\nhf = 'models/prm'\n"
            + "[megatron]\ntensor_model_parallel_size = 4\npipeline_model_parallel_size = 2\n"
            + "recompute_granularity = 'full'\n"
        ),
        [],
    )
    assert (config.policy.lr, config.policy.betas, config.policy.loss.clip) == (
        1e-4,
        (0.9, 0.95),
        0.1,
    )
    assert config.prm.hf == Path("models/prm")
    assert config.parallel == ParallelSizes(tp=4, pp=2)
    assert config.megatron["recompute_granularity"] == "full"


def test_overrides_are_toml_values_or_bare_words(toml):
    config = load(
        toml(MINIMAL + "[policy]\nlr = 1.0\nweight_decay = 0.5\n"),
        [
            "--policy.lr=2e-5",
            "--policy.betas=[0.8, 0.99]",
            "--policy.loss.clip=0.3",
            "--prm.measure_after=true",
            "--precision.policy.dtype=fp32",
            "--data.template='plain'",
            '--prm.forward="double"',
            "--run.folder=runs/b c=d",
            "--rollout.temperature=1",
            "--megatron.sequence_parallel=true",
            "--megatron.tensor_model_parallel_size=2",
            "--preset=paper",
            "--rollout.group_size=8",
            "--rollout.group_size=16",
        ],
    )
    assert (config.policy.lr, config.policy.betas) == (2e-5, (0.8, 0.99))
    assert config.policy.weight_decay == 0.5
    assert config.policy.loss.clip == 0.3
    assert config.prm.measure_after is True
    assert (config.precision.policy.dtype, config.data.template, config.prm.forward) == (
        "fp32",
        "plain",
        "double",
    )
    assert config.run.folder == Path("runs/b c=d")
    assert config.rollout.temperature == 1.0
    assert config.megatron == {"sequence_parallel": True, "tensor_model_parallel_size": 2}
    assert config.preset == "paper"
    assert config.rollout.group_size == 16, "the last override wins"


@pytest.mark.parametrize(
    "override", ["rollout.group_size=4", "--rollout.group_size", "--=4", "-x=1"]
)
def test_malformed_overrides_are_refused(toml, override):
    (line,) = lines_of(toml(MINIMAL), [override])
    assert line == f"found {override!r}, wanted --section.key=value"


def test_an_override_below_a_value_is_refused(toml):
    (line,) = lines_of(toml(MINIMAL), ["--run.folder.name=4"])
    assert line == "--run.folder.name=4: folder is a value, not a table"


def test_all_problems_are_reported_at_once(toml):
    path = toml(
        "preset = 'original'\n[run]\nfolder = 'x'\nstepps = 3\n[data]\ntrain = 7\n"
        "[rollout]\ngroup_size = 4.0\nengine = 'vllm'\n[policy.loss]\nclip = 1.5\n[actor]\nlr = 1\n"
    )
    lines = lines_of(path, ["--rollout.temperature=0", "--prm.measure_after=1", "--prm.lr=fast"])
    found = {line.partition(":")[0]: line for line in lines}
    assert found.keys() == {
        "preset",
        "run.stepps",
        "model",
        "data.train",
        "rollout.group_size",
        "rollout.engine",
        "rollout.temperature",
        "policy.loss.clip",
        "prm.measure_after",
        "prm.lr",
        "actor",
    }
    assert len(lines) == len(found)
    assert "no such knob" in found["run.stepps"]
    assert "no such knob" in found["actor"]
    assert found["model"] == "model: missing; set it in the TOML file or with --model=…"
    assert "found 4.0, wanted: Input should be a valid integer" in found["rollout.group_size"]
    assert "found 'fast'" in found["prm.lr"]
    assert "'released' or 'paper'" in found["preset"]


def test_a_knob_that_stands_elsewhere_is_pointed_to(toml):
    (line,) = lines_of(toml(MINIMAL), ["--model.precision=fp32"])
    assert line == (
        "model.precision: no such knob; set precision.policy.dtype, precision.prm.dtype, "
        "precision.reference.dtype"
    )


def test_a_missing_file_and_a_file_that_is_not_toml(toml, tmp_path):
    (line,) = lines_of(tmp_path / "nowhere.toml")
    assert line.startswith(f"no config file {tmp_path / 'nowhere.toml'}")
    (line,) = lines_of(toml("run = {"))
    assert "run.toml is not TOML" in line


def test_describe_is_toml_that_loads_to_the_same_config(toml, tmp_path):
    config = load(
        toml(MINIMAL + "[precision.prm]\nfp8 = 'e4m3'\n[megatron]\nsequence_parallel = true\n"),
        ["--preset=paper", "--policy.loss.clip=0.1", '--run.folder=runs/"ü 🙂"', "--prm.lr=1e-07"],
    )
    text = describe(config)
    again = tmp_path / "again.toml"
    again.write_text(text)
    assert load(again, []) == config
    assert "# Peak learning rate.\nlr = 1e-07" in text


def test_a_table_within_a_table_is_described_and_overridden(toml, tmp_path):
    """One set from the file, one from the command line, with what TOML must quote."""
    given = toml(MINIMAL + "[evaluate]\nsets = { math500 = 'data/math500.jsonl' }\n")
    config = load(given, ['--evaluate.sets.aime2024=a "b".jsonl'])
    assert config.evaluate.sets == {
        "math500": Path("data/math500.jsonl"),
        "aime2024": Path('a "b".jsonl'),
    }
    again = tmp_path / "again.toml"
    again.write_text(describe(config))
    assert load(again, []) == config
    with pytest.raises(ConfigError, match=r"evaluate.sets"):
        load(given, ["--evaluate.sets={ '../x' = 'y' }"])

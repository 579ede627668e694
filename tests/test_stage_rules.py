"""What the stages refuse at the door, with the knob that mends it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_prime.config import ConfigError, RunConfig
from megatron_prime.validate import check

MODEL = {
    "model_type": "qwen2",
    "hidden_size": 128,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "num_hidden_layers": 6,
    "intermediate_size": 512,
    "max_position_embeddings": 256,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("model", "prm"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(MODEL))
    for name in ("sft.jsonl", "labels.jsonl", "texts.jsonl"):
        (tmp_path / name).touch()
    return tmp_path


def found(folder: Path, command: str, ranks: int = 1, **changes: dict[str, Any]) -> list[str]:
    """What `check` says of a configuration in order but for `changes`."""
    tables: dict[str, dict[str, Any]] = {
        "run": {"folder": folder / "run"},
        "model": {"hf": folder / "model"},
        "data": {"train": folder / "none"},
        "rollout": {"group_size": 4},
        "prm": {"mini_batch_size": 32, "micro_batch_tokens": 256},
        "sft": {"data": folder / "sft.jsonl", "max_length": 256, "micro_batch_tokens": 256},
        "train_prm": {"data": folder / "labels.jsonl", "max_length": 256},
        "score": {
            "input": folder / "texts.jsonl",
            "prm": folder / "prm",
            "reference": folder / "model",
        },
    }
    for name, change in changes.items():
        tables[name] = {**tables.get(name, {}), **change}
    try:
        check(RunConfig.model_validate(tables), command, ranks)
    except ConfigError as error:
        return str(error).splitlines()
    return []


@pytest.mark.parametrize("command", ["sft", "train_prm", "score"])
def test_a_configuration_in_order(folder: Path, command: str) -> None:
    assert found(folder, command) == []
    assert found(folder, command, 4, megatron={"tensor_model_parallel_size": 2}) == []


WRONG = [
    ("sft", {"sft": {"held_out": "absent"}}, "sft.held_out: no file absent"),
    ("train_prm", {"train_prm": {"data": None}}, "train_prm.data: missing"),
    ("train_prm", {"train_prm": {"data": "absent"}}, "train_prm.data: no file absent"),
    ("train_prm", {"train_prm": {"held_out": "absent"}}, "train_prm.held_out: no file absent"),
    ("train_prm", {"train_prm": {"max_length": 300}}, "train_prm.max_length: found 300"),
    ("train_prm", {"prm": {"micro_batch_tokens": 99}}, "prm.micro_batch_tokens: found 99"),
    ("train_prm", {"prm": {"mini_batch_size": 30}}, "prm.mini_batch_size: found 30, wanted a mult"),
    ("train_prm", {"prm": {"forward": "frozen"}}, 'prm.forward: found "frozen", but train_prm'),
    ("train_prm", {"prm": {"reference": "policy"}}, 'prm.reference: found "policy", but labelled'),
    (
        "train_prm",
        {"prm": {"loss": "dpo"}, "rollout": {"group_size": 1}},
        "rollout.group_size: found 1, wanted 2 or more",
    ),
    (
        "train_prm",
        {
            "prm": {"loss": "nca"},
            "rollout": {"group_size": 1},
            "advantage": {"process_weight": 0.0},
        },
        "rollout.group_size: found 1, wanted 2 or more",
    ),
    (
        "train_prm",
        {"prm": {"schedule": "cosine", "warmup_steps": 7}, "train_prm": {"steps": 7}},
        "prm.warmup_steps: found 7, wanted fewer than train_prm.steps = 7",
    ),
    ("score", {"score": {"input": None}}, "score.input: missing"),
    ("score", {"score": {"prm": None}}, "score.prm: missing"),
    ("score", {"score": {"output": "scores.json"}}, "score.output: found scores.json, wanted a"),
    ("score", {"score": {"prm": "absent"}}, "score.prm: no directory absent"),
    ("score", {"score": {"reference": "absent"}}, "score.reference: no absent"),
    ("score", {"score": {"reference": None}}, "score.reference: missing, and"),
]


@pytest.mark.parametrize(("command", "change", "line"), WRONG)
def test_what_is_wrong_is_told_with_its_knob(
    folder: Path, command: str, change: dict[str, Any], line: str
) -> None:
    told = found(folder, command, **change)
    assert any(one.startswith(line) for one in told), told


@pytest.mark.parametrize("command", ["train_prm", "sft"])
def test_a_start_that_is_no_policy_is_refused(folder: Path, command: str) -> None:
    """The checkpoints of train_prm, and the parts of a run's that are no policy."""
    step = folder / "checkpoints" / "step_000001"
    (step / "prm").mkdir(parents=True)
    (step / "run.json").touch()
    (step / "prm" / ".metadata").touch()

    def told(weights: Path) -> list[str]:
        return found(folder, command, model={"weights": weights})

    (line,) = told(step)
    assert line.startswith(f"model.weights: found only prm of a run in {step}, wanted a policy")
    (line,) = told(step / "prm")
    assert line.startswith(f"model.weights: found the prm of a run in {step / 'prm'}, wanted")
    (step / "policy").mkdir()
    (step / "policy" / ".metadata").touch()
    assert told(step) == told(step / "policy") == []


def test_scores_are_not_written_into_the_texts(folder: Path) -> None:
    """Whatever the one file is called, also where score.output is not said."""
    texts = folder / "texts.jsonl"
    (folder / "link.jsonl").symlink_to(texts)
    for output in (texts, folder / "model" / ".." / "texts.jsonl", folder / "link.jsonl"):
        (line,) = found(folder, "score", score={"output": output})
        assert line.startswith(f"score.output: found {output}, which is score.input")
    (folder / "run" / "scores").mkdir(parents=True)
    own = folder / "run" / "scores" / "scores.jsonl"
    own.touch()
    (line,) = found(folder, "score", score={"input": own})
    assert "which is score.input" in line
    assert found(folder, "score", score={"output": folder / "other.jsonl"}) == []


def test_a_folder_of_rollouts_is_data(folder: Path) -> None:
    (folder / "rollouts").mkdir()
    assert found(folder, "train_prm", train_prm={"data": folder / "rollouts"}) == []


def test_scores_have_the_scale_that_the_prm_was_trained_with(folder: Path) -> None:
    made_with = {"model": {"hf": "m"}, "prm": {"beta": 0.1}}
    (folder / "prm" / "run.json").write_text(json.dumps({"config": made_with}))
    (line,) = found(folder, "score")
    assert line.startswith("prm.beta: found 0.05, but the PRM in ")
    assert "was trained with 0.1" in line
    assert found(folder, "score", prm={"beta": 0.1}) == []


def test_a_prm_to_score_with_is_looked_at(folder: Path) -> None:
    """Not only its reference."""
    odd = {**MODEL, "num_key_value_heads": 3}
    (folder / "prm" / "config.json").write_text(json.dumps(odd))
    (line,) = found(folder, "score", 2, megatron={"tensor_model_parallel_size": 2})
    assert line.endswith("does not divide num_key_value_heads = 3 of score.prm")
    (folder / "prm" / "config.json").unlink()
    (line,) = found(folder, "score")
    assert line.startswith(f"score.prm: no {folder / 'prm' / 'config.json'}; wanted")


def test_what_a_run_started_from_may_be_no_hugging_face_checkpoint(folder: Path) -> None:
    """`model.weights`: then its `model.hf` is not what the PRM's log-ratio is to."""
    made_with = {"model": {"hf": "m", "weights": "w"}, "prm": {}}
    (folder / "prm" / "run.json").write_text(json.dumps({"config": made_with}))
    (line,) = found(folder, "score", score={"reference": None})
    assert "started from model.weights = w" in line
    made_with["model"]["weights"] = None  # type: ignore[index]
    (folder / "prm" / "run.json").write_text(json.dumps({"config": made_with}))
    assert found(folder, "score", score={"reference": None}) == []


@pytest.mark.parametrize("command", ["train_prm", "score"])
def test_the_prm_and_its_reference_are_cut_by_tensor_parallelism(
    folder: Path, command: str
) -> None:
    told = found(folder, command, 3, megatron={"tensor_model_parallel_size": 3})
    assert any("does not divide num_key_value_heads = 4" in line for line in told)


@pytest.mark.parametrize(
    ("command", "knob", "changes"),
    [
        ("train_prm", "prm.hf", {}),
        ("score", "score.prm", {}),
        ("score", "score.reference", {"score": {"prm": "model", "reference": "prm"}}),
    ],
)
def test_ids_of_another_tokenizer_are_refused(
    folder: Path, command: str, knob: str, changes: dict[str, dict[str, str]]
) -> None:
    """They would be other words to the PRM than to what made the text."""
    where = {table: {k: folder / v for k, v in knobs.items()} for table, knobs in changes.items()}
    tables = where or {"prm": {"hf": folder / "prm"}}
    for size, told in ((300, []), (299, [knob])):
        for name, tokens in (("model", 300), ("prm", size)):
            model = {**MODEL, "vocab_size": tokens}
            (folder / name / "config.json").write_text(json.dumps(model))
        lines = found(folder, command, **tables)
        assert [line.split(":")[0] for line in lines] == told

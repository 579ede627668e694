"""What can be said of `[rollout]` and `[sglang]` before anything is started."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from megatron_prime import rollout_rules
from megatron_prime.config import ConfigError, RunConfig
from megatron_prime.validate import check

# Eight ranks can share it; four of them hold the same key/value head twice.
MODEL = {
    "model_type": "qwen3",
    "hidden_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 1536,
    "max_position_embeddings": 4096,
}


@pytest.fixture
def found(tmp_path):
    """`found(world_size, sglang={}, command="train", **rollout)`: the problems, a list of lines."""
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    (tmp_path / "data.jsonl").touch()

    def problems(world_size=None, sglang=None, command="train", debug=None, **rollout):
        rollout = {"engine": "sglang", "prompts_per_step": 12, **rollout}
        tables = {
            "run": {"folder": tmp_path / "run"},
            "model": {"hf": tmp_path},
            "data": {"train": tmp_path / "data.jsonl", "eval": tmp_path / "data.jsonl"},
            "policy": {"mini_batch_size": 48},
            "prm": {"mini_batch_size": 48},
            "rollout": rollout,
            "sglang": sglang or {},
            "debug": debug or {},
        }
        try:
            check(RunConfig.model_validate(tables), command, world_size)
        except ConfigError as error:
            return str(error).splitlines()
        return []

    return problems


@pytest.mark.parametrize("command", ["train", "evaluate", "rollout"])
@pytest.mark.parametrize(("ranks", "tp"), [(None, 1), (1, 1), (8, 1), (8, 2), (8, 4), (16, 8)])
def test_servers_in_order(found, command, ranks, tp) -> None:
    options = {"mem_fraction_static": 0.6, "enable_metrics": True}
    python = Path(sys.executable)
    assert found(ranks, options, command, tensor_parallel_size=tp, sglang_python=python) == []


@pytest.mark.parametrize("command", ["train", "evaluate", "rollout"])
@pytest.mark.parametrize(
    ("ranks", "tp", "problem"),
    [
        (6, 4, "found 4, which does not divide the run's 6 ranks"),
        (6, 3, "found 3, wanted a divisor of num_attention_heads = 8"),
        (16, 16, "and a divisor or multiple of num_key_value_heads = 2 of model.hf"),
    ],
)
def test_ranks_that_cannot_share_the_model(found, command, ranks, tp, problem) -> None:
    (line,) = found(ranks, command=command, tensor_parallel_size=tp)
    assert line.startswith("rollout.tensor_parallel_size: ")
    assert problem in line


def test_key_value_heads_that_do_not_meet_the_ranks(found, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(MODEL, "num_attention_heads", 24)
    monkeypatch.setitem(MODEL, "num_key_value_heads", 6)
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    (line,) = found(4, tensor_parallel_size=4)
    assert "multiple of num_key_value_heads = 6" in line
    assert found(2, tensor_parallel_size=2) == []


def test_an_interpreter_that_is_not_there(found, tmp_path) -> None:
    (line,) = found(sglang_python=tmp_path / "bin" / "python")
    assert line.startswith(f"rollout.sglang_python: no file {tmp_path}/bin/python; wanted")


@pytest.mark.parametrize("option", sorted(rollout_rules.REFUSED))
def test_options_that_are_ours(found, option) -> None:
    (line,) = found(sglang={option: "x"})
    assert line == (
        f"sglang.{option}: not for the user to set; {rollout_rules.REFUSED[option]} decides on it"
    )


def test_what_is_ours_is_what_the_server_gets_from_us(tmp_path) -> None:
    from megatron_prime.rollout.sglang_arguments import GPU_DEFAULTS, ServerSpec, server_arguments

    spec = ServerSpec(
        python=Path("python"),
        model_dir=tmp_path,
        tp=1,
        devices=None,
        host="127.0.0.1",
        api_key="k",
        dtype="fp32",
        folder=tmp_path,
        weight_loader="a.b",
    )
    plain = server_arguments(dataclasses.replace(spec), 1, 2)
    changed = server_arguments(
        dataclasses.replace(
            spec,
            model_dir=tmp_path / "m",
            tp=2,
            devices=("0", "1"),
            host="127.0.0.2",
            api_key="l",
            dtype="bf16",
            weight_loader="a.c",
            gives_memory=True,
        ),
        3,
        4,
    )
    ours = {name for name in changed if plain.get(name) != changed[name]} - GPU_DEFAULTS.keys()
    assert ours | {"admin_api_key", "load_format", "skip_tokenizer_init"} == set(
        rollout_rules.OWNED
    )


@pytest.mark.parametrize("knob", ["tensor_parallel_size", "fp8_weights"])
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_knobs_of_sglang_are_not_for_the_local_engine(found, knob, command) -> None:
    value = {"tensor_parallel_size": 2, "fp8_weights": True}[knob]
    (line,) = found(command=command, engine="local", **{knob: value})
    assert line == (
        f"rollout.{knob}: found {str(value).lower()}, which is of SGLang, with rollout.engine = "
        '"local"; remove it, or set that to "sglang"'
    )
    assert found(command=command, engine="local") == []


def test_fp8_blocks_on_each_rank(found) -> None:
    assert found(fp8_weights=True) == []  # 512 rows of queries, 128 of keys
    lines = found(8, fp8_weights=True, tensor_parallel_size=8)
    assert [
        line.split(" of model.hf is ")[0].removeprefix("rollout.fp8_weights: ") for line in lines
    ] == [
        "num_attention_heads * head_dim",
        "num_key_value_heads * head_dim",
        "intermediate_size",
    ]
    assert (
        "is 64 on each of rollout.tensor_parallel_size = 8 ranks, wanted a multiple of 128"
        in (lines[0])
    )


def test_played_rollouts_need_no_engine(found, tmp_path) -> None:
    (tmp_path / "other" / "rollouts").mkdir(parents=True)
    played = {"rollouts_from": tmp_path / "other" / "rollouts"}
    assert found(6, tensor_parallel_size=4, debug=played) == []


def test_both_problems_of_an_engine_are_told_at_once(found, tmp_path) -> None:
    lines = found(6, {"port": 1}, tensor_parallel_size=4, sglang_python=tmp_path / "none")
    assert [line.split(":")[0] for line in lines] == [
        "sglang.port",
        "rollout.sglang_python",
        "rollout.tensor_parallel_size",
    ]

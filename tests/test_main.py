"""The command line: instant help, all problems of a configuration at once, and exit codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_prime import __version__
from megatron_prime.__main__ import COMMANDS, main
from megatron_prime.config import RunConfig, Section
from megatron_prime.config_file import load

LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
HEAVY = {"torch", "transformers", "megatron", "numpy", "matplotlib"}
MODEL = {
    "model_type": "qwen2",
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 8192,
}

# Exit code, standard output, standard error.
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process, as the only one of its run or as one rank of several."""

    def call(*arguments: object, **environ: str) -> tuple[int, str, str]:
        for name in [*LAUNCHERS, *(n for n in os.environ if n.startswith("SLURM_"))]:
            monkeypatch.delenv(name, raising=False)
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:  # argparse
            code = end.code if isinstance(end.code, int) else -1
        return (code, *capsys.readouterr())

    return call


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    """The configuration of a run that could start."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(MODEL))
    for name in ("train.jsonl", "eval.jsonl", "sft.jsonl"):
        (tmp_path / name).touch()
    path = tmp_path / "run.toml"
    path.write_text(
        f'[run]\nfolder = "{tmp_path}/run"\n[model]\nhf = "{tmp_path}/model"\n'
        f'[data]\ntrain = "{tmp_path}/train.jsonl"\neval = "{tmp_path}/eval.jsonl"\n'
    )
    return path


def in_a_process(*arguments: object, **environ: str) -> tuple[int, str, set[str]]:
    """Exit code, output and the packages that were imported."""
    command = [sys.executable, "-X", "importtime", "-m", "megatron_prime", *map(str, arguments)]
    inherited = {name: value for name, value in os.environ.items() if name not in LAUNCHERS}
    found = subprocess.run(command, capture_output=True, text=True, env=inherited | environ)
    imported = re.findall(r"^import time:.*\| +(\w+)", found.stderr, re.MULTILINE)
    said = [line for line in found.stderr.splitlines() if not line.startswith("import time:")]
    return found.returncode, "\n".join([found.stdout, *said]), set(imported)


def test_help_is_instant() -> None:
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "megatron_prime", "--help"], check=True)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.5


def test_help_names_every_command_and_imports_nothing_for_it() -> None:
    code, output, imported = in_a_process("--help")
    assert code == 0
    assert "argparse" in imported
    assert not imported & (HEAVY | {"pydantic"})
    words = " ".join(output.split())
    for command, sentence in COMMANDS.items():
        assert f"{command} {sentence}" in words


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help_of_its_own(run: Run, command: str) -> None:
    code, output, _ = run(command, "--help")
    assert code == 0
    assert "RUN.toml" in output
    assert " ".join(COMMANDS[command].split()) in " ".join(output.split())


def test_version(run: Run) -> None:
    assert run("--version")[:2] == (0, f"megatron_prime {__version__}\n")


@pytest.mark.parametrize("arguments", [[], ["train"], ["learn", "run.toml"]])
def test_a_command_line_that_is_none_is_refused(run: Run, arguments: list[str]) -> None:
    code, _, errors = run(*arguments)
    assert code == 2
    assert "usage: megatron_prime" in errors


def knobs(kind: type[Section] = RunConfig, prefix: str = "") -> list[tuple[str, str]]:
    """Dotted name and sentence of every knob there is."""
    found = []
    for key, field in kind.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            found += knobs(inner, f"{prefix}{key}.")
        else:
            found.append((prefix + key, " ".join((field.description or "").split())))
    return found


def test_config_prints_every_knob_under_its_sentence(run: Run, toml: Path) -> None:
    code, output, errors = run("config", toml, "--prm.beta=0.25")
    assert (code, errors) == (0, "")
    table, comment, found = "", "", {}
    for line in output.splitlines():
        if header := re.fullmatch(r"\[(.+)\]", line):
            table, found[header[1]], comment = f"{header[1]}.", comment, ""
        elif knob := re.match(r"(?:# )?(\w+)(?: = | is not set$)", line):
            found[table + knob[1]], comment = comment, ""
        elif line.startswith("# "):
            comment = f"{comment} {line[2:]}".strip()
        else:
            comment = ""
    assert len(knobs()) > 70
    for name, sentence in knobs():
        assert sentence, name
        assert found[name].endswith(sentence), name  # the first stands under a title
    assert "\nbeta = 0.25\n" in output


def test_what_config_prints_is_the_same_config(run: Run, toml: Path, tmp_path: Path) -> None:
    changes = ["--preset=paper", "--megatron.tensor_model_parallel_size=2", "--policy.lr=3e-7"]
    _, output, _ = run("config", toml, *changes)
    (tmp_path / "again.toml").write_text(output)
    assert run("config", tmp_path / "again.toml") == (0, output, "")
    assert load(tmp_path / "again.toml", []) == load(toml, changes)


def test_knobs_may_stand_before_the_file(run: Run, toml: Path) -> None:
    _, output, _ = run("config", "--run.steps=77", toml)
    assert "\nsteps = 77\n" in output


def test_unknown_knobs_and_wrong_types_are_told_at_once(run: Run, toml: Path) -> None:
    wrong = ["--run.stepz=3", "--policy.lr=fast", "--rollout.group_size=2.5", "--actor.lr=1"]
    code, output, errors = run("train", toml, *wrong)
    assert (code, output) == (2, "")
    first, *lines = errors.splitlines()
    assert first == f"{toml} can't run:"
    assert sorted(line.partition(":")[0] for line in lines) == [
        "actor",
        "policy.lr",
        "rollout.group_size",
        "run.stepz",
    ]


IMPOSSIBLE = {
    "--rollout.group_size=1": "rollout.group_size: found 1",
    "--filter.min_accuracy=0.9": "filter.min_accuracy: found 0.9",
    "--data.eval=absent.jsonl": "data.eval: no file absent.jsonl",
    "--policy.micro_batch_tokens=100": "policy.micro_batch_tokens: found 100",
    "--prm.mini_batch_size=7": "prm.mini_batch_size: found 7",
}


def test_impossible_combinations_are_told_at_once_and_without_torch(toml: Path) -> None:
    torchrun = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # nobody listens there
    code, output, imported = in_a_process(
        "train", toml, *IMPOSSIBLE, RANK="0", WORLD_SIZE="2", **torchrun
    )
    assert code == 2
    assert "pydantic" in imported
    assert not imported & HEAVY
    for message in IMPOSSIBLE.values():
        assert message in output
    assert "Traceback" not in output
    assert not (toml.parent / "run").exists(), "nothing is written before the check"


def test_the_number_of_ranks_is_checked(run: Run, toml: Path) -> None:
    torchrun = {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    code, _, errors = run("train", toml, "--megatron.tensor_model_parallel_size=2", **torchrun)
    assert code == 2
    assert "does not divide the run's 3 ranks" in errors


def test_only_rank_0_speaks_of_the_configuration(run: Run, toml: Path) -> None:
    torchrun = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    assert run("train", toml, "--rollout.group_size=1", **torchrun) == (2, "", "")


def test_a_preflight_needs_some_seconds(run: Run, toml: Path) -> None:
    code, _, errors = run("preflight", toml, "--seconds", "1")
    assert code == 2
    assert "found 1, wanted 5 or more" in errors


@pytest.mark.parametrize("command", ["sft", "evaluate", "train_prm", "score"])
def test_every_command_checks_what_it_needs(run: Run, toml: Path, command: str) -> None:
    toml.write_text(toml.read_text().replace("eval = ", "# "))
    code, _, errors = run(command, toml)
    assert code == 2
    wanted = {
        "sft": "sft.data: missing",
        "evaluate": "data.eval: missing",
        "train_prm": "train_prm.data: missing",
        "score": "score.input: missing",
    }
    assert wanted[command] in errors


def test_a_missing_file(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "absent.toml"
    code, output, errors = run("train", path)
    assert (code, output) == (2, "")
    assert f"no config file {path}" in errors


def test_a_file_that_is_not_toml(run: Run, toml: Path) -> None:
    toml.write_text("[run\n")
    code, _, errors = run("config", toml)
    assert code == 2
    assert f"{toml} is not TOML" in errors


@pytest.mark.parametrize("extra", ["run2.toml", "--run.steps", "--fast"])
def test_an_argument_that_is_no_knob(run: Run, toml: Path, extra: str) -> None:
    code, _, errors = run("config", toml, extra)
    assert code == 2
    assert f"found {extra!r}, wanted --section.key=value" in errors


def test_half_a_launcher(run: Run, toml: Path) -> None:
    code, _, errors = run("train", toml, RANK="0", WORLD_SIZE="2")
    assert code == 2
    assert "MASTER_ADDR, MASTER_PORT" in errors

"""The command line: `python -m megatron_prime COMMAND RUN.toml [--section.key=value …]`.

Started once per rank by torchrun or srun; without either it is a run of one rank. Nothing heavy is
imported before the configuration has been read and checked, and the environment is read only here.
"""

from __future__ import annotations

import argparse
import gc
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from megatron_prime import __version__

if TYPE_CHECKING:
    from megatron_prime.config import RunConfig
    from megatron_prime.runtime.launch import Launch
    from megatron_prime.runtime.rendezvous import Rendezvous

REFUSED = 78  # of a preflight: sysexits' EX_CONFIG, something is not set up as it should be
LATE = 77  # of a preflight: nothing is known to be wrong, but not all answered in time
LAST_S = 1.0  # after a preflight's end, for what Python can't end
GPUS = ("SLURM_JOB_GPUS", "SLURM_STEP_GPUS", "SLURM_GPUS_ON_NODE", "CUDA_VISIBLE_DEVICES")
NO_GPUS = ("", "-1", "NoDevFiles")  # in them
COMMANDS = {
    "preflight": "look whether the nodes can run RUN.toml: a table, and what is wrong, within 60 s",
    "train": "train the policy with PRIME; the same command again continues an interrupted run",
    "sft": "supervised fine-tuning, the stage before PRIME; continues as train does",
    "train_prm": "train the PRM on labelled responses, without a policy; continues as train does",
    "score": "rewards of each token and step of score.input by a trained PRM, as jsonl",
    "evaluate": "accuracy of model.hf, or evaluate.policy, on evaluate.sets, or on data.eval",
    "rollout": "sample and verify for run.steps steps, train nothing, write rollouts/",
    "replay": "run a batch that gave a NaN or infinity again (RUN.toml: its not_finite/… folder)",
    "config": "print the resolved configuration with each knob's sentence",
}
SAVING = ("train", "sft", "train_prm")  # commands with checkpoints


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit codes are those of docs/operations.md."""
    command, path, overrides, given = _parse(arguments)
    from megatron_prime.config import ConfigError
    from megatron_prime.config_file import describe, load
    from megatron_prime.runtime.rendezvous import Rendezvous, rendezvous_from

    here = Rendezvous()
    try:
        here = rendezvous_from(os.environ)
        config = load(path / "config.toml" if command == "replay" else path, overrides)
        if command == "config":
            print(describe(config))
            return 0
        if command == "preflight":
            _preflight(path, config, here, given)
        from megatron_prime.validate import check

        check(config, command, here.world_size)
    except ConfigError as error:
        if here.rank == 0:
            print(f"{path} can't run:\n{error}", file=sys.stderr)
        return 2
    return _run(command, path, config, here)


def _preflight(
    path: Path, config: RunConfig, here: Rendezvous, given: argparse.Namespace
) -> NoReturn:
    """Look at the nodes, for `train`; a rank that can't run says so at the meeting, too."""
    from megatron_prime.config import ConfigError
    from megatron_prime.runtime.exit_timer import ExitTimer, process_age

    last_resort = ExitTimer(0 if given.warn_only else LATE)  # imports may hang, too
    last_resort.set(max(LAST_S, given.seconds + LAST_S - process_age()))

    def decided(code: int) -> None:
        """From now on whatever hangs ends with the verdict."""
        verdict = ExitTimer(code)
        verdict.set(max(LAST_S, given.seconds + LAST_S - process_age()))
        last_resort.set(0)

    from megatron_prime.preflight.door import preflight
    from megatron_prime.preflight.steps import Options
    from megatron_prime.runtime.parent import die_with
    from megatron_prime.runtime.signals import SAVED, StopSignals
    from megatron_prime.validate import check

    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with(os.getppid())
    StopSignals(lambda number: os._exit(SAVED))  # nothing is lost: the same command starts again
    problem = ""
    try:
        check(config, "train", here.world_size)
    except ConfigError as error:
        problem = str(error)
        if here.rank == 0:
            print(f"{path} can't run:\n{error}", file=sys.stderr)
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    options = Options(
        given.seconds,
        0 if given.warn_only else REFUSED,
        0 if given.warn_only else LATE,
        serves_store=not agents,
        asks_for_gpus=_asks_for_gpus(os.environ),
        decided=decided,
    )
    code = preflight(config, problem, here, node, options)
    decided(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # Python's tidying may wait for groups of gloo and NCCL, or be aborted in them


def _asks_for_gpus(environ: Mapping[str, str]) -> bool:
    """Whether Slurm, or who started this, gave GPUs; a CPU's run may be on a node that has some."""
    given = {name: environ.get(name, "") for name in GPUS}
    if given["SLURM_GPUS_ON_NODE"] == "0":  # a number, elsewhere it is a device
        given["SLURM_GPUS_ON_NODE"] = ""
    return any(value not in NO_GPUS for value in given.values())


def _run(command: str, path: Path, config: RunConfig, here: Rendezvous) -> int:
    """Bring the ranks together, run the command on them, and end together."""
    with _objects_that_stay():
        from megatron_prime.errors import Interrupted
        from megatron_prime.runtime.launch import Launch, RanksDontMeet
        from megatron_prime.runtime.parent import die_with, take_forks_along
        from megatron_prime.runtime.signals import SAVED

    if "TORCHELASTIC_RUN_ID" in os.environ:  # a rank of torchrun's, which doesn't see to it
        die_with(os.getppid())
    take_forks_along()
    try:
        launch = Launch(
            here, config.run.lost_after_s, config.run.timeout_s, saves=command in SAVING
        )
    except RanksDontMeet as error:
        print(f"[rank {here.rank}] {error}", file=sys.stderr)
        return 1
    try:
        with _objects_that_stay():
            run = _command(command, path)
        run(config, launch)
    except Interrupted as stop:
        launch.finish()
        if here.rank == 0:
            print(stop, file=sys.stderr)
        return SAVED
    except BaseException as error:  # whatever it is, the other ranks have to hear of it
        return launch.failed(error)
    launch.finish()
    return 0


def _command(command: str, path: Path) -> Callable[[RunConfig, Launch], None]:
    """What does the command, imported."""
    from megatron_prime.runtime.compat import before_megatron_import

    before_megatron_import()
    if command == "replay":
        from megatron_prime.replay import replay

        return partial(replay, folder=path)
    if command == "evaluate":
        from megatron_prime.evaluate import evaluate

        return evaluate
    if command == "score":
        from megatron_prime.score import score

        return score
    if command in ("sft", "train_prm"):
        from megatron_prime import stages

        return stages.sft if command == "sft" else stages.train_prm
    from megatron_prime import build

    return build.rollout if command == "rollout" else build.train


@contextmanager
def _objects_that_stay() -> Iterator[None]:
    """Around imports: what they make is no garbage.

    Looking for it there costs a process a second at the start, and another at the end.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _parse(arguments: list[str] | None) -> tuple[str, Path, list[str], argparse.Namespace]:
    parser = argparse.ArgumentParser(
        prog="megatron_prime",
        description="PRIME: reinforcement learning with an implicit process reward model.",
        epilog="Every knob of RUN.toml can be set as --section.key=value; `config` lists them.",
    )
    parser.add_argument("--version", action="version", version=f"megatron_prime {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, sentence in COMMANDS.items():
        command = commands.add_parser(name, help=sentence, description=sentence)
        command.add_argument("run", type=Path, metavar="RUN.toml")
        if name == "preflight":
            command.add_argument(
                "--seconds", type=_seconds, default=60.0, help="it ends within (default: 60)"
            )
            command.add_argument(
                "--warn-only", action="store_true", help="say what is wrong, and leave with 0"
            )
    known, overrides = parser.parse_known_args(arguments)
    return known.command, known.run, overrides, known


def _seconds(text: str) -> float:
    seconds = float(text)
    if seconds < 5:
        raise argparse.ArgumentTypeError(f"found {text}, wanted 5 or more: Python has to start")
    return seconds


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if code:  # without Python's tidying, which may wait for lost ranks
        os._exit(code)

"""The commands `sft` and `train_prm`: from a checked configuration to a stage's loop and its model.

What differs is the model, its data and the loop (`sft.py`, `train_prm.py`). How a stage is saved,
continued, shown and ended is here, once, and as a PRIME run's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_prime import build, labelled_inputs
from megatron_prime import sft as sft_stage
from megatron_prime import train_prm as prm_stage
from megatron_prime.config import RunConfig
from megatron_prime.data import labelled, sft_data
from megatron_prime.data.chat import load_tokenizer
from megatron_prime.data.epochs import Epochs
from megatron_prime.inputs import report_dropped
from megatron_prime.models.factory import sft_engine, trained_prm
from megatron_prime.models.training import TrainableEngine
from megatron_prime.protocols import Cursor
from megatron_prime.runtime.distributed import WorldRanks
from megatron_prime.runtime.launch import Launch
from megatron_prime.runtime.recorder import RunRecorder
from megatron_prime.stage_steps import StageSteps
from megatron_prime.weights.checkpoint import RunCheckpoints
from megatron_prime.weights.export import export_hf


def sft(config: RunConfig, launch: Launch) -> None:
    """Supervised fine-tuning from `model.hf`; writes a Hugging Face checkpoint."""
    with build.training_session(config, launch, "sft") as ranks:
        knobs = config.sft
        assert knobs.data is not None, "validate.check refuses an sft run without sft.data"
        learnt = conversations_of(config, knobs.data)
        held_out = conversations_of(config, knobs.held_out) if knobs.held_out else ()
        examples = Epochs(
            learnt,
            knobs.mini_batch_size,
            config.run.seed,
            sft_data.fingerprint,
            "conversations, wanted at least sft.mini_batch_size",
        )
        engine = sft_engine(config)
        with steps_of(config, launch, ranks, "sft", engine, examples) as steps:
            sft_stage.run(config, engine, examples, held_out, steps)
        finish(config, ranks, engine, config.model.hf, knobs.output, "fine-tuned model")


def train_prm(config: RunConfig, launch: Launch) -> None:
    """The PRM of `[prm]` taught by labelled responses; writes a Hugging Face checkpoint."""
    with build.training_session(config, launch, "train_prm") as ranks:
        knobs = config.train_prm
        tokenizer = load_tokenizer(config.model.hf)
        learnt, judged = labelled_inputs.groups_of(config, tokenizer, ranks)
        groups = Epochs(
            learnt,
            config.prm.mini_batch_size // config.rollout.group_size,
            config.run.seed,
            labelled.fingerprint,
            "groups of responses, wanted at least prm.mini_batch_size / rollout.group_size",
        )
        # Before the reference speaks, which takes long and leaves a file.
        RunCheckpoints({}, None, groups, config, "train_prm").refuse_others()
        reference, held_out = labelled_inputs.reference_of(config, learnt, judged, ranks)
        prm = trained_prm(config, knobs.steps)
        with steps_of(config, launch, ranks, "train_prm", prm.engine, groups) as steps:
            prm_stage.run(config, prm, reference, groups, held_out, steps)
        source = config.prm.hf or config.model.hf
        finish(config, ranks, prm.engine, source, knobs.output, "trained PRM")


def conversations_of(config: RunConfig, path: Path) -> tuple[sft_data.SftExample, ...]:
    """The conversations of a file; says how many were too long."""
    tokenizer = load_tokenizer(config.model.hf)
    found = sft_data.load_conversations(path, tokenizer, config.sft.max_length)
    report_dropped(path, len(found.examples), found.dropped_long, "sft.max_length")
    return found.examples


@contextmanager
def steps_of(
    config: RunConfig,
    launch: Launch,
    ranks: WorldRanks,
    command: str,
    engine: TrainableEngine,
    data: Cursor,
) -> Iterator[StageSteps]:
    """The steps that the newest checkpoint has not done, with all that a step's end needs."""
    of_prm = command == "train_prm"
    engines = {"prm" if of_prm else "policy": engine}  # as a run's, so that all tools read it
    last = config.train_prm.steps if of_prm else config.sft.steps
    checkpoints = RunCheckpoints(engines, None, data, config, command)
    state = checkpoints.resume()
    done = state.step if state else 0
    build.note_start(config, config.run.folder, ranks)  # not of a start that was refused
    with (
        RunRecorder(config.run.folder, last, ranks.rank, done) as recorder,
        launch.steps(agree=ranks.largest),
    ):
        every = config.checkpoint.every, config.evaluate.every
        yield StageSteps(done, last, *every, recorder, checkpoints, launch.signals)


def finish(
    config: RunConfig,
    ranks: WorldRanks,
    engine: TrainableEngine,
    source: Path,
    output: Path | None,
    name: str,
) -> None:
    """Write the Hugging Face checkpoint and the curves, and say where."""
    output = output or config.run.folder / "hf"
    export_hf(engine.modules, engine.shape, source, output)
    if ranks.rank == 0:
        from megatron_prime.report.curves import draw_curves  # only here: matplotlib is slow

        folder = config.run.folder
        draw_curves(folder / "metrics.jsonl", folder / "curves.png", str(folder))
        print(f"figures  {folder / 'metrics.jsonl'}\ncurves   {folder / 'curves.png'}")
        print(f"{name}: {output}")

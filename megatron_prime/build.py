"""The composition root: from a checked configuration to the roles of a run, and the commands.

Only this file knows every package. A role is chosen here, by name, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.core import parallel_state
from torch.distributed.distributed_c10d import PrefixStore

from megatron_prime import evaluation, loop
from megatron_prime.config import (
    ConfigError,
    ParallelSizes,
    RunConfig,
)
from megatron_prime.data.chat import load_tokenizer
from megatron_prime.data.prompts import PromptStream
from megatron_prime.data.steps import step_reader
from megatron_prime.devices import limits_of, models_on, tell
from megatron_prime.inputs import eval_prompts, eval_sets, prompt_stream, prompts_of
from megatron_prime.models.architecture import transformer_config
from megatron_prime.models.kernels import kernels_line
from megatron_prime.models.precision import Chip, chip_problems
from megatron_prime.protocols import Phase, Roles, RolloutEngine, Verifier
from megatron_prime.report.timeline import drawn_timeline
from megatron_prime.rollout.local_engine import LocalEngine
from megatron_prime.rollout.recorded import RecordedRollouts
from megatron_prime.rollout.sglang_arguments import Share
from megatron_prime.runtime.distributed import WorldRanks, destroy, initialize
from megatron_prime.runtime.launch import Launch
from megatron_prime.runtime.provenance import write_provenance
from megatron_prime.runtime.recorder import RunRecorder
from megatron_prime.runtime.scheduler import PhaseScheduler
from megatron_prime.types import LoopState
from megatron_prime.validate import models_of
from megatron_prime.verify.door import code_limits
from megatron_prime.verify.pool import VerifierPool
from megatron_prime.weights.checkpoint import RunCheckpoints
from megatron_prime.weights.export import export_hf
from megatron_prime.weights.shape import shape_of
from megatron_prime.weights.source import weights_of

if TYPE_CHECKING:
    from megatron_prime.rollout.sglang_engine import SglangEngine


def train(config: RunConfig, launch: Launch) -> None:
    """PRIME from `model.hf`, or from the newest checkpoint of the run folder if there is one."""
    with training_session(config, launch, "train") as ranks, ExitStack() as stack:
        limits = limits_of(config, ranks, launch.here.local_world_size)  # before anything is loaded
        tokenizer = load_tokenizer(config.model.hf)
        verifier = stack.enter_context(verifier_pool(config, ranks))
        gpus = PhaseScheduler(limits, ranks.device)
        models = models_on(gpus, config)
        policy = models.policy
        stream = prompt_stream(config, tokenizer)
        checkpoints = RunCheckpoints(models.saved, policy, stream, config)
        state = checkpoints.resume(gpus.visit) or LoopState()
        engine, checker = rollout_roles(
            config, launch, tokenizer, ranks, stream, verifier, gpus, stack
        )
        note_start(config, config.run.folder, ranks)  # not of a start that was refused
        timeline = stack.enter_context(drawn_timeline(ranks, config.run.folder, state.step))
        recorder = stack.enter_context(
            RunRecorder(
                config.run.folder,
                config.run.steps,
                ranks.rank,
                state.step,
                config.debug.save_rollouts,
                config.rollout.mismatch_alarm,
                timeline.step,
            )
        )
        deadlines = launch.deadlines(config.run.folder, config.deadline)
        gpus.on_phase, gpus.timeline, gpus.deadlines = recorder.phase, timeline, deadlines
        roles = Roles(
            prompts=stream,
            engine=engine,
            verifier=checker,
            ranks=ranks,
            policy=policy,
            prm=models.prm,
            reference=models.reference,
            critic=models.critic,
            gpus=gpus,
            recorder=recorder,
            checkpoints=checkpoints,
            signals=launch.signals,
            steps=step_reader(config.advantage, tokenizer),
            eval_prompts=eval_prompts(config, tokenizer),
            eval_sets=eval_sets(config, tokenizer),
        )
        exported = config.run.folder / "hf"
        with deadlines:
            with launch.steps(agree=ranks.largest):
                loop.run(config, roles, state)
            with gpus.phase(Phase.CHECKPOINT):
                export_hf(policy.engine.modules, policy.engine.shape, config.model.hf, exported)
        if ranks.rank == 0:
            from megatron_prime.report.curves import draw_curves  # only here: matplotlib is slow

            curves = config.run.folder / "curves.png"
            draw_curves(config.run.folder / "metrics.jsonl", curves, str(config.run.folder))
            recorder.summary(curves, exported)


def rollout(config: RunConfig, launch: Launch) -> None:
    """Sample and verify as the first steps of a run would, train nothing; write `rollouts/`."""
    with session(config, launch, ParallelSizes()) as ranks, ExitStack() as stack:
        note_start(config, config.run.folder, ranks)
        tokenizer = load_tokenizer(config.model.hf)
        prompts = PromptStream(prompts_of(config, config.data.train, tokenizer), config.run.seed)
        verifier = stack.enter_context(verifier_pool(config, ranks))
        engine = rollout_engine(config, ParallelSizes(), launch, tokenizer, ranks, stack)
        engine.load_weights(weights_of(config.model.start, config.model.hf), version=0)
        folder = config.run.folder
        recorder = RunRecorder(folder, config.run.steps, ranks.rank, save_rollouts=True)
        with stack.enter_context(recorder), launch.steps(agree=None):
            evaluation.rollouts_only(config, prompts, engine, verifier, ranks, recorder)
        if ranks.rank == 0:
            print(f"rollouts: {folder / 'rollouts'}; train on them with --debug.rollouts_from=…")


@contextmanager
def session(
    config: RunConfig, launch: Launch, sizes: ParallelSizes, name: str = ""
) -> Iterator[WorldRanks]:
    """The process groups of a run; a command's second session wants a `name` of its own."""
    store = PrefixStore(name, launch.store) if name and launch.store else launch.store
    initialize(launch.here, sizes, config.run.seed, config.run.timeout_s, store)
    yield WorldRanks(config.run.timeout_s, store)
    destroy()  # not after an error: giving groups back may wait for a rank that is lost


def note_start(config: RunConfig, folder: Path, ranks: WorldRanks) -> None:
    """Write what starts now into `folder`."""
    if ranks.rank == 0:
        write_provenance(folder, config, ranks.world_size)


@contextmanager
def training_session(
    config: RunConfig, launch: Launch, command: str, name: str = ""
) -> Iterator[WorldRanks]:
    """A session with Megatron models, whose options are checked before any group starts."""
    formats = {name: config.precision.of(name) for name in models_of(config, command)}
    chip = Chip.here()
    if unable := [line for name in formats for line in chip_problems(name, formats[name], chip)]:
        raise ConfigError("\n".join(unable))
    for name, precision in formats.items():
        transformer_config(shape_of(config, name), precision, config.megatron)
    with session(config, launch, config.parallel, name) as ranks:
        if command.startswith(("train", "sft")):  # the others' time does not hang on it
            tell(ranks, kernels_line(config.megatron))
        yield ranks


def verifier_pool(config: RunConfig, ranks: WorldRanks) -> VerifierPool:
    """This rank's checkers, already starting."""
    knobs = config.verify
    return VerifierPool(
        knobs.workers, knobs.timeout_s, timeline=ranks.timeline, code=code_limits(knobs)
    )


def rollout_roles(
    config: RunConfig,
    launch: Launch,
    tokenizer: Any,
    ranks: WorldRanks,
    stream: PromptStream | RecordedRollouts,
    verifier: Verifier,
    gpus: PhaseScheduler,
    stack: ExitStack,
) -> tuple[RolloutEngine, Verifier]:
    """Engine and verifier: live, or both played back by the stream."""
    if isinstance(stream, RecordedRollouts):
        return stream, stream
    with gpus.starting():
        engine = rollout_engine(
            config,
            config.parallel,
            launch,
            tokenizer,
            ranks,
            stack,
            Share(gpus.engine_leaves, gpus.limits.kv_tokens),
        )
    # On a CPU servers keep their memory, whatever they are told.
    gpus.add(engine.buffers(gpus.limits.planned if ranks.device.type == "cuda" else {}))
    if not isinstance(engine, LocalEngine):
        engine.for_sync = partial(gpus.as_in, Phase.SYNC_WEIGHTS)
    return engine, verifier


def rollout_engine(
    config: RunConfig,
    sizes: ParallelSizes,
    launch: Launch,
    tokenizer: Any,
    ranks: WorldRanks,
    stack: ExitStack,
    share: Share | None = None,
) -> LocalEngine | SglangEngine:
    """The engine of this rank; `sizes`: how the source of its weights is split over the ranks."""
    if config.rollout.engine == "sglang":
        from megatron_prime.rollout.sglang_setup import sglang_engine  # aiohttp is not for all runs

        tp_group = parallel_state.get_tensor_model_parallel_group()
        near = launch.here.local_world_size
        engine = sglang_engine(
            config,
            sizes,
            tokenizer,
            ranks.device,
            near,
            launch.store,
            tp_group,
            share,
            ranks.timeline,
        )
        stack.callback(engine.close)
        return engine
    return LocalEngine(
        config.model.hf,
        ranks.rank,
        ranks.world_size,
        config.precision.policy.dtype,
        config.rollout.batch_size,
        tokenizer,
        ranks.device,
        ranks.timeline,
    )

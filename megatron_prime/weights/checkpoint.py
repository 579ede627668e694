"""Everything that a run is, saved so that it is there whole or not at all.

    checkpoints/step_000016/
        policy/  prm/  critic/   Megatron distributed checkpoints: weights, optimizer, schedule
        rng/rank_00003.pt        random states of each rank
        run.json                 step, policy version, data cursor, surplus groups
        manifest.json            size and checksum of all these files; written last

A checkpoint is written under a temporary name and renamed when every rank is done, so a directory
called `step_…` is always complete; only what happens to it later can harm it, and the manifest
shows that before anything is loaded. Weights and optimizer may be loaded by another layout.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from pydantic import TypeAdapter
from torch.distributed.checkpoint.api import CheckpointException

from megatron_prime.config import RunConfig
from megatron_prime.errors import OtherRankFailed, RunError
from megatron_prime.protocols import Cursor, Trained, Versioned
from megatron_prime.runtime.compat import megatron_calls, save_in_process
from megatron_prime.types import LoopState
from megatron_prime.weights import manifest, random_states
from megatron_prime.weights.continuing import changed_knobs
from megatron_prime.weights.manifest import Damage

_LOOP_STATE = TypeAdapter(LoopState)
_STEP = re.compile(r"step_(\d{6,})")
_UNFINISHED = ("writing_*", "removing_*")  # of a run that died while it saved

Visit = Callable[[str], AbstractContextManager[None]]


class CheckpointError(RunError):
    """A checkpoint that can't be read; the message names the file and what to do."""


class RunCheckpoints:
    """The Checkpoints role: saves and finds the checkpoints of one run folder."""

    def __init__(
        self,
        engines: Mapping[str, Trained],  # by the name of their subdirectory
        policy: Versioned | None,  # None: of a stage, which has no rollouts of a policy
        prompts: Cursor,
        config: RunConfig,
        command: str = "train",
    ) -> None:
        self.folder = config.run.folder / "checkpoints"
        self.engines = engines
        self.policy = policy
        self.prompts = prompts
        self.config = config
        self.command = command
        save_in_process()

    def save(self, state: LoopState) -> None:
        """Write the checkpoint of `state.step`; collective. Earlier ones stay if it fails.

        Raises CheckpointError with the cause: a full disk, a quota, missing rights; and, before
        anything is written, when a weight is not finite.
        """
        self._refuse_broken_weights(state.step)
        final = self.folder / f"step_{state.step:06d}"
        temporary = self.folder / f"writing_{final.name}"
        try:
            self._write(temporary, state)
        # Whatever a full disk does to torch, pickle or Megatron; torch's is a BaseException.
        except (Exception, CheckpointException) as error:
            kept = completed(self.folder)
            newest = f"the newest is {kept[-1]}" if kept else "there are none yet"
            raise CheckpointError(
                f"can't save {final}: {_first_cause(error)}; checkpoints of before are as they "
                f"were, {newest}; make room below {self.folder}, or mend what was said, and the "
                "same command continues"
            ) from error
        if dist.get_rank() == 0:
            replaced = _set_aside(final) if final.exists() else None
            temporary.rename(final)
            keep = self.config.checkpoint.keep
            old = [_set_aside(path) for path in completed(self.folder)[:-keep]] if keep else []
            for doomed in [*old, replaced] if replaced else old:
                shutil.rmtree(doomed)
        dist.barrier()

    def _refuse_broken_weights(self, step: int) -> None:
        """A finite gradient may make an infinite weight, and its checkpoint replace a good one."""
        mine = [
            f"{tensor} of {name}"
            for name, engine in self.engines.items()
            for tensor in engine.broken_weights()
        ]
        found: list[list[str]] = [[]] * dist.get_world_size()
        dist.all_gather_object(found, mine)
        if not any(found):
            return
        rank, names = next((rank, names) for rank, names in enumerate(found) if names)
        more = f" and {len(names) - 1} more" if names[1:] else ""
        raise CheckpointError(
            f"step {step} is not saved: weights are NaN or infinite (rank {rank}: {names[0]}{more})"
            f"; checkpoints of before stay in {self.folder}; the lr is too high, or the range of "
            "precision.….dtype too small: start again with others in another run.folder"
        )

    def _write(self, temporary: Path, state: LoopState) -> None:
        rank = dist.get_rank()
        if rank == 0:
            for leftover in [path for name in _UNFINISHED for path in self.folder.glob(name)]:
                shutil.rmtree(leftover)
            for name in (*self.engines, "rng"):
                (temporary / name).mkdir(parents=True)
        dist.barrier()
        for name, engine in self.engines.items():
            with megatron_calls():
                sharded = engine.sharded_state_dict(is_loading=False)
                dist_checkpointing.save(sharded, str(temporary / name))
        random_states.save(temporary / "rng" / f"rank_{rank:05d}.pt")
        if rank == 0:
            (temporary / "run.json").write_text(json.dumps(self._run_state(state)))
        mine = {
            name: manifest.measure(temporary / name, to_disk=True)
            for name in manifest.files_in(temporary)
            if _writer(name) == rank
        }
        parts: list[dict[str, manifest.Entry]] = [{}] * dist.get_world_size()
        dist.all_gather_object(parts, mine)
        if rank == 0:
            manifest.write(temporary, {name: e for part in parts for name, e in part.items()})

    def resume(self, visit: Visit | None = None) -> LoopState | None:
        """Load the newest checkpoint into the models and the data stream; None if there is none.

        `visit`: surrounds the loading of each engine, which it gets by name.
        Raises CheckpointError naming the file that is damaged and the last checkpoint that is not,
        or the knobs that are not what they were when the run began.
        """
        found = self._completed_everywhere()
        if not found:
            return None
        newest = found[-1]
        if damages := self._damages(newest):
            raise CheckpointError(self._explain(damages, found))
        try:
            saved = json.loads((newest / "run.json").read_text())
            self._check_config(saved)
            for name, engine in self.engines.items():
                with visit(name) if visit else nullcontext(), megatron_calls():
                    wanted = engine.sharded_state_dict(is_loading=True)
                    engine.load_state_dict(dist_checkpointing.load(wanted, newest / name))
            rng = newest / "rng" / f"rank_{dist.get_rank():05d}.pt"
            if saved["world_size"] == dist.get_world_size():  # another layout starts new streams
                random_states.restore(rng)
            if self.policy is not None:
                self.policy.version = saved["policy_version"]
            self.prompts.load_state_dict(saved["prompts"])
            return _LOOP_STATE.validate_python(saved["loop"])
        except RunError:
            raise
        # Whatever a damaged file does to torch, pickle or Megatron; torch's is a BaseException.
        except (Exception, CheckpointException) as error:
            older = (
                f"move it away to continue from {found[-2]}" if found[1:] else "it is the only one"
            )
            raise CheckpointError(
                f"can't load checkpoint {newest}: {_first_cause(error)}; {older}"
            ) from error

    def refuse_others(self) -> None:
        """CheckpointError or DataError where `resume` would refuse to continue another run, for
        those who write into the run folder before; what is damaged `resume` tells. Collective."""
        if found := self._completed_everywhere():
            try:
                saved = json.loads((found[-1] / "run.json").read_text())
                prompts, _ = saved["prompts"], saved["config"]
            except (OSError, ValueError, KeyError, TypeError):
                return
            self._check_config(saved)
            self.prompts.load_state_dict(prompts)

    def _completed_everywhere(self) -> list[Path]:
        """Rank 0's list, for a shared file system may show others an older one."""
        found = [completed(self.folder)]
        dist.broadcast_object_list(found, src=0)
        return found[0]

    def _damages(self, checkpoint: Path) -> list[Damage]:
        """Files that are not as they were written; the same list on all ranks, which share it."""
        known = [manifest.read(checkpoint)]
        dist.broadcast_object_list(known, src=0)
        if isinstance(known[0], Damage):
            return [known[0]]
        entries, found = known[0], list[Damage]()
        for name in manifest.share(entries, dist.get_rank(), dist.get_world_size()):
            damage = manifest.check(checkpoint, name, entries[name])
            found += [damage] if damage else []
        parts: list[list[Damage]] = [[]] * dist.get_world_size()
        dist.all_gather_object(parts, found)
        return sorted(damage for part in parts for damage in part)

    def _explain(self, damages: list[Damage], found: list[Path]) -> str:
        """What is damaged, and the command that continues from the last good checkpoint."""
        newest = found[-1]
        more = len(damages) - 1
        others = f" (and {more} more file{'s' * (more > 1)})" if more else ""
        message = f"checkpoint {newest} is damaged: {damages[0]}{others}; "
        moves = list[str]()
        for checkpoint in reversed(found):
            if checkpoint != newest and not self._damages(checkpoint):
                whole = f"{checkpoint.name} is whole; continue from it after"
                return "\n".join([message + whole, *moves])
            moves.append(f"mv {checkpoint} {checkpoint.with_name('damaged_' + checkpoint.name)}")
        return f"{message}no other is whole; bring it back from a copy, or take another run.folder"

    def _check_config(self, saved: dict[str, Any]) -> None:
        began_as = saved.get("command", "train")
        if began_as != self.command:
            raise CheckpointError(
                f"{self.folder} holds checkpoints of the command {began_as}, which {self.command} "
                "can't continue; take another run.folder"
            )
        changed = changed_knobs(self.command, saved["config"], self.config)
        if changed:
            raise CheckpointError(
                f"{self.folder} holds a run with other knobs; set them back to continue it, or "
                "take another run.folder:\n" + "\n".join(changed)
            )

    def _run_state(self, state: LoopState) -> dict[str, Any]:
        return {
            "config": self.config.model_dump(mode="json"),
            "loop": _LOOP_STATE.dump_python(state, mode="json"),
            "command": self.command,
            "policy_version": 0 if self.policy is None else self.policy.version,
            "prompts": self.prompts.state_dict(),
            "world_size": dist.get_world_size(),
        }


def completed(folder: Path) -> list[Path]:
    """The complete checkpoints under `folder`, oldest first."""
    steps = [
        (int(match[1]), path)
        for path in folder.glob("step_*")
        if (match := _STEP.fullmatch(path.name))
    ]
    return [path for _, path in sorted(steps)]


def _set_aside(checkpoint: Path) -> Path:
    """Rename what is to be deleted, so that no half of it is ever called `step_…`."""
    return checkpoint.rename(checkpoint.with_name(f"removing_{checkpoint.name}"))


def _writer(name: str) -> int:
    """The rank that wrote a file of a checkpoint."""
    match = re.search(r"/(?:__|rank_)(\d+)(?:_\d+\.distcp|\.pt)$", name)
    return int(match[1]) if match else 0


def _first_cause(error: BaseException) -> str:
    """What went wrong, in a line; torch collects the errors and tracebacks of all ranks in one.

    Raises OtherRankFailed where torch knows only that some rank had an error.
    """
    if isinstance(error, CheckpointException):
        if not error.failures:
            raise OtherRankFailed("a checkpoint could not be written by another rank") from error
        rank, (error, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {_first_cause(error)}"
    return f"{type(error).__name__}: {error}".partition("\n")[0]

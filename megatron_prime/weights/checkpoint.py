"""Everything that a run is, saved so that it is there whole or not at all.

    checkpoints/step_000016/
        policy/  prm/        Megatron distributed checkpoints: weights, optimizer, schedule
        rng/rank_00003.pt    random states of each rank
        run.json             step, policy version, data cursor, surplus groups; written last

A checkpoint is written under a temporary name and renamed when every rank is done, so a directory
called `step_…` is always complete. Weights and optimizer may be loaded by another TP/PP layout.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from pydantic import TypeAdapter

from megatron_prime.errors import RunError
from megatron_prime.protocols import Cursor, Trained, Versioned
from megatron_prime.runtime.compat import megatron_calls
from megatron_prime.types import LoopState

_LOOP_STATE = TypeAdapter(LoopState)
_STEP = re.compile(r"step_(\d{6,})")


class CheckpointError(RunError):
    """A checkpoint that can't be read; the message names the file and what to do."""


class RunCheckpoints:
    """The Checkpoints role: saves and finds the checkpoints of one run folder."""

    def __init__(
        self,
        folder: Path,
        engines: Mapping[str, Trained],  # by the name of their subdirectory
        policy: Versioned,
        prompts: Cursor,
        keep: int,  # newest that stay; 0 keeps all
    ) -> None:
        self.folder = folder
        self.engines = engines
        self.policy = policy
        self.prompts = prompts
        self.keep = keep

    def save(self, state: LoopState) -> None:
        """Write the checkpoint of `state.step`; collective."""
        final = self.folder / f"step_{state.step:06d}"
        temporary = self.folder / f"writing_{final.name}"
        if dist.get_rank() == 0:
            for leftover in self.folder.glob("writing_*"):  # of a run that died while saving
                shutil.rmtree(leftover)
            for name in (*self.engines, "rng"):
                (temporary / name).mkdir(parents=True)
        dist.barrier()
        for name, engine in self.engines.items():
            with megatron_calls():
                sharded = engine.sharded_state_dict(is_loading=False)
                dist_checkpointing.save(sharded, str(temporary / name))
        torch.save(_rng_state(), temporary / "rng" / f"rank_{dist.get_rank():05d}.pt")
        dist.barrier()
        if dist.get_rank() == 0:
            (temporary / "run.json").write_text(json.dumps(self._run_state(state)))
            if final.exists():
                shutil.rmtree(final)
            temporary.rename(final)
            for old in completed(self.folder)[: -self.keep] if self.keep else []:
                shutil.rmtree(old)
        dist.barrier()

    def resume(self) -> LoopState | None:
        """Load the newest checkpoint into the models and the data stream; None if there is none.

        Raises CheckpointError naming the file when it can't be read.
        """
        found = completed(self.folder)
        if not found:
            return None
        newest = found[-1]
        try:
            saved = json.loads((newest / "run.json").read_text())
            for name, engine in self.engines.items():
                with megatron_calls():
                    wanted = engine.sharded_state_dict(is_loading=True)
                    engine.load_state_dict(dist_checkpointing.load(wanted, str(newest / name)))
            rng = newest / "rng" / f"rank_{dist.get_rank():05d}.pt"
            if saved["world_size"] == dist.get_world_size():  # another layout starts new streams
                _restore_rng(torch.load(rng, weights_only=False))
        except (OSError, EOFError, RuntimeError, ValueError, KeyError) as error:
            older = (
                f"move it away to continue from {found[-2]}" if found[1:] else "it is the only one"
            )
            raise CheckpointError(f"can't load checkpoint {newest}: {error}; {older}") from error
        self.policy.version = saved["policy_version"]
        self.prompts.load_state_dict(saved["prompts"])
        return _LOOP_STATE.validate_python(saved["loop"])

    def _run_state(self, state: LoopState) -> dict[str, Any]:
        return {
            "loop": _LOOP_STATE.dump_python(state, mode="json"),
            "policy_version": self.policy.version,
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


def _rng_state() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "megatron": get_cuda_rng_tracker().get_states(),
    }


def _restore_rng(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["megatron"])

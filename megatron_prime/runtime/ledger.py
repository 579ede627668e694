"""Who holds how many bytes, by owner and kind: what the plan says and what is measured.

After each transition the ledger is checked: what the phase's row names is on the device, whole, and
of the size that was planned; what it does not name has left (freed means freed). The same table
stands in every out-of-memory error, with the knob that would help.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from megatron_prime.errors import RunError
from megatron_prime.planner.residency import Buffers, Table
from megatron_prime.runtime.memory import Buffer

GIB = 2**30
TOLERANCE = 0.01  # of a buffer's planned bytes
ROUNDING = 2**26  # bytes that the allocator's blocks may make
_UNCHECKED = ("fp8_copies", "cuda_graphs")  # the plan's figures were never held against a GPU


class LedgerError(RunError, AssertionError):
    """A buffer is not where it should be, or not of the planned size: a mistake of ours."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the plan allows and expects, for this rank."""

    table: Table
    budget: int | None = None  # bytes of all buffers and the phase's work; None: no limit
    planned: Mapping[str, int] = field(default_factory=dict)  # of each buffer
    work: Mapping[str, int] = field(default_factory=dict)  # of each phase beside its buffers
    starts_empty: bool = False  # models make room for the servers' start
    kv_tokens: int | None = None  # of each server's key/value cache


class Ledger:
    """Compares `limits` with the buffers themselves."""

    def __init__(self, limits: Limits, buffers: Mapping[str, Buffer]) -> None:
        """`buffers` may grow."""
        self.limits, self._buffers = limits, buffers

    def check(self, phase: str, present: Buffers) -> int:
        """Bytes on the device. Raises LedgerError for a buffer that is not as it should be."""
        total = 0
        for name, buffer in self._buffers.items():
            device, _ = buffer.held()
            total += device
            whole = sum(piece.nbytes for piece in buffer.pieces)
            wanted = whole if name in present else 0
            if device != wanted:
                raise LedgerError(
                    f"{name} has {device} bytes on the device in {phase}, wanted {wanted}; this "
                    "is a mistake in megatron_prime, please report it\n" + self.table(phase)
                )
            planned = self.limits.planned.get(name, whole)
            checked = whole and not name.endswith(_UNCHECKED)  # moments come with the first step
            if checked and abs(whole - planned) > TOLERANCE * planned:
                raise LedgerError(
                    f"{name} has {whole} bytes, but {planned} were planned; the plan of this run "
                    "is wrong, please report it; memory.start_anyway = true runs without a plan\n"
                    + self.table(phase)
                )
        return total

    @contextmanager
    def of_allocator(self, phase: str) -> Iterator[None]:
        """Around moves: what left our buffers on a GPU must have come back to torch's allocator.

        Raises LedgerError when somebody else still holds it. Does nothing without a GPU.
        """
        if not torch.cuda.is_initialized():
            yield
            return
        allocated, held = torch.cuda.memory_allocated(), self._own()
        yield
        freed, left = allocated - torch.cuda.memory_allocated(), held - self._own()
        if freed < left - max(TOLERANCE * abs(left), ROUNDING):
            raise LedgerError(
                f"torch's allocator got back {freed} bytes of the {left} that left in {phase}: "
                "something else holds them; this is a mistake in megatron_prime, please report it\n"
                + self.table(phase)
            )

    def _own(self) -> int:
        """Bytes on the device, without those of other processes."""
        return sum(b.held()[0] for b in self._buffers.values() if not b.collective)

    def table(self, phase: str) -> str:
        """Every buffer: planned, and measured on device and host, the largest first."""
        held = {name: buffer.held() for name, buffer in self._buffers.items()}
        planned = self.limits.planned
        names = sorted(held.keys() | planned.keys(), key=lambda n: (-held.get(n, (0, 0))[0], n))
        lines = [f"{'GiB in ' + phase:24}{'planned':>10}{'device':>10}{'host':>10}"]
        for name in names:
            device, host = held.get(name, (0, 0))
            on = planned.get(name, 0) if name in self.limits.table.get(phase, ()) else 0
            if on or device or host:
                lines.append(f"{name:24}{on / GIB:>10.3f}{device / GIB:>10.3f}{host / GIB:>10.3f}")
        work = self.limits.work.get(phase, 0)
        lines.append(f"{'work of the phase':24}{work / GIB:>10.3f}")
        return "\n".join([*lines, f"what would help: {knob(phase)}"])


def knob(phase: str) -> str:
    """The knob that matters most for a phase's memory, and the command that compares them all."""
    of_phase = {
        "start": "more ranks per model",
        "generate": "sglang.mem_fraction_static or rollout.batch_size, lower",
        "evaluate": "sglang.mem_fraction_static or rollout.batch_size, lower",
        "score": "policy.micro_batch_tokens and prm.micro_batch_tokens, lower",
        "update_prm": "prm.micro_batch_tokens, lower",
        "update_critic": "critic.micro_batch_tokens, lower",
        "update_policy": "policy.micro_batch_tokens, lower",
        "sync_weights": "rollout.sync_bucket_mib, lower",
        "checkpoint": "more ranks per model",
    }
    return (
        f'{of_phase[phase]}; memory.offload = "always"; '
        "more tensor- or pipeline-parallel ranks; python tools/plan.py memory compares them"
    )

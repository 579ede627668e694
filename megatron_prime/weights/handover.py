"""Where a trainer's rank hands new weights to the SGLang process on its device.

Two buffers take turns: while the engine copies one round of the plan into its parameters, the
trainer fills the other. The buffers lie in shared memory on a CPU; on a GPU they are the trainer's,
and the engine opens them by CUDA IPC. All else lies in one piece of shared memory without a name (a
memfd, which no crash leaves behind), that the engine opens once through `/proc/PID/fd`:

    header      counters, the only thing both sides wait on    checksums   one per piece, engine's
    reply       text of the engine: what went wrong            layout      JSON: where pieces belong

A sync goes: the trainer calls `begin`, asks the server over HTTP to load, and `publish`es round
after round; the engine answers each with `loaded`, and at the end with its checksums. Both sides
poll, for at most a given time. Only torch and the standard library are imported: the module runs
inside SGLang's processes, too.
"""

from __future__ import annotations

import base64
import json
import mmap
import os
import pickle
import secrets
import time
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

# The header. Counters carry the number of their sync, for an engine may still be at the last one
# when the trainer has given that up; each has one writer.
_PUBLISHED, _GIVEN_UP, _LOADED, _STATE, _REPLY_BYTES, _KEY = range(6)
_HEADER_BYTES, _REPLY_ROOM = 4096, 2**20
_PAGE = 4096
_TAG = 2**32
_DONE, _FAILED = 1, 2  # states of the engine


class HandoverError(RuntimeError):
    """The other side did not do its part."""


@dataclass(frozen=True, slots=True)
class Placed:
    """Where a piece lies in a buffer, and where it belongs in the engine's parameters."""

    parameter: str
    region: list[list[int]]  # (start, stop) per dimension, of the parameter
    offset: int  # bytes, in the buffer
    dtype: str  # torch's name


@dataclass(frozen=True, slots=True)
class HandoverLayout:
    """What the engine has to know before the first sync."""

    parameters: dict[str, list[int]]  # every live parameter and its size
    dtypes: dict[str, str]
    rounds: list[list[Placed]]
    buffer_bytes: int
    timeout_s: float  # how long the engine waits for one round

    def to_json(self) -> str:
        """As text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> HandoverLayout:
        """Inverse of `to_json`."""
        found: dict[str, Any] = json.loads(text)
        found["rounds"] = [[Placed(**piece) for piece in pieces] for pieces in found["rounds"]]
        return cls(**found)

    @property
    def pieces(self) -> int:
        """Number of pieces in all rounds."""
        return sum(map(len, self.rounds))


class Handover:
    """One side's view of the shared memory; `buffers` are uint8 tensors on the device."""

    def __init__(self, memory: mmap.mmap, layout: HandoverLayout) -> None:
        """Use `create` or `open`."""
        self.layout = layout
        self._memory, self._sync = memory, 0
        self._header = torch.frombuffer(memory, dtype=torch.int64, count=_HEADER_BYTES // 8)
        first, count = _HEADER_BYTES, max(1, layout.pieces)
        self.checksums = torch.frombuffer(memory, dtype=torch.int64, count=count, offset=first)
        self._reply_at = first + 8 * count
        self.buffers: tuple[Tensor, Tensor]
        self.ticket = ""  # what `open` wants; only the trainer's side has one
        # Nobody can open it any more; what is open stays so. The engine's side closes nothing.
        self.close: Callable[[], object] = lambda: None

    @classmethod
    def create(cls, layout: HandoverLayout, device: torch.device) -> Handover:
        """The trainer's side; closed when it is no longer used."""
        text = layout.to_json().encode()
        on_gpu = device.type == "cuda"
        reply_end = _HEADER_BYTES + 8 * max(1, layout.pieces) + _REPLY_ROOM
        data_at = -(-(reply_end + len(text)) // _PAGE) * _PAGE
        file = os.memfd_create("megatron_prime_handover")
        os.ftruncate(file, data_at + (0 if on_gpu else 2 * _whole_pages(layout.buffer_bytes)))
        memory = mmap.mmap(file, 0)
        memory[reply_end : reply_end + len(text)] = text
        handover = cls(memory, layout)
        handover.close = weakref.finalize(handover, os.close, file)
        handle = ""
        if on_gpu:
            size = 2 * _whole_pages(layout.buffer_bytes)
            both = torch.empty(size, dtype=torch.uint8, device=device)
            shared = both.untyped_storage()._share_cuda_()
            handle = base64.b64encode(pickle.dumps(shared)).decode()
            handover.buffers = _halves(both, layout.buffer_bytes)
        else:
            both = torch.frombuffer(memory, dtype=torch.uint8, offset=data_at)
            handover.buffers = _halves(both, layout.buffer_bytes)
        key = secrets.randbelow(2**62)
        handover._header[_KEY] = key
        handover.ticket = json.dumps(
            {
                "path": f"/proc/{os.getpid()}/fd/{file}",
                "key": key,
                "layout": [reply_end, len(text)],
                "data": data_at,
                "cuda": handle,
            }
        )
        return handover

    @classmethod
    def open(cls, ticket: str, device: torch.device) -> Handover:
        """The engine's side, from the trainer's `ticket`.

        Raises HandoverError when that leads nowhere, or to something else.
        """
        found = json.loads(ticket)
        memory = _opened(found["path"], found["key"])
        start, length = found["layout"]
        handover = cls(memory, HandoverLayout.from_json(memory[start : start + length].decode()))
        nbytes = handover.layout.buffer_bytes
        if found["cuda"]:
            # The first field is the device's number in the trainer's process; here it is ours.
            _, *others = pickle.loads(base64.b64decode(found["cuda"]))
            index = torch.cuda.current_device() if device.index is None else device.index
            storage = torch.UntypedStorage._new_shared_cuda(index, *others)
            both = torch.empty(0, dtype=torch.uint8, device=torch.device("cuda", index))
            both.set_(storage, 0, (2 * _whole_pages(nbytes),), (1,))
        else:
            both = torch.frombuffer(memory, dtype=torch.uint8, offset=found["data"])
        handover.buffers = _halves(both, nbytes)
        return handover

    # ------------------------------------------------------------------ the trainer's side

    def begin(self, sync: int) -> None:
        """Start sync number `sync` (1, 2, …), whatever became of the last one."""
        self._sync = sync
        self.checksums.zero_()
        self._header[_PUBLISHED] = _tagged(sync, 0)

    def wait_free(self, round_: int, timeout_s: float, alive: Callable[[], bool]) -> None:
        """Return when the round's buffer may be filled.

        Raises HandoverError when the engine reports a failure, is not `alive`, or takes longer than
        `timeout_s`.
        """
        self._wait(lambda: self._read(_LOADED) >= round_ - 1, timeout_s, alive)

    def publish(self, round_: int) -> None:
        """The round's buffer is full; on a GPU, after its stream has come so far."""
        if self.buffers[0].is_cuda:
            torch.cuda.current_stream().synchronize()
        self._header[_PUBLISHED] = _tagged(self._sync, round_ + 1)

    def wait_done(self, timeout_s: float, alive: Callable[[], bool]) -> list[int]:
        """The engine's checksums, one per piece; HandoverError as in `wait_free`."""
        self._wait(lambda: self._read(_STATE) == _DONE, timeout_s, alive)
        return [int(found) for found in self.checksums[: self.layout.pieces].tolist()]

    def give_up(self) -> None:
        """Let an engine that still waits for a round return."""
        self._header[_GIVEN_UP] = self._sync

    def _wait(
        self, reached: Callable[[], bool], timeout_s: float, alive: Callable[[], bool]
    ) -> None:
        deadline, pause = time.monotonic() + timeout_s, 1e-5
        while not reached():
            if self._read(_STATE) == _FAILED:
                length = int(self._header[_REPLY_BYTES])
                said = self._memory[self._reply_at : self._reply_at + length]
                raise HandoverError(
                    "the rollout engine could not load new weights: "
                    + said.decode(errors="replace")  # it may be cut in the middle of a letter
                )
            if pause > 1e-3 and not alive() and not reached():
                raise HandoverError("the rollout engine died while it loaded new weights")
            if time.monotonic() > deadline:
                raise HandoverError(
                    f"the rollout engine did not load a bucket within {timeout_s:g} s "
                    "(rollout.sync_timeout_s)"
                )
            time.sleep(pause)
            pause = min(2 * pause, 2e-3)

    def _read(self, counter: int) -> int:
        """The engine's counter; 0 while it speaks of another sync."""
        sync, number = divmod(int(self._header[counter]), _TAG)
        return number if sync == self._sync else 0

    # ------------------------------------------------------------------ the engine's side

    def wait_published(self, sync: int, round_: int) -> bool:
        """True when the round can be loaded; False when the trainer has given this sync up."""
        self._sync = sync
        deadline, pause = time.monotonic() + self.layout.timeout_s, 1e-5
        while self._read(_PUBLISHED) <= round_:
            newest = int(self._header[_PUBLISHED]) // _TAG
            if newest != sync or int(self._header[_GIVEN_UP]) >= sync:
                return False
            if time.monotonic() > deadline:
                raise HandoverError(f"no round {round_} within {self.layout.timeout_s:g} s")
            time.sleep(pause)
            pause = min(2 * pause, 2e-3)
        return True

    def loaded(self, round_: int) -> None:
        """The round's buffer may be filled anew."""
        self._header[_LOADED] = _tagged(self._sync, round_ + 1)

    def done(self) -> None:
        """All rounds are loaded, all checksums written."""
        self._header[_STATE] = _tagged(self._sync, _DONE)

    def failed(self, sync: int, reason: str) -> None:
        """Tell the trainer what went wrong."""
        said = reason.encode()[:_REPLY_ROOM]
        self._memory[self._reply_at : self._reply_at + len(said)] = said
        self._header[_REPLY_BYTES] = len(said)
        self._header[_STATE] = _tagged(sync, _FAILED)


def _tagged(sync: int, number: int) -> int:
    return sync * _TAG + number


def _opened(path: str, key: int) -> mmap.mmap:
    """The trainer's memory, which has the ticket's key in its header."""
    try:
        file = os.open(path, os.O_RDWR)
        try:
            memory = mmap.mmap(file, 0)
        finally:
            os.close(file)
        found = int.from_bytes(memory[8 * _KEY : 8 * _KEY + 8], "little")
    except (OSError, ValueError) as error:  # gone; of another user; another process of that number
        found, reason = None, f": {error}"
    else:
        reason = ", which holds something else"
    if found != key:
        raise HandoverError(
            f"the trainer's memory is not at {path}{reason}; trainer and server must run on one "
            "machine, as one user, in one namespace of processes (the same container)"
        )
    return memory


def _whole_pages(nbytes: int) -> int:
    """Rounded up, so that the second buffer starts where any type of values may."""
    return -(-nbytes // _PAGE) * _PAGE


def _halves(both: Tensor, nbytes: int) -> tuple[Tensor, Tensor]:
    second = _whole_pages(nbytes)
    return both[:nbytes], both[second : second + nbytes]

"""The servers' device memory, by kind, given back and taken again over HTTP.

SGLang knows three tags: weights, key/value cache, CUDA graphs. What it released comes back with
undefined content. A server must be idle when it releases, or it dies; so its cache is flushed
first, which it refuses while it works. All ranks call alike, for a server lies on the devices of
several, and none may use what another's server has not given back yet.

On a CPU SGLang goes through the same states but keeps its memory: buffers are of no bytes there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from megatron_prime.rollout.engine_group import EngineGroup
from megatron_prime.rollout.sglang_answers import SglangError
from megatron_prime.rollout.sglang_client import SglangClient
from megatron_prime.rollout.weight_sync import Problem
from megatron_prime.runtime.memory import Buffer

TAGS = {"weights": "weights", "kv_cache": "kv_cache", "cuda_graphs": "cuda_graph"}  # by our kind


class ServerMemory:
    """What this rank's server holds; `away` are the tags that all servers have released."""

    def __init__(
        self,
        group: EngineGroup,
        ready: Callable[[], None],
        lost: Callable[[dict[int, Problem]], None],
        patience_s: float,
    ) -> None:
        """`ready` returns when all servers are up; `lost` makes servers anew, by their problems.

        `patience_s`: how long a server may take to get idle, and to answer.
        """
        self._group, self._ready, self._lost = group, ready, lost
        self._patience_s = patience_s
        self.away: set[str] = set()

    def release(self, tag: str) -> None:
        """Have all servers give the memory of `tag` back; returns when all have. Collective."""
        self._ready()
        self.away.add(tag)
        self._ask("release", [tag], range(self._group.member.servers))

    def resume(self, tag: str) -> None:
        """Have all servers take memory for `tag` again. Collective."""
        self._ready()
        self.away.discard(tag)
        self._ask("resume", [tag], range(self._group.member.servers))

    def restarted(self, servers: Iterable[int]) -> None:
        """New processes hold everything: let them release what the others have. Collective."""
        if self.away:
            self._ask("release", sorted(self.away), servers)

    def _ask(self, verb: str, tags: Sequence[str], servers: Iterable[int]) -> None:
        member, problem = self._group.member, None
        self._group.gathered(None)  # a server takes memory of several ranks' devices: all are ready
        if member.leads and member.server in servers:
            call = _quietly(self._group.client, verb, tags, self._patience_s)
            try:
                self._group.ask(call).result()
            except SglangError as error:  # dead or hung: it is made anew, on all ranks alike
                problem = f"{verb} of {', '.join(tags)}: {error}\n{self._group.log_tail()}"
        found = self._group.gathered(problem)
        problems = {
            rank // member.tp: Problem(text, restart=True)
            for rank, text in enumerate(found)
            if text is not None
        }
        if problems:
            self._lost(problems)


class TaggedMemory:
    """One tag of this rank's server, as a piece that a scheduler moves."""

    def __init__(self, memory: ServerMemory, tag: str, nbytes: int) -> None:
        """`nbytes`: what the plan says that it takes of this rank's device."""
        self._memory, self._tag, self.nbytes = memory, tag, nbytes
        self._here = True

    def put_away(self) -> int:
        """Nothing is copied."""
        return 0

    def free(self) -> None:
        """Release it."""
        self._memory.release(self._tag)
        self._here = False

    def allocate(self) -> None:
        """Take it again; the content is anything."""
        self._memory.resume(self._tag)
        self._here = True

    def take_back(self) -> int:
        """Nothing is copied."""
        return 0

    def written(self) -> None:
        """There is no copy."""

    def held(self) -> tuple[int, int]:
        """Bytes on device and host; the server's own word is not asked."""
        return self.nbytes if self._here else 0, 0


def server_buffers(
    memory: ServerMemory, planned: Mapping[str, int], weights_left: Callable[[], None]
) -> list[Buffer]:
    """The engine's buffers; `planned`: bytes by name, none for what takes nothing."""
    found = []
    for kind, tag in TAGS.items():
        pieces = [TaggedMemory(memory, tag, planned.get(f"engine.{kind}", 0))]
        left = weights_left if kind == "weights" else None
        buffer = Buffer(f"engine.{kind}", pieces.copy, left=left, collective=True)
        found.append(buffer)
    return found


async def _quietly(client: SglangClient, verb: str, tags: Sequence[str], patience_s: float) -> None:
    """Wait until the server is idle, then ask. Raises SglangError."""
    if verb == "release":
        await client.drained(patience_s)
    await client.occupy(verb, tags, patience_s)

"""The ranks that one SGLang server belongs to, and what all ranks tell each other about servers.

Server i serves the devices of ranks i * tp to i * tp + tp - 1; the first of them, its leader,
starts it, speaks to it and kills it. Speaking happens in a thread with an event loop of its own, so
that the leader's main thread can verify responses, or send weights, at the same time.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import psutil
import torch.distributed as dist

from megatron_prime.config import ConfigError
from megatron_prime.rollout.sglang_arguments import ServerSpec
from megatron_prime.rollout.sglang_client import SglangClient
from megatron_prime.rollout.sglang_server import ServerNotStarted, SglangServer

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Membership:
    """This rank among the ranks and servers of the run."""

    rank: int
    world_size: int
    tp: int

    @property
    def server(self) -> int:
        """The server that this rank's device belongs to."""
        return self.rank // self.tp

    @property
    def servers(self) -> int:
        """Number of servers."""
        return self.world_size // self.tp

    @property
    def leads(self) -> bool:
        """Whether this rank starts its server and speaks to it."""
        return self.rank % self.tp == 0


class EngineGroup:
    """One server as its ranks see it; `gathered` and `wait_ready` are called by all ranks alike."""

    def __init__(
        self, member: Membership, spec: ServerSpec, device_name: str | None, group: Any
    ) -> None:
        """Start the server, without waiting for it.

        `spec` without devices; `device_name`: this rank's GPU as CUDA_VISIBLE_DEVICES has it, None
        on a CPU. `group`: a gloo group of all ranks. Raises ConfigError if a server's ranks are
        not on one node.
        """
        self.member = member
        self._group = group
        places: list[tuple[str, str | None]] = self.gathered((socket.gethostname(), device_name))
        mine = places[member.server * member.tp : (member.server + 1) * member.tp]
        if len({host for host, _ in mine}) > 1:
            raise ConfigError(
                f"rollout.tensor_parallel_size: found {member.tp}, but the ranks of server "
                f"{member.server} are on {sorted({host for host, _ in mine})}; wanted a divisor of "
                "the ranks per node"
            )
        devices = tuple(name for _, name in mine if name is not None)
        self._server = SglangServer(replace(spec, devices=devices or None))
        self._pid = 0
        self._client: SglangClient | None = None  # once the server is up
        self._loop: asyncio.AbstractEventLoop | None = None
        if member.leads:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="sglang", daemon=True).start()
            self._server.start()

    @property
    def client(self) -> SglangClient:
        """Of the leader, once its server is up."""
        assert self._client is not None, "wait_ready comes first, and only leaders have one"
        return self._client

    def gathered(self, value: T) -> list[T]:
        """Every rank's value, by rank."""
        found: list[T] = [value] * self.member.world_size
        dist.all_gather_object(found, value, group=self._group)
        return found

    def wait_ready(self) -> dict[int, str]:
        """Wait until all servers are up; what went wrong with those that did not come up."""
        pid, problem = 0, None
        if self.member.leads and self._client is None:
            try:
                self._server.ready()
                self._client = SglangClient(self._server.url, self._server.spec.api_key)
                self.ask(self._client.__aenter__()).result()
            except ServerNotStarted as error:  # tried again, or the run ends, on all ranks alike
                problem = str(error)
        if self.member.leads:
            pid = self._server.pid or 0
        found = self.gathered((pid, problem))
        self._pid, _ = found[self.member.server * self.member.tp]
        return {
            rank // self.member.tp: problem
            for rank, (_, problem) in enumerate(found)
            if problem is not None
        }

    def restart(self) -> None:
        """Kill this leader's server and start it anew, unless that is done; then `wait_ready`."""
        if self._client is not None or not self._server.alive():
            self._hang_up()
            self._server.kill()
            self._server.start()

    def alive(self) -> bool:
        """Whether this rank's server runs."""
        if self.member.leads:
            return self._server.alive()
        try:
            return bool(psutil.Process(self._pid).status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False

    def log_tail(self) -> str:
        """The last lines of this rank's server's log."""
        return f"{self._server.log_file} ends with\n{self._server.log_tail(20)}"

    def ask(self, call: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a call of the client in the leader's event loop."""
        assert self._loop is not None, "only the leader speaks to its server"
        return asyncio.run_coroutine_threadsafe(call, self._loop)

    def close(self) -> None:
        """Hang up, kill the server, end what is still asked of it. Once is enough."""
        if self._loop is not None:
            self._hang_up()
            self._server.kill()
            self.ask(_cancel_others()).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._loop = None

    def _hang_up(self) -> None:
        if self._client is not None:
            self.ask(self._client.__aexit__(None, None, None)).result()
        self._client = None


async def _cancel_others() -> None:
    """End all tasks of this event loop but the present one."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)

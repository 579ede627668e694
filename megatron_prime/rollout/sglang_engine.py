"""The rollout engine on real SGLang servers, colocated with the trainer.

Generation goes in passes. In a pass the leaders take prompts from one shared list, each as many as
its server can work on, and hand out groups as they get ready, so that they are verified while
others are still sampled. At the end of a pass all ranks tell each other what was answered and which
servers died or hang. Those are restarted, get the present weights, and only what nobody has
answered goes into another pass: no rollout is lost and none counted twice. When a server has failed
more than `rollout.max_restarts` times in a step, the run stops with the last lines of its log.

New weights go shard to shard, `weight_sync.py`. A sync whose checksums differ is done again, whole.
"""

from __future__ import annotations

import queue
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from torch.distributed.distributed_c10d import Store

from megatron_prime.errors import RunError
from megatron_prime.options import RolloutSection
from megatron_prime.protocols import Tally, WeightSource
from megatron_prime.rollout.engine_group import EngineGroup
from megatron_prime.rollout.generation import Limits, Partial, Pass, PassRunner, in_flight
from megatron_prime.rollout.local_engine import Tokenizer
from megatron_prime.rollout.server_memory import ServerMemory, server_buffers
from megatron_prime.rollout.sglang_answers import SglangError
from megatron_prime.rollout.sglang_server import ServerNotStarted
from megatron_prime.rollout.weight_sync import LOADER, Problem, WeightSync
from megatron_prime.runtime.memory import Buffer
from megatron_prime.runtime.timeline import Timeline
from megatron_prime.types import Group, Metrics, Prompt, Sampling

COUNTED = ("rollout/server_restarts", "rollout/repeated_syncs", "rollout/continued_tokens")


class TooManyRestarts(RunError):
    """Servers die again and again."""


class SglangEngine:
    """The RolloutEngine role on SGLang servers; every rank has one and calls it alike."""

    version = -1

    def __init__(
        self,
        group: EngineGroup,
        sync: WeightSync,
        knobs: RolloutSection,
        tokenizer: Tokenizer,
        stop_ids: Sequence[int],
        store: Store,
        timeline: Timeline | None = None,
    ) -> None:
        """`stop_ids` end a response; `store`: where the leaders share out the prompts."""
        self._group, self._sync, self._knobs = group, sync, knobs
        self._tokenizer, self._stop_ids, self._store = tokenizer, stop_ids, store
        self._timeline = timeline or Timeline()
        self._weights: WeightSource | None = None
        self._bare: set[int] = set()  # servers that were made anew and have no weights yet
        self._ready = False
        self._passes = 0
        self._failures: Counter[int] = Counter()  # by server, since the last `take_metrics`
        self._partials: dict[int, tuple[Partial, ...]] = {}
        self._metrics: Metrics = {}
        self.for_sync: Callable[[], AbstractContextManager[None]] = nullcontext  # has the weights
        self.memory = ServerMemory(group, self._await_servers, self._lost, knobs.hang_timeout_s)

    def buffers(self, planned: Mapping[str, int]) -> list[Buffer]:
        """What the servers hold of this rank's device; `planned`: bytes, by the buffers' names."""
        return server_buffers(self.memory, planned, self._forget)

    def load_weights(self, weights: WeightSource, version: int) -> None:
        """Bring all servers to `version`. Raises ServerNotStarted, TooManyRestarts."""
        self._await_servers()
        self.version, self._weights = version, weights
        self._bare.clear()
        self._load(set(range(self._group.member.servers)))

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, enough: Tally | None = None
    ) -> Iterator[Group]:
        """Groups of the prompts that this rank's server has answered, as they get ready.

        Raises RuntimeError without weights, TooManyRestarts, and what `sglang_answers.py` does for
        answers that can't be trusted.
        """
        if self.version < 0:
            raise RuntimeError("generate: the servers have no weights; call load_weights first")
        return self._passes_over(list(prompts), sampling, enough)

    def take_metrics(self) -> Metrics:
        """Restarts, repeated syncs and continued tokens of all servers since the last call."""
        mine, self._metrics = self._metrics, {}
        self._failures.clear()  # a step has gone by
        total: Metrics = dict.fromkeys(COUNTED, 0)
        for found in self._group.gathered(mine):
            for name, value in found.items():
                total[name] += value
        return total

    def close(self) -> None:
        """Kill this rank's server."""
        self._group.close()

    # ------------------------------------------------------------------ passes

    def _passes_over(
        self, prompts: list[Prompt], sampling: Sampling, enough: Tally | None
    ) -> Iterator[Group]:
        if self._bare:
            self._load_inside(self._bare.copy())
        while prompts:
            self._passes += 1
            mine = yield from self._one_pass(prompts, sampling, enough)
            reports = self._group.gathered((mine, enough is not None and enough.reached()))
            answered = {number for found, _ in reports for number in found.answered}
            for found, _ in reports:
                self._partials |= found.partials
            for number in answered if enough is not None else ():  # an evaluation has its own
                self._partials.pop(number, None)
            tp = self._group.member.tp
            problems = {
                rank // tp: Problem(found.problem, restart=True)
                for rank, (found, _) in enumerate(reports)
                if found.problem is not None
            }
            prompts = [prompt for prompt in prompts if prompt.prompt_id not in answered]
            if problems:
                self._make_anew(problems)
                self._load_inside(set(problems))
            if any(reached for _, reached in reports):
                return
            if prompts and not problems:
                raise RuntimeError(f"no server answered {len(prompts)} prompts: a mistake of ours")

    def _one_pass(
        self, prompts: Sequence[Prompt], sampling: Sampling, enough: Tally | None
    ) -> Generator[Group, None, Pass]:
        """This rank's part of a pass; its report is the generator's return value."""
        member = self._group.member
        if not member.leads:
            return Pass()
        keep_partial = self._knobs.keep_partial and enough is not None
        partials = self._partials if keep_partial else {}
        limits = Limits(
            in_flight(len(prompts), member.servers, self._knobs.groups_in_flight),
            self._knobs.request_timeout_s,
            self._knobs.hang_timeout_s,
            keep_partial,
        )
        runner = PassRunner(
            self._group.client,
            self._group.alive,
            limits,
            self._stop_ids,
            self.version,
            f"{self.version}-{self._passes}",
            self._text,
            self._timeline,
        )
        ready: queue.SimpleQueue[Group | None] = queue.SimpleQueue()
        take = self._shared_counter()
        running = self._group.ask(runner.run(prompts, sampling, partials, take, ready.put, enough))
        running.add_done_callback(lambda _: ready.put(None))
        while (group := ready.get()) is not None:
            older = (span.tokens for rollout in group.rollouts for span in rollout.older_spans)
            self._count("rollout/continued_tokens", sum(older))  # sampled in an earlier round
            yield group
        report = running.result()
        if report.problem is not None:  # it starts while the others go on
            report.problem = self._with_log(report.problem)  # before the new process writes there
            self._group.restart()
        return report

    def _shared_counter(self) -> Callable[[], int]:
        """Hands out 0, 1, 2 … once each, over all leaders of this pass."""
        key = f"rollout_pass_{self._passes}"
        return lambda: int(self._store.add(key, 1)) - 1

    def _text(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    # ------------------------------------------------------------------ weights and restarts

    def _load_inside(self, servers: set[int]) -> None:
        """Sync these servers in a phase that has another purpose."""
        with self.for_sync():
            self._load(servers)
        self._bare -= servers

    def _load(self, servers: set[int]) -> None:
        """Sync these servers; again those that failed, restarted unless only checksums differ."""
        while problems := self._sync_once(servers):
            self._count("rollout/repeated_syncs", self._leads_one_of(set(problems)))
            self._make_anew(problems)
            servers = set(problems)

    def _sync_once(self, servers: set[int]) -> dict[int, Problem]:
        """One try; what went wrong, by server."""
        assert self._weights is not None, "load_weights comes before any sync"
        member = self._group.member
        payloads = self._group.gathered(self._sync.begin())
        calling: Future[None] | None = None
        if member.leads and member.server in servers:
            first = member.server * member.tp
            update = self._group.client.update_weights(
                payloads[first : first + member.tp],
                LOADER,
                str(self.version),
                flush_cache=True,
                timeout_s=self._sync.longest_s,
            )
            calling = self._group.ask(update)
        problem = self._sync.run(self._weights, servers, lambda: self._is_loading(calling))
        # The whole server is made anew if one rank of it wants that; its call may never return.
        problem = self._worst(self._group.gathered(problem)).get(member.server)
        if calling is not None and problem is not None and problem.restart:
            calling.cancel()
        elif calling is not None:
            try:
                calling.result(self._knobs.sync_timeout_s)
            except (SglangError, TimeoutError) as error:  # dead, hung, or at odds with itself
                problem = Problem(f"it did not end the update: {error}", restart=True)
        if problem is not None:
            problem = replace(problem, text=self._with_log(problem.text))
        return self._worst(self._group.gathered(problem if member.leads else None))

    def _is_loading(self, calling: Future[None] | None) -> bool:
        """Whether this rank's engine may still take weights: it lives, and has not refused them."""
        refused = calling is not None and calling.done() and calling.exception() is not None
        return self._group.alive() and not refused

    def _worst(self, problems: Sequence[Problem | None]) -> dict[int, Problem]:
        """By server, one of its ranks' problems: if there is one, one that wants a restart."""
        found: dict[int, Problem] = {}
        for rank, problem in enumerate(problems):
            server = rank // self._group.member.tp
            if problem is not None and (problem.restart or server not in found):
                found[server] = problem
        return found

    def _await_servers(self) -> None:
        """Return when all are up for the first time. Raises ServerNotStarted."""
        if not self._ready and (problems := self._group.wait_ready()):
            raise ServerNotStarted("\n".join(problems.values()))
        self._ready = True

    def _forget(self) -> None:
        """The servers' weights are gone; nothing is sampled before the next `load_weights`."""
        self.version = -1

    def _lost(self, problems: dict[int, Problem]) -> None:
        """Servers died between two uses: new ones get weights before they generate."""
        self._bare |= problems.keys()
        self._make_anew(problems)

    def _make_anew(self, problems: dict[int, Problem]) -> None:
        """Restart the servers that need it, as often as a step may have that."""
        restarted: set[int] = set()
        while problems:
            self._report(problems)
            dead = {server for server, problem in problems.items() if problem.restart}
            self._count("rollout/server_restarts", self._leads_one_of(dead))
            if self._leads_one_of(dead):
                self._group.restart()
            restarted |= dead
            not_up = self._group.wait_ready() if dead else {}
            problems = {server: Problem(what, restart=True) for server, what in not_up.items()}
        self.memory.restarted(restarted)

    def _report(self, problems: dict[int, Problem]) -> None:
        """Tell what went wrong; TooManyRestarts if it went wrong too often."""
        self._failures.update(problems.keys())
        told = "\n".join(
            f"SGLang server {server}: {problem.text}"
            for server, problem in sorted(problems.items())
        )
        if max(self._failures.values()) > self._knobs.max_restarts:
            raise TooManyRestarts(
                f"an SGLang server failed {self._failures.most_common(1)[0][1]} times in one step, "
                f"more than rollout.max_restarts = {self._knobs.max_restarts}:\n{told}"
            )
        if self._group.member.rank == 0:
            print(told, flush=True)

    def _with_log(self, problem: str) -> str:
        return f"{problem}\n{self._group.log_tail()}"

    def _leads_one_of(self, servers: set[int]) -> int:
        """1 on one rank of each of the servers, 0 elsewhere."""
        return int(self._group.member.leads and self._group.member.server in servers)

    def _count(self, name: str, value: float) -> None:
        self._metrics[name] = self._metrics.get(name, 0) + value

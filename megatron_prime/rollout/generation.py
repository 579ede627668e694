"""One server's part in answering prompts: many at a time, taken from a list that all servers share.

Each server has a bounded number of prompts in flight and takes the next one from the shared list
whenever one is done, so a server with short answers takes more of them. All samples of a prompt are
asked of one server, which computes the prompt once. A watch runs beside it: it ends the pass when
the process is gone or shows no sign of life, and aborts what is in flight once enough prompts have
passed the filter. Nothing is decided here about other servers: what remains unanswered goes into
the next pass, `sglang_engine.py`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from megatron_prime.errors import RunError
from megatron_prime.protocols import Tally
from megatron_prime.rollout.sglang_answers import Sample, SampleRequest
from megatron_prime.rollout.sglang_client import ServerLost, ServerSlow, SglangClient
from megatron_prime.runtime.timeline import Timeline
from megatron_prime.types import Group, Prompt, Rollout, Sampling, VersionSpan

WATCH_S = 0.25  # between looks at process and tally
PROBES = 4  # within the time after which a silent server counts as hung


class WrongVersion(RunError):
    """A response of other weights than the engine was given last."""


@dataclass(frozen=True, slots=True)
class Partial:
    """What there is of a response; `done` if it needs no more tokens."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    spans: tuple[VersionSpan, ...]
    done: bool


Partials = Mapping[int, tuple[Partial, ...]]  # by prompt_id, one per sample


@dataclass(slots=True)
class Pass:
    """What a server did of a pass."""

    answered: list[int] = field(default_factory=list)  # prompt_ids
    partials: dict[int, tuple[Partial, ...]] = field(default_factory=dict)  # of aborted prompts
    problem: str | None = None  # the server is dead or hung


@dataclass(frozen=True, slots=True)
class Limits:
    """Of the `[rollout]` table."""

    in_flight: int
    request_s: float
    hang_s: float
    keep_partial: bool


class PassRunner:
    """Runs one pass in the event loop that the client belongs to."""

    def __init__(
        self,
        client: SglangClient,
        alive: Callable[[], bool],
        limits: Limits,
        stop_ids: Sequence[int],
        version: int,
        name: str,
        decode: Callable[[Sequence[int]], str],
        timeline: Timeline,
    ) -> None:
        """`alive`: whether the server's process runs; `name`: of the pass, part of request ids."""
        self._name, self._timeline = name, timeline
        self._client, self._alive, self._limits = client, alive, limits
        self._stop_ids, self._version, self._decode = stop_ids, version, decode
        self._last_sign = time.monotonic()
        self._aborting = False
        self._result = Pass()

    async def run(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        partials: Partials,
        take: Callable[[], int],
        emit: Callable[[Group], None],
        enough: Tally | None,
    ) -> Pass:
        """Answer the prompts whose numbers `take` hands out; `emit` each group as it is done.

        Raises RunError for answers that no restart would mend (see `sglang_answers.py`).
        """

        at_work = slots = self._limits.in_flight  # prompts, from when there is none left to take
        self._timeline.generating(slots)

        async def worker() -> None:
            nonlocal at_work
            while not self._aborting:
                number = await asyncio.to_thread(take)
                if number >= len(prompts):
                    break
                prompt = prompts[number]
                group = await self._answer(prompt, sampling, partials.get(prompt.prompt_id))
                self._last_sign = time.monotonic()
                if group is not None:
                    self._result.answered.append(prompt.prompt_id)
                    emit(group)
            at_work -= 1
            self._timeline.at_work(at_work)

        workers = [asyncio.ensure_future(worker()) for _ in range(slots)]
        watches = [asyncio.ensure_future(watch) for watch in (self._probe(), self._look(enough))]
        try:
            await _all_or_first_error(workers, watches)
            if sampling.temperature == 0:
                # SGLang draws otherwise from the same seed while a greedy request is in the batch,
                # and one that it has just answered still is.
                await self._client.drained(self._limits.hang_s)
        except (ServerLost, ServerSlow) as lost:  # restarted by the caller; the rest is asked again
            self._result.problem = str(lost)
        finally:
            for task in (*workers, *watches):
                task.cancel()
            await asyncio.gather(*workers, *watches, return_exceptions=True)
            self._timeline.generated()
        return self._result

    async def _answer(
        self, prompt: Prompt, sampling: Sampling, begun: tuple[Partial, ...] | None
    ) -> Group | None:
        """The prompt's group; None if it was aborted."""
        start = begun or (Partial((), (), (), done=False),) * sampling.samples
        requests = {
            k: SampleRequest(
                rid=f"{self._name}-{prompt.prompt_id}-{k}",
                input_ids=prompt.token_ids + partial.token_ids,
                max_new_tokens=sampling.max_tokens - len(partial.token_ids),
                sampling_seed=sampling_seed(sampling.seed, prompt.prompt_id, k),
            )
            for k, partial in enumerate(start)
            if not partial.done
        }
        samples = await self._sample(list(requests.values()), sampling.temperature)
        for sample in samples:
            self._check_version(sample)
        found = list(start)
        for k, sample in zip(requests, samples, strict=True):
            found[k] = _continued(start[k], sample, self._version)
        if all(partial.done for partial in found):
            return Group(prompt, tuple(self._rollout(partial) for partial in found))
        if self._limits.keep_partial:
            self._result.partials[prompt.prompt_id] = tuple(found)
        return None

    async def _sample(self, requests: list[SampleRequest], temperature: float) -> list[Sample]:
        """The server's samples. When they take too long on a server that is well, once more."""
        client, seconds = self._client, self._limits.request_s
        try:
            return await client.generate(requests, temperature, self._stop_ids, seconds)
        except ServerSlow:
            if not await client.healthy(self._limits.hang_s / PROBES):
                raise
        again = [replace(request, rid=f"{request.rid}-again") for request in requests]
        return await client.generate(again, temperature, self._stop_ids, 2 * seconds)

    def _check_version(self, sample: Sample) -> None:
        if sample.output_ids and sample.weight_version != str(self._version):
            raise WrongVersion(
                f"request {sample.rid}: sampled with weights of version {sample.weight_version!r}, "
                f"wanted {self._version}; somebody else updates this server's weights"
            )

    def _rollout(self, partial: Partial) -> Rollout:
        ended = bool(partial.token_ids) and partial.token_ids[-1] in self._stop_ids
        return Rollout(
            response_ids=partial.token_ids,
            rollout_logprobs=partial.logprobs,
            finish_reason="stop" if ended else "length",
            policy_version=partial.spans[-1].version,
            text=self._decode(partial.token_ids),
            older_spans=partial.spans[:-1],
        )

    async def _look(self, enough: Tally | None) -> None:
        """End the pass with ServerLost when the process ends; abort it when there is enough."""
        while True:
            await asyncio.sleep(WATCH_S)
            if not self._alive():
                raise ServerLost("the server's process has ended")
            if enough is not None and await asyncio.to_thread(enough.reached):
                self._aborting = True
                await self._client.abort()  # again and again: a request may come after an abort

    async def _probe(self) -> None:
        """End the pass with ServerSlow when there is neither an answer nor a sign of life."""
        hang_s = self._limits.hang_s
        while True:
            await asyncio.sleep(hang_s / PROBES)
            if await self._client.healthy(hang_s / PROBES):
                self._last_sign = time.monotonic()
            if time.monotonic() - self._last_sign > hang_s:
                raise ServerSlow(
                    f"the server showed no sign of life for {hang_s:g} s (rollout.hang_timeout_s)"
                )


def sampling_seed(seed: int, prompt_id: int, sample: int) -> int:
    """The seed of one response's random numbers, below 2^63."""
    sequence = np.random.SeedSequence(seed, spawn_key=(prompt_id, sample))
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def _continued(partial: Partial, sample: Sample, version: int) -> Partial:
    """With the tokens of `sample` behind what there was."""
    spans = partial.spans
    if sample.output_ids:
        new = len(sample.output_ids)
        if spans and spans[-1].version == version:
            new, spans = new + spans[-1].tokens, spans[:-1]
        spans = (*spans, VersionSpan(new, version))
    return Partial(
        token_ids=partial.token_ids + sample.output_ids,
        logprobs=partial.logprobs + sample.logprobs,
        spans=spans,
        done=sample.finish_reason != "abort",
    )


async def _all_or_first_error(
    workers: Sequence[asyncio.Future[None]], watches: Sequence[asyncio.Future[None]]
) -> None:
    """Return when all workers are done; raise the first error of any, or of a watch."""
    running = {*workers}
    while running:
        done, _ = await asyncio.wait({*running, *watches}, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        running -= done


def in_flight(prompts: int, servers: int, most: int) -> int:
    """How many prompts one of several servers takes at once.

    Not its whole share: a quarter is left for the servers that are done first.
    """
    share = -(-prompts // servers)
    return min(most, share if servers == 1 else -(-share * 3 // 4))

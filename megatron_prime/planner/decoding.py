"""Seconds of generation: an engine's servers, run through in events instead of tokens.

Between two events (a response ends, a prompt begins) a server decodes one token for each of its
running sequences per pass. A pass reads the weights and the keys and values of all of them, or
computes, whichever takes longer, and has two all-reduces per layer among the server's ranks. So the
few longest responses, with the weights read for each of their tokens, cost as much as the many.

Prompts wait in one queue; a server takes one with all its responses while sequences and cache
allow, counting a sequence by the length that it will have. A prompt is computed once for its
responses. Sampling, scheduling and HTTP cost nothing here, and CUDA graphs are used.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_prime.planner.rates import Rates


@dataclass(frozen=True, slots=True)
class Server:
    """What one of a server's ranks does for a token."""

    weight_bytes: float  # read by each pass
    cache_bytes: float  # of one token's keys and values
    flops: float  # of one token in the layers, attention aside
    head_flops: float  # of one token's logits
    attention_flops: float  # of one token, per token that it sees
    reduced_bytes: float  # that one token's all-reduces send
    collectives: int  # in one pass
    kind: str  # of the linears' products: bf16, fp16, fp32
    cache_tokens: int  # that fit
    sequences: int  # at once, at most


@dataclass(slots=True)
class _Running:
    """One server at work."""

    clock: float = 0.0
    step: int = 0
    context: float = 0.0  # tokens in the cache
    reserved: float = 0.0
    ends: list[tuple[int, int, float]] = field(default_factory=list)  # (step, group, length)
    seconds: dict[str, float] = field(default_factory=dict)

    def spend(self, resource: str, seconds: float) -> None:
        self.clock += seconds
        self.seconds[resource] = self.seconds.get(resource, 0.0) + seconds


@dataclass(frozen=True, slots=True)
class Generation:
    """One round."""

    seconds: float
    by: dict[str, float]  # what the last server to finish spent them on
    done: tuple[float, ...]  # when each group was complete, in the groups' order
    finished: tuple[float, ...]  # when each server had nothing left to do

    def until(self, groups: int) -> float:
        """Seconds until so many groups were complete."""
        return sorted(self.done)[min(groups, len(self.done)) - 1]


def generate(
    groups: Sequence[Sequence[int]], prompt: float, server: Server, servers: int, rates: Rates
) -> Generation:
    """`groups[i]` are the lengths of the responses to prompt i, all prompts `prompt` tokens."""
    waiting = deque(enumerate(groups))
    missing = [len(group) for group in groups]
    done = [0.0] * len(groups)
    at_work = [(0.0, number, _Running()) for number in range(servers)]
    last = at_work[0][2]
    finished = [0.0] * servers
    while at_work:
        _, number, one = heapq.heappop(at_work)
        while waiting and _has_room(one, waiting[0][1], prompt, server):
            group, lengths = waiting.popleft()
            _prefill(one, prompt, server, rates)
            for length in lengths:
                heapq.heappush(one.ends, (one.step + length, group, prompt + length))
                one.context += prompt
                one.reserved += prompt + length
        if not one.ends:
            continue  # nothing is left for it
        _decode(one, server, rates)
        while one.ends and one.ends[0][0] == one.step:
            _, group, held = heapq.heappop(one.ends)
            one.context -= held
            one.reserved -= held
            missing[group] -= 1
            if not missing[group]:
                done[group] = one.clock
        last = max(last, one, key=lambda running: running.clock)
        finished[number] = one.clock
        heapq.heappush(at_work, (one.clock, number, one))
    return Generation(last.clock, dict(last.seconds), tuple(done), tuple(finished))


def _has_room(one: _Running, lengths: Sequence[int], prompt: float, server: Server) -> bool:
    if not one.ends:
        return True
    more = sum(lengths) + prompt * len(lengths)
    fits = one.reserved + more <= server.cache_tokens
    return fits and len(one.ends) + len(lengths) <= server.sequences


def _prefill(one: _Running, prompt: float, server: Server, rates: Rates) -> None:
    flops = prompt * server.flops + prompt * prompt / 2 * server.attention_flops
    one.spend("compute", flops / rates.flops(server.kind))
    one.spend("nvlink", prompt * server.reduced_bytes / rates.nvlink)


def _decode(one: _Running, server: Server, rates: Rates) -> None:
    """Until the next response ends."""
    passes, batch = one.ends[0][0] - one.step, len(one.ends)
    seen = one.context + batch * passes / 2  # on average
    read = (server.weight_bytes + seen * server.cache_bytes) / rates.hbm
    flops = batch * (server.flops + server.head_flops) + seen * server.attention_flops
    computed = flops / rates.flops(server.kind)
    one.spend("hbm" if read > computed else "compute", passes * max(read, computed))
    if server.collectives:
        one.spend("nvlink", passes * batch * server.reduced_bytes / rates.nvlink)
        one.spend("latency", passes * server.collectives * rates.collective_us * 1e-6)
    one.step += passes
    one.context += batch * passes

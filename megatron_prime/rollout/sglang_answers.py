"""What is asked of an SGLang server and what it answers, checked on arrival.

SGLang's JSON becomes `Sample`s here, or one of the errors, which name the request. SGLang writes a
log-prob that is not a number as null, and calls a row of logits with NaN a stop, so both are looked
for. A response whose last allowed token is a stop token counts as stopped: SGLang says `length`.
One that was aborted just as it came to its end counts as ended: SGLang says `abort`.

A step's answers have millions of tokens, and each is a list of its own in the JSON. So nothing here
loops over tokens in Python, and Python's search for cycles, which would go through all of them and
all else again and again, is paused for the milliseconds that an answer takes.
"""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Self, cast

from pydantic_core import from_json

from megatron_prime.errors import RunError

FinishReason = Literal["stop", "length", "abort"]
RID_END = ";"


class SglangError(RunError):
    """What can go wrong with a call to an SGLang server."""


class BadAnswer(SglangError):
    """An answer failed a check; each check has its own type below."""


class WrongCount(BadAnswer):
    """Not one sample per request, in the order of the requests."""


class WrongLength(BadAnswer):
    """Token ids and log-probs disagree, or there are too many or none."""


class LogprobNotFinite(BadAnswer):
    """A log-prob is NaN, infinite or missing."""


class WrongStop(BadAnswer):
    """It did not end as its finish reason says."""


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One response to be sampled."""

    rid: str  # unique on the server; without ";"
    input_ids: Sequence[int]  # prompt, and what there is already of the response
    max_new_tokens: int
    sampling_seed: int | None  # of its random numbers; needs enable_deterministic_inference


@dataclass(frozen=True, slots=True)
class Sample:
    """What came back. `output_ids` ends with a stop token if and only if it `stop`ped."""

    rid: str
    output_ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # one per output id
    finish_reason: FinishReason
    weight_version: str  # of the weights when it ended; empty if it was aborted before it began
    cached_tokens: int  # of the input, found in the prefix cache

    @classmethod
    def aborted(cls, rid: str) -> Self:
        """Of a request that was aborted before the server had queued it."""
        return cls(rid, (), (), "abort", "", 0)


def wire_rid(rid: str) -> str:
    """The rid as SGLang gets it; SGLang aborts all whose rid begins with the one it is given."""
    if RID_END in rid or not rid:
        raise ValueError(f"found the rid {rid!r}, wanted one without {RID_END}, not empty")
    return rid + RID_END


def parsed(path: str, answer: bytes) -> Any:
    """An answer's JSON. Raises BadAnswer if it is none."""
    try:
        return from_json(answer)
    except ValueError as error:
        raise BadAnswer(f"{path}: the answer is no JSON: {error}") from error


@contextmanager
def collector_paused() -> Iterator[None]:
    """No search for cycles inside; for short work that makes many objects and no cycle."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def checked_samples(
    requests: Sequence[SampleRequest], answer: Any, stop_token_ids: Sequence[int]
) -> list[Sample]:
    """The samples of a /generate answer to a list of requests. Raises BadAnswer."""
    rids = [request.rid for request in requests]
    if not isinstance(answer, list) or len(answer) != len(requests):
        count = len(answer) if isinstance(answer, list) else type(answer).__name__
        raise WrongCount(f"found {count} samples of {rids}, wanted {len(requests)}")
    stops = frozenset(stop_token_ids)
    samples = []
    for request, found in zip(requests, answer, strict=True):
        try:
            samples.append(_checked(request, found, stops))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise BadAnswer(
                f"request {request.rid}: the answer lacks what this version of SGLang should have "
                f"({type(error).__name__}: {error})"
            ) from error
    return samples


def checked_scores(input_ids: Sequence[int], answer: Any) -> tuple[float, ...]:
    """The log-probs of `input_ids` but the first, of a /generate answer. Raises BadAnswer."""
    try:
        triples = answer["meta_info"]["input_token_logprobs"]
        scored = [(token, logprob) for logprob, token, _ in triples]
    except (KeyError, TypeError, ValueError) as error:
        raise BadAnswer(
            "the answer lacks what this version of SGLang should have "
            f"({type(error).__name__}: {error})"
        ) from error
    if [token for token, _ in scored] != list(input_ids):
        raise WrongLength(
            f"found log-probs of {len(scored)} tokens, wanted those of the {len(input_ids)} sent"
        )
    for position, (_, logprob) in enumerate(scored[1:], 1):
        if not _is_finite(logprob):
            raise LogprobNotFinite(
                f"found the log-prob {logprob} at token {position}, wanted a finite one"
            )
    return tuple(float(logprob) for _, logprob in scored[1:])


def _checked(request: SampleRequest, found: Any, stops: frozenset[int]) -> Sample:
    meta, ids = found["meta_info"], tuple(found["output_ids"])
    if meta["id"] != wire_rid(request.rid):
        raise WrongCount(f"request {request.rid}: found the answer to {meta['id']} in its place")
    logprobs, tokens = _logprobs_of(request.rid, meta)
    if tokens != ids:
        raise WrongLength(
            f"request {request.rid}: found {len(ids)} token ids and log-probs of {len(tokens)}, "
            "wanted the same tokens"
        )
    reason = _reason(request, meta["finish_reason"], ids, stops)
    return Sample(
        rid=request.rid,
        output_ids=ids,
        logprobs=logprobs,
        finish_reason=reason,
        weight_version=str(meta["weight_version"]),
        cached_tokens=int(meta.get("cached_tokens", 0)),  # none if aborted while it was queued
    )


def _logprobs_of(rid: str, meta: dict[str, Any]) -> tuple[tuple[float, ...], tuple[int, ...]]:
    triples = meta["output_token_logprobs"]
    if not triples:
        return (), ()
    logprobs, tokens, _ = zip(*triples, strict=True)
    try:
        if bool not in set(map(type, logprobs)) and all(map(math.isfinite, logprobs)):
            return tuple(map(float, logprobs)), tokens
    except (TypeError, OverflowError):  # null, or no number at all, or one beyond a double
        pass
    position = list(map(_is_finite, logprobs)).index(False)
    raise LogprobNotFinite(
        f"request {rid}: found the log-prob {logprobs[position]} at token {position}, wanted a "
        "finite one; the weights or rollout.temperature give logits that are not finite"
    )


def _is_finite(logprob: Any) -> bool:
    if isinstance(logprob, bool) or not isinstance(logprob, float | int):
        return False
    return abs(logprob) <= sys.float_info.max  # no integer is too large to be compared


def _reason(
    request: SampleRequest, finish: dict[str, Any], ids: tuple[int, ...], stops: frozenset[int]
) -> FinishReason:
    """How it ended, by the tokens; checked against how SGLang says that it ended."""
    rid, claimed = request.rid, finish["type"]
    if claimed not in ("stop", "length", "abort"):
        raise WrongStop(f"request {rid}: found finish reason {claimed}, wanted stop, length, abort")
    if claimed == "stop" and not isinstance(finish.get("matched"), int):
        raise LogprobNotFinite(
            f"request {rid}: SGLang ended it with {finish.get('matched')!r}, wanted a stop token; "
            "the weights give logits that are not finite"
        )
    if len(ids) > request.max_new_tokens or (claimed != "abort" and not ids):
        raise WrongLength(
            f"request {rid}: found {len(ids)} tokens, wanted 1 to {request.max_new_tokens}"
        )
    stopped = bool(ids) and ids[-1] in stops
    if claimed == "stop" and not stopped:
        raise WrongStop(
            f"request {rid}: it stopped at token {ids[-1]}, which is not among the stop tokens "
            f"{sorted(stops)}; the tokenizer, generation_config.json and config.json of model.hf "
            "must name the same end-of-sequence tokens"
        )
    if early := stops.intersection(ids[:-1]):
        raise WrongStop(f"request {rid}: it went on after the stop token {min(early)}")
    if stopped:
        return "stop"
    # An abort that comes with the last allowed token leaves nothing to go on with.
    return "length" if len(ids) == request.max_new_tokens else cast(FinishReason, claimed)

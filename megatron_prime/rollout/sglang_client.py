"""Speaking to one SGLang server over HTTP: sample, abort, new weights; all answers are checked.

The samples of a prompt go in one call. SGLang keeps the prompt's keys and values in its prefix
cache, but samples that arrive together are prefilled together, each for itself; so the prompt is
sent ahead once, with no token to sample, and then every sample finds it there.

An answer is believed when there is one per request, ids and log-probs agree, all is finite and it
ends as our rollouts do: with a stop token, which SGLang leaves in place, unless it was cut.
Failures are types: `ServerLost` (no connection), `ServerSlow` (no answer in time), `ServerRefused`
(an HTTP error), `BadAnswer` (a check failed). Connections are not reused, for the server closes
idle ones at a moment when the next call may just be on its way.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Mapping, Sequence
from itertools import takewhile
from types import TracebackType
from typing import Any, Self

import aiohttp

from megatron_prime.rollout.sglang_answers import (
    BadAnswer,
    Sample,
    SampleRequest,
    SglangError,
    checked_samples,
    checked_scores,
    collector_paused,
    parsed,
    wire_rid,
)

PRIME_FROM = 32  # tokens in common from which it pays to send a prompt ahead
# Sampling from the whole softmax, whatever the model's generation_config.json recommends.
PLAIN = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
CONTROL_S = 30.0  # for calls that do no work to speak of
_POLL_S = 0.05
_WAS_ABORTED = "was aborted"  # of SGLang's answer to a call that was aborted before it was queued


class ServerLost(SglangError):
    """The server can't be reached or hung up: it is dead or dying."""


class ServerSlow(SglangError):
    """The server did not answer in time; it may be hung."""


class ServerRefused(SglangError):
    """The server answered with an HTTP error."""

    def __init__(self, message: str, status: int) -> None:
        """With the HTTP status."""
        super().__init__(message)
        self.status = status


class SglangClient:
    """An async context manager; one per server and event loop."""

    def __init__(self, url: str, api_key: str) -> None:
        """`url` as in `SglangServer.url`."""
        self.url = url
        self._headers = {"Authorization": f"Bearer {api_key}"}
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        """Open the session; connections are opened by each call."""
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        self._session = aiohttp.ClientSession(headers=self._headers, connector=connector)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Hang up; SGLang aborts requests whose caller is gone."""
        if self._session is not None:
            await self._session.close()

    async def generate(
        self,
        requests: Sequence[SampleRequest],
        temperature: float,
        stop_token_ids: Sequence[int],
        timeout_s: float,
    ) -> list[Sample]:
        """One sample per request, in order; the requests are those of one prompt.

        Temperature 0 takes the most likely tokens, with their log-probs at temperature 1; else
        log-probs are at `temperature`. Cancelling the call aborts its requests. Raises the errors
        of the module, a failed check before any sample is returned.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        if len(requests) > 1:
            await self._send_prompt_ahead(requests, timeout_s)
        body = {
            "rid": [wire_rid(request.rid) for request in requests],
            "input_ids": [list(request.input_ids) for request in requests],
            "sampling_params": [
                {
                    **PLAIN,
                    "temperature": temperature,
                    "max_new_tokens": request.max_new_tokens,
                    "stop_token_ids": list(stop_token_ids),
                    "sampling_seed": request.sampling_seed,
                }
                for request in requests
            ],
            "return_logprob": True,
        }
        left = max(0.1, deadline - loop.time())
        try:
            _, answer = await self._exchange("POST", "/generate", body, left)
        except ServerRefused as refused:
            if _WAS_ABORTED not in str(refused):
                raise
            return [Sample.aborted(request.rid) for request in requests]
        with collector_paused():
            return checked_samples(requests, parsed("/generate", answer), stop_token_ids)

    async def score(self, input_ids: Sequence[int], timeout_s: float) -> tuple[float, ...]:
        """The log-prob of each given token but the first, at temperature 1.

        The whole text is computed anew: SGLang does not take log-probs from its prefix cache.
        Raises the errors of the module.
        """
        body = {
            "input_ids": list(input_ids),
            "sampling_params": {"temperature": 1.0, "max_new_tokens": 0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        answer = await self._call("POST", "/generate", body, timeout_s)
        return checked_scores(input_ids, answer)

    async def abort(self, rid: str | None = None) -> None:
        """Let a request, or all, end where it is: its sample is what there is, `abort` its reason.

        It has no effect on a request that the server doesn't know yet: repeat it until the
        request's `generate` returns.
        """
        body = {"abort_all": True} if rid is None else {"rid": wire_rid(rid)}
        await self._call("POST", "/abort_request", body, CONTROL_S)

    async def healthy(self, timeout_s: float, sampling: bool = True) -> bool:
        """Whether the server answers within the time; never raises.

        `sampling`: ask its scheduler, which answers between two forward passes (SGLang looks once
        a second, and gives up after 20 s). During an update of the weights it can't answer: ask
        with False then, which the HTTP process answers by itself.
        """
        path = "/health_generate" if sampling else "/health"
        try:
            await self._call("GET", path, None, timeout_s)
        except SglangError:  # that is the answer
            return False
        return True

    async def update_weights(
        self,
        payloads: Sequence[bytes],
        load_format: str | None,
        version: str | None,
        flush_cache: bool,
        timeout_s: float,
    ) -> None:
        """Hand in new weights: a pickle of named tensors (or what the loader takes) for each rank.

        `version` is what samples report from now on; None leaves it, for all but the last bucket.
        With `flush_cache` the server must have no request left, or it dies. Waits for requests
        that are running. Raises ServerRefused if a tensor did not fit, ServerLost if the payload
        can't be unpickled: that kills the server.
        """
        body = {
            "serialized_named_tensors": [base64.b64encode(data).decode() for data in payloads],
            "load_format": load_format,
            "flush_cache": flush_cache,
            "weight_version": version,
        }
        await self._call("POST", "/update_weights_from_tensor", body, timeout_s)

    async def flush_cache(self, timeout_s: float = CONTROL_S) -> None:
        """Forget all prefixes. Raises ServerRefused while there are requests."""
        await self._call("POST", "/flush_cache", {}, timeout_s)

    async def drained(self, patience_s: float) -> None:
        """Wait until the server has let go of all requests, those it has answered, too.

        It forgets all prefixes. Raises ServerSlow when it still has one after `patience_s`.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + patience_s
        while True:
            try:
                return await self.flush_cache()
            except ServerRefused as error:  # it still works on something
                if loop.time() > deadline:
                    raise ServerSlow(f"not idle after {patience_s:g} s: {error}") from error
                await asyncio.sleep(_POLL_S)

    async def occupy(self, verb: str, tags: Sequence[str], timeout_s: float) -> None:
        """`release` the device memory of `tags`, or `resume` it. The server must be idle."""
        await self._call("POST", f"/{verb}_memory_occupation", {"tags": list(tags)}, timeout_s)

    async def server_info(self, timeout_s: float = CONTROL_S) -> dict[str, Any]:
        """What the server was started with, and the state of its scheduler; without the key."""
        info = await self._call("GET", "/server_info", None, timeout_s)
        if not isinstance(info, dict):
            raise BadAnswer(f"{self.url}/server_info: found {type(info).__name__}, wanted a table")
        return _without_keys(info)

    async def _send_prompt_ahead(self, requests: Sequence[SampleRequest], timeout_s: float) -> None:
        """Fill the prefix cache with what the requests have in common."""
        first, *others = (request.input_ids for request in requests)
        common = list(first)
        if any(ids != first for ids in others):  # some continue an answer
            columns = zip(first, *others, strict=False)
            common = [ids[0] for ids in takewhile(lambda ids: len(set(ids)) == 1, columns)]
        if len(common) < PRIME_FROM:
            return
        body = {
            "rid": wire_rid(f"{requests[0].rid}/prompt"),
            "input_ids": common,
            "sampling_params": {"max_new_tokens": 0},
        }
        try:
            await self._call("POST", "/generate", body, timeout_s)
        except ServerRefused as refused:  # aborted with all others: so will the samples be
            if _WAS_ABORTED not in str(refused):
                raise

    async def _call(
        self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float
    ) -> Any:
        """The answer to one call: JSON if it is that, else text."""
        kind, answer = await self._exchange(method, path, body, timeout_s)
        return (
            parsed(path, answer) if kind == "application/json" else answer.decode(errors="replace")
        )

    async def _exchange(
        self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float
    ) -> tuple[str, bytes]:
        """The type and the bytes of the answer to one call."""
        assert self._session is not None, "use the client in `async with`"
        where = f"{method} {self.url}{path}"
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self._session.request(
                method, self.url + path, json=body, timeout=timeout
            ) as answer:
                if answer.status != 200:
                    text = (await answer.text())[:1000]
                    raise ServerRefused(f"{where}: status {answer.status}: {text}", answer.status)
                return answer.content_type, await answer.read()
        except TimeoutError as error:  # before the next: aiohttp's is a connection error, too
            raise ServerSlow(f"{where}: no answer within {timeout_s:g} s") from error
        except aiohttp.ClientError as error:
            raise ServerLost(f"{where}: {type(error).__name__}: {error}") from error


def _without_keys(value: Any) -> Any:
    """SGLang tells its API keys, at more than one depth, to who has one; nobody here needs them."""
    if isinstance(value, dict):
        return {
            name: _without_keys(item) for name, item in value.items() if "api_key" not in str(name)
        }
    return [_without_keys(item) for item in value] if isinstance(value, list) else value

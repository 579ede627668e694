"""The client against the fake server, and each way in which an answer can be wrong."""

from __future__ import annotations

import asyncio
import socket

import pytest
from fake_sglang import KEY, spec

from megatron_prime.rollout.sglang_answers import (
    BadAnswer,
    LogprobNotFinite,
    SampleRequest,
    WrongCount,
    WrongLength,
    WrongStop,
    checked_samples,
    wire_rid,
)
from megatron_prime.rollout.sglang_client import (
    ServerLost,
    ServerRefused,
    ServerSlow,
    SglangClient,
)
from megatron_prime.rollout.sglang_server import SglangServer

PROMPT = tuple(range(4, 54))


def requests(count=3, tokens=6):
    return [SampleRequest(f"p{i}", PROMPT, tokens, i) for i in range(count)]


def with_server(folder, job, **faults):
    """What `job(client)` returns, of a fake server with faults."""
    server = SglangServer(spec(folder, **faults))

    async def inside():
        async with SglangClient(server.url, KEY) as client:
            return await job(client, server)

    server.start()
    try:
        server.ready()
        return asyncio.run(inside())
    finally:
        server.kill()


def test_a_group_is_sampled_from_one_prefill(tmp_path) -> None:
    async def job(client, server):
        first = await client.generate(requests(), 1.0, (), 5)
        again = await client.generate(requests()[1:2], 1.0, (), 5)
        await client.update_weights([b"x"], None, "8", flush_cache=True, timeout_s=5)
        return first, again, await client.generate(requests()[1:2], 1.0, (), 5)

    first, again, later = with_server(tmp_path, job)
    assert [one.rid for one in first] == ["p0", "p1", "p2"]
    assert [one.cached_tokens for one in first] == [len(PROMPT) - 1] * 3
    assert len({one.output_ids for one in first}) == 3
    assert again[0].output_ids == first[1].output_ids
    assert (first[0].weight_version, later[0].weight_version) == ("default", "8")
    assert later[0].cached_tokens == 0


def test_an_abort_reaches_one_request_or_all(tmp_path) -> None:
    async def job(client, server):
        asked = [SampleRequest(f"p{i}", PROMPT, 500, i) for i in (1, 10)]
        running = asyncio.create_task(client.generate(asked, 1.0, (), 20))
        await asyncio.sleep(0.2)
        await client.abort("p1")  # not p10
        await asyncio.sleep(0.2)
        await client.abort()
        return await running

    first, second = with_server(tmp_path, job, token_s=0.01)
    assert (first.finish_reason, second.finish_reason) == ("abort", "abort")
    assert 0 < len(first.output_ids) < len(second.output_ids) < 500


def test_a_dead_a_hung_and_a_forbidding_server_are_told_apart(tmp_path) -> None:
    async def dies(client, server):
        await client.generate(requests(), 1.0, (), 5)
        with pytest.raises(ServerLost):
            await client.generate(requests(), 1.0, (), 5)
        assert not await client.healthy(2)

    async def hangs(client, server):
        await client.generate(requests(), 1.0, (), 5)
        with pytest.raises(ServerSlow, match=r"within 0\.3 s"):
            await client.generate(requests(), 1.0, (), 0.3)
        assert not await client.healthy(0.3)

    async def forbids(client, server):
        assert await client.healthy(2)
        async with SglangClient(server.url, "another") as stranger:
            with pytest.raises(ServerRefused) as caught:
                await stranger.abort()
        assert caught.value.status == 401

    with_server(tmp_path / "a", dies, die_after=2)
    with_server(tmp_path / "b", hangs, hang_after=1)
    with_server(tmp_path / "c", forbids)


def test_nobody_there_is_a_lost_server() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"

        async def job():
            async with SglangClient(url, KEY) as client:
                await client.flush_cache()

        with pytest.raises(ServerLost, match="flush_cache"):
            asyncio.run(job())


def test_a_spoiled_answer_is_refused_with_the_rid(tmp_path) -> None:
    errors = {
        "count": WrongCount,
        "lengths": WrongLength,
        "nan": LogprobNotFinite,
        "stop": WrongStop,
    }

    async def job(client, server):
        for error in errors.values():
            with pytest.raises(error, match="p0"):
                await client.generate(requests(), 1.0, (2,), 5)
        return await client.generate(requests(), 1.0, (2,), 5)

    found = with_server(tmp_path, job, spoil=[*errors, "version"])
    assert [one.weight_version for one in found] == ["another", "default", "default"]


def answer(ids, reason, logprobs=None, rid="r;", **meta):
    logprobs = [-1.0] * len(ids) if logprobs is None else logprobs
    triples = [[logprob, token, None] for logprob, token in zip(logprobs, ids, strict=True)]
    found = {"id": rid, "finish_reason": reason, "weight_version": 3, "cached_tokens": 1}
    found |= {"output_token_logprobs": triples}
    return [{"output_ids": ids, "meta_info": found | meta}]


def check(found, stops=(2,)):
    return checked_samples([SampleRequest("r", PROMPT, 4, 0)], found, stops)[0]


LENGTH, STOP = {"type": "length", "length": 4}, {"type": "stop", "matched": 2}


def test_what_is_right_passes() -> None:
    cut = check(answer([5, 6, 7, 8], LENGTH))
    assert (cut.finish_reason, cut.logprobs, cut.weight_version) == ("length", (-1.0,) * 4, "3")
    assert check(answer([5, 2], STOP)).finish_reason == "stop"
    assert check(answer([5, 6, 7, 2], LENGTH)).finish_reason == "stop"
    queued = answer([], {"type": "abort", "message": "Abort in waiting queue"})
    del queued[0]["meta_info"]["cached_tokens"]
    assert check(queued).finish_reason == "abort"
    abort = {"type": "abort", "message": "Aborted"}
    assert check(answer([5, 6, 7], abort)).finish_reason == "abort"
    assert check(answer([5, 6, 7, 8], abort)).finish_reason == "length"  # nothing is missing
    assert check(answer([5, 2], abort)).finish_reason == "stop"


@pytest.mark.parametrize(
    ("found", "error", "says"),
    [
        (answer([5, 2], {"type": "stop", "matched": "NaN happened"}), LogprobNotFinite, "NaN"),
        (answer([5, 6], LENGTH, [-1.0, float("inf")]), LogprobNotFinite, "token 1"),
        (answer([5, 6], LENGTH, [-1.0, None]), LogprobNotFinite, "None"),
        (answer([5, 6], {"type": "stop", "matched": 6}), WrongStop, "token 6"),
        (answer([2, 6], LENGTH), WrongStop, "went on"),
        (answer([5, 6], {"type": "bored"}), WrongStop, "bored"),
        (answer([5, 6, 7, 8, 9], LENGTH), WrongLength, "5 tokens"),
        (answer([], LENGTH), WrongLength, "0 tokens"),
        (answer([5, 6], LENGTH, rid="s;"), WrongCount, "answer to s;"),
        ([{"output_ids": [5]}], BadAnswer, "meta_info"),
        ({"error": "?"}, WrongCount, "dict"),
    ],
)
def test_each_check_has_its_error(found, error, says) -> None:
    with pytest.raises(error, match=says) as caught:
        check(found)
    assert "r" in str(caught.value)
    assert type(caught.value) is error


def test_no_rid_begins_another() -> None:
    assert not wire_rid("p10").startswith(wire_rid("p1"))
    with pytest.raises(ValueError, match="without ;"):
        wire_rid("a;b")

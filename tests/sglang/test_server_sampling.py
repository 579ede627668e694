"""A real server of one rank: what it samples, and that our client reads it right."""

from __future__ import annotations

import asyncio
import json

import pytest
from exchanges import RECORDED, converse
from tiny_server import KEY, logprobs_of, send_weights

from megatron_prime.rollout.sglang_client import SampleRequest, ServerRefused, SglangClient

PROMPT = [4 + (7 * i) % 90 for i in range(50)]


def requests(seeds, tokens=12, prompt=PROMPT, tag="r"):
    return [
        SampleRequest(f"{tag}{i}", prompt, tokens, sampling_seed=seed)
        for i, seed in enumerate(seeds)
    ]


def run(server, job, key=KEY):
    async def inside():
        async with SglangClient(server.url, key) as client:
            return await job(client)

    return asyncio.run(inside())


def sample(server, seeds, temperature=1.0, stops=(), **more):
    async def job(client):
        samples = await client.generate(requests(seeds, **more), temperature, stops, 120)
        if temperature == 0:
            await client.drained(60)  # or what comes next may draw otherwise
        return samples

    return run(server, job)


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_logprobs_are_those_of_transformers(server, model, temperature) -> None:
    for found in sample(server, [1, 2, 3], temperature):
        assert found.finish_reason == "length"
        assert found.logprobs == pytest.approx(
            logprobs_of(model[0], PROMPT, found.output_ids), abs=1e-4
        )


def test_scores_of_a_text_are_those_of_transformers(server, model) -> None:
    sample(server, [1])  # the text's beginning is in the prefix cache now
    text = [*PROMPT, 5, 9, 5, 17]
    for _ in range(2):
        found = run(server, lambda client: client.score(text, 60))
        assert found == pytest.approx(logprobs_of(model[0], text[:1], tuple(text[1:])), abs=1e-4)


def test_greedy_takes_the_most_likely_tokens(server, model) -> None:
    (found,) = sample(server, [1], 0.0)
    told = model[0].generate(
        model[0].dummy_inputs["input_ids"].new_tensor([PROMPT]), max_new_tokens=12, do_sample=False
    )
    assert list(found.output_ids) == told[0, len(PROMPT) :].tolist()


def test_new_weights_count_from_the_next_sample_on(server, model) -> None:
    before = sample(server, [5])[0]
    with_other_head = type(model[0])(model[0].config).float().eval()
    with_other_head.load_state_dict(model[0].state_dict())
    with_other_head.lm_head.weight.data.mul_(-1)
    try:
        asyncio.run(send_weights(server.url, with_other_head, tp=1, version="1"))
        after = sample(server, [5])[0]
    finally:
        asyncio.run(send_weights(server.url, model[0], tp=1, version="0"))
    assert (before.weight_version, after.weight_version) == ("0", "1")
    told = logprobs_of(with_other_head, PROMPT, after.output_ids)
    assert after.logprobs == pytest.approx(told, abs=1e-4)
    assert sample(server, [5])[0].output_ids == before.output_ids


def test_a_seed_gives_the_same_sample_alone_and_among_others(server) -> None:
    alone = sample(server, [1 << 40])[0]
    among = sample(server, [1, 2, 1 << 40, 3])
    assert among[2].output_ids == alone.output_ids
    assert len({found.output_ids for found in among}) == 4


def test_a_response_can_be_continued_with_the_same_random_numbers(server) -> None:
    whole = sample(server, [9])[0]
    begun = whole.output_ids[:5]
    rest = sample(server, [9], prompt=[*PROMPT, *begun], tokens=7)[0]
    assert begun + rest.output_ids == whole.output_ids


def test_sampling_follows_the_probabilities(server, model) -> None:
    """The first token of 400 responses against the model, by the χ² of what is likely enough."""
    prompt = [7, 8, 9]
    found = sample(server, range(400), tokens=1, prompt=prompt)
    probabilities = [
        2.718281828 ** logprobs_of(model[0], prompt, (token,))[0] for token in range(96)
    ]
    likely = [token for token in range(96) if probabilities[token] * 400 >= 5]
    counts = {token: 0 for token in likely}
    for one in found:
        if one.output_ids[0] in counts:
            counts[one.output_ids[0]] += 1
    chi2 = sum((counts[t] - 400 * probabilities[t]) ** 2 / (400 * probabilities[t]) for t in likely)
    assert len(likely) >= 5
    assert chi2 < 3 * len(likely)


def test_samples_share_their_prompt(server) -> None:
    prompt = [4 + (11 * i + 5) % 90 for i in range(64)]
    found = sample(server, [1, 2, 3, 4], prompt=prompt)
    assert [one.cached_tokens for one in found] == [63] * 4  # the last token is always computed


def test_a_stop_token_is_the_last(server) -> None:
    (free,) = sample(server, [6], tokens=30)
    stop = free.output_ids[20]
    first = free.output_ids.index(stop)
    (found,) = sample(server, [6], tokens=30, stops=[stop])
    assert (found.output_ids, found.finish_reason) == (free.output_ids[: first + 1], "stop")
    (at_the_end,) = sample(server, [6], tokens=first + 1, stops=[stop])
    assert at_the_end.finish_reason == "stop"  # SGLang itself says length


def test_aborting_leaves_what_there_is(server) -> None:
    async def job(client):
        asked = requests([1, 2], tokens=1900, tag="long")
        running = asyncio.create_task(client.generate(asked, 1.0, (), 120))
        await asyncio.sleep(0.7)
        await client.abort("long0")
        await asyncio.sleep(0.3)
        await client.abort()
        return await running

    first, second = run(server, job)
    assert (first.finish_reason, second.finish_reason) == ("abort", "abort")
    assert 0 < len(first.output_ids) < len(second.output_ids) < 1900


def test_a_caller_that_hangs_up_frees_the_server(server) -> None:
    async def job(client):
        asked = requests([1, 2], tokens=1900, tag="left")
        running = asyncio.create_task(client.generate(asked, 1.0, (), 120))
        await asyncio.sleep(0.5)
        running.cancel()
        for _ in range(100):
            await asyncio.sleep(0.1)
            try:
                return await client.flush_cache()  # refused while there are requests
            except ServerRefused:
                continue
        pytest.fail("still at it after 10 s")

    run(server, job)


def test_the_wrong_key_is_refused(server) -> None:
    with pytest.raises(ServerRefused) as caught:
        run(server, lambda client: client.abort(), key="another")
    assert caught.value.status == 401


def test_health_and_information(server) -> None:
    async def job(client):
        assert await client.healthy(30)
        assert await client.healthy(5, sampling=False)
        return await client.server_info()

    info = run(server, job)
    assert info["tp_size"] == 1
    assert info["enable_deterministic_inference"]
    assert KEY not in json.dumps(info)


def test_it_answers_as_it_was_recorded(server, model) -> None:
    """If not: see what has changed, then record anew, and let the fake follow."""
    asyncio.run(send_weights(server.url, model[0], tp=1, version="default"))
    try:
        now = asyncio.run(converse(server.url, KEY))
    finally:
        asyncio.run(send_weights(server.url, model[0], tp=1, version="0"))
    recorded = json.loads(RECORDED.read_text())
    for name in recorded:
        assert now[name] == recorded[name], name

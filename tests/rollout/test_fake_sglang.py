"""The fake server against a conversation with the real one."""

from __future__ import annotations

import asyncio
import json

import pytest
from exchanges import RECORDED, converse
from fake_sglang import KEY, spec

from megatron_prime.rollout.sglang_server import SglangServer

USED = {"id", "finish_reason", "output_token_logprobs", "weight_version", "cached_tokens"}


@pytest.fixture(scope="module")
def conversations(tmp_path_factory) -> tuple[dict, dict]:
    server = SglangServer(spec(tmp_path_factory.mktemp("fake"), token_s=0.002))
    server.start()
    try:
        server.ready()
        fake = asyncio.run(converse(server.url, KEY))
    finally:
        server.kill()
    return json.loads(RECORDED.read_text()), fake


def test_every_call_gets_the_same_answer(conversations) -> None:
    real, fake = conversations
    assert list(fake) == list(real)
    for name in real:
        for part in real[name].keys() - {"shape"}:
            assert fake[name][part] == real[name][part], f"{name}: {part}"


def test_all_that_the_fake_says_has_the_real_type(conversations) -> None:
    real, fake = conversations
    for name in real:
        assert_within(fake[name].get("shape"), real[name].get("shape"), name)


def test_the_fake_says_all_that_is_read(conversations) -> None:
    _, fake = conversations
    sample = fake["group"]["shape"][0]
    assert sample["meta_info"].keys() >= USED
    assert sample["meta_info"]["output_token_logprobs"] == [["float"]]


def assert_within(fake: object, real: object, where: str) -> None:
    """The fake may leave out keys, but has none of its own and no other types."""
    if isinstance(fake, dict):
        assert isinstance(real, dict), where
        for key, value in fake.items():
            assert key in real, f"{where}.{key}"
            assert_within(value, real[key], f"{where}.{key}")
    elif isinstance(fake, list) and fake and isinstance(real, list):
        assert real, where
        assert_within(fake[0], real[0], f"{where}[]")
    else:
        assert fake == real, where

"""Answers by value, as they come: what is taken over, and which fault is told of what is not."""

from __future__ import annotations

import gc
import json
import math
from typing import Any

import pytest

from megatron_prime.rollout.sglang_answers import (
    BadAnswer,
    LogprobNotFinite,
    Sample,
    SampleRequest,
    WrongLength,
    WrongStop,
    checked_samples,
    checked_scores,
    collector_paused,
    parsed,
)

REQUEST = SampleRequest("a", (5, 6), 3, 1)


def answer(ids: list[int], triples: list[Any], reason: dict[str, Any]) -> Any:
    meta = {"id": "a;", "finish_reason": reason, "weight_version": 7, "cached_tokens": 2}
    one = {"output_ids": ids, "meta_info": meta | {"output_token_logprobs": triples}}
    return parsed("/generate", json.dumps([one]).encode())


LENGTH = {"type": "length", "length": 3}


def test_numbers_come_as_they_were_written() -> None:
    """A double that holds a single's value, a whole number, and one near the largest."""
    written = [-0.10536054521799088, -2, -3.4028234663852886e38]
    triples = [[value, token, None] for value, token in zip(written, (9, 8, 7), strict=True)]
    (found,) = checked_samples([REQUEST], answer([9, 8, 7], triples, LENGTH), [1])
    assert found == Sample("a", (9, 8, 7), tuple(map(float, written)), "length", "7", 2)
    assert all(type(value) is float for value in found.logprobs)


def test_nothing_was_sampled_before_an_abort() -> None:
    (found,) = checked_samples([REQUEST], answer([], [], {"type": "abort"}), [1])
    assert (found.output_ids, found.logprobs, found.finish_reason) == ((), (), "abort")


@pytest.mark.parametrize("value", [None, math.nan, -math.inf, "-0.5", True, 10**400])
def test_the_position_of_a_log_prob_that_is_no_number_is_told(value: Any) -> None:
    triples = [[-0.5, 9, None], [value, 8, None], [-0.5, 7, None]]
    with pytest.raises(LogprobNotFinite, match=rf"found the log-prob {value} at token 1"):
        checked_samples([REQUEST], answer([9, 8, 7], triples, LENGTH), [1])


@pytest.mark.parametrize("entry", [[-0.5, 8], [-0.5, 8, None, 0], [], 7, None])
def test_an_entry_that_has_not_three_fields(entry: Any) -> None:
    triples = [[-0.5, 9, None], entry, [-0.5, 7, None]]
    with pytest.raises(BadAnswer, match="request a: the answer lacks what this version of SGLang"):
        checked_samples([REQUEST], answer([9, 8, 7], triples, LENGTH), [1])


@pytest.mark.parametrize("entries", [[[-0.5]] * 3, [[-0.5, 9, None, 0]] * 3])
def test_entries_that_all_have_other_fields(entries: Any) -> None:
    with pytest.raises(BadAnswer, match="request a: the answer lacks what this version of SGLang"):
        checked_samples([REQUEST], answer([9, 9, 9], entries, LENGTH), [1])


@pytest.mark.parametrize("value", [None, math.nan, True, 10**400])
def test_a_score_that_is_no_finite_number(value: Any) -> None:
    found = {"meta_info": {"input_token_logprobs": [[None, 5, None], [value, 6, None]]}}
    with pytest.raises(LogprobNotFinite, match=f"found the log-prob {value} at token 1"):
        checked_scores((5, 6), found)


def test_other_tokens_than_their_log_probs_say() -> None:
    with pytest.raises(WrongLength, match="wanted the same tokens"):
        checked_samples([REQUEST], answer([9, 8], [[-1, 9, None], [-1, 7, None]], LENGTH), [1])


def test_a_stop_token_in_the_middle() -> None:
    triples = [[-1, token, None] for token in (9, 1, 7)]
    with pytest.raises(WrongStop, match="it went on after the stop token 1"):
        checked_samples([REQUEST], answer([9, 1, 7], triples, LENGTH), [1])


@pytest.mark.parametrize("content", [b"<html>", b'[{"output_ids": [1, 2', b"\xff\xfe"])
def test_what_is_no_json(content: bytes) -> None:
    with pytest.raises(BadAnswer, match="/generate: the answer is no JSON"):
        parsed("/generate", content)


def test_the_collector_runs_again_after_an_error_and_stays_off_where_it_was() -> None:
    assert gc.isenabled()

    def fail() -> None:
        with collector_paused():
            assert not gc.isenabled()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert gc.isenabled()
    gc.disable()
    try:
        with collector_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()

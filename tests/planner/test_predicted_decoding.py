"""Generation against times worked out by hand, on rates with round numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_prime.planner.decoding import Server, generate
from megatron_prime.planner.rates import GPUS

RATES = replace(
    GPUS["h100"],
    hbm_gb_per_s=1000,
    bf16_tflops=1000,
    nvlink_gb_per_s=100,
    hbm_share=1,
    compute_share=1,
    link_share=1,
)
SERVER = Server(
    weight_bytes=10e9,
    cache_bytes=1e6,
    flops=0,
    head_flops=0,
    attention_flops=0,
    reduced_bytes=0,
    collectives=0,
    kind="bf16",
    cache_tokens=10**9,
    sequences=100,
)


def seconds(groups: list[list[int]], server: Server = SERVER, servers: int = 1) -> float:
    return generate(groups, 100, server, servers, RATES).seconds


def test_one_sequence_reads_the_weights_for_each_token() -> None:
    """1000 passes of 10 GB, and of the keys and values of 100 to 1100 tokens, 600 on average."""
    assert seconds([[1000]]) == pytest.approx(1000 * (10e9 + 600 * 1e6) / 1e12)


def test_a_batch_shares_the_weights() -> None:
    """Two sequences until one ends, then the other alone: 10 s of weights, once."""
    cache = 400 * 2 * 300 + 600 * (500 + 1100) / 2  # tokens read: 100 to 500 twice, 500 to 1100
    assert seconds([[400, 1000]]) == pytest.approx(1000 * 0.010 + cache * 1e-6)


def test_llama_3_8b_decodes_at_the_speed_of_its_memory() -> None:
    """15 GB of weights at 80 % of 3.35 TB/s: 5.6 ms a token; 512 at once wait for products."""
    server = replace(SERVER, weight_bytes=15e9, cache_bytes=0, flops=15e9, sequences=1024)
    alone = generate([[100]], 0, server, 1, GPUS["h100"])
    assert alone.seconds == pytest.approx(100 * 15e9 / 2.68e12)
    together = generate([[100] * 512], 0, server, 1, GPUS["h100"])
    assert "hbm" not in together.by
    assert together.seconds == pytest.approx(100 * 512 * 15e9 / (989e12 * 0.55))


def test_all_reduces_cost_bytes_and_latency() -> None:
    server = replace(SERVER, reduced_bytes=1e6, collectives=160)
    more = seconds([[1000]], server) - seconds([[1000]])
    assert more == pytest.approx(1000 * (160 * 10e-6 + 1e6 / 100e9) + 100 * 1e6 / 100e9)


def test_prompts_are_computed_once_for_their_responses() -> None:
    """100 tokens of 1 TFLOP, and 100²/2 pairs of 1 GFLOP, at 1000 TFLOP/s."""
    server = replace(SERVER, flops=1e12, attention_flops=1e9, weight_bytes=1e15)
    prefill = generate([[1, 1]], 100, server, 1, RATES).by["compute"]
    assert prefill == pytest.approx((100 * 1e12 + 5000 * 1e9) / 1e15)


def test_what_has_no_room_waits() -> None:
    """Two groups of two, of which only one fits: by number, or by the tokens of the cache."""
    groups, small = [[1000, 1000]] * 2, replace(SERVER, cache_bytes=0)
    assert seconds(groups, small) == pytest.approx(10)
    assert seconds(groups, replace(small, sequences=3)) == pytest.approx(20)
    assert seconds(groups, replace(small, cache_tokens=4 * 1100 - 1)) == pytest.approx(20)
    assert seconds(groups, replace(small, cache_tokens=10)) == pytest.approx(20)  # but begins


def test_the_server_that_is_free_takes_the_next_prompt() -> None:
    """Lengths 3, 1, 1, 1 on two servers that take one at a time: all are done after 3, not 4."""
    server = replace(SERVER, cache_bytes=0, sequences=1)
    found = generate([[3000], [1000], [1000], [1000]], 0, server, 2, RATES)
    assert found.seconds == pytest.approx(30)
    assert sorted(found.done) == pytest.approx([10, 20, 30, 30])
    assert found.until(2) == pytest.approx(20)

"""Operations of Llama 3 8B, counted by hand."""

from __future__ import annotations

from pathlib import Path

from public_models import shape_of

from megatron_prime.planner.flops import Load, forward_flops, load_of


def test_llama_3_8b_by_hand(tmp_path: Path) -> None:
    """Products of 4096 × 6144, 4096 × 4096, twice 4096 × 14336 and once back; 128256 tokens."""
    found = forward_flops(shape_of(tmp_path, "Llama-3-8B"), Load(1, 1, 1))
    layer = 25_165_824 + 16_777_216 + 176_160_768
    assert found.linears == 2 * 32 * layer == 13_958_643_712
    assert found.head == 2 * 525_336_576
    assert found.attention == 4 * 4096 * 32
    # The rule of thumb is two operations per parameter; the embedding's 525 M are looked up.
    assert (
        2 * (8_030_261_248 - 525_336_576) * 0.999 < found.linears + found.head < 2 * 8_030_261_248
    )


def test_a_sequence_sees_its_own_past_only() -> None:
    """A prompt of 2, a response of 2: keys seen are 1 + 2 + 3 + 4; others add their own."""
    assert load_of(2, (2,)) == Load(tokens=4, seen_keys=10, wanted=2)
    assert load_of(2, (2, 1)) == Load(tokens=7, seen_keys=16, wanted=3)


def test_key_value_heads_are_fewer_than_query_heads(tmp_path: Path) -> None:
    """Qwen2.5-7B: 28 query heads and 4 key/value heads of 128."""
    found = forward_flops(shape_of(tmp_path, "Qwen2.5-7B"), Load(1, 0, 0))
    assert found.linears == 2 * 28 * 3584 * (3584 + 2 * 512 + 3584 + 3 * 18944)

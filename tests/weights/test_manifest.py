"""Shares of the work: every file once, and the bytes spread evenly."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from megatron_prime.weights.manifest import Entry, measure, share


@pytest.mark.parametrize("world_size", [1, 3, 8])
def test_every_file_is_somebody_s_and_nobody_reads_much_more(world_size: int) -> None:
    rng = random.Random(0)
    entries = {f"policy/__{i}_0.distcp": Entry(rng.randrange(10**9), 0) for i in range(100)}
    shares = [list(share(entries, rank, world_size)) for rank in range(world_size)]
    assert sorted(name for names in shares for name in names) == sorted(entries)
    loads = [sum(entries[name].size for name in names) for names in shares]
    assert max(loads) <= sum(loads) / world_size + max(e.size for e in entries.values())
    assert max(loads) < 1.05 * min(loads)


def test_the_checksum_is_that_of_the_zip_format(tmp_path: Path) -> None:
    """The check value of CRC-32/ISO-HDLC."""
    (tmp_path / "file").write_bytes(b"123456789")
    assert measure(tmp_path / "file") == Entry(9, 0xCBF43926)
    (tmp_path / "large").write_bytes(b"123456789" * 4_000_000)  # several reads
    assert measure(tmp_path / "large", to_disk=True).size == 36_000_000

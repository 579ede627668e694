"""What `--verify` does: both sides are read again, and every byte is compared or summed.

Before a conversion the source's own checksums, where it has any: a damaged source would make a
faithful copy of the damage. After it every tensor against the source's, then the small files and
the new manifest. That happens before the new directory gets its name, so one that fails never has
it. Memory is a few buffers, and a tensor that is in columns on one side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from megatron_prime.errors import WeightsError
from megatron_prime.weights import manifest
from megatron_prime.weights.convert_sources import Source
from megatron_prime.weights.names import Entry, entries
from megatron_prime.weights.shape import ModelShape
from megatron_prime.weights.stretches import Budget, FileTensor, converted, opened

Report = Callable[[int, int], None]  # bytes done, of how many


def same_tensors(
    source: Source,
    made: Source,
    shape: ModelShape,
    dtype: str | None,
    workers: int = 1,
    report: Report = lambda *_: None,
) -> int:
    """Compare bit for bit, tensor by tensor; returns their number. WeightsError at the first."""
    every = entries(shape)
    pairs = [(entry, source.tensors(entry), made.tensors(entry)) for entry in every]
    sizes = {e.megatron: sum(t.rows * t.pitch for t in wanted) for e, wanted, _ in pairs}
    largest = (
        max(t.rows * t.pitch for tensors in side for t in tensors)
        for side in ([wanted for _, wanted, _ in pairs], [found for *_, found in pairs])
    )  # of two types of numbers the narrower one's counts
    budget, done = Budget(2 * min(largest)), 0

    def one(pair: tuple[Entry, list[FileTensor], list[FileTensor]]) -> Entry:
        entry, wanted, found = pair
        for a, b, name in zip(wanted, found, entry.hf, strict=True):
            as_type = dtype or a.dtype
            if (b.dtype, b.rows, b.cols) != (as_type, a.rows, a.cols) or not _same(
                a, b, name, as_type, budget
            ):
                raise WeightsError(f"--verify: {name} in {made.folder} is not what it was made of")
        return entry

    for entry in _each(one, pairs, workers):
        done += sizes[entry.megatron]
        report(done, sum(sizes.values()))
    return sum(len(entry.hf) for entry in every)


def _same(wanted: FileTensor, found: FileTensor, name: str, dtype: str, budget: Budget) -> bool:
    import numpy as np

    with ExitStack() as stack:
        assert wanted.wide or found.wide, "two held ones could wait for each other's memory"
        first, second = (stack.enter_context(opened(t, False, budget)) for t in (wanted, found))
        ours = converted(first.blocks(0, wanted.rows), name, wanted.dtype, dtype)
        theirs = second.blocks(0, found.rows)
        return all(
            np.array_equal(np.frombuffer(a, np.uint8), np.frombuffer(b, np.uint8))
            for a, b in _abreast(ours, theirs)
        )


def _abreast(ours: Iterator[Any], theirs: Iterator[Any]) -> Iterator[tuple[Any, Any]]:
    """Stretches of equal length of two streams of blocks."""
    a, b = memoryview(b""), memoryview(b"")
    while True:
        a, b = a or next(ours, a), b or next(theirs, b)
        length = min(len(a), len(b))
        if not length:
            assert not a
            assert not b
            return
        yield a[:length], b[:length]
        a, b = a[length:], b[length:]


def same_files(folder: Path, wanted: Mapping[str, bytes]) -> None:
    """WeightsError unless the small files hold what they should."""
    for name, content in wanted.items():
        path = folder / name
        if not path.exists() or path.read_bytes() != content:
            raise WeightsError(f"--verify: {path} is not what it was made of")


def whole(folder: Path, within: Path, workers: int, report: Report = lambda *_: None) -> bool:
    """Read the files of `within`, which the manifest of `folder` knows; False without a manifest.

    WeightsError names what is damaged.
    """
    if not (folder / manifest.NAME).exists():
        return False
    known = manifest.read(folder)
    if isinstance(known, manifest.Damage):
        raise WeightsError(f"{folder}: {known}; bring it back from a copy")
    names = [name for name in known if (folder / name).is_relative_to(within)]
    total, done = sum(known[name].size for name in names), 0
    checks = _each(lambda name: (name, manifest.check(folder, name, known[name])), names, workers)
    for name, damage in checks:
        if damage:
            raise WeightsError(f"{folder}: {damage}; bring it back from a copy")
        done += known[name].size
        report(done, total)
    return True


def _each(function: Callable[[Any], Any], items: Sequence[Any], workers: int) -> Iterator[Any]:
    """The results in order; after an error nothing more is begun."""
    pool = ThreadPoolExecutor(workers)
    try:
        yield from pool.map(function, items)
    finally:
        pool.shutdown(cancel_futures=True)

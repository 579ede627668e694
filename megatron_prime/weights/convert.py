"""Between Hugging Face safetensors and Megatron's distributed checkpoints, a parameter at a time.

`to_megatron` and `to_hf` first plan (which parameters go into which file, from the sources' tables
alone) and refuse what can't work; then `shard_jobs` writes the files, `verify` compares them if
asked to, and the directory appears under its name when it is whole. Names and layouts are the
weight sync's: `names.py` says what a parameter is made of, `layout.py` how. The bytes go through
`stretches`, through small buffers. Neither torch nor process groups nor Megatron are needed.
"""

from __future__ import annotations

import json
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from megatron_prime.errors import WeightsError
from megatron_prime.weights import archive, manifest, torch_dist, verify
from megatron_prime.weights.companions import other_files
from megatron_prime.weights.convert_plan import (
    Options,
    check_layout,
    disk_sizes,
    hf_sizes,
    largest,
    nbytes_of,
    plan,
)
from megatron_prime.weights.convert_sources import HfSource, MegatronSource, Source
from megatron_prime.weights.dist_metadata import Piece
from megatron_prime.weights.dtypes import ITEMSIZE
from megatron_prime.weights.layout import row_runs
from megatron_prime.weights.names import Entry, disk_key, entries, hf_shapes
from megatron_prime.weights.raw_safetensors import INDEX, SINGLE, table_of
from megatron_prime.weights.shape import ModelShape
from megatron_prime.weights.shard_jobs import (
    Done,
    Job,
    Summed,
    Workplace,
    clear_notes,
    room_for,
    run,
)
from megatron_prime.weights.stretches import Budget, Stretches, converted, opened
from megatron_prime.weights.torch_dist import Rect

HF_FOLDER = "hf"  # config.json, tokenizer and so on, in a converted checkpoint
NOTE = "converted.json"  # what it was made of


class Report(Protocol):
    """Is told how far it is."""

    def __call__(self, done: int, total: int, before: int = 0, what: str = "") -> None:
        """Bytes done, of how many; `before` of those done were there when it began."""


def to_megatron(hf_dir: Path, out: Path, options: Options, report: Report) -> int:
    """Make `out`, a distributed checkpoint of the weights in `hf_dir`. WeightsError if it can't.

    Returns how many tensors were verified.
    """
    shape = ModelShape.from_hf(hf_dir, options.tp)
    check_layout(shape, options)
    source = HfSource(hf_dir, shape)
    sizes = disk_sizes(source, shape, options)
    others = other_files(hf_dir, options.dtype or source.dtype(entries(shape)[0]))

    def verified(folder: Path) -> int:
        made = MegatronSource(folder, shape)
        count = _compared(source, made, shape, options, report)
        verify.same_files(folder / HF_FOLDER, others)
        verify.whole(folder, folder, options.workers, _named(report, "checksums"))
        return count

    if options.verify and out.exists():
        clear_notes(out)
        return verified(out)
    jobs = plan(source, shape, options, "__{}_0.distcp")
    place = _workplace(out, source, jobs, options, others)
    budget = Budget(2 * largest(source, shape))

    def write(job: Job, file: Summed) -> tuple[Piece, ...]:
        pieces = []
        for entry in job.entries:
            pieces += list(_write_chunks(entry, source, shape, options, budget, file))
            meter.add(nbytes_of(entry, source, shape, options))
        return tuple(pieces)

    meter = _Meter(report, sum(job.nbytes for job in jobs))
    done = run(place, jobs, write, options.workers, meter.found)
    states = place.make(Job(f"__{len(jobs)}_0.distcp", (), 0), lambda _, f: _write_states(f, shape))
    located = [(file.file, piece) for file in (*done, states) for piece in file.pieces]
    note: dict[str, str | int] = {"from": str(hf_dir.absolute()), "family": shape.family}
    note |= {"tp": options.tp, "pp": options.pp}
    with place.disk():
        torch_dist.write_metadata(place.folder, located, sizes)
        place.write(others, HF_FOLDER)
        place.write({NOTE: json.dumps(note).encode()})
        _write_manifest(place.folder, [*done, states])
    return _publish(place, verified if options.verify else None)


def to_hf(
    checkpoint: Path,
    hf_dir: Path,
    out: Path,
    options: Options,
    report: Report,
    critic: bool = False,
) -> int:
    """Make `out`, a Hugging Face directory of the weights in `checkpoint`.

    `hf_dir` has the config.json, tokenizer and so on; a `critic` becomes transformers' model for
    sequence classification with one label. Returns how many tensors were verified. WeightsError if
    it can't.
    """
    shape = ModelShape.from_hf(hf_dir)
    shape = shape.as_critic() if critic else shape
    source = MegatronSource(checkpoint, shape)
    others = other_files(hf_dir, options.dtype or source.dtype(entries(shape)[0]), critic)
    if options.verify:
        for root in (checkpoint, checkpoint.parent):  # converted, or policy/ of a run's
            if verify.whole(root, checkpoint, options.workers, _named(report, "checksums")):
                break

    def verified(folder: Path) -> int:
        count = _compared(source, HfSource(folder, shape), shape, options, report)
        verify.same_files(folder, others)
        return count

    if options.verify and out.exists():
        clear_notes(out)
        return verified(out)
    jobs = plan(source, shape, options, "model-{:05d}-of-{:05d}.safetensors", 1)
    if len(jobs) == 1:
        jobs = [Job(SINGLE, jobs[0].entries, jobs[0].nbytes)]
    place = _workplace(out, source, jobs, options, others)
    budget = Budget(2 * largest(source, shape))

    def write(job: Job, file: Summed) -> tuple[Piece, ...]:
        sizes = hf_shapes(shape)
        dtypes = {name: options.dtype or source.dtype(e) for e in job.entries for name in e.hf}
        file.write(table_of((name, dtype, sizes[name]) for name, dtype in dtypes.items()))
        for entry in job.entries:
            for tensor, name in zip(source.tensors(entry), entry.hf, strict=True):
                with opened(tensor, False, budget) as stretches:
                    blocks = stretches.blocks(0, tensor.rows)
                    for block in converted(blocks, name, tensor.dtype, dtypes[name]):
                        file.write(block)
            meter.add(nbytes_of(entry, source, shape, options))
        return ()

    meter = _Meter(report, sum(job.nbytes for job in jobs))
    run(place, jobs, write, options.workers, meter.found)
    if len(jobs) > 1:
        weight_map = {name: job.file for job in jobs for e in job.entries for name in e.hf}
        index = {"metadata": {"total_size": meter.total}, "weight_map": weight_map}
        place.write({INDEX: json.dumps(index, indent=2).encode()})
    place.write(others)
    return _publish(place, verified if options.verify else None)


def _write_chunks(
    entry: Entry,
    source: Source,
    shape: ModelShape,
    options: Options,
    budget: Budget,
    file: Summed,
) -> Iterator[Piece]:
    key, layer = disk_key(entry.megatron)
    dtype = options.dtype or source.dtype(entry)
    size = torch_dist.fused_size(entry.layout, hf_sizes(entry, shape), shape)
    rects = torch_dist.chunks_of(entry.layout, size, options.tp)
    tensors = source.tensors(entry)
    with ExitStack() as stack:
        cut = rects[0].cols < tensors[0].cols  # of one tensor only: no layout fuses columns
        sources = [stack.enter_context(opened(t, cut, budget)) for t in tensors]
        for rect in rects:
            offsets, sizes = (rect.row, rect.col), (rect.rows, rect.cols)
            lead = () if layer is None else ((layer, 1),)
            where = (*(at for at, _ in lead), *offsets[: len(size)])
            chunk = (*(n for _, n in lead), *sizes[: len(size)])
            around = archive.frame(dtype, chunk)
            start = file.size
            file.write(around.head)
            for block in _blocks(rect, entry, sources, dtype, shape):
                file.write(block)
            file.write(around.tail)
            yield Piece(key, where, chunk, start, file.size - start)


def _blocks(
    rect: Rect, entry: Entry, sources: Sequence[Stretches], dtype: str, shape: ModelShape
) -> Iterator[bytes | memoryview]:
    """The bytes of a chunk of an entry's parameter."""
    rows = 0
    for fused, which, row, count in row_runs(
        entry.layout, [source.tensor.rows for source in sources], shape
    ):
        first, last = max(fused, rect.row), min(fused + count, rect.row + rect.rows)
        if first < last:
            source = sources[which]
            blocks = source.blocks(row + first - fused, last - first, rect.col, rect.cols)
            yield from converted(blocks, entry.hf[which], source.tensor.dtype, dtype)
            rows += last - first
    for _ in range(rect.rows - rows):  # the vocabulary's padding
        yield bytes(rect.cols * ITEMSIZE[dtype])


def _write_states(file: Summed, shape: ModelShape) -> tuple[Piece, ...]:
    pieces, empty = [], archive.plain([None])
    for key in torch_dist.empty_states(shape.num_layers):
        pieces.append(Piece(key, None, (), file.size, file.write(empty)))
    return tuple(pieces)


def _workplace(
    out: Path, source: Source, jobs: list[Job], options: Options, others: Mapping[str, bytes]
) -> Workplace:
    if out.exists() or out.is_symlink():
        raise WeightsError(
            f"{out} exists; move it away, choose another --out, or compare it by --verify"
        )
    room_for(out, sum(job.nbytes for job in jobs))
    stats = {str(path.resolve()): path.stat() for path in source.paths}
    of = {path: [stat.st_size, stat.st_mtime_ns] for path, stat in stats.items()}
    small = {name: zlib.crc32(content) for name, content in others.items()}
    unlike = ("workers", "verify")  # make no difference to the files
    how = {name: str(value) for name, value in asdict(options).items() if name not in unlike}
    files = [[job.file, job.nbytes] for job in jobs]
    return Workplace(out, {"of": of, "small": small, "how": how, "files": files})


def _write_manifest(folder: Path, done: Sequence[Done]) -> None:
    known = {file.file: manifest.Entry(file.size, file.crc32) for file in done}
    names = manifest.files_in(folder)
    manifest.write(folder, {n: known.get(n) or manifest.measure(folder / n) for n in names})


def _compared(
    source: Source, made: Source, shape: ModelShape, options: Options, report: Report
) -> int:
    told = _named(report, "compared")
    return verify.same_tensors(source, made, shape, options.dtype, options.workers, told)


def _publish(place: Workplace, verified: Callable[[Path], int] | None) -> int:
    count = 0
    if verified:
        try:
            count = verified(place.folder)
        except WeightsError as error:
            place.forget()
            raise WeightsError(f"{error}; nothing is published, convert again") from error
    place.publish()
    return count


def _named(report: Report, what: str) -> Callable[[int, int], None]:
    return lambda done, total: report(done, total, what=what)


class _Meter:
    """Adds up what the workers have done."""

    def __init__(self, report: Report, total: int) -> None:
        self._report, self.total, self._done, self._found = report, total, 0, 0
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        """So many bytes more."""
        with self._lock:
            self._done += nbytes
            self._report(self._done, self.total, self._found)

    def found(self, nbytes: int) -> None:
        """So many bytes were there."""
        with self._lock:
            self._found += nbytes
        self.add(nbytes)

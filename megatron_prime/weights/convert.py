"""Between Hugging Face safetensors and Megatron's distributed checkpoints, a parameter at a time.

`to_megatron` and `to_hf` first plan (which parameters go into which file, from the sources' tables
alone) and refuse what can't work; then `shard_jobs` writes the files, and the directory appears
under its name when it is whole. Names and layouts are the weight sync's: `names.py` says what a
parameter is made of, `layout.py` how. In memory is one parameter, in its parts and fused, at most
twice the largest; `workers` share that. Neither process groups nor Megatron are needed.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, cast

import torch

from megatron_prime.weights import manifest, torch_dist
from megatron_prime.weights.companions import other_files
from megatron_prime.weights.convert_sources import HfSource, MegatronSource, Source, converted
from megatron_prime.weights.names import Entry, disk_key, entries, hf_shapes
from megatron_prime.weights.raw_safetensors import bytes_of, table_of
from megatron_prime.weights.safetensors_io import SHARD_BYTES, WeightsError
from megatron_prime.weights.shape import ModelShape
from megatron_prime.weights.shard_jobs import Budget, Done, Job, Summed, Workplace, room_for, run
from megatron_prime.weights.torch_dist import Piece

HF_FOLDER = "hf"  # config.json, tokenizer and so on, in a converted checkpoint
NOTE = "converted.json"  # what it was made of
Report = Callable[[int, int], None]  # bytes done, of how many


@dataclass(frozen=True, slots=True)
class Options:
    """How to convert."""

    dtype: torch.dtype | None = None  # None: as it is
    tp: int = 1  # cut parameters as that many tensor-parallel ranks read them
    pp: int = 1  # no file has layers of two of that many pipeline stages
    shard_bytes: int = SHARD_BYTES  # of a file, unless one parameter is larger
    workers: int = 1


def to_megatron(hf_dir: Path, out: Path, options: Options, report: Report) -> None:
    """Make `out`, a distributed checkpoint of the weights in `hf_dir`. WeightsError if it can't."""
    shape = ModelShape.from_hf(hf_dir, options.tp)
    split = (shape.num_heads, shape.num_kv_heads, shape.ffn_size)
    if any(count % options.tp for count in split):
        raise WeightsError(
            f"--tp {options.tp}: wanted a divisor of the model's {split[0]} heads, {split[1]} "
            f"key/value heads and {split[2]} feed-forward units"
        )
    source = HfSource(hf_dir, shape)
    jobs = plan(source, shape, options, "__{}_0.distcp")
    place = _workplace(out, source.paths, jobs, options)
    budget = Budget(2 * _largest(source, shape, options))

    def write(job: Job, file: Summed) -> tuple[Piece, ...]:
        pieces = []
        for entry in job.entries:
            with budget.take(2 * nbytes_of(entry, source, shape, options)):
                pieces += list(_write_chunks(entry, source, shape, options, file))
            meter.add(nbytes_of(entry, source, shape, options))
        return tuple(pieces)

    meter = _Meter(report, sum(job.nbytes for job in jobs))
    with torch_dist.without_archive_sums():
        done = run(place, jobs, write, options.workers, meter.add)
    states = place.make(Job(f"__{len(jobs)}_0.distcp", (), 0), lambda _, f: _write_states(f, shape))
    sizes = {}
    for entry in entries(shape):
        key, layer = disk_key(entry.megatron)
        size = torch_dist.fused_size(entry, _hf_sizes(entry, shape), shape)
        whole = size if layer is None else (shape.num_layers, *size)
        sizes[key] = whole, options.dtype or source.dtype(entry)
    located = [(file.file, piece) for file in (*done, states) for piece in file.pieces]
    torch_dist.write_metadata(place.folder, located, sizes)
    _write_others(place.folder / HF_FOLDER, other_files(hf_dir, _main_dtype(jobs, source, options)))
    note = {
        "from": str(hf_dir.absolute()),
        "family": shape.family,
        "tp": options.tp,
        "pp": options.pp,
    }
    (place.folder / NOTE).write_text(json.dumps(note))
    _finish(place, [*done, states])


def to_hf(checkpoint: Path, hf_dir: Path, out: Path, options: Options, report: Report) -> None:
    """Make `out`, a Hugging Face directory of the weights in `checkpoint`.

    `hf_dir` has the config.json, tokenizer and so on. WeightsError if it can't.
    """
    shape = ModelShape.from_hf(hf_dir)
    source = MegatronSource(checkpoint, shape)
    jobs = plan(source, shape, options, "model-{:05d}-of-{:05d}.safetensors", 1)
    if len(jobs) == 1:
        jobs = [Job("model.safetensors", jobs[0].entries, jobs[0].nbytes)]
    place = _workplace(out, source.paths, jobs, options)
    budget = Budget(2 * _largest(source, shape, options))

    def write(job: Job, file: Summed) -> tuple[Piece, ...]:
        sizes = hf_shapes(shape)
        dtypes = {name: options.dtype or source.dtype(e) for e in job.entries for name in e.hf}
        file.write(table_of((name, dtype, sizes[name]) for name, dtype in dtypes.items()))
        for entry in job.entries:
            with budget.take(2 * nbytes_of(entry, source, shape, options)):
                for tensor in converted(source, entry, options.dtype):
                    file.write(bytes_of(tensor.contiguous()))
            file.flush()
            meter.add(nbytes_of(entry, source, shape, options))
        return ()

    meter = _Meter(report, sum(job.nbytes for job in jobs))
    run(place, jobs, write, options.workers, meter.add)
    if len(jobs) > 1:
        weight_map = {name: job.file for job in jobs for e in job.entries for name in e.hf}
        index = {"metadata": {"total_size": meter.total}, "weight_map": weight_map}
        (place.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    _write_others(place.folder, other_files(hf_dir, _main_dtype(jobs, source, options)))
    place.publish()


def plan(
    source: Source, shape: ModelShape, options: Options, name: str, first: int = 0
) -> list[Job]:
    """Which parameters go into which file, in the order of the model."""
    groups: list[list[Entry]] = []
    held, stage = 0, -1
    for entry in entries(shape):
        nbytes = nbytes_of(entry, source, shape, options)
        layer = disk_key(entry.megatron)[1]
        now = max(stage, 0) if layer is None else layer * options.pp // shape.num_layers
        if not groups or held + nbytes > options.shard_bytes or now != max(stage, 0):
            groups.append([])
            held = 0
        groups[-1].append(entry)
        held, stage = held + nbytes, now
    return [
        Job(
            name.format(number, len(groups) - 1 + first),
            tuple(group),
            sum(nbytes_of(entry, source, shape, options) for entry in group),
        )
        for number, group in enumerate(groups, first)
    ]


def nbytes_of(entry: Entry, source: Source, shape: ModelShape, options: Options) -> int:
    """Bytes of an entry's tensors as they will be written."""
    itemsize = (options.dtype or source.dtype(entry)).itemsize
    return sum(prod(size) for size in _hf_sizes(entry, shape)) * itemsize


def _write_chunks(
    entry: Entry, source: Source, shape: ModelShape, options: Options, file: Summed
) -> Iterator[Piece]:
    key, layer = disk_key(entry.megatron)
    tensors = converted(source, entry, options.dtype)
    for offsets, shard in torch_dist.shards_of(entry.layout, tensors, shape, options.tp):
        chunk = shard.contiguous()
        if chunk.untyped_storage().nbytes() != chunk.nbytes:  # torch.save would write all of it
            chunk = chunk.clone()
        if layer is not None:
            offsets, chunk = (layer, *offsets), chunk[None]
        start = file.size
        torch.save(chunk, cast(Any, file))
        yield Piece(key, offsets, tuple(chunk.shape), start, file.size - start)


def _write_states(file: Summed, shape: ModelShape) -> tuple[Piece, ...]:
    pieces = []
    for key in torch_dist.empty_states(shape.num_layers):
        start = file.size
        torch.save([None], cast(Any, file))
        pieces.append(Piece(key, None, (), start, file.size - start))
    return tuple(pieces)


def _workplace(out: Path, sources: Sequence[Path], jobs: list[Job], options: Options) -> Workplace:
    if out.exists():
        raise WeightsError(f"{out} exists; move it away or choose another --out")
    room_for(out, sum(job.nbytes for job in jobs))
    of = {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in sources}
    how = {name: str(value) for name, value in asdict(options).items() if name != "workers"}
    return Workplace(out, {"of": of, "how": how, "files": [[j.file, j.nbytes] for j in jobs]})


def _finish(place: Workplace, done: Sequence[Done]) -> None:
    known = {file.file: manifest.Entry(file.size, file.crc32) for file in done}
    names = [n for n in manifest.files_in(place.folder) if not n.endswith(".done")]
    names.remove("conversion.json")
    manifest.write(
        place.folder, {n: known.get(n) or manifest.measure(place.folder / n, True) for n in names}
    )
    place.publish()


def _write_others(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def _main_dtype(jobs: Sequence[Job], source: Source, options: Options) -> torch.dtype:
    """That of most of the model: norms may be finer."""
    return options.dtype or source.dtype(jobs[0].entries[0])


def _largest(source: Source, shape: ModelShape, options: Options) -> int:
    return max(nbytes_of(entry, source, shape, options) for entry in entries(shape))


def _hf_sizes(entry: Entry, shape: ModelShape) -> list[tuple[int, ...]]:
    sizes = _all_hf_sizes(shape)
    return [sizes[name] for name in entry.hf]


_all_hf_sizes = lru_cache(maxsize=1)(hf_shapes)


class _Meter:
    """Adds up what the workers have done."""

    def __init__(self, report: Report, total: int) -> None:
        self._report, self.total, self._done = report, total, 0
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        """So many bytes more."""
        with self._lock:
            self._done += nbytes
            self._report(self._done, self.total)

"""Llama-3-70B and Qwen2.5-72B at their true shapes, on files without bytes.

What each of 8 x 8 (tensor, pipeline) ranks finds in a converted checkpoint, by the arithmetic of
the two models: keys, offsets, sizes, files, and as many parameters as the planner gives the rank.
Then bytes: the corners of each rank's chunks carry numbers, placed by hand on one side and found
where the converter says that they lie on the other; so for both directions.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import synthetic

from megatron_prime.config import ParallelSizes
from megatron_prime.planner import counts
from megatron_prime.weights import archive, dist_metadata
from megatron_prime.weights.convert_plan import Options, hf_sizes, plan
from megatron_prime.weights.convert_sources import HfSource, MegatronSource, Source
from megatron_prime.weights.layout import row_runs
from megatron_prime.weights.names import Entry, disk_key, entries, hf_shapes
from megatron_prime.weights.shape import ModelShape
from megatron_prime.weights.torch_dist import Piece, chunks_of, empty_states, fused_size

TP = PP = 8
HIDDEN, HEAD = 8192, 128
STAGE = 10  # layers
MODELS = pytest.mark.parametrize(
    "config", [synthetic.LLAMA_70B, synthetic.QWEN_72B], ids=["llama", "qwen"]
)
Chunk = tuple[tuple[int, ...], tuple[int, ...]]  # offsets and sizes in the parameter


def by_hand(name: str, rank: int, config: dict[str, Any]) -> list[tuple[Chunk, str, int, int]]:
    """Of tensor-parallel `rank`: chunks, and for each the tensor, row and column it begins with.

    Eight key/value heads, so each rank has one and the eight query heads that share it.
    """
    ffn, vocab = config["intermediate_size"] // TP, config["vocab_size"] // TP
    q, part = HIDDEN // TP, name.split(".", 3)[-1] if name.startswith("decoder.layers") else name
    qkv, mlp = "self_attn.{}_proj.weight", "mlp.{}_proj.weight"
    group = q + 2 * HEAD
    known: dict[str, list[tuple[Chunk, str, int, int]]] = {
        "input_layernorm.weight": [(((0,), (HIDDEN,)), "input_layernorm.weight", 0, 0)],
        "pre_mlp_layernorm.weight": [(((0,), (HIDDEN,)), "post_attention_layernorm.weight", 0, 0)],
        "self_attention.linear_qkv.weight": [
            (((rank * group, 0), (group, HIDDEN)), qkv.format("q"), rank * q, 0)
        ],
        "self_attention.linear_qkv.bias": [
            (((rank * group,), (group,)), "self_attn.q_proj.bias", rank * q, 0)
        ],
        "self_attention.linear_proj.weight": [
            (((0, rank * q), (HIDDEN, q)), qkv.format("o"), 0, rank * q)
        ],
        "mlp.linear_fc1.weight": [
            (((rank * ffn, 0), (ffn, HIDDEN)), mlp.format("gate"), rank * ffn, 0),
            (((TP * ffn + rank * ffn, 0), (ffn, HIDDEN)), mlp.format("up"), rank * ffn, 0),
        ],
        "mlp.linear_fc2.weight": [
            (((0, rank * ffn), (HIDDEN, ffn)), mlp.format("down"), 0, rank * ffn)
        ],
        "embedding.word_embeddings.weight": [
            (((rank * vocab, 0), (vocab, HIDDEN)), "model.embed_tokens.weight", rank * vocab, 0)
        ],
        "output_layer.weight": [
            (((rank * vocab, 0), (vocab, HIDDEN)), "lm_head.weight", rank * vocab, 0)
        ],
        "decoder.final_layernorm.weight": [(((0,), (HIDDEN,)), "model.norm.weight", 0, 0)],
    }
    layer = disk_key(name)[1]
    before = "" if layer is None else f"model.layers.{layer}."
    return [(chunk, before + hf, row, col) for chunk, hf, row, col in known[part]]


def chunks(entry: Entry, shape: ModelShape) -> list[list[Chunk]]:
    """What the converter cuts for each rank."""
    size = fused_size(entry.layout, hf_sizes(entry, shape), shape)
    rects = chunks_of(entry.layout, size, TP)
    each = len(rects) // TP
    found = [((r.row, r.col)[: len(size)], (r.rows, r.cols)[: len(size)]) for r in rects]
    return [found[r * each : (r + 1) * each] if each else found for r in range(TP)]


@MODELS
def test_names_slices_and_sizes_of_every_rank(tmp_path: Path, config: dict[str, Any]) -> None:
    hf = synthetic.make(tmp_path / "hf", config, files=15, sparse=True)
    shape = ModelShape.from_hf(hf, TP)
    options = Options(tp=TP, pp=PP)
    jobs = plan(HfSource(hf, shape), shape, options, "{}-{}")
    file_of = {entry.megatron: job.file for job in jobs for entry in job.entries}
    stages_of: dict[str, set[int]] = {}
    every = {entry.megatron: entry for entry in entries(shape)}
    held = 0
    for stage in range(PP):
        (parameters,) = counts.chunks(shape, ParallelSizes(tp=TP, pp=PP), stage)
        for rank in range(TP):
            sizes = {}
            for parameter in parameters:
                found = chunks(every[parameter.name], shape)[rank]
                wanted = [chunk for chunk, *_ in by_hand(parameter.name, rank, config)]
                assert found == wanted, (parameter.name, rank)
                sizes[parameter.name] = sum(_numbers(sizes) for _, sizes in found)
                stages_of.setdefault(file_of[parameter.name], set()).add(stage)
            assert sizes == {p.name: p.numel for p in parameters}
            held += sum(sizes.values())
    assert stages_of.keys() == {job.file for job in jobs}
    assert all(len(stages) == 1 for stages in stages_of.values())  # a rank reads only its stage's
    norms = (2 * 80 + 1) * HIDDEN  # the same on all tensor-parallel ranks
    assert sum(job.nbytes for job in jobs) == 2 * (held - (TP - 1) * norms)
    assert all(job.nbytes <= options.shard_bytes for job in jobs)


def _numbers(size: tuple[int, ...]) -> int:
    return size[0] * (size[1] if len(size) > 1 else 1)


def corners(
    name: str, config: dict[str, Any]
) -> Iterator[tuple[int, Chunk, tuple[int, int], str, int, int]]:
    """Rank, chunk, place in the chunk, and tensor, row and column there: first and last numbers.

    In a chunk of q, k and v: of its k and v, too.
    """
    for rank in range(TP):
        for chunk, tensor, row, col in by_hand(name, rank, config):
            rows, cols = chunk[1][0], chunk[1][1] if len(chunk[1]) > 1 else 1
            stretches = [(0, rows, tensor, row)]
            if "linear_qkv" in name:
                q = HIDDEN // TP
                stretches = [(0, q, tensor, row)]
                for i, other in enumerate("kv"):
                    where = tensor.replace("q_proj", f"{other}_proj")
                    stretches.append((q + i * HEAD, HEAD, where, rank * HEAD))
            for first, length, where, begins in stretches:
                for r, c in ((0, 0), (length - 1, cols - 1)):
                    yield rank, chunk, (first + r, c), where, begins + r, col + c


def some(shape: ModelShape) -> list[Entry]:
    """What stands outside the layers, and the layers that begin or end a stage."""
    layers = {None, *(i for i in range(80) if i % STAGE in (0, STAGE - 1))}
    return [entry for entry in entries(shape) if disk_key(entry.megatron)[1] in layers]


def bytes_at(source: Source, entry: Entry, name: str, row: int, col: int) -> bytes:
    """Two bytes, from where the source says that a number of a Hugging Face tensor lies."""
    tensor = source.tensors(entry)[entry.hf.index(name)]
    (extent,) = (
        e for e in tensor.extents if e.row <= row < e.row + e.rows and e.col <= col < e.col + e.cols
    )
    with extent.path.open("rb") as file:
        file.seek(extent.start + 2 * ((row - extent.row) * extent.cols + col - extent.col))
        return file.read(2)


def hf_places(hf: Path) -> dict[str, tuple[Path, int]]:
    """By the format's own description: file and first byte of each tensor."""
    places = {}
    for path in hf.glob("*.safetensors"):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            for name, told in json.loads(file.read(length)).items():
                if name != "__metadata__":
                    places[name] = path, 8 + length + told["data_offsets"][0]
    return places


def put(path: Path, at: int, number: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(struct.pack("<H", number))


@MODELS
def test_bytes_of_every_rank_there(tmp_path: Path, config: dict[str, Any]) -> None:
    """Numbers in the Hugging Face files by hand; found through the chunks that ranks will read."""
    hf = synthetic.make(tmp_path / "hf", config, files=15, sparse=True)
    shape, places, numbers = ModelShape.from_hf(hf, TP), hf_places(hf), count(1)
    sizes, source = hf_shapes(shape), HfSource(hf, ModelShape.from_hf(hf, TP))
    for entry in some(shape):
        runs = row_runs(entry.layout, [sizes[name][0] for name in entry.hf], shape)
        for _, chunk, (r, c), name, row, col in corners(entry.megatron, config):
            number, (path, start) = next(numbers) % 60000 + 1, places[name]
            put(path, start + 2 * (row * (*sizes[name], 1)[1] + col), number)
            fused = chunk[0][0] + r
            (run,) = (run for run in runs if run.fused <= fused < run.fused + run.rows)
            assert entry.hf[run.tensor] == name
            column = (*chunk[0], 0)[1] + c
            found = bytes_at(source, entry, name, run.row + fused - run.fused, column)
            assert struct.unpack("<H", found) == (number,), (entry.megatron, chunk, r, c)


@MODELS
def test_bytes_of_every_rank_back(tmp_path: Path, config: dict[str, Any]) -> None:
    """Numbers in the chunks of ranks by hand; found through the Hugging Face tensors."""
    dist = tmp_path / "dist"
    dist.mkdir()
    (dist / "config.json").write_text(json.dumps(config))
    shape, numbers = ModelShape.from_hf(dist, TP), count(1)
    starts = sparse_chunks(dist, shape)
    source = MegatronSource(dist, shape)
    for entry in some(shape):
        for _, chunk, (r, c), name, row, col in corners(entry.megatron, config):
            number, (path, start) = next(numbers) % 60000 + 1, starts[entry.megatron, chunk]
            put(path, start + 2 * (r * (*chunk[1], 1)[1] + c), number)
            found = bytes_at(source, entry, name, row, col)
            assert struct.unpack("<H", found) == (number,), (name, row, col)


def sparse_chunks(dist: Path, shape: ModelShape) -> dict[tuple[str, Chunk], tuple[Path, int]]:
    """A distributed checkpoint of chunks without bytes; returns where those of each begin."""
    pieces, starts, sizes = [], {}, {}
    path = dist / "__0_0.distcp"
    with path.open("wb") as file:
        for entry in entries(shape):
            key, layer = disk_key(entry.megatron)
            size = fused_size(entry.layout, hf_sizes(entry, shape), shape)
            lead = () if layer is None else (layer,)
            sizes[key] = ((80, *size) if lead else size), "bfloat16"
            for chunk in dict.fromkeys(chunk for rank in chunks(entry, shape) for chunk in rank):
                frame = archive.frame("bfloat16", ((1,) if lead else ()) + chunk[1])
                begins = file.tell()
                file.write(frame.head)
                starts[entry.megatron, chunk] = path, file.tell()
                file.seek(2 * _numbers(chunk[1]), 1)
                file.write(frame.tail)
                cut = ((1,) if lead else ()) + chunk[1]
                piece = Piece(key, lead + chunk[0], cut, begins, file.tell() - begins)
                pieces.append((path.name, piece))
        for key in empty_states(80):
            pieces.append((path.name, Piece(key, None, (), 0, 0)))
    dist_metadata.write(dist, pieces, sizes)
    return starts

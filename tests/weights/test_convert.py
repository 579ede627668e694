"""Conversions there and back, and what they refuse."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
import synthetic
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_prime.config import ConfigError
from megatron_prime.errors import WeightsError
from megatron_prime.weights import shard_jobs
from megatron_prime.weights.convert import to_hf, to_megatron
from megatron_prime.weights.convert_plan import Options
from megatron_prime.weights.convert_sources import HfSource, MegatronSource
from megatron_prime.weights.layout import Layout, fuse, part_of
from megatron_prime.weights.names import disk_key, entries, hf_shapes
from megatron_prime.weights.shape import ModelShape
from megatron_prime.weights.verify import same_tensors

FAMILIES = {
    "llama": synthetic.SMALL,
    "llama-tied": synthetic.SMALL | {"tie_word_embeddings": True},
    "mistral": synthetic.SMALL | {"model_type": "mistral", "head_dim": 16},
    "qwen2": synthetic.SMALL | {"model_type": "qwen2"},
    "qwen3": synthetic.SMALL | {"model_type": "qwen3", "head_dim": 16},
}


def quiet(*_: object, **__: object) -> None:
    pass


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def by_torch(folder: Path, key: str) -> torch.Tensor:
    """What torch's own reader finds under a key of a distributed checkpoint."""
    reader = FileSystemReader(folder)
    stored = reader.read_metadata().state_dict_metadata[key]
    state = {key: torch.empty(stored.size, dtype=stored.properties.dtype)}
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state[key]


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return synthetic.make(tmp_path / "hf", synthetic.SMALL)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [Options(), Options(tp=2, pp=3, shard_bytes=9000, workers=3)])
def test_there_and_back_is_exact(tmp_path: Path, family: str, options: Options) -> None:
    source = synthetic.make(tmp_path / "hf", FAMILIES[family], files=2)
    to_megatron(source, tmp_path / "dist", options, quiet)
    to_hf(tmp_path / "dist", tmp_path / "dist" / "hf", tmp_path / "back", options, quiet)
    same(tensors_in(tmp_path / "back"), tensors_in(source))
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "back" / name).read_text() == (source / name).read_text()
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config == FAMILIES[family] | {"torch_dtype": "bfloat16"}
    assert not list(tmp_path.glob(".*"))


def test_fused_rows_are_those_of_megatrons_attention(tmp_path: Path, hf: Path) -> None:
    """By hand: q heads of the first key/value head, its k, its v, then the second's."""
    to_megatron(hf, tmp_path / "dist", Options(tp=2), quiet)
    truth = tensors_in(hf)
    q, k, v = (truth[f"model.layers.1.self_attn.{x}_proj.weight"] for x in "qkv")
    fused = by_torch(tmp_path / "dist", "decoder.layers.self_attention.linear_qkv.weight")[1]
    assert torch.equal(fused, torch.cat([q[:16], k[:8], v[:8], q[16:], k[8:], v[8:]]))
    padded = by_torch(tmp_path / "dist", "output_layer.weight")
    assert torch.equal(padded, torch.cat([truth["lm_head.weight"], torch.zeros(14, 32)]).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_types(tmp_path: Path, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    source = synthetic.make(tmp_path / "hf", synthetic.SMALL, torch.float32)
    to_megatron(source, tmp_path / "dist", Options(dtype=name), quiet)
    to_hf(tmp_path / "dist", source, tmp_path / "back", Options(), quiet)
    truth = tensors_in(source)
    same(tensors_in(tmp_path / "back"), {key: t.to(dtype) for key, t in truth.items()})
    found = json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"]
    assert found == name


def test_what_fp16_cannot_hold_is_refused(tmp_path: Path, hf: Path) -> None:
    tensors = tensors_in(hf)
    tensors["model.norm.weight"][3] = 1e5
    save_file(tensors, hf / "model.safetensors")
    with pytest.raises(WeightsError, match=r"norm\.weight has values beyond the range of float16"):
        to_megatron(hf, tmp_path / "dist", Options(dtype="float16"), quiet)
    assert not (tmp_path / "dist").exists()


def test_verify_finds_one_changed_value(tmp_path: Path, hf: Path) -> None:
    to_megatron(hf, tmp_path / "dist", Options(), quiet)
    shape = ModelShape.from_hf(hf)
    made = MegatronSource(tmp_path / "dist", shape)
    assert same_tensors(HfSource(hf, shape), made, shape, None) == len(hf_shapes(shape))
    tensors = tensors_in(hf)
    tensors["model.layers.2.mlp.up_proj.weight"][5, 7] += 1
    save_file(tensors, hf / "model.safetensors")
    with pytest.raises(
        WeightsError, match=r"model\.layers\.2\.mlp\.up_proj\.weight in .* is not what"
    ):
        same_tensors(HfSource(hf, shape), made, shape, None)


def refused(tmp_path: Path, hf: Path, message: str, error: type[Exception] = WeightsError) -> None:
    with pytest.raises(error, match=message):
        to_megatron(hf, tmp_path / "dist", Options(), quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_refusals_leave_nothing(tmp_path: Path, hf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = tensors_in(hf)
    save_file({k: t for k, t in tensors.items() if "norm" not in k}, hf / "model.safetensors")
    refused(tmp_path, hf, r"lacks tensors \(7\): .*input_layernorm")
    save_file(tensors | {"model.more": torch.zeros(1)}, hf / "model.safetensors")
    refused(tmp_path, hf, r"has unknown tensors \(1\): model.more")
    save_file(tensors | {"model.norm.weight": torch.zeros(31)}, hf / "model.safetensors")
    refused(tmp_path, hf, r"has wrong tensors .*model.norm.weight is \(31,\), wanted \(32,\)")
    save_file(tensors | {"model.norm.weight": torch.zeros(32)}, hf / "model.safetensors")
    to_megatron(hf, tmp_path / "norm in fp32", Options(), quiet)  # a type of its own is none
    shard_jobs.shutil.rmtree(tmp_path / "norm in fp32")
    gate = "model.layers.0.mlp.gate_proj.weight"
    save_file(tensors | {gate: tensors[gate].float()}, hf / "model.safetensors")
    refused(tmp_path, hf, "of several types; give --dtype")
    save_file(tensors | {gate: tensors[gate].double()}, hf / "model.safetensors")
    refused(tmp_path, hf, "gate_proj.weight is F64, wanted one of")
    save_file(tensors, hf / "model.safetensors")
    monkeypatch.setattr(shard_jobs.shutil, "disk_usage", lambda _: Disk())
    refused(tmp_path, hf, r"has 1\.0 kB free, wanted 5\d\.\d; make room")
    monkeypatch.undo()
    os.truncate(hf / "model.safetensors", (hf / "model.safetensors").stat().st_size - 1)
    refused(tmp_path, hf, r"model\.safetensors is damaged or cut short: .* bytes, wanted ")
    os.truncate(hf / "model.safetensors", 5)
    refused(tmp_path, hf, r"too few for its own table")
    (hf / "config.json").write_text(json.dumps(synthetic.SMALL | {"model_type": "gpt2"}))
    refused(tmp_path, hf, "found model_type 'gpt2'", ConfigError)


class Disk:
    free = 1000


def test_layers_of_several_types_under_one_key_are_refused(tmp_path: Path, hf: Path) -> None:
    tensors = tensors_in(hf)
    norm = "model.layers.0.input_layernorm.weight"
    save_file(tensors | {norm: tensors[norm].float()}, hf / "model.safetensors")
    refused(
        tmp_path, hf, r"layers\.1\.input_layernorm\.weight is in bfloat16, .* in float32.*--dtype"
    )
    to_megatron(hf, tmp_path / "dist", Options(dtype="float32", verify=True), quiet)


@pytest.mark.parametrize("hidden", [1, 0])
def test_a_nan_does_not_hide_an_overflow(tmp_path: Path, hf: Path, hidden: int) -> None:
    tensors = {name: t.float() for name, t in tensors_in(hf).items()}
    tensors["model.norm.weight"][:2] = torch.tensor([float("nan"), 3.4e38])
    save_file(tensors, hf / "model.safetensors")
    dtype = ("bfloat16", "float16")[hidden]
    with pytest.raises(WeightsError, match=f"beyond the range of {dtype}"):
        to_megatron(hf, tmp_path / "dist", Options(dtype=dtype), quiet)


def test_a_surplus_tensor_that_the_index_does_not_know(tmp_path: Path) -> None:
    hf = synthetic.make(tmp_path / "hf", synthetic.SMALL, files=2)
    file = hf / "model-00002-of-00002.safetensors"
    save_file(load_file(file) | {"model.layers.2.bias": torch.zeros(3)}, file)
    refused(tmp_path, hf, r"has unknown tensors \(1\): model.layers.2.bias")


def test_another_vocabulary_is_not_cut_off(tmp_path: Path) -> None:
    """Padding is less than a multiple of what some layout needs; 2000 rows more are tokens."""
    hf = synthetic.make(tmp_path / "hf", synthetic.SMALL | {"vocab_size": 2100})
    to_megatron(hf, tmp_path / "dist", Options(), quiet)
    other = synthetic.make(tmp_path / "other", synthetic.SMALL | {"vocab_size": 100})
    with pytest.raises(WeightsError, match=r"has wrong tensors .*embedding.* is \(2112, 32\)"):
        to_hf(tmp_path / "dist", other, tmp_path / "back", Options(), quiet)


def test_an_output_that_links_to_nothing_stays(tmp_path: Path, hf: Path) -> None:
    (tmp_path / "dist").symlink_to(tmp_path / "absent")
    with pytest.raises(WeightsError, match="dist exists"):
        to_megatron(hf, tmp_path / "dist", Options(), quiet)
    (hf / "tokenizer.json").unlink()
    (hf / "tokenizer.json").symlink_to(tmp_path / "absent")
    with pytest.raises(WeightsError, match=r"tokenizer\.json is a link to nothing"):
        to_megatron(hf, tmp_path / "other", Options(), quiet)


def test_a_tensor_parallel_size_that_does_not_divide_is_refused(tmp_path: Path, hf: Path) -> None:
    with pytest.raises(WeightsError, match="--tp 4: wanted a divisor of the model's 4 heads, 2 "):
        to_megatron(hf, tmp_path / "dist", Options(tp=4), quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_an_existing_output_stays(tmp_path: Path, hf: Path) -> None:
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist" / "mine").write_text("kept")
    with pytest.raises(WeightsError, match="dist exists; move it away"):
        to_megatron(hf, tmp_path / "dist", Options(), quiet)
    assert [path.name for path in (tmp_path / "dist").iterdir()] == ["mine"]


def test_a_damaged_or_foreign_distributed_checkpoint_is_refused(tmp_path: Path, hf: Path) -> None:
    to_megatron(hf, tmp_path / "dist", Options(), quiet)
    other = synthetic.make(tmp_path / "more", synthetic.SMALL | {"num_hidden_layers": 4})
    with pytest.raises(WeightsError, match=r"has wrong tensors .*\(3, .*wanted \(4, "):
        to_hf(tmp_path / "dist", other, tmp_path / "back", Options(), quiet)
    tied = synthetic.make(tmp_path / "tied", FAMILIES["llama-tied"])
    with pytest.raises(WeightsError, match=r"has unknown tensors \(1\): output_layer"):
        to_hf(tmp_path / "dist", tied, tmp_path / "back", Options(), quiet)
    os.truncate(tmp_path / "dist" / "__0_0.distcp", 3000)
    with pytest.raises(WeightsError, match=r"__0_0\.distcp is absent or cut short: 3,000 bytes"):
        to_hf(tmp_path / "dist", hf, tmp_path / "back", Options(), quiet)
    assert not (tmp_path / "back").exists()


def test_eighty_layers_of_64_heads_there_and_back(tmp_path: Path) -> None:
    """The structure of a 70B model, with heads of two numbers; and what each rank finds in it."""
    small = {"hidden_size": 128, "intermediate_size": 448, "vocab_size": 2004}
    config = synthetic.QWEN_72B | small
    hf = synthetic.make(tmp_path / "hf", config, files=5)
    to_megatron(hf, tmp_path / "dist", Options(tp=8, pp=8, workers=4), quiet)
    assert len(list((tmp_path / "dist").glob("*.distcp"))) == 9  # of stages, and states
    truth, shape = tensors_in(hf), ModelShape.from_hf(hf, 8)
    stored = FileSystemReader(tmp_path / "dist").read_metadata()
    for entry in entries(shape):
        key, layer = disk_key(entry.megatron)
        for rank in range(8):  # as weights/load.py gives it to them
            parts = [
                truth[n][part_of(entry.layout, truth[n].shape, shape, 8, rank)] for n in entry.hf
            ]
            wanted = [fuse(entry.layout, parts, shape, 8)]
            if entry.layout is Layout.GATE_UP:
                wanted = parts
            for above, part in enumerate(wanted):
                at = [0] * part.dim()
                if entry.layout is Layout.COLUMNS:
                    at[1] = rank * part.shape[1]
                elif entry.layout is not Layout.WHOLE:
                    at[0] = (above * 8 + rank) * part.shape[0]
                offset = torch.Size(at if layer is None else [layer, *at])
                place = stored.storage_data[MetadataIndex(key, offset)]
                with (tmp_path / "dist" / place.relative_path).open("rb") as file:
                    file.seek(place.offset)
                    found = torch.load(io.BytesIO(file.read(place.length)))
                assert torch.equal(found if layer is None else found[0], part), (key, rank)
                if layer is not None:
                    assert place.relative_path == f"__{layer // 10}_0.distcp"
    to_hf(tmp_path / "dist", hf, tmp_path / "back", Options(shard_bytes=5_000_000), quiet)
    same(tensors_in(tmp_path / "back"), truth)
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in truth.values())

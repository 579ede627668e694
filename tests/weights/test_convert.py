"""Conversions there and back, what they refuse, what a kill leaves, and the memory they take."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from math import prod
from pathlib import Path

import pytest
import synthetic
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader

from megatron_prime.config import ConfigError
from megatron_prime.errors import WeightsError
from megatron_prime.weights import shard_jobs
from megatron_prime.weights.convert import to_hf, to_megatron
from megatron_prime.weights.convert_plan import Options, plan
from megatron_prime.weights.convert_sources import HfSource, MegatronSource
from megatron_prime.weights.layout import Layout
from megatron_prime.weights.names import disk_key, entries, hf_shapes
from megatron_prime.weights.shape import ModelShape
from megatron_prime.weights.verify import same_tensors

ROOT = Path(__file__).parents[2]
TO_MEGATRON = ROOT / "tools" / "convert_hf_to_megatron.py"
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
    refused(tmp_path, hf, "GB free, wanted")
    monkeypatch.undo()
    os.truncate(hf / "model.safetensors", (hf / "model.safetensors").stat().st_size - 1)
    refused(tmp_path, hf, r"model\.safetensors is damaged or cut short: .* bytes, wanted ")
    os.truncate(hf / "model.safetensors", 5)
    refused(tmp_path, hf, r"too few for its own table")
    (hf / "config.json").write_text(json.dumps(synthetic.SMALL | {"model_type": "gpt2"}))
    refused(tmp_path, hf, "found model_type 'gpt2'", ConfigError)


class Disk:
    free = 1000


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


def tool(*arguments: object, limit: int | None = None) -> subprocess.Popen[str]:
    def limited() -> None:
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=limited,
    )


def test_a_full_disk_is_named_and_the_same_command_continues(tmp_path: Path, hf: Path) -> None:
    arguments = (TO_MEGATRON, "--hf", hf, "--out", tmp_path / "dist")
    full = tool(*arguments, limit=20_000)
    output, _ = full.communicate(timeout=60)
    assert full.returncode == 1
    assert "can't write" in output
    assert "File too large; make room, and the same command continues" in output
    assert "Traceback" not in output
    assert not (tmp_path / "dist").exists()
    again = tool(*arguments, "--verify")
    output, _ = again.communicate(timeout=60)
    assert again.returncode == 0, output
    assert "verified: 30 tensors" in output


def test_a_kill_loses_only_the_file_that_was_being_written(tmp_path: Path) -> None:
    config = synthetic.SMALL | {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 4096}
    hf = synthetic.make(tmp_path / "hf", config | {"num_hidden_layers": 24})
    writing = tmp_path / ".dist.converting"
    command = (TO_MEGATRON, "--hf", hf, "--out", tmp_path / "dist", "--max-shard-gb", 0.009)
    killed = tool(*command, "--workers", 1)
    deadline = time.monotonic() + 60
    while len(list(writing.glob("*.done"))) < 3:
        assert time.monotonic() < deadline
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "dist").exists()
    finished = [note.name.removesuffix(".done") for note in writing.glob("*.done")]
    before = {name: (writing / name).stat().st_mtime_ns for name in finished}
    spoiled = finished[0]
    with (writing / spoiled).open("r+b") as file:  # same size, another byte
        file.seek(1000)
        file.write(bytes([file.read(1)[0] ^ 1]))
    again = tool(*command, "--verify")
    output, _ = again.communicate(timeout=60)
    assert again.returncode == 0, output
    assert "verified" in output
    after = {name: (tmp_path / "dist" / name).stat().st_mtime_ns for name in finished}
    assert {name for name in finished if before[name] == after[name]} == set(finished) - {spoiled}
    assert not list((tmp_path / "dist").glob("*.done"))
    assert not writing.exists()


def test_another_source_does_not_continue_the_first(tmp_path: Path, hf: Path) -> None:
    """The notes of a conversion are kept only for the same files and options."""
    task = {"of": "one"}
    place = shard_jobs.Workplace(tmp_path / "dist", task)
    job = shard_jobs.Job("a", (), 3)
    place.make(job, lambda _, file: file.write(b"abc") and ())
    with pytest.raises(WeightsError, match="another conversion is writing"):
        shard_jobs.Workplace(tmp_path / "dist", task)
    os.close(place._lock)
    again = shard_jobs.Workplace(tmp_path / "dist", task)
    done = again.finished(job)
    assert done is not None
    assert done.size == 3
    os.close(again._lock)
    assert shard_jobs.Workplace(tmp_path / "dist", {"of": "other"}).finished(job) is None


@pytest.mark.slow
def test_memory_is_that_of_the_largest_tensor(tmp_path: Path) -> None:
    """A gigabyte in 20 layers; the largest tensor, whose rows want padding, has 205 MB."""
    config = synthetic.SMALL | {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "vocab_size": 100001,
    }
    hf = synthetic.make(
        tmp_path / "hf", config | {"num_hidden_layers": 20, "num_attention_heads": 8}
    )
    shape = ModelShape.from_hf(hf)
    largest = max(prod(size) for size in hf_shapes(shape).values()) * 2
    report = (
        "import runpy, sys\ntry: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "print([line for line in open('/proc/self/status') if 'VmHWM' in line][0])"
    )
    back = ROOT / "tools" / "convert_megatron_to_hf.py"
    to, fro = tmp_path / "dist", tmp_path / "back"
    for arguments in (
        (TO_MEGATRON, "--hf", hf, "--out", to, "--verify", "--workers", 4),
        (back, "--checkpoint", to, "--out", fro, "--verify", "--dtype", "fp16"),
    ):
        head = f"import sys; sys.argv = {[str(a) for a in arguments]!r}\n"
        child = tool("-c", head + report)
        output, _ = child.communicate(timeout=120)
        assert child.returncode == 0, output
        peak = int(output.split("VmHWM:")[1].split()[0]) * 1024
        assert peak <= 2 * largest + 512 * 2**20
    same(tensors_in(fro), {name: tensor.half() for name, tensor in tensors_in(hf).items()})


@pytest.mark.parametrize("config", [synthetic.LLAMA_70B, synthetic.QWEN_72B], ids=["llama", "qwen"])
@pytest.mark.parametrize(
    "tp", [pytest.param(1, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow), 8]
)
def test_names_slices_and_bytes_at_70b(tmp_path: Path, config: dict[str, object], tp: int) -> None:
    """Through the planning code, on files without bytes; truth by arithmetic of the two models."""
    hf = synthetic.make(tmp_path / "hf", config, files=15, sparse=True)
    shape = ModelShape.from_hf(hf, tp)
    ffn, vocab = shape.ffn_size, shape.vocab_size
    bias = 10240 if config["model_type"] == "qwen2" else 0
    layer = 8192 * (10240 + 8192 + 3 * ffn + 2) + bias
    source, options = HfSource(hf, shape), Options(tp=tp, pp=8)
    jobs = plan(source, shape, options, "{}-{}")
    assert sum(job.nbytes for job in jobs) == 2 * (80 * layer + 8192 * (2 * vocab + 1))
    for job in jobs:
        layers = [disk_key(e.megatron)[1] for e in job.entries]
        stages = {number // 10 for number in layers if number is not None}
        assert len(stages) <= 1
        assert job.nbytes <= options.shard_bytes
    per_rank = [0] * tp
    for entry in entries(shape):
        tensors = [
            torch.empty(hf_shapes(shape)[n], dtype=torch.bfloat16, device="meta") for n in entry.hf
        ]
        covered = 0
        shards = list(shards_of(entry.layout, tensors, shape, tp))
        for i, (offsets, shard) in enumerate(shards):
            covered += shard.numel()
            each = len(shards) // tp or 1
            for rank in [i // each] if entry.layout is not Layout.WHOLE else range(tp):
                per_rank[rank] += shard.nbytes
            if "linear_fc1" in entry.megatron:
                assert offsets == (i % 2 * ffn + i // 2 * ffn // tp, 0)
                assert tuple(shard.shape) == (ffn // tp, 8192)
            elif "linear_fc2" in entry.megatron:
                assert offsets == (0, i * ffn // tp)
                assert tuple(shard.shape) == (8192, ffn // tp)
            elif "linear_qkv.weight" in entry.megatron:
                assert offsets == (i * 10240 // tp, 0)
                assert tuple(shard.shape) == (10240 // tp, 8192)
        assert covered == sum(t.numel() for t in tensors)  # neither model's vocabulary is padded
    whole = 80 * 2 * 8192 + 8192  # norms
    split = 80 * (layer - 2 * 8192) + 2 * vocab * 8192
    assert per_rank == [2 * (whole + split // tp)] * tp


def test_eighty_layers_of_64_heads_there_and_back(tmp_path: Path) -> None:
    """The structure of a 70B model, with heads of two numbers."""
    small = {"hidden_size": 128, "intermediate_size": 448, "vocab_size": 2004}
    config = synthetic.QWEN_72B | small
    hf = synthetic.make(tmp_path / "hf", config, files=5)
    to_megatron(hf, tmp_path / "dist", Options(tp=8, pp=8, workers=4), quiet)
    assert len(list((tmp_path / "dist").glob("*.distcp"))) == 9  # of stages, and states
    to_hf(tmp_path / "dist", hf, tmp_path / "back", Options(shard_bytes=5_000_000), quiet)
    same(tensors_in(tmp_path / "back"), tensors_in(hf))

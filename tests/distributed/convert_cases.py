"""What the ranks of test_converted.py do; `convert_cases.py load|save|plain FOLDER`.

`load` compares FOLDER/dist/NAME, a converted checkpoint, with load_hf of FOLDER/NAME. `save` writes
a run's checkpoint of policy and PRM, and what the gathered weights of both are. `plain`, on one
rank, compares with FOLDER/NAME what Megatron-core alone loads.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from megatron_prime.runtime.compat import before_megatron_import, megatron_calls

before_megatron_import()

from layouts import LAYOUTS, megatron_options  # noqa: E402
from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from tiny_models import CONFIGS  # noqa: E402

from megatron_prime.config import (  # noqa: E402
    ParallelSizes,
    PolicySection,
    PrecisionOptions,
    RunConfig,
)
from megatron_prime.models import factory  # noqa: E402
from megatron_prime.models.architecture import ModelShape, build_model  # noqa: E402
from megatron_prime.models.engine import Engine  # noqa: E402
from megatron_prime.models.training import TrainableEngine  # noqa: E402
from megatron_prime.runtime import distributed  # noqa: E402
from megatron_prime.runtime.rendezvous import rendezvous_from  # noqa: E402
from megatron_prime.types import LoopState  # noqa: E402
from megatron_prime.weights.checkpoint import RunCheckpoints  # noqa: E402
from megatron_prime.weights.gather import gather_hf_tensors  # noqa: E402
from megatron_prime.weights.layout import fuse  # noqa: E402
from megatron_prime.weights.load import load_hf  # noqa: E402
from megatron_prime.weights.names import parameters_by_entry  # noqa: E402
from megatron_prime.weights.safetensors_io import HfCheckpoint  # noqa: E402

TIMEOUT_S = 120


def main(what: str, folder: Path, saved: dict[str, str]) -> None:
    alone = int(os.environ["WORLD_SIZE"]) == 1
    loaded = ["tp1-pp1"] if alone else ["tp2-pp2", "tp1-pp2-vpp2"]
    distributed.initialize(rendezvous_from(os.environ), ParallelSizes(), 1, TIMEOUT_S)
    if what == "plain":
        for name in ("untied", "qwen3"):
            plain(folder, name)
        return distributed.destroy()
    pairs = [(name, layout) for layout in loaded for name in CONFIGS]
    for name, layout in pairs if what == "load" else saved.items():
        parallel_state.destroy_model_parallel()
        distributed.initialize_model_parallel(LAYOUTS[layout], 1, TIMEOUT_S)
        (load if what == "load" else save)(folder, name, LAYOUTS[layout])
    return distributed.destroy()


def plain(folder: Path, name: str) -> None:
    """With nothing but Megatron-core: its model of its layers, its loading, its strict check."""
    shape, count = ModelShape.from_hf(folder / name), 0
    config = TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.ffn_size,
        add_qkv_bias=shape.qkv_bias,
        qk_layernorm=shape.qk_norm,
        normalization="RMSNorm",
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        use_cpu_initialization=True,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=shape.qk_norm),
        vocab_size=shape.padded_vocab_size,
        max_sequence_length=64,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=shape.tied_embeddings,
    )
    with megatron_calls():
        loaded = dist_checkpointing.load(model.sharded_state_dict(), str(folder / "dist" / name))
    model.load_state_dict(loaded, strict=True)
    hf = HfCheckpoint(folder / name)
    for entry, parameter, _ in parameters_by_entry([model], shape):
        parts = [hf.read(n, tuple(slice(0, m) for m in hf.size(n))) for n in entry.hf]
        wanted = fuse(entry.layout, parts, shape, 1)
        assert torch.equal(parameter, wanted.to(parameter.dtype)), entry.megatron
        count += 1
    sys.stdout.write(f"plain Megatron-core loaded {count} of {name}\n")


def load(folder: Path, name: str, sizes: ParallelSizes) -> None:
    shape = ModelShape.from_hf(folder / name, sizes.tp)
    precision = PrecisionOptions(dtype="fp32")
    truth = build_model(shape, precision, megatron_options(sizes))
    load_hf(truth, folder / name, shape)
    chunks = build_model(shape, precision, megatron_options(sizes))
    engine = Engine(chunks, shape, 256, 1.0)
    with megatron_calls():
        wanted = {"model": engine.sharded_weights()}
        engine.load_weights(dist_checkpointing.load(wanted, str(folder / "dist" / name))["model"])
    config = run_config(folder, name, sizes, weights=folder / "dist" / name)
    started = build_model(shape, precision, megatron_options(sizes))
    factory.start(started, config, "policy", shape)
    count = 0
    for loaded, also, theirs in zip(chunks, started, truth, strict=True):
        by_run = dict(also.named_parameters())
        for (key, found), (_, right) in zip(
            loaded.named_parameters(), theirs.named_parameters(), strict=True
        ):
            assert torch.equal(found, right), (name, key)
            assert torch.equal(by_run[key], right), (name, key)
            count += 1
    sys.stdout.write(f"compared {count} of {name}\n")
    sys.stdout.flush()


def run_config(folder: Path, name: str, sizes: ParallelSizes, **model: Path) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"folder": folder / "runs" / name},
            "model": {"hf": folder / name, **model},
            "data": {"train": "train.jsonl"},
            "megatron": megatron_options(sizes),
        }
    )


def save(folder: Path, name: str, sizes: ParallelSizes) -> None:
    precision = PrecisionOptions(dtype="bf16")
    shape = ModelShape.from_hf(folder / name, sizes.tp)
    engines: dict[str, Any] = {}
    for model in ("policy", "prm"):  # of random weights
        chunks = build_model(shape, precision, megatron_options(sizes))
        engines[model] = TrainableEngine(chunks, shape, PolicySection(), 1.0, 3, precision)
        if parallel_state.get_data_parallel_rank() == 0:
            tensors = {
                key: t.clone() for key, t in gather_hf_tensors(engines[model].modules, shape)
            }
            if dist.get_rank() == 0:
                torch.save(tensors, folder / f"{name}-{model}.pt")
    config = run_config(folder, name, sizes)
    cursor: Any = SimpleNamespace(version=16, state_dict=dict)
    RunCheckpoints(engines, cursor, cursor, config).save(LoopState(16))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3] if sys.argv[3:] else "{}"))

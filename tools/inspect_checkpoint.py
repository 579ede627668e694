"""What is in a checkpoint's directory: from which run and step, its layout, sizes, and if intact.

Knows Hugging Face directories, a run's checkpoints/step_… and converted checkpoints.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from math import prod
from pathlib import Path

from megatron_prime.errors import RunError
from megatron_prime.weights import manifest
from megatron_prime.weights.convert import HF_FOLDER, NOTE
from megatron_prime.weights.directories import Kind, damages, hf_of, kind_of, run_state
from megatron_prime.weights.dtypes import ITEMSIZE
from megatron_prime.weights.raw_safetensors import HfFiles
from megatron_prime.weights.shape import ModelShape
from megatron_prime.weights.torch_dist import WEIGHTS, DistCheckpoint


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 for a known directory that is intact as far as can be told, else 1."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args(arguments).folder
    try:
        kind = kind_of(folder)
        found = damages(folder, kind)
        for line in _lines(folder, kind) if not found else [f"{folder}: {kind}"]:
            print(line)
    except BrokenPipeError:  # `| head` has seen enough; nothing is left to be flushed at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (RunError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    for damage in found or []:
        print(f"DAMAGED: {damage}")
    if not found:
        print(_praise(folder, kind))
    return 1 if found else 0


def _praise(folder: Path, kind: Kind) -> str:
    if kind == "huggingface":
        return "intact as far as sizes tell: a Hugging Face directory has no checksums"
    if kind == "megatron":
        return "no file is cut; the manifest with checksums is with the whole checkpoint"
    entries = manifest.read(folder)
    assert not isinstance(entries, manifest.Damage)
    return f"intact: {len(entries)} files have the sizes and checksums of the manifest"


def _lines(folder: Path, kind: Kind) -> Iterator[str]:
    if kind == "huggingface":
        yield f"{folder}: a Hugging Face checkpoint"
        yield f"  {_architecture(folder)}"
        files = HfFiles(folder)
        stored = [files.stored(name) for name in files.file_of]
        sizes = Counter[str]()
        for tensor in stored:
            sizes[tensor.dtype] += prod(tensor.size)
        yield from _types("weights", sizes)
        yield f"  {len(stored)} tensors in {len(set(files.file_of.values()))} files"
    elif kind == "converted":
        note = json.loads((folder / NOTE).read_text())
        yield f"{folder}: converted from {note['from']}"
        yield f"  {_architecture(folder / HF_FOLDER)}"
        yield f"  cut for tensor parallel {note['tp']}, pipeline parallel {note['pp']}"
        yield from _distributed(folder)
    elif kind == "run":
        yield from _run(folder)
    else:
        yield f"{folder}: a Megatron distributed checkpoint"
        yield from _distributed(folder)


def _run(folder: Path) -> Iterator[str]:
    state = run_state(folder / "run.json")
    config = state["config"]
    megatron = config.get("megatron", {})
    yield f"{folder}: of the run in {config['run']['folder']}"
    yield (
        f"  step {state['loop']['step']}, policy version {state['policy_version']}, "
        f"saved by {state['world_size']} ranks"
    )
    kinds = {"tensor": "tensor_model", "pipeline": "pipeline_model", "context": "context"}
    layout = (f"{k} parallel {megatron.get(f'{o}_parallel_size', 1)}" for k, o in kinds.items())
    yield f"  {', '.join(layout)}"
    for model in sorted(path.parent.name for path in folder.glob("*/.metadata")):
        hf = hf_of(folder / "run.json", model)
        yield f"{model}: from {hf}"
        if (hf / "config.json").exists():
            yield f"  {_architecture(hf, critic=model == 'critic')}"
        yield from _distributed(folder / model)


def _architecture(hf_dir: Path, critic: bool = False) -> str:
    shape = ModelShape.from_hf(hf_dir)
    shape = shape.as_critic() if critic else shape
    return (
        f"{shape.family}: {shape.num_layers} layers, hidden {shape.hidden_size}, "
        f"{shape.num_heads} heads ({shape.num_kv_heads} key/value), vocabulary {shape.vocab_size}"
        f"{', tied embeddings' if shape.tied_embeddings else ''}"
        f"{', value head' if shape.value_head else ''}"
    )


def _distributed(folder: Path) -> Iterator[str]:
    sizes = {"weights": Counter[str](), "optimizer": Counter[str]()}
    for key, stored in DistCheckpoint(folder).tensors.items():
        what = "weights" if key.startswith(WEIGHTS) else "optimizer"
        sizes[what][stored.dtype] += prod(stored.size)
    for what, counted in sizes.items():
        yield from _types(what, counted)


def _types(what: str, counted: Counter[str]) -> Iterator[str]:
    for dtype, numbers in sorted(counted.items()):
        gb = numbers * ITEMSIZE[dtype] / 1e9
        unit = "parameters" if what == "weights" else "numbers"
        yield f"  {what} {numbers:,} {unit} in {str(dtype).removeprefix('torch.')}, {gb:,.3f} GB"


if __name__ == "__main__":
    sys.exit(main())

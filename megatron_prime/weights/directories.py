"""What a directory with a model is: a Hugging Face checkpoint, a run's, or a converted one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_prime.errors import WeightsError
from megatron_prime.weights import manifest
from megatron_prime.weights.convert import HF_FOLDER, NOTE
from megatron_prime.weights.raw_safetensors import HfFiles
from megatron_prime.weights.torch_dist import DistCheckpoint

Kind = Literal["huggingface", "run", "converted", "megatron"]
MODELS = ("policy", "prm", "critic")


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights of a model in Megatron's form, and where its config.json should be."""

    folder: Path
    hf_dir: Path | None


def kind_of(folder: Path) -> Kind:
    """What `folder` is. WeightsError when it is nothing known."""
    if not folder.is_dir():
        raise WeightsError(f"{folder} is no directory")
    if (folder / NOTE).exists():
        return "converted"
    if (folder / "run.json").exists():
        return "run"
    if (folder / ".metadata").exists():
        return "megatron"
    if (folder / "config.json").exists():
        return "huggingface"
    raise WeightsError(
        f"{folder}: found no config.json (Hugging Face), run.json (a run's checkpoints/step_…) and "
        f"{NOTE} (a converted one); is it the right directory?"
    )


def weights_in(folder: Path, model: str) -> Weights:
    """Megatron's weights in `folder`: a run's checkpoint, one of its models, or a converted one."""
    kind = kind_of(folder)
    if kind == "converted":
        return Weights(folder, folder / HF_FOLDER)
    if kind == "huggingface":
        raise WeightsError(f"{folder} is a Hugging Face checkpoint already")
    if kind == "megatron":  # step_000016/policy
        above = folder.parent / "run.json"
        hf = hf_of(above, folder.name) if above.exists() else None
        return Weights(folder, hf)
    if not (folder / model).is_dir():
        raise WeightsError(f"{folder} has no {model}; --model takes one of {', '.join(MODELS)}")
    return Weights(folder / model, hf_of(folder / "run.json", model))


def hf_of(run_json: Path, model: str) -> Path:
    """The checkpoint that a model of a run started from."""
    config = run_state(run_json)["config"]
    own: str | None = config.get(model, {}).get("hf") if model in ("prm", "critic") else None
    return Path(own or config["model"]["hf"])


def run_state(run_json: Path) -> dict[str, Any]:
    """A run's state. WeightsError when the file is damaged."""
    try:
        state: dict[str, Any] = json.loads(run_json.read_text())
        assert state["config"]["model"]["hf"]
    except (ValueError, KeyError, AssertionError) as error:
        raise WeightsError(f"{run_json} is damaged ({error}); bring it back from a copy") from error
    return state


def check_sizes(folder: Path) -> None:
    """WeightsError when a file of the manifest of `folder`, or above it, is absent or cut."""
    for root in (folder, folder.parent):
        entries = manifest.read(root) if (root / manifest.NAME).exists() else {}
        if isinstance(entries, manifest.Damage):
            raise WeightsError(f"{root}: {entries}; bring it back from a copy")
        for name, entry in entries.items():
            path = root / name
            if not path.is_relative_to(folder):
                continue
            found = path.stat().st_size if path.exists() else 0
            if found != entry.size:
                raise WeightsError(
                    f"{path} has {found:,} bytes of {entry.size:,}; bring it back from a copy"
                )


def damages(folder: Path, kind: Kind) -> list[str] | None:
    """What is wrong with a directory, all of it read where there is a manifest.

    None when there is no manifest and no table to tell.
    """
    try:
        if kind == "huggingface":
            files = HfFiles(folder)
            for name in files.file_of:
                files.stored(name)
            return []
        if kind == "megatron":
            DistCheckpoint(folder).check_files()
            return None
    except WeightsError as error:
        return [str(error)]
    entries = manifest.read(folder)
    if isinstance(entries, manifest.Damage):
        return [str(entries)]
    found = (manifest.check(folder, name, entry) for name, entry in entries.items())
    return [str(damage) for damage in found if damage]

"""A guard for models that tests build by themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_prime.config import RunConfig
from megatron_prime.models.guard import Guard


def guard(folder: Path, model: str, hf_dir: Path | None = None, **debug: Any) -> Guard:
    """Keeps what breaks below `folder`, as a copy of `hf_dir` with other weights."""
    tables = {"run": {"folder": folder}, "model": {"hf": hf_dir or folder}}
    tables["data"] = {"train": folder}
    return Guard(RunConfig.model_validate({**tables, "debug": debug}), model)

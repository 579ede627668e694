"""A guard for models that tests build by themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_prime.config import RunConfig
from megatron_prime.models.guard import Guard


def guard(folder: Path, model: str, **debug: Any) -> Guard:
    """Keeps what breaks below `folder`."""
    tables = {"run": {"folder": folder}, "model": {"hf": folder}, "data": {"train": folder}}
    return Guard(RunConfig.model_validate({**tables, "debug": debug}), model)

"""One real SGLang server for the session."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_server import send_weights, spec_of, tiny_model
from transformers import Qwen2ForCausalLM

from megatron_prime.rollout.sglang_server import SglangServer

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "rollout"))  # exchanges.py


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of this folder need the server."""
    python = os.environ.get("SGLANG_PYTHON", "")
    found = bool(python) and Path(python).exists()
    why = f"SGLANG_PYTHON is {python or 'not set'}: no SGLang; tools/venv.sh installs it"
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.sglang)
            item.add_marker(pytest.mark.timeout(600))
            if not found:
                item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Qwen2ForCausalLM, Path]:
    """The model, and the folder that has its config.json."""
    folder = tmp_path_factory.mktemp("model")
    return tiny_model(folder), folder


@pytest.fixture(scope="session")
def server(tmp_path_factory, model) -> Iterator[SglangServer]:
    """With the model's weights, version 0."""
    started = SglangServer(spec_of(tmp_path_factory.mktemp("engine"), model[1]))
    try:
        started.start()
        started.ready()
        asyncio.run(send_weights(started.url, model[0], tp=1, version="0"))
        yield started
    finally:
        started.kill()

"""The reshard on four ranks, from live Megatron models, against slices of the checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
from launch import run_ranks
from layouts import LAYOUTS

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(400)]
CASES = Path(__file__).parent / "reshard_cases.py"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_models.make(folder)
    return folder


@pytest.mark.parametrize("which", ["in_turn", pytest.param("all", marks=pytest.mark.slow)])
def test_families_in_all_layouts_into_all_engines(models: Path, which: str) -> None:
    output = run_ranks(CASES, 4, [which, models], timeout_s=380)
    whole = len(tiny_models.CONFIGS) * len(LAYOUTS)
    assert output.count("resharded") == (whole if which == "all" else whole / 3)


def test_one_server_alone_and_engines_that_fail(models: Path) -> None:
    run_ranks(CASES, 4, ["one", models])


def test_parameters_of_two_bytes(models: Path) -> None:
    run_ranks(CASES, 4, ["bf16", models])


def test_a_checkpoints_files_into_engines(models: Path) -> None:
    run_ranks(CASES, 4, ["files", models])


def test_fp8_blocks_across_shards(tmp_path: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=80,
        hidden_size=256,
        intermediate_size=640,  # over two ranks: 320, which cuts a block
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "wide" / "model")
    run_ranks(CASES, 4, ["fp8", tmp_path])

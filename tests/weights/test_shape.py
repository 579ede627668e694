"""config.json, in the spellings of transformers 4 and 5, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_prime.config import ConfigError
from megatron_prime.families import MODEL_TYPES
from megatron_prime.weights.shape import ModelShape, padded

QWEN = {  # Qwen2.5-Math-7B, as transformers 4 writes it
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 4096,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def shape_of(folder: Path, tp: int = 1, **changes: Any) -> ModelShape:
    base = QWEN if len(changes) < 5 else {}  # few changes, or a whole config
    config = {key: value for key, value in {**base, **changes}.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))
    return ModelShape.from_hf(folder, tp)


def test_qwen25_7b(tmp_path: Path) -> None:
    assert shape_of(tmp_path, tp=4) == ModelShape(
        family="qwen2",
        hidden_size=3584,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        head_dim=128,
        ffn_size=18944,
        vocab_size=152064,
        padded_vocab_size=152064,
        max_positions=4096,
        norm_eps=1e-6,
        rope_theta=10000.0,
        qkv_bias=True,
        tied_embeddings=False,
    )


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 1000000.0},
        {"rope_theta": 1000000.0, "rope_scaling": None},
        {"rope_theta": ..., "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
    ],
)
def test_both_spellings_of_rope(rope: dict[str, Any], tmp_path: Path) -> None:
    assert shape_of(tmp_path, **rope).rope_theta == 1000000.0


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"model_type": "gemma2"},
            r"found model_type 'gemma2', wanted one of \['llama', 'mistral'",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type 'yarn'"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1.0}}, "rope_type 'linear'"),
        ({"hidden_act": "gelu"}, "found hidden_act = 'gelu'"),
        ({"attention_bias": True}, "found attention_bias = True"),
        ({"mlp_bias": True}, "found mlp_bias = True"),
        ({"quantization_config": {"bits": 4}}, "quantised weights"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 2.0}}, "'low_freq_factor': 2.0"),
        ({"rms_norm_eps": ...}, "lacks 'rms_norm_eps'"),
    ],
)
def test_refusals(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=told):
        shape_of(tmp_path, **changes)


LLAMA = {  # Llama-3.2-1B, as transformers 4 writes it
    **{key: value for key, value in QWEN.items() if key != "use_sliding_window"},
    "model_type": "llama",
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "attention_bias": False,
    "mlp_bias": False,
    "rope_scaling": LLAMA3,
    "max_position_embeddings": 131072,
}


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_what_config_json_leaves_out_is_transformers_own(family: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    silent = {"model_type": family, "num_attention_heads": 32, "hidden_size": 2048}
    keys = ("intermediate_size", "num_hidden_layers", "rms_norm_eps", "vocab_size")
    silent |= {key: LLAMA[key] for key in (*keys, "max_position_embeddings")}
    found, theirs = shape_of(tmp_path, **silent), AutoConfig.for_model(**silent)
    assert found.num_kv_heads == theirs.num_key_value_heads
    assert found.head_dim == getattr(theirs, "head_dim", None) or 2048 // 32
    window = getattr(theirs, "sliding_window", None)
    assert found.max_positions == min(theirs.max_position_embeddings, window or 10**9)


def test_each_family_has_its_own_parts(tmp_path: Path) -> None:
    llama = shape_of(tmp_path, **LLAMA)
    assert (llama.rope_scaling_factor, llama.qkv_bias, llama.qk_norm) == (32.0, False, False)
    old = {**LLAMA, "num_key_value_heads": ..., "rope_scaling": None}
    assert shape_of(tmp_path, **old).num_kv_heads == 32  # Llama 2: no groups
    mistral = {**LLAMA, "model_type": "mistral", "head_dim": 128, "rope_scaling": None}
    shape = shape_of(tmp_path, **mistral, sliding_window=4096)
    assert (shape.head_dim, shape.max_positions, shape.qkv_bias) == (128, 4096, False)
    assert shape_of(tmp_path, **mistral, sliding_window=None).max_positions == 131072
    qwen3 = shape_of(tmp_path, model_type="qwen3", attention_bias=False)
    assert (qwen3.qk_norm, qwen3.qkv_bias, qwen3.head_dim) == (True, False, 128)


@pytest.mark.parametrize(("used", "room"), [(False, 4096), (True, 512)])
def test_a_sliding_window_bounds_the_length(used: bool, room: int, tmp_path: Path) -> None:
    shape = shape_of(tmp_path, use_sliding_window=used, sliding_window=512)
    assert shape.max_positions == room


def test_absent_or_broken_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="wanted the directory of a Hugging Face checkpoint"):
        ModelShape.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        ModelShape.from_hf(tmp_path)


@pytest.mark.parametrize(
    ("vocab", "tp", "rows"), [(61, 1, 64), (61, 2, 64), (65, 2, 96), (151936, 8, 151936)]
)
def test_padding_is_even_and_minimal(vocab: int, tp: int, rows: int) -> None:
    assert padded(vocab, tp) == rows

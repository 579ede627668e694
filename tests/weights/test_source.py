"""What a checkpoint of Megatron's gives an engine is what the Hugging Face files would."""

from __future__ import annotations

from pathlib import Path

import pytest
import synthetic
import torch

from megatron_prime.errors import WeightsError
from megatron_prime.runtime.compat import before_megatron_import
from megatron_prime.weights.convert import to_megatron
from megatron_prime.weights.convert_plan import Options
from megatron_prime.weights.shape import ModelShape

before_megatron_import()
source = pytest.importorskip("megatron_prime.weights.source")

QWEN3 = synthetic.SMALL | {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True}


@pytest.mark.parametrize("config", [synthetic.SMALL, QWEN3])
def test_both_forms_give_the_same_tensors(tmp_path: Path, config: dict) -> None:
    hf = synthetic.make(tmp_path / "hf", config)
    to_megatron(hf, tmp_path / "dist", Options(tp=2), lambda *_, **__: None)
    wanted = dict(source.CheckpointWeights(hf).whole())
    given = source.MegatronWeights(tmp_path / "dist", ModelShape.from_hf(hf))
    found = dict(given.whole())
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
        assert torch.equal(given.stretch(name), tensor), name
    given.forget()


def test_stretches_of_both_forms_are_the_same(tmp_path: Path) -> None:
    """Rows and columns that begin and end within chunks, of other ranks' cutting."""
    hf = synthetic.make(tmp_path / "hf", synthetic.SMALL)
    to_megatron(hf, tmp_path / "dist", Options(tp=2, pp=2), lambda *_, **__: None)
    given = source.MegatronWeights(tmp_path / "dist", ModelShape.from_hf(hf))
    for name, tensor in source.CheckpointWeights(hf).whole():
        assert given.size(name) == tuple(tensor.shape)
        part = tuple(slice(length // 4, length - length // 3) for length in tensor.shape)
        assert torch.equal(given.read(name, part), tensor[part]), name
        assert torch.equal(given.read(name, part[:1]), tensor[part[:1]]), name


def test_weights_are_found_in_either_form(tmp_path: Path) -> None:
    hf = synthetic.make(tmp_path / "hf", synthetic.SMALL)
    to_megatron(hf, tmp_path / "dist", Options(), lambda *_, **__: None)
    assert isinstance(source.weights_of(hf, hf), source.CheckpointWeights)
    assert isinstance(source.weights_of(tmp_path / "dist", hf), source.MegatronWeights)


def test_another_shape_is_refused(tmp_path: Path) -> None:
    hf = synthetic.make(tmp_path / "hf", synthetic.SMALL)
    to_megatron(hf, tmp_path / "dist", Options(), lambda *_, **__: None)
    other = synthetic.make(tmp_path / "other", synthetic.SMALL | {"num_hidden_layers": 2})
    with pytest.raises(WeightsError):
        source.MegatronWeights(tmp_path / "dist", ModelShape.from_hf(other))

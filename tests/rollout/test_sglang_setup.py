"""What is refused before a server is started."""

from __future__ import annotations

import json

import pytest
from fake_engine import CONFIG

from megatron_prime.config import ConfigError
from megatron_prime.rollout.sglang_setup import check_cpu
from megatron_prime.weights.shape import ModelShape


@pytest.mark.parametrize(
    ("tp", "changes", "fits"),
    [
        (1, {"intermediate_size": 32}, True),
        (2, {"intermediate_size": 64}, True),
        (1, {"intermediate_size": 48}, False),
        (2, {"intermediate_size": 96}, False),
        (4, {"intermediate_size": 128}, False),  # two key/value heads
        (4, {"intermediate_size": 128, "num_key_value_heads": 4}, True),
    ],
)
def test_a_model_that_sglang_would_pad_on_a_cpu(tmp_path, tp, changes, fits) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | changes))
    shape = ModelShape.from_hf(tmp_path, 1)
    if fits:
        check_cpu(shape, tp)
    else:
        with pytest.raises(ConfigError, match=f"tensor_parallel_size: found {tp} for a model of"):
            check_cpu(shape, tp)

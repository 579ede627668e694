"""What is refused before a server is started."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from fake_engine import CONFIG

from megatron_prime.config import ConfigError
from megatron_prime.rollout.sglang_arguments import ServerSpec, Share
from megatron_prime.rollout.sglang_setup import _with_share, check_cpu
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


def test_a_server_takes_the_cache_that_was_planned_unless_the_user_says_another(tmp_path) -> None:
    plain = ServerSpec(Path("python"), tmp_path, 1, ("0",), "127.0.0.1", "key", "bf16", tmp_path)
    assert _with_share(plain, Share()) == plain
    shared = _with_share(plain, Share(gives_memory=True, kv_tokens=1234))
    assert shared.gives_memory
    assert shared.options == {"max_total_tokens": 1234}
    asked = dataclasses.replace(plain, options={"max_total_tokens": 9})
    assert _with_share(asked, Share(kv_tokens=1234)).options["max_total_tokens"] == 9

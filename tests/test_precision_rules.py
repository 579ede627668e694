from __future__ import annotations

import pytest

from megatron_prime import precision_rules
from megatron_prime.config import PrecisionOptions
from megatron_prime.families import with_defaults

# On two tensor-parallel ranks every side of its matrices is a multiple of 128.
LLAMA = {
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 2816,
    "num_hidden_layers": 12,
}


def options_of(**knobs):
    return PrecisionOptions(**{"fp8": "hybrid", **knobs})


def shapes(recipe, tp=1, pp=1, model=LLAMA, **knobs):
    options = options_of(fp8_recipe=recipe, **knobs)
    return list(precision_rules.shape_problems("prm", options, model, "prm.hf", tp, pp))


@pytest.mark.parametrize(
    ("recipe", "multiple"),
    [("delayed", 16), ("tensorwise", 16), ("mxfp8", 32), ("blockwise", 128)],
)
def test_token_multiples(recipe, multiple):
    assert precision_rules.token_multiple(options_of(fp8_recipe=recipe)) == multiple
    assert precision_rules.token_multiple(options_of(fp8_recipe=recipe), ranks=4) == 4 * multiple
    assert precision_rules.token_multiple(options_of(fp8=None, fp8_recipe=recipe)) == 1
    assert precision_rules.token_multiple(options_of(fp8=None), ranks=4) == 4


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "mxfp8", "blockwise"])
@pytest.mark.parametrize("tp", [1, 2])
def test_a_shape_that_fits(recipe, tp):
    assert shapes(recipe, tp) == []


def test_each_side_that_does_not_fit_is_named():
    # On 16 ranks: 128 rows of the projection, (16 + 2 * 8) * 128 / 16 = 256 of QKV, 176 of the MLP.
    (found,) = shapes("blockwise", tp=16)
    assert found == (
        "precision.prm.fp8_recipe: found 'blockwise', which wants multiples of 128, but "
        "intermediate_size / tensor_model_parallel_size 16 = 176 in prm.hf; take another recipe or "
        "megatron.tensor_model_parallel_size, or remove precision.prm.fp8"
    )
    (found,) = shapes("mxfp8", tp=16)  # 176 = 5.5 * 32
    assert "multiples of 32" in found
    assert shapes("tensorwise", tp=16) == []  # 176 = 11 * 16


def test_head_dim_and_key_value_heads_are_what_transformers_takes_them_for():
    """Without head_dim: hidden_size / heads; without key/value heads: as many as heads."""
    model = {"hidden_size": 48, "num_attention_heads": 6, "intermediate_size": 64}
    model = with_defaults({"model_type": "llama", **model})
    found = shapes("mxfp8", model=model)  # 48 hidden, 6 * 8 = 48 of the heads, 3 * 48 = 144 of QKV
    assert [line.partition("but ")[2].partition(" in ")[0] for line in found] == [
        "hidden_size = 48",
        "num_attention_heads * head_dim = 48",
        "(num_attention_heads + 2 * num_key_value_heads) * head_dim = 144",
    ]
    assert shapes("delayed", model=model) == []


def test_bf16_layers_must_lie_in_the_outer_stages():
    knobs = {"first_last_layers_bf16": True, "num_layers_at_end_in_bf16": 4}
    assert shapes("tensorwise", pp=3, **knobs) == []
    (found,) = shapes("tensorwise", pp=4, **knobs)
    assert "num_layers_at_end_in_bf16: found 4, wanted at most the 3 layers of a pipeline" in found


def test_without_fp8_no_shape_matters():
    odd = dict.fromkeys(LLAMA, 7)
    assert shapes("blockwise", model=odd, fp8=None) == []


CONTRADICTIONS = {
    "fp8_param: found true without precision.prm.fp8": {"fp8": None, "fp8_param": True},
    "first_last_layers_bf16: found true without": {"fp8": None, "first_last_layers_bf16": True},
    "dtype: found 'fp16', wanted 'bf16' beside precision.prm.fp8": {"dtype": "fp16"},
    "first_last_layers_bf16: found true, wanted false": {
        "fp8_recipe": "delayed",
        "first_last_layers_bf16": True,
    },
    "fp8_param: found true, wanted false with fp8_recipe": {
        "fp8_recipe": "delayed",
        "fp8_param": True,
    },
    "loss_scale: found 8.0, wanted none with precision.prm.dtype = 'bf16'": {"loss_scale": 8.0},
    "initial_loss_scale: found 2.0, wanted at least precision.prm.min_loss_scale = 4.0": {
        "fp8": None,
        "dtype": "fp16",
        "initial_loss_scale": 2.0,
        "min_loss_scale": 4.0,
    },
}


@pytest.mark.parametrize(("told", "knobs"), CONTRADICTIONS.items(), ids=CONTRADICTIONS)
def test_contradictions(told, knobs):
    (found,) = precision_rules.option_problems("prm", options_of(**knobs))
    assert found.startswith(f"precision.prm.{told}")


def test_only_a_model_that_trains_has_delayed_scales():
    delayed = options_of(fp8_recipe="delayed")
    assert list(precision_rules.option_problems("policy", delayed)) == []
    (found,) = precision_rules.option_problems("reference", delayed)
    assert found.startswith("precision.reference.fp8_recipe: found 'delayed', wanted another")


def test_options_in_order():
    for knobs in ({"fp8": None}, {"fp8_param": True}, {"first_last_layers_bf16": True}):
        assert list(precision_rules.option_problems("reference", options_of(**knobs))) == []
    fp16 = options_of(fp8=None, dtype="fp16", loss_scale=128.0)
    assert list(precision_rules.option_problems("policy", fp16)) == []


def test_options_of_megatron_that_stand_in_precision():
    (found,) = precision_rules.megatron_problems({"fp8": "hybrid"}, [])
    assert found == (
        "megatron.fp8: each model has its own number formats; move it to [precision.policy], "
        "[precision.prm] or [precision.reference]"
    )
    (found,) = precision_rules.megatron_problems({"bf16": True}, [])
    assert found.endswith("where it is called dtype")
    (found,) = precision_rules.megatron_problems({"fp4": "e2m1"}, [])
    assert found.startswith("megatron.fp4: found 'e2m1', not supported")
    assert list(precision_rules.megatron_problems({"fp8_amax_history_len": 16}, ["prm"])) == []


def test_plain_torch_layers_have_no_fp8():
    local = {"transformer_impl": "local"}
    assert list(precision_rules.megatron_problems(local, [])) == []
    (found,) = precision_rules.megatron_problems(local, ["prm"])
    assert "precision.prm.fp8 needs Transformer Engine's layers" in found

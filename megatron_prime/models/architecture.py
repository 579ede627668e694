"""From a model's shape and the `[megatron]` table to this rank's part of a Megatron GPTModel.

The shape decides what the model is; `[megatron]` decides how it is computed and goes to Megatron's
TransformerConfig untouched, except that options which would contradict the shape, or which this
project's losses and reshard can't honour, are refused by name. On a GPU the layers are Transformer
Engine's (`transformer_impl = "local"` takes the plain torch ones), on a CPU always plain torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_prime.config import ConfigError, PrecisionOptions
from megatron_prime.models.kernels import has_fused_gradient_sums
from megatron_prime.models.precision import model_options
from megatron_prime.models.torch_spec import torch_block_spec
from megatron_prime.models.value_head import ValueHead
from megatron_prime.runtime.compat import megatron_calls
from megatron_prime.weights.shape import ModelShape

__all__ = ["ModelShape", "build_model", "transformer_config"]

# What every model here has, and why `[megatron]` can't change it.
FIXED: dict[str, Any] = {
    "hidden_dropout": 0.0,  # the ratio of two policies must not contain dropout's noise
    "attention_dropout": 0.0,
    # Packs of one pipeline are equally long; exchanging shapes can hang with virtual stages.
    "variable_seq_lengths": False,
    "calculate_per_token_loss": False,  # the engine's losses are already shares of the batch's
    "mtp_num_layers": None,
    "multi_latent_attention": False,
    "hierarchical_context_parallel_sizes": None,
    # No model here has these, and plain torch layers would leave some out in silence.
    "layernorm_zero_centered_gamma": False,
    "rotary_interleaved": False,
    "no_rope_freq": None,
    "mrope_section": None,
    "window_size": None,
    "softmax_type": "vanilla",
    "softmax_scale": None,
    "attention_output_gate": False,
    "apply_residual_connection_post_layernorm": False,
    "glu_linear_offset": 0.0,
    "activation_func_clamp_value": None,
    "qk_clip": False,
    "qk_l2_norm": False,
    "heterogeneous_block_specs": False,
}

# Fused CUDA kernels and CUDA streams: not on a CPU, whatever `[megatron]` says.
CPU_OPTIONS: dict[str, Any] = {
    "transformer_impl": "local",
    "use_cpu_initialization": True,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "gradient_accumulation_fusion": False,
    "apply_rope_fusion": False,
    "cross_entropy_loss_fusion": False,
    "persist_layer_norm": False,
    "tp_comm_overlap": False,
    "batch_p2p_comm": False,
    "batch_p2p_sync": False,
}


def transformer_config(
    shape: ModelShape, precision: PrecisionOptions, megatron: Mapping[str, Any]
) -> TransformerConfig:
    """Megatron's config of this model.

    Raises ConfigError, with all problems at once, for an option of `[megatron]` that Megatron does
    not have, or that belongs to the model's config.json or to this project.
    """
    owned = _shape_options(shape) | model_options(precision)
    known = {field.name for field in fields(TransformerConfig)}
    problems = [
        f"megatron.{key}: Megatron's TransformerConfig has no such option; remove it"
        for key in megatron.keys() - known
    ]
    problems += [
        f"megatron.{key}: it comes from the model's config.json or [precision]; remove it"
        for key in megatron.keys() & owned.keys()
    ]
    problems += [
        f"megatron.{key}: found {megatron[key]!r}, wanted {FIXED[key]!r}; remove it"
        for key in megatron.keys() & FIXED.keys()
        if megatron[key] != FIXED[key]
    ]
    on_gpu = torch.cuda.is_available()
    if megatron.get("overlap_p2p_comm") and not on_gpu:
        problems.append(
            "megatron.overlap_p2p_comm: found true without CUDA, where overlapping sends give "
            "wrong losses in silence; remove it"
        )
    problems += _division_problems(shape, megatron)
    if precision.fp8 and not on_gpu:  # Megatron would leave it out in silence
        problems.append("[precision] fp8: there is none on a CPU; remove it")
    if problems:
        raise ConfigError("\n".join(sorted(problems)))
    cpu = {} if on_gpu else CPU_OPTIONS
    ours = {
        "deallocate_pipeline_outputs": True,
        "gradient_accumulation_fusion": on_gpu and has_fused_gradient_sums(),
    }
    options = {**ours, **megatron, **owned, **FIXED, **cpu}
    try:
        return TransformerConfig(**options)
    except (AssertionError, TypeError, ValueError) as error:  # its own checks of combinations
        raise ConfigError(f"[megatron]: Megatron refuses these options: {error}") from error


def _shape_options(shape: ModelShape) -> dict[str, Any]:
    return {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.num_heads,
        "num_query_groups": shape.num_kv_heads,
        "kv_channels": shape.head_dim,
        "ffn_hidden_size": shape.ffn_size,
        "layernorm_epsilon": shape.norm_eps,
        "add_qkv_bias": shape.qkv_bias,
        "qk_layernorm": shape.qk_norm,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
    }


def _division_problems(shape: ModelShape, megatron: Mapping[str, Any]) -> list[str]:
    tp = megatron.get("tensor_model_parallel_size", 1)
    parts = {"attention heads": shape.num_heads, "key/value heads": shape.num_kv_heads}
    parts["feed-forward units"] = shape.ffn_size
    return [
        f"megatron.tensor_model_parallel_size: {tp} does not divide the model's {count} {name}"
        for name, count in parts.items()
        if count % tp
    ]


def build_model(
    shape: ModelShape, precision: PrecisionOptions, megatron: Mapping[str, Any]
) -> list[GPTModel]:
    """This rank's parts of the model, on its device; the process groups must stand.

    One part, or with virtual pipeline stages one for each, in the order of their layers. A part's
    forward takes a pack of tokens [1, S] and gives logits [1, n, V / tp], or a critic's values
    [1, n, 1], of the pack's n `wanted` tokens on the last pipeline stage. The weights are
    Megatron's random ones until `weights.load.load_hf` or a checkpoint replaces them. Raises
    ConfigError as `transformer_config`.
    """
    config = transformer_config(shape, precision, megatron)
    virtual = config.virtual_pipeline_model_parallel_size
    stages = range(virtual) if virtual else [None]
    with megatron_calls():
        return [_part(shape, config, stage) for stage in stages]


def _part(shape: ModelShape, config: TransformerConfig, vp_stage: int | None) -> GPTModel:
    where: dict[str, Any] = {"ignore_virtual": False, "vp_stage": vp_stage}
    rope: dict[str, Any] = {
        "rotary_base": shape.rope_theta,
        "rope_scaling": shape.rope_scaling_factor is not None,
        "rope_scaling_factor": shape.rope_scaling_factor or 1.0,
    }
    in_attention = config.transformer_impl == "local"
    model = GPTModel(
        config,
        _layers(config, rope, vp_stage),
        vocab_size=shape.padded_vocab_size,
        max_sequence_length=shape.max_positions,
        pre_process=parallel_state.is_pipeline_first_stage(**where),
        post_process=parallel_state.is_pipeline_last_stage(**where),
        share_embeddings_and_output_weights=shape.tied_embeddings,
        position_embedding_type="none" if in_attention else "rope",
        vp_stage=vp_stage,
        **rope,
    )
    if model.post_process:
        if shape.value_head:
            model.output_layer = ValueHead(config)
        _leave_out_logits(model)
    return model.to(torch.cuda.current_device())


def _leave_out_logits(model: GPTModel) -> None:
    """Let only the tokens `wanted` of a pack meet the vocabulary: logits [1, n, V / tp].

    Prompts need no logits, which are a model's largest tensor. Under sequence parallelism the
    output layer gathers the sequence itself, so there the others are left out after it.
    """
    layer = model.output_layer

    def note(_model: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        layer.wanted = kwargs["packed_seq_params"].wanted

    def before(_layer: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return inputs[0].index_select(0, layer.wanted), *inputs[1:]

    def after(_layer: Any, _inputs: Any, outputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return outputs[0].index_select(0, layer.wanted), *outputs[1:]

    model.register_forward_pre_hook(note, with_kwargs=True)
    if model.config.sequence_parallel:
        layer.register_forward_hook(after)
    else:
        layer.register_forward_pre_hook(before)


def _layers(config: TransformerConfig, rope: Mapping[str, Any], vp_stage: int | None) -> Any:
    if config.transformer_impl == "local":
        embedding = RotaryEmbedding(
            config.kv_channels,
            rotary_percent=1.0,
            use_cpu_initialization=config.use_cpu_initialization,
            **rope,
        )
        return torch_block_spec(config, embedding, vp_stage)
    if find_spec("transformer_engine") is None:
        raise ConfigError(
            "Transformer Engine is not installed: pip install transformer-engine[pytorch], or set "
            'megatron.transformer_impl = "local" for plain torch layers'
        )
    return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)

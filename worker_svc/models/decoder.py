"""What the configs of the Llama lineage have in common, read once for all families."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from worker_svc.models.rope import KINDS, Rope
from worker_svc.models.spec import HF_LAYER, HF_TOP, ModelSpec, SpecError, WeightNames

Config = Mapping[str, Any]

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def decoder_spec(
    config: Config,
    *,
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    windows: tuple[int, ...] = (),
) -> ModelSpec:
    """The common fields of a transformers config.json. Raises SpecError naming the field that is missing or unknown."""
    hidden, heads = _positive(config, "hidden_size"), _positive(config, "num_attention_heads")
    kv_heads = int(config.get("num_key_value_heads") or heads)
    if heads % kv_heads:
        raise SpecError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    head_dim = int(config.get("head_dim") or hidden // heads)
    name = config.get("hidden_act", "silu")
    if name not in _ACTIVATIONS:
        raise SpecError(f"hidden_act {name!r} is not supported, only {', '.join(_ACTIVATIONS)}")
    max_len = _positive(config, "max_position_embeddings")
    rope = rope_of(config, head_dim, max_len)
    return ModelSpec(
        architecture=str((config.get("architectures") or [config.get("model_type", "")])[0]),
        vocab_size=_positive(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_positive(config, "intermediate_size"),
        num_layers=_positive(config, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_model_len=max_len,
        max_positions=int(max_len * rope.factor) if rope.kind == "dynamic" else max_len,
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope=rope,
        names=WeightNames(HF_LAYER, HF_TOP),
        activation=_ACTIVATIONS[name],
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
        windows=windows,
        tied=bool(config.get("tie_word_embeddings", False)),
    )


def rope_of(config: Config, head_dim: int, max_len: int) -> Rope:
    """From `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (before)."""
    scaling: dict[str, Any] = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = str(scaling.get("rope_type") or scaling.get("type") or "default")
    if kind not in KINDS:
        raise SpecError(f"rope type {kind!r} is not supported, only {', '.join(KINDS)}")
    theta = float(scaling.get("rope_theta") or config.get("rope_theta") or 10000.0)
    share = float(scaling.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0)
    dim = int(head_dim * share)
    original = scaling.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    if kind == "dynamic":
        original = max_len  # transformers stretches beyond the whole of what max_position_embeddings says
    original_len = int(original or max_len)
    factor = float(scaling.get("factor") or (max_len / original_len if kind in ("yarn", "longrope") else 1.0))
    try:
        return Rope(
            dim=dim,
            theta=theta,
            kind=kind,
            factor=factor,
            original_max_len=original_len,
            low_freq_factor=float(scaling["low_freq_factor"]) if kind == "llama3" else 1.0,
            high_freq_factor=float(scaling["high_freq_factor"]) if kind == "llama3" else 4.0,
            beta_fast=float(scaling.get("beta_fast") or 32.0),
            beta_slow=float(scaling.get("beta_slow") or 1.0),
            truncate=bool(scaling.get("truncate", True)),
            attention_factor=_attention_factor(kind, factor, original_len, scaling),
            short_factor=tuple(map(float, scaling["short_factor"])) if kind == "longrope" else (),
            long_factor=tuple(map(float, scaling["long_factor"])) if kind == "longrope" else (),
        )
    except KeyError as error:
        raise SpecError(f"rope type {kind!r} needs {error.args[0]}") from error


def windows_by_layer(config: Config) -> tuple[int, ...]:
    """Qwen's way: a window where `use_sliding_window`, in the layers that `layer_types` or `max_window_layers` name."""
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    if not window:
        return ()
    layers = _positive(config, "num_hidden_layers")
    kinds = config.get("layer_types")
    if kinds is None:
        first = int(config.get("max_window_layers", layers))
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    if len(kinds) != layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise SpecError(f"layer_types must name full_attention or sliding_attention for each of {layers} layers")
    return tuple(int(window) if kind == "sliding_attention" else 0 for kind in kinds)


def _attention_factor(kind: str, factor: float, original_len: int, scaling: Config) -> float:
    """The factors that the papers propose, unless the config has its own."""
    if kind not in ("yarn", "longrope"):
        return 1.0
    if (given := scaling.get("attention_factor")) is not None:
        return float(given)
    if kind == "longrope":
        return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original_len))
    mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if mscale and all_dim:
        return _mscale(factor, float(mscale)) / _mscale(factor, float(all_dim))
    return _mscale(factor, 1.0)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _positive(config: Config, field: str) -> int:
    value = config.get(field)
    if not isinstance(value, int) or value < 1:
        raise SpecError(f"config.json: {field} must be a positive integer, not {value!r}")
    return value

"""What the configs of the Llama lineage have in common, read once for all families."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from worker_svc.models.fields import MAX_HEAD_DIM, MAX_LAYERS, Fields
from worker_svc.models.rope import KINDS, Rope
from worker_svc.models.spec import HF_LAYER, HF_TOP, ModelSpec, SpecError, WeightNames

Config = Mapping[str, Any]
FILE = "config.json"

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


# Older configs have these beside the group that describes the scaling.
_BESIDE_SCALING = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")


def decoder_spec(
    config: Config,
    *,
    act: str = "hidden_act",
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    windows: tuple[int, ...] = (),
) -> ModelSpec:
    """The common fields of a transformers config.json; `act` is what the activation's field is called.

    Raises SpecError naming the field that is missing or unknown.
    """
    fields = Fields(FILE, config)
    hidden, heads = fields.whole("hidden_size"), fields.whole("num_attention_heads")
    kv_heads = fields.whole("num_key_value_heads", heads)
    if heads % kv_heads:
        raise SpecError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    head_dim = fields.whole("head_dim", hidden // heads, most=MAX_HEAD_DIM)
    name = fields.text(act, "silu")
    if name not in _ACTIVATIONS:
        raise SpecError(f"{act} {name!r} is not supported, only {', '.join(_ACTIVATIONS)}")
    max_len = fields.whole("max_position_embeddings")
    rope = rope_of(config, head_dim, max_len)
    return ModelSpec(
        architecture=(fields.texts("architectures") or [fields.text("model_type", "")])[0],
        vocab_size=fields.whole("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.whole("intermediate_size"),
        num_layers=fields.whole("num_hidden_layers", most=MAX_LAYERS),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_model_len=max_len,
        max_positions=int(max_len * rope.factor) if rope.kind == "dynamic" else max_len,
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=rope,
        names=WeightNames(HF_LAYER, HF_TOP),
        activation=_ACTIVATIONS[name],
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
        windows=windows,
        tied=fields.flag("tie_word_embeddings", False),
    )


def rope_of(config: Config, head_dim: int, max_len: int) -> Rope:
    """From `rope_scaling` (before transformers 5) or else `rope_parameters`; what they leave out stands beside them."""
    fields, said = Fields(FILE, config), {}
    beside = {key: config.get(key) for key in _BESIDE_SCALING}
    for group in (beside, fields.group("rope_scaling") or fields.group("rope_parameters")):
        said.update({key: value for key, value in group.items() if value is not None})
    scaling = Fields(f"{FILE}, rope", said)
    kind = scaling.text("rope_type", scaling.text("type", "default"))
    if kind not in KINDS:
        raise SpecError(f"rope type {kind!r} is not supported, only {', '.join(KINDS)}")
    original_len = scaling.whole("original_max_position_embeddings", max_len)
    if kind == "dynamic":
        original_len = max_len  # transformers stretches beyond the whole of what max_position_embeddings says
    factor = scaling.number("factor", max_len / original_len if kind in ("yarn", "longrope") else 1.0)
    dim = int(head_dim * scaling.number("partial_rotary_factor", 1.0))
    factors = {name: scaling.numbers(name) if kind == "longrope" else () for name in ("short_factor", "long_factor")}
    for name, values in factors.items():
        if values and len(values) != dim // 2:
            raise scaling.trouble(name, f"a list of {dim // 2} numbers", list(values))
    return Rope(
        dim=dim,
        theta=scaling.number("rope_theta", 10000.0),
        kind=kind,
        factor=factor,
        original_max_len=original_len,
        low_freq_factor=scaling.number("low_freq_factor") if kind == "llama3" else 1.0,
        high_freq_factor=scaling.number("high_freq_factor") if kind == "llama3" else 4.0,
        beta_fast=scaling.number("beta_fast", 32.0),
        beta_slow=scaling.number("beta_slow", 1.0),
        truncate=scaling.flag("truncate", True),
        attention_factor=_attention_factor(kind, factor, original_len, scaling),
        **factors,
    )


def windows_by_layer(config: Config) -> tuple[int, ...]:
    """Qwen's way: a window where `use_sliding_window`, in the layers that `layer_types` or `max_window_layers` name."""
    fields = Fields(FILE, config)
    window = fields.whole("sliding_window", 0, least=0) if fields.flag("use_sliding_window", False) else 0
    if not window:
        return ()
    layers = fields.whole("num_hidden_layers", most=MAX_LAYERS)
    first = fields.whole("max_window_layers", layers, least=0)
    return tuple(window if sliding else 0 for sliding in sliding_layers(config, lambda i: i >= first))


def sliding_layers(config: Config, otherwise: Callable[[int], bool]) -> tuple[bool, ...]:
    """Which layers have a window: what `layer_types` says, or `otherwise` of a layer's number."""
    fields = Fields(FILE, config)
    layers = fields.whole("num_hidden_layers", most=MAX_LAYERS)
    kinds = fields.texts("layer_types")
    kinds = kinds or ["sliding_attention" if otherwise(i) else "full_attention" for i in range(layers)]
    if len(kinds) != layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise SpecError(f"layer_types must name full_attention or sliding_attention for each of {layers} layers")
    return tuple(kind == "sliding_attention" for kind in kinds)


def window_in_all(config: Config) -> tuple[int, ...]:
    """Mistral's way: the same window in every layer, or in none."""
    fields = Fields(FILE, config)
    window = fields.whole("sliding_window", 0, least=0)
    return (window,) * fields.whole("num_hidden_layers", most=MAX_LAYERS) if window else ()


def top_k(fields: Fields, num: int) -> int:
    """How many of `num` experts a token takes."""
    chosen = fields.whole("num_experts_per_tok")
    if chosen > num:
        raise fields.trouble("num_experts_per_tok", f"at most the {num} experts", chosen)
    return chosen


def _attention_factor(kind: str, factor: float, original_len: int, scaling: Fields) -> float:
    """The factors that the papers propose, unless the config has its own."""
    if kind not in ("yarn", "longrope"):
        return 1.0
    if scaling.has("attention_factor"):
        return scaling.number("attention_factor")
    if kind == "longrope":
        return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original_len))
    if scaling.values.get("mscale") and scaling.values.get("mscale_all_dim"):  # 0 is off
        return _mscale(factor, scaling.number("mscale")) / _mscale(factor, scaling.number("mscale_all_dim"))
    return _mscale(factor, 1.0)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

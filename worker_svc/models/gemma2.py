"""Gemma 2: norms around attention and MLP, softcaps, a window in every other layer, weights of norms as 1 + w."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from worker_svc.models.decoder import FILE, Config, decoder_spec, sliding_layers
from worker_svc.models.fields import Fields
from worker_svc.models.spec import HF_LAYER, HF_TOP, ModelSpec, SpecError, WeightNames

# What transformers takes where a config leaves it out.
DEFAULTS = {
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
LAYER = HF_LAYER | {
    "attn_post_norm": "model.layers.{i}.post_attention_layernorm.{p}",
    "mlp_norm": "model.layers.{i}.pre_feedforward_layernorm.{p}",
    "mlp_post_norm": "model.layers.{i}.post_feedforward_layernorm.{p}",
}


def spec(config: Config) -> ModelSpec:
    config = {**DEFAULTS, **config}
    return replace(
        gemma_spec(config, lambda i: i % 2 == 0),
        attention_softcap=softcap(config, "attn_logit_softcapping", 50.0),
        logit_softcap=softcap(config, "final_logit_softcapping", 30.0),
    )


def gemma_spec(config: Config, sliding: Callable[[int], bool], *, qk_norm: bool = False) -> ModelSpec:
    """What Gemma 2 and 3 have in common. `sliding`: which layers have a window, unless `layer_types` says."""
    fields = Fields(FILE, config)
    if fields.flag("use_bidirectional_attention", False):
        raise SpecError("use_bidirectional_attention is not supported: tokens see what comes before them")
    layers = sliding_layers(config, sliding)
    window = fields.whole("sliding_window") if any(layers) else 0
    bias = fields.flag("attention_bias", False)
    windows = tuple(window if slides else 0 for slides in layers)
    base = decoder_spec(config, act="hidden_activation", qkv_bias=bias, o_bias=bias, qk_norm=qk_norm, windows=windows)
    return replace(
        base,
        names=WeightNames(LAYER, HF_TOP),
        embedding_scale=math.sqrt(base.hidden_size),
        attention_scale=fields.number("query_pre_attn_scalar") ** -0.5,
        norm_offset=1.0,
        post_norms=True,
    )


def softcap(config: Config, key: str, default: float) -> float:
    """Here null says that there is none."""
    if key in config and config[key] is None:
        return 0.0
    return Fields(FILE, config).number(key, default)

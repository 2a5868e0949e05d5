"""Gemma 3, its text: Gemma 2 with norms of q and k for softcaps, and a rope of their own for layers with windows.

A checkpoint with a vision tower (Gemma3ForConditionalGeneration) is served as the language model that it has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from worker_svc.models import gemma2
from worker_svc.models.decoder import FILE, Config, rope_of
from worker_svc.models.fields import Fields
from worker_svc.models.gemma2 import gemma_spec, softcap
from worker_svc.models.spec import HF_TOP, ModelSpec, SpecError, WeightNames

# What transformers takes where a config leaves it out: those of models with vision leave out most.
DEFAULTS = gemma2.DEFAULTS | {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
}
LAYER = gemma2.LAYER


def spec(config: Config) -> ModelSpec:
    config = {**DEFAULTS, **config}
    fields = Fields(FILE, config)
    if fields.has("attn_logit_softcapping"):
        raise SpecError(
            "attn_logit_softcapping is not supported for Gemma 3: transformers knows it, and does not use it"
        )
    pattern = fields.whole("sliding_window_pattern", fields.whole("_sliding_window_pattern", 6))
    everywhere, local = _ropes(fields)
    base = gemma_spec({**config, **everywhere}, lambda i: (i + 1) % pattern != 0, qk_norm=True)
    return replace(
        base,
        logit_softcap=softcap(config, "final_logit_softcapping", 0.0) if fields.has("final_logit_softcapping") else 0.0,
        local_rope=rope_of(local, base.head_dim, base.max_model_len),
    )


def vision_spec(config: Config) -> ModelSpec:
    """The language model of one that sees as well. Early checkpoints, and those of transformers 5, name it apart."""
    fields = Fields(FILE, config)
    tied = fields.flag("tie_word_embeddings", True)
    text = {**fields.group("text_config"), "architectures": fields.texts("architectures"), "tie_word_embeddings": tied}
    return replace(spec(text), names=_inside("language_model.model."), other_names=(_inside("model.language_model."),))


def _inside(prefix: str) -> WeightNames:
    head = "language_model.lm_head.{p}" if prefix.startswith("language_model") else "lm_head.{p}"
    layer = {role: prefix + name.removeprefix("model.") for role, name in LAYER.items()}
    return WeightNames(
        layer, {**{role: prefix + t.removeprefix("model.") for role, t in HF_TOP.items()}, "lm_head": head}
    )


def _ropes(fields: Fields) -> tuple[dict[str, Any], dict[str, Any]]:
    """Configs that `rope_of` follows: of layers that see everything, and of those with a window. `rope_scaling`, of
    before transformers 5, is for the former alone.
    """
    groups = Fields(f"{FILE}, rope_parameters", fields.group("rope_parameters"))
    scaling: Mapping[str, Any] = {**groups.group("full_attention"), **fields.group("rope_scaling")}
    everywhere = {"rope_theta": fields.number("rope_theta", 1e6), "rope_parameters": scaling, "rope_scaling": None}
    local = {
        "rope_theta": fields.number("rope_local_base_freq", 1e4),
        "rope_parameters": groups.group("sliding_attention"),
    }
    return everywhere, local

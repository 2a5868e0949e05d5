"""Llama, and what calls itself so (SmolLM, TinyLlama, Yi …)."""

from __future__ import annotations

from worker_svc.models.decoder import FILE, Config, decoder_spec
from worker_svc.models.fields import Fields
from worker_svc.models.spec import ModelSpec


def spec(config: Config) -> ModelSpec:
    attention_bias = Fields(FILE, config).flag("attention_bias", False)
    return decoder_spec(
        config, qkv_bias=attention_bias, o_bias=attention_bias, mlp_bias=Fields(FILE, config).flag("mlp_bias", False)
    )

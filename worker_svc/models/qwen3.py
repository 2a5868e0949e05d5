"""Qwen3: each head's q and k are normed before they turn; no biases unless asked."""

from __future__ import annotations

from worker_svc.models.decoder import FILE, Config, decoder_spec, windows_by_layer
from worker_svc.models.fields import Fields
from worker_svc.models.spec import ModelSpec


def spec(config: Config) -> ModelSpec:
    attention_bias = Fields(FILE, config).flag("attention_bias", False)
    return decoder_spec(
        config, qkv_bias=attention_bias, o_bias=attention_bias, qk_norm=True, windows=windows_by_layer(config)
    )

"""Qwen2 and Qwen2.5: Llama with biases on q, k and v, and windows in the upper layers where asked."""

from __future__ import annotations

from worker_svc.models.decoder import Config, decoder_spec, windows_by_layer
from worker_svc.models.spec import ModelSpec


def spec(config: Config) -> ModelSpec:
    return decoder_spec(config, qkv_bias=True, windows=windows_by_layer(config))

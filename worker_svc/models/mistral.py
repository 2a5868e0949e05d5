"""Mistral: Llama with a sliding window in every layer (or in none, from v0.2 on)."""

from __future__ import annotations

from worker_svc.models.decoder import Config, decoder_spec
from worker_svc.models.spec import ModelSpec


def spec(config: Config) -> ModelSpec:
    window = int(config.get("sliding_window") or 0)
    return decoder_spec(config, windows=(window,) * int(config.get("num_hidden_layers", 0)) if window else ())

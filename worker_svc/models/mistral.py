"""Mistral: Llama with a sliding window in every layer (or in none, from v0.2 on)."""

from __future__ import annotations

from worker_svc.models.decoder import Config, decoder_spec, window_in_all
from worker_svc.models.spec import ModelSpec


def spec(config: Config) -> ModelSpec:
    return decoder_spec(config, windows=window_in_all(config))

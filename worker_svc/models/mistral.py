"""Mistral: Llama with a sliding window in every layer (or in none, from v0.2 on)."""

from __future__ import annotations

from worker_svc.models.decoder import FILE, Config, decoder_spec
from worker_svc.models.fields import MAX_LAYERS, Fields
from worker_svc.models.spec import ModelSpec


def spec(config: Config) -> ModelSpec:
    fields = Fields(FILE, config)
    window = fields.whole("sliding_window", 0, least=0)
    return decoder_spec(
        config, windows=(window,) * fields.whole("num_hidden_layers", most=MAX_LAYERS) if window else ()
    )

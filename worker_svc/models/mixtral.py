"""Mixtral: Mistral with experts in every layer."""

from __future__ import annotations

from dataclasses import replace

from worker_svc.models.decoder import FILE, Config, decoder_spec, top_k, window_in_all
from worker_svc.models.fields import Fields
from worker_svc.models.spec import HF_EXPERTS, HF_LAYER, HF_TOP, Experts, ModelSpec, WeightNames

# What transformers takes where a config leaves it out.
DEFAULTS = {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_local_experts": 8, "num_experts_per_tok": 2}
LAYER = HF_LAYER | {
    "router": "model.layers.{i}.block_sparse_moe.gate.{p}",
    "expert_gate": "model.layers.{i}.block_sparse_moe.experts.{e}.w1.{p}",
    "expert_up": "model.layers.{i}.block_sparse_moe.experts.{e}.w3.{p}",
    "expert_down": "model.layers.{i}.block_sparse_moe.experts.{e}.w2.{p}",
}


def spec(config: Config) -> ModelSpec:
    config = {**DEFAULTS, **config}
    fields = Fields(FILE, config)
    num = fields.whole("num_local_experts")
    base = decoder_spec(config, windows=window_in_all(config))
    return replace(
        base,
        experts=Experts(num, top_k(fields, num), base.intermediate_size, normalized=True),
        names=WeightNames(LAYER, HF_TOP),
        other_names=(WeightNames(HF_LAYER | HF_EXPERTS, HF_TOP),),
    )

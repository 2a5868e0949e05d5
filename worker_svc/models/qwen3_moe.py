"""Qwen3 with experts: in every layer, or in those that the config does not leave out."""

from __future__ import annotations

from dataclasses import replace

from worker_svc.models.decoder import FILE, Config, decoder_spec, top_k, window_in_all
from worker_svc.models.fields import Fields
from worker_svc.models.spec import HF_EXPERTS, HF_LAYER, HF_TOP, Experts, ModelSpec, WeightNames

# What transformers takes where a config leaves it out.
DEFAULTS = {"num_experts_per_tok": 8, "moe_intermediate_size": 768}
LAYER = HF_LAYER | {
    "router": "model.layers.{i}.mlp.gate.{p}",
    "expert_gate": "model.layers.{i}.mlp.experts.{e}.gate_proj.{p}",
    "expert_up": "model.layers.{i}.mlp.experts.{e}.up_proj.{p}",
    "expert_down": "model.layers.{i}.mlp.experts.{e}.down_proj.{p}",
}


def spec(config: Config) -> ModelSpec:
    config = {**DEFAULTS, **config}
    fields = Fields(FILE, config)
    bias = fields.flag("attention_bias", False)
    # Unlike Qwen3, transformers gives every layer the window.
    windows = window_in_all(config) if fields.flag("use_sliding_window", False) else ()
    base = decoder_spec(config, qkv_bias=bias, o_bias=bias, qk_norm=True, windows=windows)
    return replace(
        base,
        experts=_experts(fields, base.num_layers),
        names=WeightNames(LAYER, HF_TOP),
        other_names=(WeightNames(HF_LAYER | HF_EXPERTS, HF_TOP),),
    )


def _experts(fields: Fields, layers: int) -> Experts | None:
    """transformers 5 writes `num_local_experts` for what configs on the hub call `num_experts`."""
    num = fields.whole("num_experts", fields.whole("num_local_experts", 128, least=0), least=0)
    step, dense = fields.whole("decoder_sparse_step", 1), fields.wholes("mlp_only_layers", most=layers - 1)
    sparse = tuple(num > 0 and i not in dense and (i + 1) % step == 0 for i in range(layers))
    if not any(sparse):
        return None
    return Experts(
        num,
        top_k(fields, num),
        fields.whole("moe_intermediate_size"),
        normalized=fields.flag("norm_topk_prob", False),
        layers=sparse,
    )

"""Phi-3, Phi-3.5, Phi-4: Llama with q, k and v, and gate and up, in one tensor each; some turn a part of a head."""

from __future__ import annotations

from dataclasses import replace

from worker_svc.models.decoder import FILE, Config, decoder_spec, window_in_all
from worker_svc.models.fields import Fields
from worker_svc.models.spec import HF_LAYER, HF_TOP, ModelSpec, WeightNames

_APART = ("q", "k", "v", "gate", "up")
LAYER = {role: name for role, name in HF_LAYER.items() if role not in _APART} | {
    "qkv": "model.layers.{i}.self_attn.qkv_proj.{p}",
    "gate_up": "model.layers.{i}.mlp.gate_up_proj.{p}",
}


def spec(config: Config) -> ModelSpec:
    config = {"rms_norm_eps": 1e-5, **config, "rope_parameters": _rope(Fields(FILE, config)), "rope_scaling": None}
    return replace(decoder_spec(config, windows=window_in_all(config)), names=WeightNames(LAYER, HF_TOP))


def _rope(fields: Fields) -> dict[str, object]:
    """In today's spelling. The context trained on counts as it stands beside the group; early configs call longrope
    "su", or "yarn".
    """
    rope = dict(fields.group("rope_scaling") or fields.group("rope_parameters"))
    kind = rope.get("rope_type") or rope.get("type")
    if kind in ("su", "yarn"):
        rope["rope_type"] = "longrope"
    if fields.has("original_max_position_embeddings") or not rope.get("original_max_position_embeddings"):
        rope["original_max_position_embeddings"] = fields.whole("original_max_position_embeddings", 4096)
    return rope

"""From packed weights to the structs that the C library opens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from kernels.cpu import library
from kernels.cpu.library import Floats, Layer, Spec, Weight
from worker_svc.inputs import Ints, StepInputs
from worker_svc.models.rope import Rope
from worker_svc.models.spec import ModelSpec
from worker_svc.quant.packed import PackedModel

Tables = Mapping[Rope, tuple[Floats, Floats]]  # cos and sin [max_model_len, dim / 2] of each of a spec's ropes
NORMS: Final = ("attn_norm", "attn_post_norm", "mlp_norm", "mlp_post_norm", "q_norm", "k_norm")


@dataclass(frozen=True)
class KVForm:
    kind: str  # a key of library.KV_KINDS
    block_size: int  # tokens
    num_blocks: int = 0


def unfit(spec: ModelSpec) -> str:
    """What the kernels cannot do of this model; empty where there is nothing."""
    if spec.head_dim % 16 or spec.head_dim > 256:
        return f"the cpu backend has no attention for heads of {spec.head_dim}, only multiples of 16 up to 256"
    if spec.experts:
        return "the cpu backend has no kernels for experts"
    if len({rope.dim for rope in spec.ropes}) > 1:
        return "the cpu backend turns as many dimensions in every layer"
    if spec.rope.dim % 2:
        return f"the cpu backend cannot turn {spec.rope.dim} dimensions of a head: they go in pairs"
    return ""


def shape(spec: ModelSpec, kv: KVForm, max_model_len: int) -> Spec:
    """All but the weights: enough for the size of a KV block."""
    return Spec(
        abi=library.ABI,
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_layers=spec.num_layers,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        rotary_dim=spec.rope.dim,
        max_model_len=max_model_len,
        activation=library.ACTIVATIONS[spec.activation],
        kv_kind=library.KV_KINDS[kv.kind],
        block_size=kv.block_size,
        num_blocks=kv.num_blocks,
        norm_eps=spec.norm_eps,
        attention_scale=spec.query_scale,
        attention_softcap=spec.attention_softcap,
        logit_softcap=spec.logit_softcap,
        embedding_scale=spec.embedding_scale,
    )


def tables(spec: ModelSpec, max_model_len: int) -> Tables:
    return {rope: rope.tables(max_model_len) for rope in spec.ropes}


def whole(packed: PackedModel, kv: KVForm, ropes: Tables) -> Spec:
    """`shape` with its weights and rope tables, which live as long as it does."""
    cos, sin = ropes[packed.spec.rope]
    made, arrays = shape(packed.spec, kv, len(cos)), packed.arrays
    layers = [_layer(packed, i, ropes) for i in range(packed.spec.num_layers)]
    made.layers, made.lm_head = library.layers(layers), _weight(packed, "lm_head")
    made.point(cos=cos, sin=sin, embed=arrays.get("embed"), final_norm=arrays["final_norm"])
    return made.keep(packed, layers)


def outputs_wanted(inputs: StepInputs) -> Ints:
    """Tokens that a step answers something about, ascending: the last layer is computed for those alone."""
    others = np.concatenate([inputs.prompt_logprob_tokens, inputs.pooled_tokens])
    return np.union1d(inputs.sample_tokens, others) if len(others) else inputs.sample_tokens


def batch(inputs: StepInputs, wanted: Ints | None = None) -> library.Batch:
    """`wanted`: all tokens that outputs will be asked of; None is any."""
    made = library.Batch(
        num_rows=len(inputs.slots),
        num_tokens=len(inputs.token_ids),
        table_stride=inputs.block_tables.shape[1],
        num_wanted=0 if wanted is None else len(wanted),
    )
    return made.point(
        cu=inputs.cu,
        context_lens=inputs.context_lens,
        token_ids=inputs.token_ids,
        positions=inputs.positions,
        slot_mapping=inputs.slot_mapping,
        block_tables=inputs.block_tables,
        wanted=wanted,
    )


def _layer(packed: PackedModel, i: int, ropes: Tables) -> Layer:
    cos, sin = ropes[packed.spec.layer_rope(i)]
    products = {role: _weight(packed, f"{i}.{role}") for role in ("qkv", "o", "gate_up", "down")}
    norms = {role: packed.arrays.get(f"{i}.{role}") for role in NORMS}
    return Layer(window=packed.spec.window(i), **products).point(cos=cos, sin=sin, **norms)


def _weight(packed: PackedModel, name: str) -> Weight:
    matrix, arrays = packed.layout.matrices[name], packed.arrays
    scale, bias, order = (arrays.get(f"{name}.{what}") for what in ("scale", "bias", "order"))
    return library.weight(matrix.kind, matrix.n, matrix.k, arrays[name], scale, bias, matrix.group, order)

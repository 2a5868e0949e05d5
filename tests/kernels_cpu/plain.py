"""A model's forward in plain numpy float32, one sequence at a time: what the step is compared with."""

from __future__ import annotations

import numpy as np

from benchmarks.random_model import HEADS, RandomModel, from_bf16, rotated, sizes_of_blocks, to_bf16
from kernels.cpu.library import PANEL, Floats


def logits(model: RandomModel, token_ids: list[int]) -> Floats:
    """[tokens, vocab]. Rounds where the step rounds: operands of products by their kind, K and V to bfloat16."""
    s, d = model.shape, model.dense
    x = d["embed"][token_ids] * np.float32(s.embedding_scale)
    for i in range(s.num_layers):
        x = x + _attention(model, i, _rms(x, d[f"attn_norm.{i}"]))
        h = linear(model, f"gate_up.{i}", _rms(x, d[f"mlp_norm.{i}"]))
        gate, up = (
            h.reshape(len(x), -1, 2, PANEL)
            .swapaxes(1, 2)
            .reshape(len(x), 2, -1)[:, :, : s.intermediate_size]
            .swapaxes(0, 1)
        )
        x = x + linear(model, f"down.{i}", gate / (1 + np.exp(-gate)) * up)
    y = linear(model, "lm_head", _rms(x, d["final_norm"]), head=True)
    return np.float32(s.logit_softcap) * np.tanh(y / s.logit_softcap) if s.logit_softcap else y


def _attention(model: RandomModel, i: int, x: Floats) -> Floats:
    s, d = model.shape, model.dense
    length, group = len(x), s.num_heads // s.num_kv_heads
    qkv = linear(model, f"qkv.{i}", x).reshape(length, -1, s.head_dim)
    q, k, v = np.split(qkv, [s.num_heads, s.num_heads + s.num_kv_heads], 1)
    if s.qk_norm:
        q, k = _rms(q, d[f"q_norm.{i}"]), _rms(k, d[f"k_norm.{i}"])
    q, k = _rope(model, q), _rope(model, k)
    if model.kv == "bf16":
        k, v = from_bf16(to_bf16(np.ascontiguousarray(k))), from_bf16(to_bf16(np.ascontiguousarray(v)))
    scores = np.einsum("qhd,khd->hqk", q, np.repeat(k, group, 1)) * np.float32(s.head_dim**-0.5)
    if s.attention_softcap:
        scores = s.attention_softcap * np.tanh(scores / s.attention_softcap)
    at = np.arange(length)
    seen = at[None, :] <= at[:, None]
    if s.windows and s.windows[i]:
        seen &= at[None, :] > at[:, None] - s.windows[i]
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("hqk,khd->qhd", weights, np.repeat(v, group, 1)).reshape(length, -1)
    return linear(model, f"o.{i}", out.astype(np.float32))


def _rope(model: RandomModel, x: Floats) -> Floats:
    half = model.dense["cos"].shape[1]
    cos, sin = (model.dense[name][: len(x), None] for name in ("cos", "sin"))
    a, b = x[..., :half], x[..., half : 2 * half]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, x[..., 2 * half :]], -1)


def _rms(x: Floats, weight: Floats) -> Floats:
    y: Floats = x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(1e-5)) * weight
    return y.astype(np.float32)


def linear(model: RandomModel, name: str, x: Floats, head: bool = False) -> Floats:
    w, bias = model.dense[name], model.dense.get(f"{name}.bias", np.float32(0))
    kind = HEADS.get(model.kind, model.kind) if head else model.kind
    if kind in ("bf16", "w4a16", "w8a16"):
        x = from_bf16(to_bf16(np.ascontiguousarray(x, np.float32)))
    elif kind == "int8":  # rotated, one scale a token
        u, width = rotated(x), x.shape[-1]
        x = (rotated(_rounded(u)) / sizes_of_blocks(width))[..., :width]
    elif kind == "w8a8":  # one scale a token
        x = _rounded(x)
    else:  # one scale a token and group of 32
        groups = np.zeros((len(x), -(-x.shape[-1] // 32) * 32), np.float32)
        groups[:, : x.shape[-1]] = x
        x = _rounded(groups.reshape(len(x), -1, 32)).reshape(len(x), -1)[:, : x.shape[-1]]
    y: Floats = x @ w.T + bias
    return y.astype(np.float32)


def _rounded(x: Floats) -> Floats:
    """To 127 steps of the greatest of the last dimension."""
    scale = np.maximum(np.abs(x).max(-1, keepdims=True), 1e-30) / 127
    y: Floats = np.rint(x / scale) * scale
    return y

"""Plain-torch oracles: each says what its kernel computes, one row and one head at a time, with nothing to be fast."""

from __future__ import annotations

import torch
from torch import Tensor


def paged_attention(
    q: Tensor,
    pages: Tensor,
    block_table: Tensor,
    positions: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Tensor:
    """Causal attention of one sequence's tokens over its paged keys and values.

    q [n, heads, dim] at absolute `positions` [n]; pages [2, blocks, kv heads, block_size, dim] hold K and V;
    block_table [B] in position order. `window` positions are seen, the token's own included; 0 is all. What the pages
    hold, times k_scale and v_scale, are the keys and values. → [n, heads, dim]
    """
    _, num_heads, _ = q.shape
    _, _, kv_heads, block_size, _ = pages.shape
    length = int(positions.max()) + 1
    at = torch.arange(length)
    blocks, offsets = block_table[at // block_size], at % block_size
    keys, values = (plane[blocks, :, offsets].float() for plane in pages)  # each [length, kv heads, dim]
    keys, values = keys * k_scale, values * v_scale
    out = torch.empty_like(q)
    for i, position in enumerate(positions.tolist()):
        first = max(0, position + 1 - window) if window else 0
        seen = slice(first, position + 1)
        for head in range(num_heads):
            kv_head = head * kv_heads // num_heads
            scores = keys[seen, kv_head] @ q[i, head].float() * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            out[i, head] = torch.softmax(scores, 0) @ values[seen, kv_head]
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D] over its root mean square, times weight [D]."""
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def rotate(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """x [T, heads, dim] at `positions` [T], frequencies [d/2].

    Dimensions (j, j + d/2) turn by position * frequencies[j]; those from d on stay.
    """
    half = frequencies.shape[0]
    pairs = torch.complex(x[..., :half], x[..., half : 2 * half])
    angles = positions[:, None].float() * frequencies[None, :]
    turned = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([turned.real, turned.imag, x[..., 2 * half :]], -1)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise."""
    return gate * torch.sigmoid(gate) * up


def hadamard_blocks(x: Tensor) -> Tensor:
    """x [..., k], k a multiple of 32, times Sylvester's matrix over its size, in blocks of 64 and a last one of 32."""
    out = torch.empty_like(x)
    for first in range(0, x.shape[-1], 64):
        block = x[..., first : first + 64]
        size = block.shape[-1]
        bits = torch.arange(size)[:, None] & torch.arange(size)
        ones = torch.stack([(bits >> i) & 1 for i in range(6)]).sum(0)
        out[..., first : first + 64] = block @ (1 - 2 * (ones % 2)).to(x.dtype) / size
    return out


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) · up, elementwise, for "silu", "gelu" and "gelu_tanh"."""
    if activation == "silu":
        return torch.nn.functional.silu(gate) * up
    return torch.nn.functional.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """residual += x, rounded to its dtype, in place → float32 norm of that, times weight + offset."""
    residual.copy_(residual.float() + x.float())
    return rms_norm(residual.float(), weight.float() + offset, eps)


def float8(x: Tensor, scale: Tensor) -> Tensor:
    """x in units of a scale, as the nearest float8 e4m3 there is."""
    return (x.float() * (1 / scale)).clamp(-448, 448).to(torch.float8_e4m3fn)


def kv_write(
    k: Tensor, v: Tensor, slots: Tensor, pages: Tensor, k_scale: Tensor | None = None, v_scale: Tensor | None = None
) -> None:
    """k, v [T, kv heads, dim] to pages [2, blocks, kv heads, block_size, dim], in place; none for a slot below 0."""
    block_size = pages.shape[3]
    for token, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        for plane, values, scale in zip(pages, (k, v), (k_scale, v_scale), strict=True):
            stored = values[token].to(pages.dtype) if scale is None else float8(values[token], scale)
            plane[slot // block_size, :, slot % block_size] = stored


def rope_kv_write(
    qkv: Tensor,
    positions: Tensor,
    frequencies: Tensor,
    slots: Tensor,
    pages: Tensor,
    heads: int,
    norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
    scales: tuple[Tensor, Tensor] | tuple[None, None] = (None, None),
) -> Tensor:
    """qkv [T, (heads + 2 kv heads) * dim]: keys and values into pages → turned queries [T, heads, dim], float32."""
    kv_heads, dim = pages.shape[2], pages.shape[4]
    q, k, v = qkv.float().unflatten(1, (-1, dim)).split([heads, kv_heads, kv_heads], 1)
    if norms is not None:
        q, k = (rms_norm(x, weight.float() + offset, eps) for x, weight in zip((q, k), norms, strict=True))
    kv_write(rotate(k, positions, frequencies), v, slots, pages, *scales)
    return rotate(q, positions, frequencies)


def embed(token_ids: Tensor, table: Tensor, first_id: int = 0, scale: float = 1.0) -> Tensor:
    """token_ids [T], table [V, D] of the ids from first_id on → [T, D] float32, zeros for ids that it lacks."""
    out = torch.zeros(len(token_ids), table.shape[1])
    for i, token in enumerate(token_ids.tolist()):
        if first_id <= token < first_id + len(table):
            out[i] = table[token - first_id].float() * scale
    return out


def mask_logits(logits: Tensor, bitmask: Tensor, rows: Tensor) -> None:
    """In place: logits[rows[i], t] is −inf where bit t % 32 of bitmask[i, t // 32] is 0; no row below 0."""
    for words, row in zip(bitmask.tolist(), rows.tolist(), strict=True):
        for token in range(logits.shape[1]):
            if row >= 0 and not words[token // 32] >> token % 32 & 1:
                logits[row, token] = -torch.inf


def grouped_weight(codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int, order: Tensor | None) -> Tensor:
    """[N, K] float64 of codes [N, K], scales and zeros [N, G] of runs of `group_size` columns (0: all).

    The codes' column k is the matrix's column order[k].
    """
    columns = torch.arange(codes.shape[1])
    groups = columns // (group_size or len(columns))
    sorted_columns = (codes.double() - zeros.double()[:, groups]) * scales.double()[:, groups]
    out = torch.empty_like(sorted_columns)
    out[:, columns if order is None else order.long()] = sorted_columns
    return out


def lora(x: Tensor, a: Tensor, b: Tensor, scales: Tensor, index: Tensor, y: Tensor, first: int = 0) -> None:
    """In place: y[t, first:] += scales[i] · b[i] · (a[i] · x[t]) where i = index[t] > 0; float64, rounded once.

    A scale of 0 leaves the row as it is.
    """
    for row, i in enumerate(index.tolist()):
        if i > 0 and scales[i] != 0:
            added = scales[i].double() * (b[i].double() @ (a[i].double() @ x[row].double()))
            columns = slice(first, first + len(added))
            y[row, columns] = (y[row, columns].double() + added).to(y.dtype)


def add_states(states: Tensor, slots: Tensor, borders: Tensor, first: int, totals: Tensor) -> None:
    """In place: totals[slots[g]] += states[t − first] for each t of borders[g] : borders[g + 1] that is there."""
    for group, slot in enumerate(slots.tolist()):
        for t in range(*borders[group : group + 2].tolist()):
            if 0 <= t - first < len(states):
                totals[slot] += states[t - first].double()

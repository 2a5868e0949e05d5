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
) -> Tensor:
    """Causal attention of one sequence's tokens over its paged keys and values.

    q [n, heads, dim] at absolute `positions` [n]; pages [2, blocks, kv heads, block_size, dim] hold K and V;
    block_table [B] in position order. `window` positions are seen, the token's own included; 0 is all.
    → [n, heads, dim]
    """
    _, num_heads, _ = q.shape
    _, _, kv_heads, block_size, _ = pages.shape
    length = int(positions.max()) + 1
    at = torch.arange(length)
    blocks, offsets = block_table[at // block_size], at % block_size
    keys, values = (plane[blocks, :, offsets].float() for plane in pages)  # each [length, kv heads, dim]
    out = torch.empty_like(q)
    for i, position in enumerate(positions.tolist()):
        first = max(0, position + 1 - window) if window else 0
        seen = slice(first, position + 1)
        for head in range(num_heads):
            kv_head = head * kv_heads // num_heads
            scores = keys[seen, kv_head] @ q[i, head] * scale
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

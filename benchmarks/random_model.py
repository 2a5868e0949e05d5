"""A model of random weights in the CPU library's form, at any shape: what its step is timed and tested with."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernels.cpu.library import (
    ABI,
    ACTIVATIONS,
    KV_KINDS,
    PANEL,
    Floats,
    Layer,
    Library,
    Spec,
    Weight,
    address,
    array_of,
    weight,
)


@dataclass(frozen=True)
class Shape:
    """The default is SmolLM2-135M's."""

    vocab_size: int = 49152
    hidden_size: int = 576
    intermediate_size: int = 1536
    num_layers: int = 30
    num_heads: int = 9
    num_kv_heads: int = 3
    head_dim: int = 64
    max_model_len: int = 8192
    activation: str = "silu"
    bias: bool = False
    qk_norm: bool = False
    windows: tuple[int, ...] = ()
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    embedding_scale: float = 1.0
    rotary_dim: int = 0  # 0 is head_dim


HEADS = {"int4": "int8", "w4a16": "bf16", "w8a16": "bf16", "w8a8": "bf16"}  # of kinds whose head is of another
GROUP_SIZE = 64  # of w4a16 and w8a16


@dataclass
class RandomModel:
    """`dense` keeps what the packed weights stand for, by name: for tests, which compute the same another way."""

    library: Library
    shape: Shape
    kind: str
    kv: str = "bf16"
    seed: int = 0
    copies: bool = False  # every layer has the first one's numbers, in memory of its own: sooner made
    dense: dict[str, Any] = field(default_factory=dict)

    def spec(self, num_blocks: int, block_size: int = 32) -> Spec:
        s, rng = self.shape, np.random.default_rng(self.seed)
        each = [self._layer(rng, i) for i in range(1 if self.copies else s.num_layers)]
        each += [self._copy(each[0]) for _ in range(s.num_layers - len(each))]
        lm_head = self._matrix(rng, "lm_head", HEADS.get(self.kind, self.kind), s.vocab_size, s.hidden_size, bias=False)
        rotary = s.rotary_dim or s.head_dim
        angles = np.arange(s.max_model_len)[:, None] * 10000.0 ** (-np.arange(rotary // 2) * 2.0 / rotary)
        embed = to_bf16(rng.standard_normal((s.vocab_size, s.hidden_size), np.float32))
        tops: dict[str, Any] = {
            "cos": np.cos(angles).astype(np.float32),
            "sin": np.sin(angles).astype(np.float32),
            "embed": embed,
            "final_norm": _norm(rng, s.hidden_size),
        }
        self.dense.update(tops, embed=from_bf16(embed))
        spec = Spec(
            abi=ABI, vocab_size=s.vocab_size, hidden_size=s.hidden_size, intermediate_size=s.intermediate_size,
            num_layers=s.num_layers, num_heads=s.num_heads, num_kv_heads=s.num_kv_heads, head_dim=s.head_dim,
            rotary_dim=rotary, max_model_len=s.max_model_len, activation=ACTIVATIONS[s.activation],
            kv_kind=KV_KINDS[self.kv], block_size=block_size, num_blocks=num_blocks, norm_eps=1e-5,
            attention_scale=s.head_dim**-0.5, attention_softcap=s.attention_softcap, logit_softcap=s.logit_softcap,
            embedding_scale=s.embedding_scale, lm_head=lm_head, layers=array_of(each),
        )  # fmt: skip
        return spec.point(**tops)

    def _layer(self, rng: np.random.Generator, i: int) -> Layer:
        s = self.shape
        q, kv = s.num_heads * s.head_dim, s.num_kv_heads * s.head_dim
        layer = Layer(
            qkv=self._matrix(rng, f"qkv.{i}", self.kind, q + 2 * kv, s.hidden_size, s.bias),
            o=self._matrix(rng, f"o.{i}", self.kind, s.hidden_size, q, s.bias),
            gate_up=self._gate_up(rng, i),
            down=self._matrix(rng, f"down.{i}", self.kind, s.hidden_size, s.intermediate_size, s.bias),
            window=s.windows[i] if s.windows else 0,
        )
        norms: dict[str, Any] = {"attn_norm": _norm(rng, s.hidden_size), "mlp_norm": _norm(rng, s.hidden_size)}
        if s.qk_norm:
            norms |= {"q_norm": _norm(rng, s.head_dim), "k_norm": _norm(rng, s.head_dim)}
        self.dense.update({f"{name}.{i}": values for name, values in norms.items()})
        return layer.point(**norms)

    def _copy(self, layer: Layer) -> Layer:
        copy = Layer.from_buffer_copy(layer).keep(layer)
        for name in ("qkv", "o", "gate_up", "down"):
            of = getattr(copy, name)
            size = self.library.packed_bytes(self.kind, of.n, of.k, of.group)
            data = aligned(size)
            ctypes.memmove(address(data), of.data, size)
            of.data = address(data)
            copy.keep(data)
        return copy

    def _gate_up(self, rng: np.random.Generator, i: int) -> Weight:
        """Gate and up, each padded to whole panels, their panels in turn."""
        s = self.shape
        wide = -(-s.intermediate_size // PANEL) * PANEL
        values = np.zeros((2, wide, s.hidden_size), np.float32)
        values[:, : s.intermediate_size] = _random(rng, (2, s.intermediate_size, s.hidden_size))
        turns = values.reshape(2, -1, PANEL, s.hidden_size).swapaxes(0, 1).reshape(2 * wide, s.hidden_size)
        bias = np.zeros((2, wide), np.float32)
        if s.bias:
            bias[:, : s.intermediate_size] = rng.standard_normal((2, s.intermediate_size), np.float32)
        turned = bias.reshape(2, -1, PANEL).swapaxes(0, 1).reshape(-1).copy()
        return self._packed(rng, f"gate_up.{i}", self.kind, turns, turned if s.bias else None)

    def _matrix(self, rng: np.random.Generator, name: str, kind: str, n: int, k: int, bias: bool) -> Weight:
        padded = np.zeros(-(-n // PANEL) * PANEL, np.float32)
        padded[:n] = rng.standard_normal(n, np.float32)
        return self._packed(rng, name, kind, _random(rng, (n, k)), padded if bias else None)

    def _packed(self, rng: np.random.Generator, name: str, kind: str, values: Floats, bias: Floats | None) -> Weight:
        n, k = values.shape
        group = min(GROUP_SIZE, -(-k // 32) * 32) if kind in ("w4a16", "w8a16") else 0
        out = aligned(self.library.packed_bytes(kind, n, k, group))
        scale = None
        if kind == "bf16":
            bits = to_bf16(values)
            self.library.pack_bf16(bits, out)
            values = from_bf16(bits)
        elif kind == "int8":
            scale = np.zeros(-(-n // PANEL) * PANEL, np.float32)
            self.library.pack_int8(values, out, scale)
            turned = rotated(values)
            safe = np.where(scale[:n] > 0, scale[:n], 1)[:, None]
            values = rotated(np.rint(turned / sizes_of_blocks(k) / safe) * safe)[:, :k]
        elif kind == "w8a8":
            scale = np.zeros(-(-n // PANEL) * PANEL, np.float32)
            scale[:n] = np.abs(values).max(1) / 127
            codes = np.rint(values / np.where(scale[:n] > 0, scale[:n], 1)[:, None])
            self.library.pack_w8a8((codes + 128).astype(np.uint8), out)
            values = codes * scale[:n, None]
        elif group:
            top, groups = 16 if kind == "w4a16" else 256, -(-k // group)
            codes, zeros = rng.integers(0, top, (n, k), np.uint8), rng.integers(0, top, (n, groups), np.uint8)
            scales = (rng.uniform(0.5, 1.5, (n, groups)) * k**-0.5 / (0.3 * top)).astype(np.float32)
            scales[~values.any(1)] = 0  # the padding of gate and up
            self.library.pack_affine(kind, codes, scales, zeros, group, out)
            at = np.arange(k) // group
            values = (codes.astype(np.float32) - zeros[:, at]) * scales[:, at]
        else:
            groups = -(-k // 32)
            codes = rng.integers(0, 16, (n, k), np.uint8)
            d = (rng.uniform(0.5, 1.5, (n, groups)) * k**-0.5 / 4.6).astype(np.float16)
            m = (-7.5 * d).astype(np.float16)
            empty = ~values.any(1)  # the padding of gate and up
            d[empty], m[empty] = 0, 0
            self.library.pack_int4(codes, d.view(np.uint16), m.view(np.uint16), out)
            wide, low = (np.repeat(part.astype(np.float32), 32, 1)[:, :k] for part in (d, m))
            values = wide * codes + low
        self.dense[name] = values
        if bias is not None:
            self.dense[f"{name}.bias"] = bias[:n]
        return weight(kind, n, k, out, scale, bias, group)


def aligned(size: int) -> NDArray[np.uint8]:
    """64-byte aligned."""
    raw = np.empty(size + 64, np.uint8)
    start = -raw.__array_interface__["data"][0] % 64
    return raw[start : start + size]


def to_bf16(values: Floats) -> NDArray[np.uint16]:
    """To the nearest, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: NDArray[np.uint16]) -> Floats:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rotated(x: Floats) -> Floats:
    """x [..., k] · H: Sylvester's Hadamard matrix, block by block of k rounded up to 32 (abi.h, PW_INT8)."""
    sizes = sizes_of_blocks(x.shape[-1])
    wide = np.zeros((*x.shape[:-1], len(sizes)), np.float32)
    wide[..., : x.shape[-1]] = x
    matrix = np.array([[(-1.0) ** (i & j).bit_count() for j in range(64)] for i in range(64)], np.float32)
    for start in range(0, len(sizes), 64):
        size = int(sizes[start])
        wide[..., start : start + size] = wide[..., start : start + size] @ matrix[:size, :size]
    return wide


def sizes_of_blocks(k: int) -> Floats:
    """[k rounded up to 32]: 64, but 32 in a last block of 32."""
    wide = -(-k // 32) * 32
    return np.where(np.arange(wide) < wide // 64 * 64, 64, 32).astype(np.float32)


def _random(rng: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    return rng.standard_normal(shape, np.float32) * np.float32(shape[-1] ** -0.5)


def _norm(rng: np.random.Generator, size: int) -> Floats:
    return rng.uniform(0.5, 1.5, size).astype(np.float32)

"""Sequences on paged KV memory for the tests of kv.inc and attention.inc, through csrc/test_attention.cpp."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import byref, c_float, c_int, c_int32, c_int64, c_void_p
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.cpu import library
from kernels.cpu.library import Batch, Layer, Struct
from kernels.reference import paged_attention, rms_norm, rotate

Floats = NDArray[np.float32]

NORM_EPS = 1e-5


class Shape(Struct):
    """AttentionShape of csrc/isa.h."""

    _fields_ = (
        ("num_heads", c_int32), ("num_kv_heads", c_int32), ("head_dim", c_int32), ("rotary_dim", c_int32),
        ("kv_kind", c_int32), ("block_size", c_int32), ("num_blocks", c_int32),
        ("norm_eps", c_float), ("scale", c_float), ("softcap", c_float), ("cos", c_void_p), ("sin", c_void_p),
    )  # fmt: skip
    _arrays_: ClassVar = {"cos": np.float32, "sin": np.float32}


@dataclass
class Attention:
    """One layer's attention, of random weights where it has any, with room for positions below `max_len`."""

    heads: int = 3
    kv_heads: int = 1
    dim: int = 64
    kv: str = "bf16"
    block_size: int = 32
    rotary_dim: int = -1  # −1: all
    window: int = 0
    softcap: float = 0.0
    qk_norm: bool = False
    max_len: int = 1024
    frequencies: Tensor = field(init=False)
    shape: Shape = field(init=False)
    layer: Layer = field(init=False)

    def __post_init__(self) -> None:
        rotary = self.dim if self.rotary_dim < 0 else self.rotary_dim
        self.frequencies = 10000.0 ** -(torch.arange(0, rotary, 2, dtype=torch.float64) / max(rotary, 1))
        angles = torch.arange(self.max_len, dtype=torch.float64)[:, None] * self.frequencies
        self.shape = Shape(
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.dim,
            rotary_dim=rotary,
            kv_kind=library.KV_KINDS[self.kv],
            block_size=self.block_size,
            norm_eps=NORM_EPS,
            scale=self.dim**-0.5,
            softcap=self.softcap,
        ).point(cos=angles.cos().float().numpy(), sin=angles.sin().float().numpy())
        self.layer = Layer(window=self.window)
        if self.qk_norm:
            generator = torch.Generator().manual_seed(1)
            norms = torch.rand(2, self.dim, generator=generator) + 0.5
            self.layer.point(q_norm=norms[0].numpy(), k_norm=norms[1].numpy())
            self.norms = norms

    @property
    def width(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.dim

    def tokens(self, count: int, seed: int = 0) -> Floats:
        """What a qkv projection might say of a sequence's tokens [count, width]."""
        return np.random.default_rng(seed).standard_normal((count, self.width), np.float32)

    def parts(self, qkv: Floats) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [T, heads, dim] of tokens at positions 0 …, after norm and rope, in float32."""
        x = torch.from_numpy(qkv).unflatten(1, (-1, self.dim))
        q, k, v = x.split([self.heads, self.kv_heads, self.kv_heads], 1)
        if self.qk_norm:
            q, k = rms_norm(q, self.norms[0], NORM_EPS), rms_norm(k, self.norms[1], NORM_EPS)
        positions = torch.arange(len(qkv)).double()
        return (
            rotate(q.double(), positions, self.frequencies).float(),
            rotate(k.double(), positions, self.frequencies).float(),
            v,
        )

    def expected(self, qkv: Floats, *, rounded: bool = True) -> Floats:
        """Attention of a whole sequence by the oracle; `rounded`: on q, k and v as the KV kind keeps them."""
        q, k, v = self.parts(qkv)
        if rounded and self.kv == "int8":  # q and k turned alike: their products are the same
            q, k, v = quantized(spread(q)), quantized(spread(k)), quantized(v)
        elif rounded:
            q, k, v = halved(q), halved(k), halved(v)
        pages = torch.stack([k, v]).transpose(1, 2)[:, None]  # one block of the whole
        positions = torch.arange(len(qkv))
        out = paged_attention(
            q, pages, torch.zeros(1, dtype=torch.long), positions, self.dim**-0.5, self.window, self.softcap
        )
        return out.flatten(1).numpy()


def halved(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def quantized(x: Tensor) -> Tensor:
    """int8 and back, a scale for each vector."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    return torch.round(x / scale) * scale


def spread(x: Tensor) -> Tensor:
    """Times Hadamard's matrix, in blocks of 64, then of the greatest power of two that is left; of length as before."""
    blocks, at = [], 0
    while at < x.shape[-1]:
        size = min(64, 1 << (x.shape[-1] - at).bit_length() - 1)
        matrix = torch.ones(1, 1)
        while len(matrix) < size:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        blocks.append(x[..., at : at + size] @ matrix / size**0.5)
        at += size
    return torch.cat(blocks, -1)


@dataclass
class Chunk:
    """Tokens start … end − 1 of a sequence, whose qkv [n, width] are all known, on its blocks."""

    qkv: Floats
    table: Sequence[int]
    start: int
    end: int


class Memory:
    """KV pages of one layer, of garbage: every byte 0xFF is a NaN in bfloat16 and in float32."""

    def __init__(self, cdll: ctypes.CDLL, isa: str, attention: Attention, num_blocks: int = 64) -> None:
        self.cdll, self.isa, self.attention = cdll, isa.encode(), attention
        cdll.pw_test_page_bytes.restype = c_int64
        page = cdll.pw_test_page_bytes(self.isa, byref(attention.shape))
        self.bytes = page * attention.kv_heads * attention.block_size // library.PAGE * num_blocks
        memory = np.full(self.bytes + 64, 0xFF, np.uint8)
        skip = -library.address(memory) % 64
        self.pages = memory[skip : skip + self.bytes]

    def write(self, chunks: Sequence[Chunk]) -> Floats:
        """Writes the chunks' keys and values; answers with their qkv [T, width], queries ready to attend."""
        qkv = np.concatenate([chunk.qkv[chunk.start : chunk.end] for chunk in chunks])
        positions, slots = self._places(chunks)
        self.cdll.pw_test_write_kv(
            self.isa, byref(self.attention.shape), byref(self.attention.layer), _at(qkv), c_int64(qkv.shape[1]),
            _at(positions), _at(slots), c_int(len(positions)), _at(self.pages),
        )  # fmt: skip
        return qkv

    def attend(self, chunks: Sequence[Chunk], qkv: Floats, *, threads: int = 1, layers: int = 1) -> Floats:
        """Attention of the chunks' queries [T, heads · dim], all in one step."""
        positions, slots = self._places(chunks)
        tables = np.full((len(chunks), max(len(chunk.table) for chunk in chunks)), 0, np.int64)
        for row, chunk in zip(tables, chunks, strict=True):
            row[: len(chunk.table)] = chunk.table
        batch = Batch(num_rows=len(chunks), num_tokens=len(qkv), table_stride=tables.shape[1]).point(
            cu=np.cumsum([0, *(chunk.end - chunk.start for chunk in chunks)], dtype=np.int64),
            context_lens=np.array([chunk.end for chunk in chunks], np.int64),
            positions=positions,
            slot_mapping=slots,
            block_tables=tables,
        )
        out = np.full((len(qkv), self.attention.heads * self.attention.dim), np.nan, np.float32)
        self.cdll.pw_test_attend(
            self.isa, c_int(threads), byref(self.attention.shape), c_int(self.attention.window), byref(batch),
            _at(qkv), c_int64(qkv.shape[1]), _at(self.pages), c_int(layers), c_int64(0), _at(out),
        )  # fmt: skip
        return out

    def run(self, chunks: Sequence[Chunk], *, threads: int = 1) -> Floats:
        return self.attend(chunks, self.write(chunks), threads=threads)

    def _places(self, chunks: Sequence[Chunk]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        size = self.attention.block_size
        positions = np.concatenate([np.arange(chunk.start, chunk.end, dtype=np.int64) for chunk in chunks])
        owners = np.repeat(np.arange(len(chunks)), [chunk.end - chunk.start for chunk in chunks])
        blocks = [chunks[int(owner)].table[int(at) // size] for owner, at in zip(owners, positions, strict=True)]
        return positions, np.array(blocks, np.int64) * size + positions % size


def in_chunks(memory: Memory, qkv: Floats, table: Sequence[int], size: int, threads: int = 1) -> Floats:
    """A whole sequence, `size` tokens a step."""
    starts = range(0, len(qkv), size)
    return np.concatenate(
        [memory.run([Chunk(qkv, table, start, min(start + size, len(qkv)))], threads=threads) for start in starts]
    )


def blocks_for(attention: Attention, length: int, first: int = 1) -> list[int]:
    return list(range(first, first - (-length // attention.block_size)))


def _at(array: NDArray[Any]) -> c_void_p:
    assert array.flags.c_contiguous
    return c_void_p(library.address(array))

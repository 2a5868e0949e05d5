"""Quantized modules as the formats' documents describe them, packed bit by bit: of ours only the types are used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from worker_svc.models.raw_tensor import RawTensor
from worker_svc.quant.formats.module import Module

TYPES = {"int32": "I32", "int8": "I8", "int64": "I64", "float16": "F16", "float32": "F32", "uint8": "F8_E4M3"}
NAME = "model.layers.0.mlp.up_proj"


@dataclass(frozen=True)
class Matrix:
    """W = (codes − zeros[:, groups]) · scales[:, groups]."""

    codes: NDArray[np.int64]  # [N, K]
    zeros: NDArray[np.int64]  # [N, G]
    scales: NDArray[np.float16]  # [N, G]
    groups: NDArray[np.int64]  # [K]
    bits: int

    def weights(self) -> NDArray[np.float64]:
        return (self.codes - self.zeros[:, self.groups]) * self.scales.astype(np.float64)[:, self.groups]


def random_matrix(
    seed: int, bits: int, rows: int, columns: int, size: int, *, symmetric: bool = False, permuted: bool = False
) -> Matrix:
    """`size` 0: all columns are one group. Zero points are of all values, both ends among them."""
    rng = np.random.default_rng(seed)
    count = -(-columns // size) if size else 1
    top = 1 << bits
    zeros = rng.integers(0, top, (rows, count))
    zeros[0], zeros[-1] = 0, top - 1
    if symmetric:
        zeros[:] = top // 2
    groups = np.arange(columns) // (size or columns)
    if permuted:
        groups = rng.permutation(groups)
    scales = (rng.random((rows, count)) + 0.5).astype(np.float16)
    return Matrix(rng.integers(0, top, (rows, columns)), zeros, scales, groups, bits)


def words(codes: NDArray[Any], bits: int) -> NDArray[np.int32]:
    """[R, count] → [R, W]: each row one long number, lowest code first, cut into words of 32 bits."""
    count = -(-codes.shape[1] * bits // 32)
    packed = [sum(int(code) << (bits * i) for i, code in enumerate(row)) for row in codes]
    return np.array([[n >> (32 * w) & 0xFFFFFFFF for w in range(count)] for n in packed], np.uint32).view(np.int32)


def words_less_one(codes: NDArray[Any], bits: int) -> NDArray[np.int32]:
    """The same of codes from each of which 1 is taken, by whole words: what one of 0 lacks the next one lends. Of three
    bits each is taken by itself.
    """
    if bits == 3:
        return words((codes - 1) % 8, bits)
    count = -(-codes.shape[1] * bits // 32)
    ones = sum(1 << (bits * i) for i in range(count * 32 // bits + 1))
    less = [int(n) & 0xFFFFFFFF for n in words(codes, bits).reshape(-1).tolist()]
    taken = [(n - (ones >> (32 * (i % count)) & 0xFFFFFFFF)) & 0xFFFFFFFF for i, n in enumerate(less)]
    return np.array(taken, np.uint32).view(np.int32).reshape(len(codes), count)


def module(**tensors: NDArray[Any]) -> Module:
    return Module(NAME, {name: raw(f"{NAME}.{name}", array) for name, array in tensors.items()})


def raw(name: str, array: NDArray[Any]) -> RawTensor:
    return RawTensor(name, TYPES[str(array.dtype)], array.shape, array)


def gptq(matrix: Matrix, *, v2: bool = False, g_idx: bool = False) -> dict[str, NDArray[Any]]:
    pack = words if v2 else words_less_one
    made: dict[str, NDArray[Any]] = {
        "qweight": np.ascontiguousarray(words(matrix.codes, matrix.bits).T),
        "qzeros": pack(matrix.zeros.T, matrix.bits),
        "scales": np.ascontiguousarray(matrix.scales.T),
    }
    return made | ({"g_idx": matrix.groups.astype(np.int32)} if g_idx else {})


def awq_gemm(matrix: Matrix) -> dict[str, NDArray[Any]]:
    order = np.array([0, 2, 4, 6, 1, 3, 5, 7])  # which column each nibble is of, lowest first

    def placed(codes: NDArray[Any]) -> NDArray[np.int32]:
        return words(codes.reshape(len(codes), -1, 8)[:, :, order].reshape(len(codes), -1), 4)

    return {
        "qweight": placed(matrix.codes.T),
        "qzeros": placed(matrix.zeros.T),
        "scales": np.ascontiguousarray(matrix.scales.T),
    }


def awq_gemv(matrix: Matrix) -> dict[str, NDArray[Any]]:
    count = matrix.zeros.shape[1]
    width = -(-count // 8)
    scales = np.zeros((len(matrix.codes), 8 * width), np.float16)
    scales[:, :count] = matrix.scales
    return {"qweight": words(matrix.codes, 4), "qzeros": words(matrix.zeros, 4), "scales": scales}


def pack_quantized(matrix: Matrix, *, symmetric: bool = False, g_idx: bool = False) -> dict[str, NDArray[Any]]:
    made: dict[str, NDArray[Any]] = {
        "weight_packed": words(matrix.codes, matrix.bits),
        "weight_scale": matrix.scales,
        "weight_shape": np.array(matrix.codes.shape, np.int64),
    }
    if not symmetric:
        made["weight_zero_point"] = np.ascontiguousarray(words(matrix.zeros.T, matrix.bits).T)
    return made | ({"weight_g_idx": matrix.groups.astype(np.int32)} if g_idx else {})

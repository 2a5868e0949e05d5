"""Float weights quantized as they are loaded: `--quantization` of a float checkpoint, in the form that files have.

int8   symmetric, a scale a row; activations stay as they are
int4   zero points, groups of 32; activations stay as they are
fp8    e4m3, a scale a row; activations e4m3 with a scale a token, where the device multiplies such numbers
"""

from __future__ import annotations

from typing import Final, Literal

import numpy as np

from worker_svc.models.raw_tensor import Tensor
from worker_svc.quant.form import E4M3, Activations, Codes, Floats, QuantizedTensor, Scheme, quantized

Mode = Literal["int8", "int4", "fp8"]
MODES: Final = ("int8", "int4", "fp8")
GROUP: Final = 32
TINY: Final = np.float32(2.0**-126)
GREATEST: Final = np.float32(448)  # of e4m3


def on_load(tensor: Tensor, mode: str) -> QuantizedTensor:
    """A matrix [N, K]. Raises CheckpointError where a weight is no finite number."""
    weights = tensor.finite()
    if mode == "int4":
        scheme, codes, scales, zeros = _int4(weights)
    elif mode == "int8":
        scales = np.maximum(np.abs(weights).max(1, keepdims=True) / np.float32(127), TINY)
        codes = (np.rint(weights / scales) + 128).astype(np.uint8)
        scheme, zeros = Scheme("int", 8, 0, symmetric=True), np.full(scales.shape, 128, np.uint8)
    else:
        scales = np.maximum(np.abs(weights).max(1, keepdims=True) / GREATEST, TINY)
        codes, zeros = to_e4m3(weights / scales), None
        scheme = Scheme("e4m3", 8, 0, symmetric=True, activations=Activations("e4m3", "token"))
    return quantized(tensor.name, scheme, lambda rows: codes[rows], scales, zeros, weights.shape[1])


def to_e4m3(values: Floats) -> Codes:
    """To the nearest of the 253 numbers, ties to even; beyond the greatest, that."""
    near = np.searchsorted(_BORDERS, np.abs(values), side="left").astype(np.uint8)
    # On a border the even code is the nearest: the one below where that is even.
    on = np.abs(values) == _BORDERS[np.minimum(near, len(_BORDERS) - 1)]
    near += on & (near % 2 == 1)
    return near | np.signbit(values).astype(np.uint8) << np.uint8(7)


def _int4(weights: Floats) -> tuple[Scheme, Codes, Floats, Codes]:
    """Groups from their least to their greatest weight, 0 among them: then it is a code."""
    n, k = weights.shape
    groups = -(-k // GROUP)
    padded = np.pad(weights, ((0, 0), (0, groups * GROUP - k)), mode="edge").reshape(n, groups, GROUP)
    low, high = np.minimum(padded.min(2), 0), np.maximum(padded.max(2), 0)
    scales = np.maximum((high - low) / np.float32(15), TINY)
    zeros = np.rint(-low / scales)
    codes = np.clip(np.rint(padded / scales[:, :, None]) + zeros[:, :, None], 0, 15).astype(np.uint8)
    codes = np.ascontiguousarray(codes.reshape(n, -1)[:, :k])
    return Scheme("int", 4, GROUP, symmetric=False), codes, scales, zeros.astype(np.uint8)


_BORDERS: Final = (E4M3[:126] + E4M3[1:127]) / 2  # between one positive number and the next

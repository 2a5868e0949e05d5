"""An adapter as the C library reads it: bfloat16, sixteen columns together, pairs of k side by side."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kernels.cpu import library
from kernels.cpu.library import LORA_RANKS, LORAS, PANEL
from worker_svc.adapters.peft import Lora, LoraAdapter
from worker_svc.models.raw_tensor import to_bfloat16


def loras(adapter: LoraAdapter) -> list[library.Lora]:
    """One for each of LORAS in each layer."""
    return [_packed(layer.get(role)) for layer in adapter.layers for role in LORAS]


def _packed(lora: Lora | None) -> library.Lora:
    if lora is None:
        return library.Lora()
    rank = _up(len(lora.a), LORA_RANKS)
    a, b = _columns(lora.a, rank, 32), _columns(lora.b, _up(len(lora.b), PANEL), LORA_RANKS)
    return library.Lora(scale=lora.scale, rank=rank).point(a=a, b=b)


def _columns(weight: NDArray[np.float32], n: int, multiple: int) -> NDArray[np.uint16]:
    """[N, K] → [n / 16, k / 2, 16, 2]: zeros beyond N and K."""
    more = (0, n - weight.shape[0]), (0, -weight.shape[1] % multiple)
    bits = np.pad(to_bfloat16(weight), more)
    return np.ascontiguousarray(bits.reshape(n // 16, 16, -1, 2).swapaxes(1, 2))


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple

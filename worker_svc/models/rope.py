"""Rotary frequencies as configs describe them. numpy only.

Which frequencies a model turns by is settled once, at load, from the longest context that is served: a key in the cache
has been turned already, so "dynamic" and "longrope", which transformers re-decides per sequence length, cannot follow
each sequence without forgetting its KV (vLLM settles it the same way).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


@dataclass(frozen=True)
class Rope:
    """Fields beyond `dim` and `theta` have a meaning only for the kinds named beside them."""

    dim: int  # how many of the head's leading dimensions turn
    theta: float
    kind: str = "default"  # one of KINDS
    factor: float = 1.0  # linear, dynamic, llama3, yarn
    original_max_len: int = 0  # the context trained on: dynamic, llama3, yarn, longrope
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn
    attention_factor: float = 1.0  # yarn, longrope: cos and sin are scaled by it
    short_factor: tuple[float, ...] = ()  # longrope [dim / 2]
    long_factor: tuple[float, ...] = ()  # longrope [dim / 2]
    divisors: tuple[float, ...] = ()  # any kind [dim / 2]: from a GGUF's rope_freqs tensor

    def tables(self, max_model_len: int) -> tuple[Floats, Floats]:
        """cos and sin for every position below `max_model_len`, each [max_model_len, dim / 2]."""
        angles = np.arange(max_model_len, dtype=np.float32)[:, None] * self.frequencies(max_model_len)[None, :]
        scale = np.float32(self.attention_factor)
        return np.cos(angles) * scale, np.sin(angles) * scale

    def frequencies(self, max_model_len: int) -> Floats:
        """Radians a position [dim / 2], in the float32 arithmetic of transformers' modeling_rope_utils."""
        match self.kind:
            case "linear":
                frequencies = np.divide(self._plain(), np.float32(self.factor))
            case "dynamic":
                longest = max(max_model_len, self.original_max_len)
                stretch = self.factor * longest / self.original_max_len - (self.factor - 1)
                frequencies = self._plain(self.theta * math.pow(stretch, self.dim / (self.dim - 2)))
            case "llama3":
                frequencies = self._llama3()
            case "yarn":
                frequencies = self._yarn()
            case "longrope":
                factors = self.long_factor if max_model_len > self.original_max_len else self.short_factor
                frequencies = np.divide(self._plain(), np.array(factors, np.float32))
            case _:
                frequencies = self._plain()
        if self.divisors:
            frequencies = np.divide(frequencies, np.array(self.divisors, np.float32))
        return frequencies

    def _plain(self, theta: float | None = None) -> Floats:
        exponents = np.arange(0, self.dim, 2, dtype=np.float32) / np.float32(self.dim)
        plain: Floats = np.float32(1) / np.power(np.float32(theta or self.theta), exponents)
        return plain

    def _llama3(self) -> Floats:
        """Long waves are stretched by `factor`, short ones stay, those between are blended."""
        plain = self._plain()
        waves = np.float32(2 * math.pi) / plain
        stretched = plain / np.float32(self.factor)
        share = (self.original_max_len / waves - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        blended = (1 - share) * stretched + share * plain
        between = np.where(waves > self.original_max_len / self.low_freq_factor, stretched, blended)
        chosen: Floats = np.where(waves < self.original_max_len / self.high_freq_factor, plain, between)
        return chosen.astype(np.float32)

    def _yarn(self) -> Floats:
        """A ramp over the dimensions, from those that turn often (kept) to those that turn rarely (stretched)."""
        plain = self._plain()
        low, high = (self._dimension_turning(turns) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        if low == high:
            high += 0.001
        ramp = np.clip((np.arange(self.dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
        blended: Floats = plain / np.float32(self.factor) * ramp + plain * (1 - ramp)
        return blended.astype(np.float32)

    def _dimension_turning(self, turns: float) -> float:
        """The dimension that turns so many times over the context trained on."""
        return self.dim * math.log(self.original_max_len / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

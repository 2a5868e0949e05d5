"""The embedding of a run of the vocabulary."""

from __future__ import annotations

from torch import Tensor


class Embedding:
    def __init__(self, weight: Tensor, first: int) -> None:
        """`weight` [n, hidden]: of the tokens first … first + n − 1."""
        self.weight, self._first = weight, first

    def __call__(self, tokens: Tensor) -> Tensor:
        """[T] → [T, hidden] float32; zeros for tokens that are not in the run."""
        local = tokens - self._first
        elsewhere = (local < 0) | (local >= len(self.weight))
        return self.weight[local.masked_fill(elsewhere, 0)].float().masked_fill_(elsewhere[:, None], 0.0)

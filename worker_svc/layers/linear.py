"""y = x Wᵀ + b on the CPU, in row tiles of a few fixed sizes.

A GEMM library chooses its kernel by the number of rows, and another kernel may add in another order: a token's bits
would depend on what else is in the batch. So rows are padded to tiles of TILES only, and `probe` finds out at load, on
the shapes at hand, whether all those tiles give the same bits at every row. Packed weights (oneDNN's own layout) save
packing them anew each step, which at a few rows costs more than the product.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

TILES = (4, 8, 16, 32, 64, 128)  # every size is a shape that oneDNN compiles once, so there are few


def padded_rows(num_rows: int) -> int:
    """The rows of the tiles that hold `num_rows`: largest tiles first, the rest in the smallest that takes it."""
    whole, rest = divmod(num_rows, TILES[-1])
    return whole * TILES[-1] + (next(tile for tile in TILES if tile >= rest) if rest else 0)


class Linear:
    """Weight [N, K] and bias [N] of one dtype, float32 or bfloat16."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self.dtype, self.bias = weight.dtype, bias
        self._packed = _can_pack(weight.dtype)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, TILES[-1]) if self._packed else weight

    def __call__(self, x: Tensor) -> Tensor:
        """[T, K] → [T, N], where T = padded_rows(T)."""
        rows = x.shape[0]
        if rows <= TILES[-1]:
            return self._tile(x)
        return torch.cat([self._tile(part) for part in x.split(TILES[-1])])

    def _tile(self, x: Tensor) -> Tensor:
        if self._packed:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self.bias, "none", [], "")
            return y
        return functional.linear(x, self._weight, self.bias)

    def probe(self) -> bool:
        """Whether a row's bits depend neither on its tile's size, nor on its place there, nor on its neighbours.

        Compiles this shape's kernels on the way.
        """
        generator = torch.Generator().manual_seed(self.in_features)
        x = torch.randn(2 * TILES[-1], self.in_features, generator=generator).to(self.dtype)
        expected = self(x)
        return all(
            torch.equal(self(x[start : start + rows]), expected[start : start + rows]) for start, rows in _cuts()
        )


def _cuts() -> Iterator[tuple[int, int]]:
    """(start, rows) of slices that put rows into every tile size, at places other than in one whole run."""
    for tile in TILES:
        yield 0, tile
        yield TILES[-1] - 3, tile


def _can_pack(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())

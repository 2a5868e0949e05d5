"""Run in a process of its own, where Triton compiles: what kernels.ahead says of kernels that are not as they should.

Prints, as JSON, one result for each of `CASES` and target.
"""

from __future__ import annotations

import json
from dataclasses import asdict

import triton
import triton.language as tl

from kernels.ahead import TARGETS, Ahead, Usage, compiled


@triton.jit
def shares_kernel(x, y, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Every value is wanted again when all have been seen."""
    at = tl.arange(0, BLOCK)
    values = tl.load(x + at)
    tl.store(y + at, values / tl.sum(values, 0))


@triton.jit
def broken_kernel(x, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(x + tl.arange(0, BLOCK), tl.no_such_function(1))


@triton.jit
def turn_kernel(x, y, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """A transposition, through shared memory."""
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(y + at, tl.trans(tl.load(x + at)))


POINTERS = {"x": "*fp32", "y": "*fp32"}
CASES = {
    "small": Ahead(shares_kernel, "small", POINTERS, {"BLOCK": 64}),
    "crowded": Ahead(shares_kernel, "crowded", POINTERS, {"BLOCK": 1 << 14}, num_warps=1),
    "broken": Ahead(broken_kernel, "broken", {"x": "*fp32"}, {"BLOCK": 64}),
    "large": Ahead(turn_kernel, "large", POINTERS, {"SIZE": 256}, num_warps=16),
    "unnamed": Ahead(shares_kernel, "unnamed", {"x": "*fp32"}, {"BLOCK": 64}),
    "twice": Ahead(shares_kernel, "twice", {**POINTERS, "BLOCK": "i32"}, {"BLOCK": 64}),
}

if __name__ == "__main__":
    results = [compiled(ahead, target) for ahead in CASES.values() for target in TARGETS]
    print(json.dumps([asdict(one) | {"fine": isinstance(one, Usage)} for one in results]))

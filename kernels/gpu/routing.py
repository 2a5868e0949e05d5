"""Which experts a token takes, and the (token, choice) pairs sorted by expert, without a word to the host.

    route        logits [T, E] ─► chosen [T, k], weights [T, k]
    sort_pairs   chosen ─► counts of each chunk of pairs ─► where each expert begins, row tiles ─► order of the pairs

Pair p is token p // k's choice p % k. A tile is up to `rows` pairs of one expert that lie behind each other in `order`:
there are at most as many as T and k alone decide, so that a graph that was captured serves any choices; those that are
not needed are empty.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ahead import Ahead
from kernels.gpu.arguments import expect

CHUNK: Final = 256  # pairs of one program
STEP: Final = 32  # of them at a time: a table [STEP, experts] in registers
MAX_EXPERTS: Final = 512
WARPS: Final = 4


@triton.jit
def route_kernel(
    logits, chosen, weights, stride,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, NORMALIZED: tl.constexpr, BLOCK: tl.constexpr, CHOICES: tl.constexpr,
):  # fmt: skip
    """One token a program: softmax over all, the likeliest first, of equals the one of lower number."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    choice = tl.arange(0, CHOICES)
    left = tl.load(logits + token * stride + at, mask=at < EXPERTS, other=float("-inf"))
    highest = tl.max(left, 0)
    total = tl.sum(tl.exp(left - highest), 0)
    taken = tl.zeros([CHOICES], tl.float32)
    for j in tl.static_range(TOP_K):
        best = tl.max(left, 0)
        expert = tl.min(tl.where((left == best) & (at < EXPERTS), at, EXPERTS - 1), 0)  # NaN: some expert that exists
        tl.store(chosen + token * TOP_K + j, expert)
        taken = tl.where(choice == j, tl.exp(best - highest), taken)
        left = tl.where(at == expert, float("-inf"), left)
    if NORMALIZED:
        total = tl.sum(taken, 0)
    tl.store(weights + token * TOP_K + choice, taken / total, mask=choice < TOP_K)


@triton.jit
def count_pairs_kernel(
    chosen, counts, num_pairs,
    EXPERTS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """counts [chunks, EXPERTS]"""
    chunk = tl.program_id(0)
    expert = tl.arange(0, BLOCK)
    count = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, CHUNK, STEP):
        pair = chunk * CHUNK + begin + tl.arange(0, STEP)
        theirs = tl.load(chosen + pair, mask=pair < num_pairs, other=-1)
        count += tl.sum((theirs[:, None] == expert[None, :]).to(tl.int32), 0)
    tl.store(counts + chunk * EXPERTS + expert, count, mask=expert < EXPERTS)


@triton.jit
def plan_tiles_kernel(
    counts, starts, tiles, num_chunks, num_tiles, ROWS,
    EXPERTS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One program. counts become the pairs of an expert in the chunks before; starts [EXPERTS] where each begins in
    `order`; tiles [3, num_tiles]: expert, first and end in `order`.
    """
    expert = tl.arange(0, BLOCK)
    step = tl.arange(0, STEP)
    total = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, num_chunks, STEP):
        inside = ((begin + step) < num_chunks)[:, None] & (expert < EXPERTS)[None, :]
        at = counts + (begin + step)[:, None] * EXPERTS + expert[None, :]
        here = tl.load(at, mask=inside, other=0)
        tl.store(at, tl.cumsum(here, 0) - here + total[None, :], mask=inside)
        total += tl.sum(here, 0)
    first = tl.cumsum(total, 0) - total
    tl.store(starts + expert, first, mask=expert < EXPERTS)
    per = tl.cdiv(total, ROWS)
    last = tl.cumsum(per, 0)  # tiles of the experts up to this one
    for begin in range(0, num_tiles, STEP):
        tile = begin + step
        owner = tl.sum(((last[None, :] <= tile[:, None]) & (expert < EXPERTS)[None, :]).to(tl.int32), 1)
        mine = owner[:, None] == expert[None, :]
        begins = first[None, :] + (tile[:, None] - (last - per)[None, :]) * ROWS
        ends = tl.minimum(begins + ROWS, (first + total)[None, :])
        inside = tile < num_tiles
        tl.store(tiles + tile, tl.minimum(owner, EXPERTS - 1), mask=inside)
        tl.store(tiles + num_tiles + tile, tl.sum(tl.where(mine, begins, 0), 1), mask=inside)
        tl.store(tiles + 2 * num_tiles + tile, tl.sum(tl.where(mine, ends, 0), 1), mask=inside)


@triton.jit
def order_pairs_kernel(
    chosen, counts, starts, order, num_pairs,
    EXPERTS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    expert = tl.arange(0, BLOCK)
    real = expert < EXPERTS
    next_one = tl.load(starts + expert, mask=real, other=0)
    next_one += tl.load(counts + chunk * EXPERTS + expert, mask=real, other=0)
    for begin in range(0, CHUNK, STEP):
        pair = chunk * CHUNK + begin + tl.arange(0, STEP)
        theirs = tl.load(chosen + pair, mask=pair < num_pairs, other=-1)
        mine = (theirs[:, None] == expert[None, :]).to(tl.int32)
        before = tl.cumsum(mine, 0) - mine + next_one[None, :]
        tl.store(order + tl.sum(mine * before, 1), pair, mask=pair < num_pairs)
        next_one += tl.sum(mine, 0)


@dataclass(frozen=True)
class Pairs:
    """`order` [T · k]: pairs by expert, of one expert in their own order; tiles [3, n]: expert, first and end."""

    order: Tensor
    tiles: Tensor
    rows: int


def route(logits: Tensor, top_k: int, *, normalized: bool) -> tuple[Tensor, Tensor]:
    """logits [T, E] float32 → chosen [T, top_k] int32, weights [T, top_k] float32.

    Weights are a softmax over all experts, with `normalized` over the chosen ones. Raises ValueError.
    """
    expect("logits", logits, (None, None), (torch.float32,), logits)
    tokens, experts = logits.shape
    if not 0 < top_k <= experts <= MAX_EXPERTS:
        raise ValueError(
            f"top_k {top_k} of {experts} experts: at least 1, at most all, and those at most {MAX_EXPERTS}"
        )
    chosen = torch.empty(tokens, top_k, dtype=torch.int32, device=logits.device)
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device)
    if tokens:
        route_kernel[(tokens,)](
            logits, chosen, weights, logits.stride(0), EXPERTS=experts, TOP_K=top_k, NORMALIZED=normalized,
            BLOCK=triton.next_power_of_2(experts), CHOICES=triton.next_power_of_2(top_k), num_warps=1,
        )  # fmt: skip
    return chosen, weights


def sort_pairs(chosen: Tensor, num_experts: int, rows: int) -> Pairs:
    """chosen [T, k] int32, each below `num_experts`: nobody looks; tiles of up to `rows` pairs. Raises ValueError."""
    expect("chosen", chosen, (None, None), (torch.int32,), chosen, contiguous=True)
    pairs = chosen.numel()
    num_tiles, chunks = pairs // rows + min(pairs, num_experts), triton.cdiv(pairs, CHUNK)

    def words(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=chosen.device)

    sorted_pairs = Pairs(words(pairs), words(3, num_tiles), rows)
    if pairs:
        counts, starts = words(chunks, num_experts), words(num_experts)
        sizes = {"EXPERTS": num_experts, "BLOCK": triton.next_power_of_2(num_experts), "STEP": STEP, "num_warps": WARPS}
        count_pairs_kernel[(chunks,)](chosen, counts, pairs, CHUNK=CHUNK, **sizes)
        plan_tiles_kernel[(1,)](counts, starts, sorted_pairs.tiles, chunks, num_tiles, rows, **sizes)
        order_pairs_kernel[(chunks,)](chosen, counts, starts, sorted_pairs.order, pairs, CHUNK=CHUNK, **sizes)
    return sorted_pairs


def ahead() -> Iterator[Ahead]:
    for name, experts, top_k in (("mixtral-8x7b", 8, 2), ("qwen3-30b-a3b", 128, 8)):
        block = {"EXPERTS": experts, "BLOCK": triton.next_power_of_2(experts)}
        words = dict.fromkeys(("chosen", "counts", "starts", "tiles", "order"), "*i32")
        yield Ahead(
            route_kernel,
            name,
            {"logits": "*fp32", "chosen": "*i32", "weights": "*fp32", "stride": "i32"},
            {**block, "TOP_K": top_k, "NORMALIZED": True, "CHOICES": triton.next_power_of_2(top_k)},
            num_warps=1,
        )
        for kernel, integers, constants in (
            (count_pairs_kernel, ("num_pairs",), {"CHUNK": CHUNK}),
            (plan_tiles_kernel, ("num_chunks", "num_tiles", "ROWS"), {}),
            (order_pairs_kernel, ("num_pairs",), {"CHUNK": CHUNK}),
        ):
            pointers = {argument: kind for argument, kind in words.items() if argument in kernel.arg_names}
            signature = {**pointers, **dict.fromkeys(integers, "i32")}
            yield Ahead(kernel, name, signature, {**block, **constants, "STEP": STEP}, num_warps=WARPS)

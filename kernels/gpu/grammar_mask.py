"""Masks of structured output: logits of tokens that a grammar forbids become −∞."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ahead import MODELS, Ahead
from kernels.gpu.arguments import FLOATS, INTEGERS, expect

BLOCK = 1024
WARPS = 4


@triton.jit
def grammar_mask_kernel(logits, bitmask, rows, stride, bitmask_stride, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    mask = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + mask).to(tl.int64)
    if row >= 0:
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        # Past the vocabulary nothing is forbidden, so nothing is written.
        word = tl.load(bitmask + mask * bitmask_stride + at // 32, mask=at < VOCAB, other=-1)
        forbidden = (word >> (at % 32)) & 1 == 0
        tl.store(logits + row * stride + at, float("-inf"), mask=forbidden)


def mask_logits(logits: Tensor, bitmask: Tensor, rows: Tensor) -> None:
    """In place: logits[rows[i], t] = −∞ where bit t % 32 of bitmask[i, t // 32] is 0.

    logits [R, V] bfloat16, float16 or float32; bitmask [masks, ceil(V / 32)] int32; rows [masks], -1 for a mask of
    nobody (a captured graph has a fixed number of them), else below R: nobody looks. Bits past V are not read. Raises
    ValueError naming the argument.
    """
    expect("logits", logits, (None, None), FLOATS, logits)
    masks, vocab = bitmask.shape[0], logits.shape[1]
    expect("bitmask", bitmask, (masks, triton.cdiv(vocab, 32)), (torch.int32,), logits)
    expect("rows", rows, (masks,), INTEGERS, logits)
    if masks == 0 or vocab == 0:
        return
    grammar_mask_kernel[(masks, triton.cdiv(vocab, BLOCK))](
        logits, bitmask, rows, logits.stride(0), bitmask.stride(0), VOCAB=vocab, BLOCK=BLOCK, num_warps=WARPS
    )


def ahead() -> Iterator[Ahead]:
    for model in MODELS:
        for pointer in ("*fp32", "*bf16"):
            yield Ahead(
                grammar_mask_kernel,
                f"{model.name} {pointer[1:]}",
                {"logits": pointer, "bitmask": "*i32", "rows": "*i32", "stride": "i32", "bitmask_stride": "i32"},
                {"VOCAB": model.vocab, "BLOCK": BLOCK},
                num_warps=WARPS,
                multiples_of_16=("stride",),
            )

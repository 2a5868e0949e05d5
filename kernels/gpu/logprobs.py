"""Log probabilities of tokens, their ranks, and the likeliest tokens beside them, of logits as the model gave them.

A result row is words: logprob | rank | T token ids | T logprobs; logprobs are float32 by their bits. Tokens stand in
the order of sampling_values.py. One program a row reads it 2 + T times: rows are few, and mostly T is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ahead import MODELS, Ahead
from kernels.gpu.arguments import expect
from kernels.gpu.sampling_values import LAST_ID, UNIT, rank_key, weight

BLOCK: Final = 1024
WARPS: Final = 8
INT32 = (torch.int32,)


@triton.jit
def float32_bits(x):
    return x.to(tl.float32).to(tl.int32, bitcast=True)


@triton.jit
def logprobs_kernel(logits, rows, tokens, out, stride, out_stride, num_top, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    row, target = logits + tl.load(rows + i).to(tl.int64) * stride, tl.load(tokens + i)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    for begin in range(0, VOCAB, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        best = tl.maximum(best, tl.load(row + at, mask=at < VOCAB, other=float("-inf")))
    top = tl.max(best, 0)
    chosen = tl.load(row + target) + 0.0
    its_key = rank_key(chosen, target)
    weights, ahead = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int32)
    for begin in range(0, VOCAB, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        value = tl.load(row + at, mask=at < VOCAB, other=float("-inf")) + 0.0
        weights += weight(value - top)
        ahead += ((rank_key(value, at) > its_key) & (at < VOCAB)).to(tl.int32)
    norm = top.to(tl.float64) + tl.log(tl.sum(weights, 0).to(tl.float64) / UNIT)
    words = out + i * out_stride
    tl.store(words, float32_bits(chosen.to(tl.float64) - norm))
    tl.store(words + 1, 1 + tl.sum(ahead, 0))
    last = tl.full((), 1 << 62, tl.int64)
    for n in range(num_top):
        last_key = tl.full([BLOCK], -(1 << 62), tl.int64)
        for begin in range(0, VOCAB, BLOCK):
            at = begin + tl.arange(0, BLOCK)
            key = rank_key(tl.load(row + at, mask=at < VOCAB, other=float("-inf")) + 0.0, at)
            last_key = tl.maximum(last_key, tl.where((key < last) & (at < VOCAB), key, -(1 << 62)))
        last = tl.max(last_key, 0)
        token = ((last & LAST_ID) ^ LAST_ID).to(tl.int32)
        inside = token < VOCAB  # else the vocabulary has no more
        tl.store(words + 2 + n, token)
        logit = tl.load(row + token, mask=inside, other=float("-inf"))
        tl.store(words + 2 + num_top + n, float32_bits(logit.to(tl.float64) - norm))


def logprobs(logits: Tensor, rows: Tensor, tokens: Tensor, num_top: int, out: Tensor) -> None:
    """Of tokens [Q] under logits[rows[i]] of logits [S, V] float32, each with the `num_top` likeliest, no more than V.

    out [Q, 2 + 2 · num_top]; all but the logits are int32. Rows whose logits are not numbers give anything. Raises
    ValueError naming the argument.
    """
    expect("logits", logits, (None, None), (torch.float32,), logits)
    expect("tokens", tokens, rows.shape, INT32, logits)
    expect("out", out, (len(rows), 2 + 2 * num_top), INT32, logits)
    if num_top > logits.shape[1]:
        raise ValueError(f"num_top is {num_top}, and the vocabulary has {logits.shape[1]} tokens")
    if len(rows):
        logprobs_kernel[(len(rows),)](
            logits, rows, tokens, out, logits.stride(0), out.stride(0), num_top,
            VOCAB=logits.shape[1], BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip


def ahead() -> Iterator[Ahead]:
    for model in MODELS:
        words = dict.fromkeys(("rows", "tokens", "out"), "*i32")
        numbers = dict.fromkeys(("stride", "out_stride", "num_top"), "i32")
        yield Ahead(
            logprobs_kernel,
            model.name,
            {"logits": "*fp32", **words, **numbers},
            {"VOCAB": model.vocab, "BLOCK": BLOCK},
            num_warps=WARPS,
            multiples_of_16=("stride",),
            fp_fusion=False,
        )

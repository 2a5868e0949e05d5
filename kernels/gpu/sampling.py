"""From logits to tokens: min_p, top_k and top_p without a sort, and counter noise; by the rules of the CPU's samplers.

    row_max     [rows, parts]   the greatest logit of each part, and whether all are numbers
    cut         [rows]          where top_k and top_p end, where a row asks for them
    choose      [rows, parts]   the best of each part: the greatest logit, or logit / temperature + noise
    finish      [rows]          the best of all

Tokens stand in one order, by logit down, then by id up, and a `rank key` is that order as a number: no two tokens of a
row have the same. So what top_k or top_p leave is all tokens from one key on, which is found by narrowing a range of
keys: each pass counts, or weighs, what is above eight keys in it (compare FlashInfer's "Sorting-free GPU kernels for
LLM sampling", 2025). Weights are integers of 2⁻⁴⁰: their sums have no order, so a row's token does not depend on how
its vocabulary is cut into parts. Noise is that of kernels/philox.py, its logarithms taken in float64 as the C++ step
takes them: a GPU's own are approximations that are worst where noise is greatest.
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
from kernels.gpu.slot_state import SAMPLING_WORDS, SlotState

BLOCK: Final = 1024
PART: Final = 8192  # tokens of a program of `choose`
PIVOTS: Final = 8
WARPS: Final = 8
NOT_NUMBERS, NONE_ALLOWED = 1, 2  # status of a row; 0 is well
ID_BITS: Final = 20  # of a rank key: more tokens than any vocabulary has

UNIT = tl.constexpr(2.0**40)
_LIMIT = tl.constexpr(3e33)  # as worker_svc/sampling_rules.py has it: no sound logit is greater
_GREEDY_BELOW = tl.constexpr(1e-5)
_ID_BITS, LAST_ID = tl.constexpr(ID_BITS), tl.constexpr((1 << ID_BITS) - 1)
_LOWEST = tl.constexpr(-3.4028234663852886e38)
_WORDS = tl.constexpr(SAMPLING_WORDS)


@triton.jit
def weight(x):
    """int64 eˣ in units of 2⁻⁴⁰, cut to an integer; x ≤ 0. Only products and sums: where they are not fused, the same
    bits on every device. Coefficients: minimax on ±½ ln 2 (Cephes' expf)."""
    x = tl.where(x > -28.0, x, -28.0)  # which weighs nothing
    n = tl.floor(x * 1.44269504 + 0.5)
    r = (x - n * 0.693359375) + n * 2.12194440e-4  # ln 2 in two parts, the first of nine bits
    p = 1.9875691500e-4
    p = p * r + 1.3981999507e-3
    p = p * r + 8.3334519073e-3
    p = p * r + 4.1665795894e-2
    p = p * r + 1.6666665459e-1
    p = p * r + 5.0000001201e-1
    mantissa = p * (r * r) + r + 1.0
    power = ((n.to(tl.int32) + (127 + 40)) << 23).to(tl.float32, bitcast=True)
    return (mantissa * power).to(tl.int64)


@triton.jit
def rounded_log(x):
    """Of float32, taken in float64: of all uniforms that there are, and of their logarithms, none comes so near to the
    middle of two float32 that 49 places of float64 would matter. So these are the same bits on every device."""
    return tl.log(x.to(tl.float64)).to(tl.float32)


@triton.jit
def gumbel(seed, position, first, BLOCK: tl.constexpr):
    """[BLOCK] noise of the tokens from `first` on, a multiple of four."""
    quads = (first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zero = quads * 0
    w0, w1, w2, w3 = tl.philox(seed, quads, zero + position.to(tl.uint32), zero, zero)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [BLOCK])
    uniform = ((words >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2⁻²³
    return -rounded_log(-rounded_log(uniform))


@triton.jit
def load_param(sampling, slot, word: tl.constexpr):
    return tl.load(sampling + slot * _WORDS + word)


@triton.jit
def load_float(sampling, slot, word: tl.constexpr):
    return tl.load(sampling + slot * _WORDS + word).to(tl.float32, bitcast=True)


@triton.jit
def load_wide(sampling, slot, word: tl.constexpr):
    low = tl.load(sampling + slot * _WORDS + word).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = tl.load(sampling + slot * _WORDS + word + 1).to(tl.uint32, bitcast=True).to(tl.uint64)
    return low | (high << 32)


@triton.jit
def rank_key(logit, token):
    """int64, greater for a likelier token: by logit, then by lower id. `logit` is never −0."""
    bits = logit.to(tl.int32, bitcast=True)
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ascending.to(tl.int64) << _ID_BITS) + (LAST_ID - token)


@triton.jit
def row_max_kernel(logits, maxima, broken, stride, VOCAB: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr):
    row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    nans = tl.zeros([BLOCK], tl.int32)
    for begin in range(part * PART, min(part * PART + PART, VOCAB), BLOCK):
        at = begin + tl.arange(0, BLOCK)
        value = tl.load(logits + row * stride + at, mask=at < VOCAB, other=float("-inf"))
        nans = nans | (value != value).to(tl.int32)
        best = tl.maximum(best, value)
    tl.store(maxima + row * parts + part, tl.max(best, 0))
    tl.store(broken + row * parts + part, tl.max(nans, 0))


@triton.jit
def _above(
    logits, row, stride, temperature, top, pivots, WEIGH: tl.constexpr, VOCAB: tl.constexpr, BLOCK: tl.constexpr
):
    """How many tokens, or how much weight, each of the keys `pivots` [P] has from it on: [P] int64."""
    total = pivots * 0
    for begin in range(0, VOCAB, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        value = tl.load(logits + row * stride + at, mask=at < VOCAB, other=float("-inf"))
        value = tl.div_rn(value, temperature) + 0.0
        inside = (rank_key(value, at)[None, :] >= pivots[:, None]) & (at < VOCAB)[None, :]
        amount = weight(value - top) if WEIGH else tl.full([BLOCK], 1, tl.int64)
        total += tl.sum(tl.where(inside, amount[None, :], 0), 1)
    return total


@triton.jit
def _narrow(
    logits, row, stride, temperature, top, low, high, needed, exact,
    WEIGH: tl.constexpr, VOCAB: tl.constexpr, PIVOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The greatest key in [low, high) from which on there is as much as `needed`; there is from `low` on."""
    while low + 1 < high:
        step = (high - low) // (PIVOTS + 1)
        pivots = low + (high - low) * (tl.arange(0, PIVOTS).to(tl.int64) + 1) // (PIVOTS + 1)
        if step == 0:
            pivots = tl.minimum(low + tl.arange(0, PIVOTS).to(tl.int64) + 1, high - 1)
        amount = _above(logits, row, stride, temperature, top, pivots, WEIGH, VOCAB, BLOCK)
        enough = amount >= needed
        low = tl.maximum(low, tl.max(tl.where(enough, pivots, low), 0))
        high = tl.minimum(high, tl.min(tl.where(enough, high, pivots), 0))
        # Where exactly as many as were asked for are above a key, any key down to it means the same tokens.
        if exact & (tl.max((amount == needed).to(tl.int32), 0) == 1):
            high = low + 1
    return low


@triton.jit
def cut_kernel(
    logits, slots, sampling, maxima, tops, cuts, stride,
    VOCAB: tl.constexpr, PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr, PIVOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    part = tl.arange(0, PARTS_BLOCK)
    raw_top = tl.max(tl.load(maxima + row * PARTS + part, mask=part < PARTS, other=float("-inf")), 0)
    tl.store(tops + row, raw_top)
    temperature = load_float(sampling, slot, 2)
    low = tl.full((), -(1 << 62), tl.int64)
    if temperature >= _GREEDY_BELOW:
        top = tl.div_rn(raw_top, temperature) + 0.0
        floor = tl.maximum(top + load_float(sampling, slot, 3), _LOWEST)  # never −inf, which is banned
        low = rank_key(floor + 0.0, tl.full((), LAST_ID, tl.int64))
        high = rank_key(top, tl.zeros((), tl.int64)) + 1
        top_k = load_param(sampling, slot, 4).to(tl.int64)
        share = load_wide(sampling, slot, 5).to(tl.float64, bitcast=True)
        alone = low + tl.zeros([PIVOTS], tl.int64)
        if (top_k > 0) & (top_k < VOCAB):
            count = tl.max(_above(logits, row, stride, temperature, top, alone, False, VOCAB, BLOCK), 0)
            if count > top_k:
                low = _narrow(
                    logits, row, stride, temperature, top, low, high, top_k, True, False, VOCAB, PIVOTS, BLOCK
                )
        if share < 1.0:
            alone = low + tl.zeros([PIVOTS], tl.int64)
            total = tl.max(_above(logits, row, stride, temperature, top, alone, True, VOCAB, BLOCK), 0)
            needed = tl.maximum(tl.ceil(share * total.to(tl.float64)).to(tl.int64), 1)
            low = _narrow(logits, row, stride, temperature, top, low, high, needed, False, True, VOCAB, PIVOTS, BLOCK)
    tl.store(cuts + row, low)


@triton.jit
def choose_kernel(
    logits, slots, sampling, lengths, cuts, scores, tokens, stride,
    VOCAB: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    slot = tl.load(slots + row).to(tl.int64)
    temperature = load_float(sampling, slot, 2)
    seed, position = load_wide(sampling, slot, 0), tl.load(lengths + slot)
    cut = tl.load(cuts + row)
    best_score, best_token = tl.full([BLOCK], float("-inf"), tl.float32), tl.full([BLOCK], VOCAB, tl.int32)
    for begin in range(part * PART, min(part * PART + PART, VOCAB), BLOCK):
        at = begin + tl.arange(0, BLOCK)
        score = tl.load(logits + row * stride + at, mask=at < VOCAB, other=float("-inf"))
        if temperature >= _GREEDY_BELOW:
            scaled = tl.div_rn(score, temperature) + 0.0
            noisy = scaled + gumbel(seed, position, begin, BLOCK)
            score = tl.where((rank_key(scaled, at) >= cut) & (at < VOCAB), noisy, float("-inf"))
        better = score > best_score
        best_score = tl.where(better, score, best_score)
        best_token = tl.where(better, at, best_token)
    best = tl.max(best_score, 0)
    tl.store(scores + row * parts + part, best)
    tl.store(tokens + row * parts + part, tl.min(tl.where(best_score == best, best_token, VOCAB), 0))


@triton.jit
def finish_kernel(
    scores, tokens, tops, broken, status_before, out, status,
    VOCAB: tl.constexpr, PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    part = tl.arange(0, PARTS_BLOCK)
    inside = part < PARTS
    score = tl.load(scores + row * PARTS + part, mask=inside, other=float("-inf"))
    token = tl.load(tokens + row * PARTS + part, mask=inside, other=VOCAB)
    token = tl.min(tl.where(score == tl.max(score, 0), token, VOCAB), 0)
    tl.store(out + row, tl.where(token < VOCAB, token, 0))
    top = tl.load(tops + row)
    wrong = tl.max(tl.load(broken + row * PARTS + part, mask=inside, other=0), 0)
    found = tl.where(top == float("-inf"), 2, 0)
    found = tl.where((wrong > 0) | ((tl.abs(top) <= _LIMIT) == 0) & (found == 0), 1, found)
    if status_before is not None:
        before = tl.load(status_before + row)
        found = tl.where(before > 0, before, found)
    tl.store(status + row, found)


def sample(
    logits: Tensor,
    slots: Tensor,
    state: SlotState,
    out: Tensor,
    status: Tensor,
    status_before: Tensor | None = None,
) -> None:
    """A token for each row, by the parameters of its slot (see `SlotState.sampling`) and at its length as position.

    logits [S, V] float32, slots [S] → out [S] token ids, status [S]: NOT_NUMBERS or NONE_ALLOWED where the row has no
    token to give, and then its token is any. `status_before` [S], of the logits before they were edited, goes first.
    All but logits are int32. Raises ValueError naming the argument.
    """
    expect("logits", logits, (None, None), (torch.float32,), logits)
    rows, vocab = logits.shape
    for name, tensor in (("slots", slots), ("out", out), ("status", status)):
        expect(name, tensor, (rows,), (torch.int32,), logits)
    if vocab >= 1 << ID_BITS:
        raise ValueError(f"logits has {vocab} columns, and fewer than {1 << ID_BITS} can be told apart")
    if not rows:
        return
    parts = triton.cdiv(vocab, PART)
    scores, tokens, tops = _scratch(rows, parts, logits.device)
    cuts = torch.empty(rows, dtype=torch.int64, device=logits.device)
    maxima, broken = _maxima(logits, parts)
    of_parts = {"PARTS": parts, "PARTS_BLOCK": triton.next_power_of_2(parts)}
    cut_kernel[(rows,)](
        logits, slots, state.sampling, maxima, tops, cuts, logits.stride(0),
        VOCAB=vocab, **of_parts, PIVOTS=PIVOTS, BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    choose_kernel[(rows, parts)](
        logits, slots, state.sampling, state.lengths, cuts, scores, tokens, logits.stride(0),
        VOCAB=vocab, PART=PART, BLOCK=BLOCK, enable_fp_fusion=False,
    )  # fmt: skip
    finish_kernel[(rows,)](
        scores, tokens, tops, broken, status_before, out, status, VOCAB=vocab, **of_parts, num_warps=1
    )


def check(logits: Tensor, status: Tensor) -> None:
    """status [S] int32 of logits [S, V] as they are, see `sample`."""
    rows, parts = logits.shape[0], triton.cdiv(logits.shape[1], PART)
    maxima, broken = _maxima(logits, parts)
    top = maxima.amax(1)
    numbers = (top.abs() <= _LIMIT.value) & (broken.amax(1) == 0)
    found = torch.where(numbers, 0, NOT_NUMBERS)
    status.copy_(torch.where((top == -torch.inf) & (broken.amax(1) == 0), NONE_ALLOWED, found).view(rows))


def _maxima(logits: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    maxima = torch.empty(len(logits), parts, dtype=torch.float32, device=logits.device)
    broken = torch.empty(len(logits), parts, dtype=torch.int32, device=logits.device)
    row_max_kernel[(len(logits), parts)](
        logits, maxima, broken, logits.stride(0), VOCAB=logits.shape[1], PART=PART, BLOCK=BLOCK
    )
    return maxima, broken


def _scratch(rows: int, parts: int, where: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    scores = torch.empty(rows, parts, dtype=torch.float32, device=where)
    return scores, torch.empty(rows, parts, dtype=torch.int32, device=where), torch.empty(rows, device=where)


def ahead() -> Iterator[Ahead]:
    for model in MODELS:
        vocab, parts = model.vocab, triton.cdiv(model.vocab, PART)
        of_parts = {"PARTS": parts, "PARTS_BLOCK": triton.next_power_of_2(parts)}
        rows = {"logits": "*fp32", "slots": "*i32", "sampling": "*i32"}
        yield Ahead(
            row_max_kernel,
            model.name,
            {"logits": "*fp32", "maxima": "*fp32", "broken": "*i32", "stride": "i32"},
            {"VOCAB": vocab, "PART": PART, "BLOCK": BLOCK},
            multiples_of_16=("stride",),
        )
        yield Ahead(
            cut_kernel,
            model.name,
            {**rows, "maxima": "*fp32", "tops": "*fp32", "cuts": "*i64", "stride": "i32"},
            {"VOCAB": vocab, **of_parts, "PIVOTS": PIVOTS, "BLOCK": BLOCK},
            num_warps=WARPS,
            multiples_of_16=("stride",),
            fp_fusion=False,
        )
        yield Ahead(
            choose_kernel,
            model.name,
            {**rows, "lengths": "*i32", "cuts": "*i64", "scores": "*fp32", "tokens": "*i32", "stride": "i32"},
            {"VOCAB": vocab, "PART": PART, "BLOCK": BLOCK},
            multiples_of_16=("stride",),
            fp_fusion=False,
        )
        finish = {
            "scores": "*fp32",
            "tokens": "*i32",
            "tops": "*fp32",
            "broken": "*i32",
            "out": "*i32",
            "status": "*i32",
        }
        yield Ahead(finish_kernel, model.name, finish, {"VOCAB": vocab, **of_parts, "status_before": None}, num_warps=1)

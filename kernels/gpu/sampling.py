"""From logits to tokens: min_p, top_k and top_p without a sort, and counter noise; by the rules of the CPU's samplers.

    row_max     [rows, parts]   the greatest logit of each run of tokens, and whether all are numbers
    …           sampling_cut.py: from which rank key on the tokens of a row are left
    choose      [rows, parts]   the best of each part: the greatest logit, or logit / temperature + noise
    finish      [rows]          the best of all

Neither a maximum nor a sum of integers has an order, so a row's token does not depend on how its vocabulary is cut into
parts, nor on the rows beside it. All shapes follow from the logits' own, and the host waits for nothing: the launches
can be captured.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ahead import MODELS, Ahead
from kernels.gpu.arguments import expect
from kernels.gpu.sampling_cut import BLOCK, PART, RUN, cut_rows, runs_of
from kernels.gpu.sampling_values import GREEDY_BELOW, ID_BITS, LIMIT, gumbel, load_float, load_wide, rank_key
from kernels.gpu.slot_state import SlotState

NOT_NUMBERS, NONE_ALLOWED = 1, 2  # status of a row; 0 is well


@triton.jit
def row_max_kernel(
    logits, maxima, broken, stride, VOCAB: tl.constexpr, RUN: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr
):
    row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    runs: tl.constexpr = BLOCK // RUN
    row_maxima = maxima + row * ((VOCAB + BLOCK - 1) // BLOCK * runs)
    nans = tl.zeros([BLOCK], tl.int32)
    for begin in range(part * PART, min(part * PART + PART, VOCAB), BLOCK):
        at = begin + tl.arange(0, BLOCK)
        value = tl.load(logits + row * stride + at, mask=at < VOCAB, other=float("-inf"))
        nan = value != value
        nans = nans | nan.to(tl.int32)
        value = tl.reshape(tl.where(nan, float("-inf"), value), [runs, RUN])
        tl.store(row_maxima + begin // RUN + tl.arange(0, runs), tl.max(value, 1))
    tl.store(broken + row * parts + part, tl.max(nans, 0))


@triton.jit
def choose_kernel(
    logits, slots, sampling, positions, cuts, scores, tokens, stride,
    VOCAB: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    slot = tl.load(slots + row).to(tl.int64)
    temperature = load_float(sampling, slot, 2)
    seed, position = load_wide(sampling, slot, 0), tl.load(positions + row)
    cut = tl.load(cuts + row)
    best_score, best_token = tl.full([BLOCK], float("-inf"), tl.float32), tl.full([BLOCK], VOCAB, tl.int32)
    for begin in range(part * PART, min(part * PART + PART, VOCAB), BLOCK):
        at = begin + tl.arange(0, BLOCK)
        score = tl.load(logits + row * stride + at, mask=at < VOCAB, other=float("-inf"))
        if temperature >= GREEDY_BELOW:
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
    found = tl.where((wrong > 0) | ((tl.abs(top) <= LIMIT) == 0) & (found == 0), 1, found)
    if status_before is not None:
        before = tl.load(status_before + row)
        found = tl.where(before > 0, before, found)
    tl.store(status + row, found)


def sample(
    logits: Tensor,
    slots: Tensor,
    state: SlotState,
    positions: Tensor,
    out: Tensor,
    status: Tensor,
    status_before: Tensor | None = None,
) -> None:
    """A token for each row, by the parameters of its slot (see `SlotState.sampling`), at its position.

    logits [S, V] float32, slots and positions [S] → out [S] token ids, status [S]: NOT_NUMBERS or NONE_ALLOWED where
    the row has no token to give, and then its token is any. `status_before` [S], of the logits before they were edited,
    goes first.
    All but logits are int32. Raises ValueError naming the argument.
    """
    expect("logits", logits, (None, None), (torch.float32,), logits)
    rows, vocab = logits.shape
    for name, tensor in (("slots", slots), ("positions", positions), ("out", out), ("status", status)):
        expect(name, tensor, (rows,), (torch.int32,), logits)
    if vocab >= 1 << ID_BITS:
        raise ValueError(f"logits has {vocab} columns, and fewer than {1 << ID_BITS} can be told apart")
    if not rows:
        return
    parts = triton.cdiv(vocab, PART)
    maxima, broken = _maxima(logits)
    tops = torch.empty(rows, device=logits.device)
    cuts = cut_rows(logits, slots, state, maxima, tops)
    scores = torch.empty(rows, parts, device=logits.device)
    tokens = torch.empty(rows, parts, dtype=torch.int32, device=logits.device)
    choose_kernel[(rows, parts)](
        logits, slots, state.sampling, positions, cuts, scores, tokens, logits.stride(0),
        VOCAB=vocab, PART=PART, BLOCK=BLOCK, enable_fp_fusion=False,
    )  # fmt: skip
    finish_kernel[(rows,)](
        scores, tokens, tops, broken, status_before, out, status,
        VOCAB=vocab, PARTS=parts, PARTS_BLOCK=triton.next_power_of_2(parts), num_warps=1,
    )  # fmt: skip


def check(logits: Tensor, status: Tensor) -> None:
    """status [S] int32 of logits [S, V] as they are, see `sample`."""
    maxima, broken = _maxima(logits)
    top = maxima.amax(1)
    numbers = (top.abs() <= LIMIT.value) & (broken.amax(1) == 0)
    found = torch.where(numbers, 0, NOT_NUMBERS)
    status.copy_(torch.where((top == -torch.inf) & (broken.amax(1) == 0), NONE_ALLOWED, found))


def _maxima(logits: Tensor) -> tuple[Tensor, Tensor]:
    """[S, runs_of(V)], and [S, parts] int32: 1 where a logit is no number."""
    rows, vocab = logits.shape
    parts = triton.cdiv(vocab, PART)
    maxima = torch.empty(rows, runs_of(vocab), device=logits.device)
    broken = torch.empty(rows, parts, dtype=torch.int32, device=logits.device)
    row_max_kernel[(rows, parts)](
        logits, maxima, broken, logits.stride(0), VOCAB=vocab, RUN=RUN, PART=PART, BLOCK=BLOCK
    )
    return maxima, broken


def ahead() -> Iterator[Ahead]:
    for model in MODELS:
        vocab, parts = model.vocab, triton.cdiv(model.vocab, PART)
        of_parts = {"PARTS": parts, "PARTS_BLOCK": triton.next_power_of_2(parts)}
        rows = {"logits": "*fp32", "slots": "*i32", "sampling": "*i32"}
        yield Ahead(
            row_max_kernel,
            model.name,
            {"logits": "*fp32", "maxima": "*fp32", "broken": "*i32", "stride": "i32"},
            {"VOCAB": vocab, "RUN": RUN, "PART": PART, "BLOCK": BLOCK},
            multiples_of_16=("stride",),
        )
        yield Ahead(
            choose_kernel,
            model.name,
            {**rows, "positions": "*i32", "cuts": "*i64", "scores": "*fp32", "tokens": "*i32", "stride": "i32"},
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

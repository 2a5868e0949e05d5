"""What requests ask to change in their logits, on the device: biases, bans, bad words, penalties, in this order.

Biases and bans come as flat indices (row · vocab + token) from whoever knows the requests. Bad words and penalties
follow from a slot's tokens, which the device alone has while steps are in flight: both look at the whole history anew,
so nothing has to be kept, or built again after a crash. The arithmetic is that of worker_svc/sampler.py, rounding by
rounding: no edit takes a logit beyond LIMIT, and a ban stays one.
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
from kernels.gpu.slot_state import SlotState

BLOCK: Final = 1024
MAX_WORD: Final = 1024  # tokens of a bad word
INT32 = (torch.int32,)
_LIMIT = tl.constexpr(3e33)  # as worker_svc/sampling_rules.py has it
_SEEN = tl.constexpr(1 << 30)  # in a count: the token is there, perhaps in the prompt alone


@triton.jit
def bounded(value):
    """A ban stays one, and what is no number stays none."""
    near = tl.where(value > _LIMIT, _LIMIT, tl.where(value < -_LIMIT, -_LIMIT, value))
    return tl.where(value == float("-inf"), value, near)


@triton.jit
def bias_kernel(logits, at, bias, count, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    where = logits + tl.load(at + i, mask=i < count, other=0)
    value = tl.load(where, mask=i < count, other=0.0)
    tl.store(where, bounded(value + tl.load(bias + i, mask=i < count, other=0.0)), mask=i < count)


@triton.jit
def ban_kernel(logits, at, count, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(logits + tl.load(at + i, mask=i < count, other=0), float("-inf"), mask=i < count)


@triton.jit
def early_ban_kernel(logits, at, until, positions, count, vocab, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    where = tl.load(at + i, mask=i < count, other=0)
    early = tl.load(positions + where // vocab) < tl.load(until + i, mask=i < count, other=0)
    tl.store(logits + where, float("-inf"), mask=(i < count) & early)


@triton.jit
def bad_word_kernel(
    logits, slots, word_rows, borders, tokens, all_token_ids, positions, prompt_lens, vocab, tokens_stride,
    MOST: tl.constexpr,
):  # fmt: skip
    word = tl.program_id(0)
    row, begin = tl.load(word_rows + word), tl.load(borders + word)
    before = tl.load(borders + word + 1) - begin - 1  # tokens of it that the output must end with
    slot = tl.load(slots + row).to(tl.int64)
    length = tl.load(positions + row)
    if length - tl.load(prompt_lens + word) >= before:
        at = tl.arange(0, MOST)
        history = all_token_ids + slot * tokens_stride + length - before
        had = tl.load(history + at, mask=at < before, other=0)
        if tl.max((had != tl.load(tokens + begin + at, mask=at < before, other=0)).to(tl.int32), 0) == 0:
            tl.store(logits + row.to(tl.int64) * vocab + tl.load(tokens + begin + before), float("-inf"))


@triton.jit
def count_kernel(slots, rows, prompt_lens, all_token_ids, positions, counts, vocab, tokens_stride, BLOCK: tl.constexpr):
    i = tl.program_id(0)
    row = tl.load(rows + i)
    slot = tl.load(slots + row).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tl.load(positions + row)
    token = tl.load(all_token_ids + slot * tokens_stride + at, mask=inside, other=0)
    count = counts + i.to(tl.int64) * vocab + token
    tl.atomic_or(count, 1 << 30, mask=inside)
    tl.atomic_add(count, 1, mask=inside & (at >= tl.load(prompt_lens + i)))


@triton.jit
def penalty_kernel(logits, rows, counts, repetition, frequency, presence, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    found = tl.load(counts + i * VOCAB + at, mask=at < VOCAB, other=0)
    where = logits + tl.load(rows + i).to(tl.int64) * VOCAB + at
    value = tl.load(where, mask=found > 0, other=float("-inf"))
    count = (found & (_SEEN - 1)).to(tl.float32)
    rate = tl.load(repetition + i)
    new = bounded(tl.where(value > 0, tl.div_rn(value, rate), value * rate))
    new = bounded(new - bounded(tl.load(frequency + i) * count))
    new = bounded(new - tl.where(count > 0, tl.load(presence + i), 0.0))
    tl.store(where, new, mask=(found > 0) & (value != float("-inf")))


@triton.jit
def lift_kernel(edited, logits, rows, masks, bitmask, words, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    row, mask = tl.load(rows + tl.program_id(0)).to(tl.int64), tl.load(masks + tl.program_id(0)).to(tl.int64)
    left = tl.full([BLOCK], 0, tl.int32)
    for begin in range(0, VOCAB, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        value = tl.load(edited + row * VOCAB + at, mask=at < VOCAB, other=float("-inf"))
        left = left | (value != float("-inf")).to(tl.int32)
    if tl.max(left, 0) == 0:
        for begin in range(0, VOCAB, BLOCK):
            at = begin + tl.arange(0, BLOCK)
            value = tl.load(logits + row * VOCAB + at, mask=at < VOCAB, other=0.0)
            if mask >= 0:
                word = tl.load(bitmask + mask * words + at // 32, mask=at < VOCAB, other=0)
                value = tl.where((word >> (at % 32)) & 1 == 0, float("-inf"), value)
            tl.store(edited + row * VOCAB + at, value, mask=at < VOCAB)


def add_bias(logits: Tensor, at: Tensor, bias: Tensor) -> None:
    """logits [S, V] dense float32; bias [n] float32 is added at the flat indices `at` [n] int32, all different."""
    _dense(logits)
    expect("bias", bias, at.shape, (torch.float32,), logits)
    if count := len(at):
        bias_kernel[(triton.cdiv(count, BLOCK),)](logits, at, bias, count, BLOCK=BLOCK)


def ban(logits: Tensor, at: Tensor) -> None:
    """−inf at the flat indices `at` [n] int32."""
    _dense(logits)
    if count := len(at):
        ban_kernel[(triton.cdiv(count, BLOCK),)](logits, at, count, BLOCK=BLOCK)


def ban_until(logits: Tensor, at: Tensor, until: Tensor, positions: Tensor) -> None:
    """−inf at the flat indices `at` [n] of rows whose positions [S] are below until[i]; all int32."""
    _dense(logits)
    expect("until", until, at.shape, INT32, logits)
    expect("positions", positions, (len(logits),), INT32, logits)
    if count := len(at):
        early_ban_kernel[(triton.cdiv(count, BLOCK),)](
            logits, at, until, positions, count, logits.shape[1], BLOCK=BLOCK
        )


def ban_words(
    logits: Tensor,
    slots: Tensor,
    state: SlotState,
    rows: Tensor,
    borders: Tensor,
    tokens: Tensor,
    prompt_lens: Tensor,
    positions: Tensor,
) -> None:
    """−inf for the last token of each word whose other tokens the output of its row ends with.

    Word i has tokens borders[i]:borders[i+1] of `tokens`, two at least and MAX_WORD at most, all of the vocabulary its
    last; it is for row rows[i], whose prompt has prompt_lens[i] tokens. positions [S]: where each row's own tokens end,
    drafts among them. All int32.
    """
    _dense(logits)
    expect("borders", borders, (len(rows) + 1,), INT32, logits)
    expect("positions", positions, (len(logits),), INT32, logits)
    expect("prompt_lens", prompt_lens, (len(rows),), INT32, logits)
    if len(rows):
        bad_word_kernel[(len(rows),)](
            logits, slots, rows, borders, tokens, state.token_ids, positions, prompt_lens, logits.shape[1],
            state.token_ids.stride(0), MOST=MAX_WORD,
        )  # fmt: skip


def penalize(
    logits: Tensor,
    slots: Tensor,
    state: SlotState,
    rows: Tensor,
    prompt_lens: Tensor,
    penalties: Tensor,
    positions: Tensor,
) -> None:
    """Repetition, frequency and presence, `penalties` [3, P] float32, of rows [P] and the lengths of their prompts;
    `positions` as in `ban_words`.

    A token that is in the prompt alone is repeated, and present or frequent is what the output has.
    """
    _dense(logits)
    count, vocab = len(rows), logits.shape[1]
    expect("prompt_lens", prompt_lens, (count,), INT32, logits)
    expect("penalties", penalties, (3, count), (torch.float32,), logits)
    if not count:
        return
    counts = torch.zeros(count, vocab, dtype=torch.int32, device=logits.device)
    longest = state.token_ids.shape[1]
    count_kernel[(count, triton.cdiv(longest, BLOCK))](
        slots,
        rows,
        prompt_lens,
        state.token_ids,
        positions,
        counts,
        vocab,
        longest,
        BLOCK=BLOCK,
    )
    penalty_kernel[(count, triton.cdiv(vocab, BLOCK))](
        logits, rows, counts, *penalties, VOCAB=vocab, BLOCK=BLOCK, enable_fp_fusion=False
    )


def lift(edited: Tensor, logits: Tensor, rows: Tensor, masks: Tensor, bitmask: Tensor) -> None:
    """Rows [E] of which bans left nothing become what they were before: `logits`, with what a grammar forbids.

    masks [E]: the row's mask in `bitmask` [masks, words], −1 where it has none.
    """
    _dense(edited)
    if len(rows):
        lift_kernel[(len(rows),)](
            edited, logits, rows, masks, bitmask, bitmask.shape[1], VOCAB=logits.shape[1], BLOCK=BLOCK
        )


def _dense(logits: Tensor) -> None:
    expect("logits", logits, (None, None), (torch.float32,), logits, contiguous=True)
    if logits.numel() >= 1 << 31:
        raise ValueError(f"logits has {logits.numel()} elements, and flat indices are below 2^31")


def ahead() -> Iterator[Ahead]:
    yield Ahead(
        bias_kernel, "any", {"logits": "*fp32", "at": "*i32", "bias": "*fp32", "count": "i32"}, {"BLOCK": BLOCK}
    )
    yield Ahead(ban_kernel, "any", {"logits": "*fp32", "at": "*i32", "count": "i32"}, {"BLOCK": BLOCK})
    early = {"logits": "*fp32", **dict.fromkeys(("at", "until", "positions"), "*i32"), "count": "i32", "vocab": "i32"}
    yield Ahead(early_ban_kernel, "any", early, {"BLOCK": BLOCK})
    words = ("slots", "word_rows", "borders", "tokens", "all_token_ids", "positions", "prompt_lens")
    numbers = {"vocab": "i32", "tokens_stride": "i32"}
    signature = {"logits": "*fp32", **dict.fromkeys(words, "*i32"), **numbers}
    yield Ahead(bad_word_kernel, "any", signature, {"MOST": MAX_WORD})
    counted = ("slots", "rows", "prompt_lens", "all_token_ids", "positions", "counts")
    yield Ahead(count_kernel, "any", {**dict.fromkeys(counted, "*i32"), **numbers}, {"BLOCK": BLOCK})
    for model in MODELS:
        constants = {"VOCAB": model.vocab, "BLOCK": BLOCK}
        rates = dict.fromkeys(("repetition", "frequency", "presence"), "*fp32")
        penalized = {"logits": "*fp32", "rows": "*i32", "counts": "*i32", **rates}
        yield Ahead(penalty_kernel, model.name, penalized, constants, fp_fusion=False)
        lifted = {**dict.fromkeys(("edited", "logits"), "*fp32"), **dict.fromkeys(("rows", "masks", "bitmask"), "*i32")}
        yield Ahead(lift_kernel, model.name, {**lifted, "words": "i32"}, constants)

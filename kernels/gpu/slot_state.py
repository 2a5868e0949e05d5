"""What a GPU worker remembers of each slot, kept on the device, and a step's inputs made from it there (R1).

    token_ids     [slots + 1, max_model_len]    as worker_svc/slots.py has it, row 0 the null slot
    block_tables  [slots + 1, blocks a slot]
    lengths       [slots + 1]                   tokens known
    computed      [slots + 1]                   positions whose KV is written
    limits        [slots + 1]                   the longest that the sequence may become
    drafts        [slots + 1]                   tokens proposed behind those known
    sampling      [slots + 1, SAMPLING_WORDS]   how to choose a token, see `sampling_words`
    adapters      [slots + 1]                   index of its adapter, 0 is none; of no slots where there are no adapters

All of them are int32 views of one array of words. A plan reaches it as pairs of address and word, so that admissions
and new blocks are one copy and one launch, whatever they are. A step that goes on at its slots' own lengths
(`start` −1) needs nothing of the step before it from the host: sampled tokens are appended, and read back, here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from kernels.ahead import Ahead
from kernels.gpu.arguments import expect

PAIRS = 256  # … a program
TOKENS = 128
SAMPLING_WORDS = 8
MAX_ROWS = 1024  # of a step: one program adds them up
INT32 = (torch.int32,)


@dataclass(frozen=True)
class SlotState:
    """Views of `words`; `address` says where an element is among them."""

    words: Tensor
    token_ids: Tensor
    block_tables: Tensor
    lengths: Tensor
    computed: Tensor
    limits: Tensor
    drafts: Tensor
    sampling: Tensor
    adapters: Tensor

    @classmethod
    def empty(
        cls, max_slots: int, max_model_len: int, max_blocks: int, device: torch.device, adapts: bool = False
    ) -> SlotState:
        rows = max_slots + 1
        shapes = (
            *((rows, max_model_len), (rows, max_blocks), *[(rows,)] * 4, (rows, SAMPLING_WORDS)),
            (rows * adapts,),
        )
        sizes = [torch.Size(shape).numel() for shape in shapes]
        if sum(sizes) >= 1 << 31:
            raise ValueError(f"{max_slots} slots of {max_model_len} tokens are {sum(sizes)} words; below 2^31 can be")
        words = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        parts = (part.view(shape) for part, shape in zip(words.split(sizes), shapes, strict=True))
        return cls(words, *parts)

    @staticmethod
    def address(view: Tensor, *index: int) -> int:
        """Of one element of a view of `words`."""
        return int(view.storage_offset()) + sum(i * stride for i, stride in zip(index, view.stride(), strict=True))


def sampling_words(seed: int, temperature: float, min_p: float, top_k: int, top_p: float) -> NDArray[np.int32]:
    """[SAMPLING_WORDS]: seed, low word first; temperature; log of min_p; top_k, 0 is off; top_p, a double's words."""
    with np.errstate(divide="ignore"):
        floats = np.array([temperature, np.log(np.float32(min_p))], np.float32)
    share = np.array([top_p], np.float64).view(np.int32)
    key = np.array([seed], np.uint64).view(np.int32)
    return np.concatenate([key, floats.view(np.int32), np.array([top_k], np.int32), share, np.zeros(1, np.int32)])


@triton.jit
def scatter_words_kernel(words, addresses, values, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    address = tl.load(addresses + at, mask=at < count, other=-1).to(tl.int64)
    tl.store(words + address, tl.load(values + at, mask=at < count, other=0), mask=address >= 0)


@triton.jit
def prepare_rows_kernel(
    slots, starts, most, drafts, lengths, computed, cu, context_lens, num_rows, laid, BLOCK: tl.constexpr
):
    row = tl.arange(0, BLOCK)
    inside = row < num_rows
    slot = tl.load(slots + row, mask=inside, other=0)
    start = tl.load(starts + row, mask=inside, other=0)
    count = tl.load(most + row, mask=inside, other=0)
    done = tl.load(computed + slot)
    left = tl.load(lengths + slot) - done
    count = tl.where(start < 0, tl.minimum(count, left), count)
    end = tl.where(start < 0, done, start) + count
    behind = tl.load(drafts + row, mask=inside, other=0)
    count = tl.where((laid > 0) & inside, laid, count + behind)
    tl.store(cu, 0)
    tl.store(cu + 1 + row, tl.cumsum(count, 0), mask=inside)
    tl.store(context_lens + row, end + behind, mask=inside)
    tl.store(computed + slot, end, mask=inside)


@triton.jit
def prepare_tokens_kernel(
    slots, drafts, cu, context_lens, all_token_ids, block_tables, token_ids, positions, slot_mapping,
    num_rows, num_tokens, laid, tokens_stride, tables_stride, BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(cu + row)
    if row == num_rows:  # behind the last row: what a captured graph computes besides goes nowhere
        outside = first + at < num_tokens
        zero = tl.zeros([BLOCK], tl.int32)
        tl.store(token_ids + first + at, zero, mask=outside)
        tl.store(positions + first + at, zero, mask=outside)
        tl.store(slot_mapping + first + at, zero - 1, mask=outside)
    else:
        count = tl.load(cu + row + 1) - first
        inside = at < count
        slot = tl.load(slots + row).to(tl.int64)
        position = tl.load(context_lens + row) - count + at
        token = tl.load(all_token_ids + slot * tokens_stride + position, mask=inside)
        block = tl.load(block_tables + slot * tables_stride + position // BLOCK_SIZE, mask=inside)
        place = block * BLOCK_SIZE + position % BLOCK_SIZE
        again = tl.where(laid > 0, laid - 1 - tl.load(drafts + row), 0)  # computed before
        place = tl.where(at < again, -1, place)
        tl.store(token_ids + first + at, token, mask=inside)
        tl.store(positions + first + at, position, mask=inside)
        tl.store(slot_mapping + first + at, place, mask=inside)


@triton.jit
def token_adapters_kernel(slots, cu, adapters, index, num_rows, num_tokens, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first, end = tl.load(cu + row), num_tokens
    adapter = 0  # behind the last row, too
    if row < num_rows:
        end = tl.load(cu + row + 1)
        adapter = tl.load(adapters + tl.load(slots + row))
    tl.store(index + first + at, tl.zeros([BLOCK], tl.int32) + adapter, mask=first + at < end)


@triton.jit
def append_tokens_kernel(
    slots, sampled, counts, all_token_ids, lengths, drafts, sampled_stride, tokens_stride, MOST: tl.constexpr
):
    row = tl.program_id(0)
    slot = tl.load(slots + row).to(tl.int64)
    count = tl.load(counts + row)
    if slot > 0:
        at = tl.arange(0, MOST)
        length = tl.load(lengths + slot)
        token = tl.load(sampled + row * sampled_stride + at, mask=at < count)
        tl.store(all_token_ids + slot * tokens_stride + length + at, token, mask=at < count)
        tl.store(lengths + slot, length + count)
        tl.store(drafts + slot, 0)


def scatter_words(state: SlotState, addresses: Tensor, values: Tensor) -> None:
    """words[addresses[i]] = values[i], both [N] int32; a negative address is none. No address twice: any would win."""
    expect("addresses", addresses, (None,), INT32, state.words)
    expect("values", values, addresses.shape, INT32, state.words)
    count = addresses.shape[0]
    if count:
        scatter_words_kernel[(triton.cdiv(count, PAIRS),)](state.words, addresses, values, count, BLOCK=PAIRS)


def prepare(
    state: SlotState,
    slots: Tensor,
    starts: Tensor,
    most: Tensor,
    drafts: Tensor,
    block_size: int,
    laid: int,
    *,
    cu: Tensor,
    context_lens: Tensor,
    token_ids: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
) -> None:
    """A step's rows, [R] each (see Row: slot, start or −1, num_tokens at most), become what a forward pass reads.

    Writes cu [R + 1], context_lens [R], and the first cu[R] of token_ids, positions and slot_mapping [T], as
    worker_svc/inputs.py has them; the rest of those is token 0 at position 0, written to slot −1, which is nowhere.
    Counts the rows' positions as computed. T must be no less than the sum of `most`, and no slot but the null slot
    there twice: nobody looks. A null row, (0, 0, 1), computes position 0 of the null block. All are int32. Raises
    ValueError naming the argument.

    `drafts` [R]: so many positions more of each row, for what lies behind its slot's tokens, held or not; they are not
    counted as computed. `laid`: of rows of one token, the positions that each one has, whatever its drafts: those that
    are too many come first, are computed a second time and written nowhere, so a slot must know as many tokens; 0: as
    many as it has.
    """
    rows = slots.shape[0]
    if not 0 < rows <= MAX_ROWS:
        raise ValueError(f"slots has {rows} rows: must be from 1 to {MAX_ROWS}")
    for name, tensor in (("slots", slots), ("starts", starts), ("most", most), ("drafts", drafts)):
        expect(name, tensor, (rows,), INT32, state.words)
    expect("context_lens", context_lens, (rows,), INT32, state.words)
    expect("cu", cu, (rows + 1,), INT32, state.words)
    tokens = token_ids.shape[0]
    for name, tensor in (("token_ids", token_ids), ("positions", positions), ("slot_mapping", slot_mapping)):
        expect(name, tensor, (tokens,), INT32, state.words)
    prepare_rows_kernel[(1,)](
        slots, starts, most, drafts, state.lengths, state.computed, cu, context_lens, rows, laid,
        BLOCK=triton.next_power_of_2(rows),
    )  # fmt: skip
    prepare_tokens_kernel[(rows + 1, triton.cdiv(tokens, TOKENS))](
        slots, drafts, cu, context_lens, state.token_ids, state.block_tables, token_ids, positions, slot_mapping,
        rows, tokens, laid, state.token_ids.stride(0), state.block_tables.stride(0),
        BLOCK_SIZE=block_size, BLOCK=TOKENS,
    )  # fmt: skip


def token_adapters(state: SlotState, slots: Tensor, cu: Tensor, index: Tensor) -> None:
    """index [T]: that of the adapter of each token's slot; 0 behind the last row. slots [R] and cu [R + 1] as `prepare`
    has them, all int32; of a state that has adapters. Raises ValueError naming the argument.
    """
    expect("slots", slots, (None,), INT32, state.words)
    rows = slots.shape[0]
    expect("cu", cu, (rows + 1,), INT32, state.words)
    expect("index", index, (None,), INT32, state.words)
    expect("adapters", state.adapters, state.lengths.shape, INT32, state.words)
    tokens = index.shape[0]
    token_adapters_kernel[(rows + 1, triton.cdiv(tokens, TOKENS))](
        slots, cu, state.adapters, index, rows, tokens, BLOCK=TOKENS
    )


def append_tokens(state: SlotState, slots: Tensor, sampled: Tensor, counts: Tensor) -> None:
    """The first counts[i] of sampled[i] go to the end of slots[i]; slots and counts [R], sampled [R, K], all int32. Its
    drafts are dropped.

    0 for a row that does not sample; null rows are left out. Slots must have the room: nobody looks.
    """
    expect("slots", slots, (None,), INT32, state.words)
    rows = slots.shape[0]
    expect("sampled", sampled, (rows, None), INT32, state.words)
    expect("counts", counts, (rows,), INT32, state.words)
    if rows:
        append_tokens_kernel[(rows,)](
            slots, sampled, counts, state.token_ids, state.lengths, state.drafts,
            sampled.stride(0), state.token_ids.stride(0), MOST=triton.next_power_of_2(max(1, sampled.shape[1])),
        )  # fmt: skip


def ahead() -> Iterator[Ahead]:
    words = ("words", "addresses", "values")
    yield Ahead(scatter_words_kernel, "any", {**dict.fromkeys(words, "*i32"), "count": "i32"}, {"BLOCK": PAIRS})
    rows = ("slots", "starts", "most", "drafts", "lengths", "computed", "cu", "context_lens")
    of_slots = ("slots", "drafts", "cu", "context_lens", "all_token_ids", "block_tables")
    tokens = (*of_slots, "token_ids", "positions", "slot_mapping")
    numbers = ("num_rows", "num_tokens", "laid", "tokens_stride", "tables_stride")
    appended = ("slots", "sampled", "counts", "all_token_ids", "lengths", "drafts")
    for most in (64, MAX_ROWS):
        signature = {**dict.fromkeys(rows, "*i32"), "num_rows": "i32", "laid": "i32"}
        yield Ahead(prepare_rows_kernel, f"{most} rows", signature, {"BLOCK": most})
    signature = {**dict.fromkeys(tokens, "*i32"), **dict.fromkeys(numbers, "i32")}
    constants = {"BLOCK_SIZE": 16, "BLOCK": TOKENS}
    yield Ahead(prepare_tokens_kernel, "blocks of 16", signature, constants)
    adapted = {**dict.fromkeys(("slots", "cu", "adapters", "index"), "*i32"), "num_rows": "i32", "num_tokens": "i32"}
    yield Ahead(token_adapters_kernel, "any", adapted, {"BLOCK": TOKENS})
    for most in (1, 8):
        signature = {**dict.fromkeys(appended, "*i32"), "sampled_stride": "i32", "tokens_stride": "i32"}
        yield Ahead(append_tokens_kernel, f"{most} a row", signature, {"MOST": most})

"""What a worker remembers of each running sequence: tokens, blocks and sampling parameters, one row a slot. numpy only.

    token_ids    |prompt …          |sampled …     |drafts| …  [max_slots + 1, max_model_len]
    computed     |=====================>                        positions whose KV is written
    lengths      |================================>             tokens known
    drafts                                         |======>     proposed after them
    block_tables |b0|b1|b2|…              |  null …            [max_slots + 1, ceil(max_model_len / block_size)]

Row 0 is the null slot and block 0 the null block. All of it follows from the Admits and the rows since: nothing here
has to survive a worker. A plan that contradicts the table is refused by SlotError, a Fault that ends the epoch (R5):
going on would compute some other sequence's tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from protos.wire import Admit, Copy, Row, Sampling, StepPlan

# A slot's parameters as a row of an array, so that a step's worth of them is one indexing.
PARAMS = np.dtype(
    [
        ("seed", np.uint64),
        ("temperature", np.float32),
        ("min_p", np.float32),
        ("top_k", np.int64),
        ("top_p", np.float64),
        ("repetition", np.float32),
        ("presence", np.float32),
        ("frequency", np.float32),
        ("min_tokens", np.int64),
        ("logprobs", np.int64),
        ("prompt_logprobs", np.int64),
        ("prompt_logprobs_from", np.int64),
    ]
)


POOLINGS = ("", "last", "mean", "cls")  # by their numbers in a table
MAX_FLOAT = float(np.finfo(np.float32).max)


class SlotError(ValueError):
    """A plan that this worker cannot follow: it and the scheduler disagree about a slot."""


class SlotTable:
    """`copy` does what a plan says of blocks and host blocks; None: this worker keeps none of those."""

    def __init__(
        self,
        *,
        max_slots: int,
        max_model_len: int,
        block_size: int,
        num_blocks: int,
        vocab_size: int,
        copy: Callable[[list[Copy]], None] | None = None,
    ) -> None:
        self._copy = copy
        self.max_slots, self.max_model_len, self.block_size = max_slots, max_model_len, block_size
        self.num_blocks, self.vocab_size = num_blocks, vocab_size
        self.reset()

    def reset(self) -> None:
        """Forgets every slot. Pages of the tables are taken from the system only as they are written."""
        rows = self.max_slots + 1
        self.token_ids = np.zeros((rows, self.max_model_len), np.int32)
        self.lengths = np.zeros(rows, np.int64)
        self.prompt_lens = np.zeros(rows, np.int64)
        self.limits = np.zeros(rows, np.int64)  # the longest that the sequence may become
        self.drafts = np.zeros(rows, np.int64)
        self.computed = np.full(rows, -1, np.int64)  # −1: admitted, and no row yet has said where the cache ends
        self.block_tables = np.zeros((rows, -(-self.max_model_len // self.block_size)), np.int32)
        self.block_counts = np.zeros(rows, np.int64)
        self.params = np.zeros(rows, PARAMS)
        self.pooling = np.zeros(rows, np.int8)  # number of each slot's in POOLINGS
        self.sampling: list[Sampling | None] = [None] * rows  # None: the slot is free
        self.domains = [b""] * rows
        self.admissions = np.zeros(rows, np.int64)  # tells a slot's holder from the one before, for memos
        self._admitted = 0

    def apply(self, plan: StepPlan) -> None:
        """Release, admit, copies, then what the rows bring (blocks, forced tokens): the order of the wire."""
        for slot in plan.release:
            self._release(slot)
        for admit in plan.admit:
            self._admit(admit)
        if plan.copies and self._copy:
            self._copy(plan.copies)
        elif plan.copies:
            raise SlotError(f"step {plan.step} copies blocks to or from the host, where this worker keeps none")
        seen: set[int] = set()
        for row in plan.rows:
            if row.slot in seen:
                raise SlotError(f"step {plan.step} has two rows for slot {row.slot}")
            seen.add(row.slot)
            self._bring(row)

    def append(self, slot: int, token_ids: Sequence[int]) -> int:
        """Adds sampled or forced tokens; answers with the length before."""
        start = int(self.lengths[slot])
        end = start + len(token_ids)
        if end > self.max_model_len:
            raise SlotError(f"slot {slot} would hold {end} tokens, more than max_model_len {self.max_model_len}")
        self.token_ids[slot, start:end] = self._checked_tokens(slot, token_ids)
        self.lengths[slot] = end
        self.drafts[slot] = 0
        return start

    def append_each(
        self, slots: NDArray[np.int64], token_ids: NDArray[np.int64], positions: NDArray[np.int64] | None = None
    ) -> None:
        """Adds token_ids[i], which was sampled, to slots[i], and drops its drafts. No slot twice, unless at `positions`
        that follow each other.
        """
        positions = self.lengths[slots] if positions is None else positions
        if positions.max(initial=0) >= self.max_model_len:
            full = slots[positions.argmax()]
            raise SlotError(f"slot {full} would hold more tokens than max_model_len {self.max_model_len}")
        self.token_ids[slots, positions] = token_ids
        self.lengths[slots] = positions + 1  # the last one stays
        self.drafts[slots] = 0

    def propose(self, slot: int, token_ids: Sequence[int] | NDArray[np.int32]) -> None:
        """Puts drafts behind the slot's tokens, in place of those before."""
        start = int(self.lengths[slot])
        self.token_ids[slot, start : start + len(token_ids)] = token_ids
        self.drafts[slot] = len(token_ids)

    def output_ids(self, slot: int) -> NDArray[np.int32]:
        """View of the tokens after the prompt."""
        return self.token_ids[slot, self.prompt_lens[slot] : self.lengths[slot]]

    def held(self, slot: int) -> Sampling:
        """The sampling parameters of a slot that is in use. Raises SlotError for any other."""
        sampling = self.sampling[slot] if 0 < slot <= self.max_slots else None
        if sampling is None:
            raise SlotError(f"slot {slot} is not admitted")
        return sampling

    def _release(self, slot: int) -> None:
        self.held(slot)
        self.sampling[slot] = None
        self.block_tables[slot, : self.block_counts[slot]] = 0
        self.block_counts[slot] = self.lengths[slot] = self.prompt_lens[slot] = self.drafts[slot] = 0
        self.computed[slot] = -1

    def _admit(self, admit: Admit) -> None:
        slot, num_tokens = admit.slot, len(admit.token_ids)
        if not 0 < slot <= self.max_slots:
            raise SlotError(f"slot {slot} is not in 1..{self.max_slots}")
        if self.sampling[slot] is not None:
            raise SlotError(f"slot {slot} is admitted twice without a release")
        if not 0 < admit.prompt_len <= num_tokens:
            raise SlotError(f"slot {slot} is admitted with prompt_len {admit.prompt_len} of {num_tokens} tokens")
        if admit.adapter:
            raise SlotError(f"slot {slot} wants adapter {admit.adapter!r}, which is not loaded")
        sampling = admit.sampling
        if not 0 <= sampling.seed < 1 << 64:
            raise SlotError(f"slot {slot} has the seed {sampling.seed}, not an unsigned number of 64 bits")
        if admit.pooling not in POOLINGS:
            raise SlotError(f"slot {slot} is to be pooled by {admit.pooling!r}, none of {', '.join(POOLINGS[1:])}")
        self.sampling[slot] = sampling
        self._admitted += 1
        self.admissions[slot] = self._admitted
        self.prompt_lens[slot] = admit.prompt_len
        self.limits[slot] = min(admit.prompt_len + sampling.max_tokens, self.max_model_len)
        self.domains[slot] = admit.domain
        self.pooling[slot] = POOLINGS.index(admit.pooling)
        self.append(slot, admit.token_ids)
        self.add_blocks(slot, admit.block_ids)
        self.params[slot] = (
            sampling.seed,
            within(0.0, sampling.temperature, MAX_FLOAT),
            within(0.0, sampling.min_p, 1.0),
            sampling.top_k,
            within(0.0, sampling.top_p, 1.0),
            within(0.0, sampling.repetition_penalty, MAX_FLOAT),
            within(-MAX_FLOAT, sampling.presence_penalty, MAX_FLOAT),
            within(-MAX_FLOAT, sampling.frequency_penalty, MAX_FLOAT),
            sampling.min_tokens,
            sampling.logprobs,
            sampling.prompt_logprobs,
            sampling.prompt_logprobs_from,
        )

    def _bring(self, row: Row) -> None:
        self.held(row.slot)
        if row.new_block_ids:
            self.add_blocks(row.slot, row.new_block_ids)
        if row.append_token_ids:
            self.append(row.slot, row.append_token_ids)

    def add_blocks(self, slot: int, block_ids: Sequence[Sequence[int]]) -> None:
        """To the end of its table, of each KV group."""
        if len(block_ids) != 1:
            raise SlotError(f"slot {slot} gets blocks of {len(block_ids)} KV groups, where this worker has 1")
        new = np.asarray(block_ids[0], np.int64)
        if not new.size:
            return
        if new.min() < 1 or new.max() >= self.num_blocks:
            raise SlotError(f"slot {slot} gets blocks {new.min()}..{new.max()}, where 1..{self.num_blocks - 1} exist")
        begin = int(self.block_counts[slot])
        end = begin + new.size
        if end > self.block_tables.shape[1]:
            raise SlotError(f"slot {slot} gets {end} blocks, more than max_model_len {self.max_model_len} can use")
        self.block_tables[slot, begin:end] = new
        self.block_counts[slot] = end

    def _checked_tokens(self, slot: int, token_ids: Sequence[int]) -> NDArray[np.int64]:
        tokens = np.asarray(token_ids, np.int64)
        if tokens.size and (tokens.min() < 0 or tokens.max() >= self.vocab_size):
            bad = tokens[(tokens < 0) | (tokens >= self.vocab_size)][0]
            raise SlotError(f"slot {slot} gets token {bad}, not in the vocabulary of {self.vocab_size}")
        return tokens


def within(least: float, value: float, greatest: float) -> float:
    """The nearest that is a float32 and has a meaning; NaN is `least`. Frontends refuse what is outside: this keeps a
    mistake of theirs from ending a worker.
    """
    return max(least, min(value, greatest))

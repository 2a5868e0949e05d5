"""What requests ask to change in their logits, as flat lists of (row, token): sparse, however large the vocabulary.

Everything here follows from a slot's sampling parameters and its tokens. What is kept between steps is a memo of that:
it catches up with the token table and is built anew for another holder of the slot, so penalties have the same bits
after a crash or a preemption. numpy only.
"""

from __future__ import annotations

from array import array
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from protos.wire import Sampling
from worker_svc.inputs import Ints
from worker_svc.sampling_rules import StepMask
from worker_svc.slots import MAX_FLOAT, SlotTable, within

NONE: Final = np.zeros(0, np.int64)


class Edits(NamedTuple):
    """Flat indices are row * vocab_size + token; within one list they differ."""

    bias_at: Ints
    bias: NDArray[np.float32]
    ban_at: Ints
    penalty_at: Ints  # each distinct token of a penalized row
    penalty_rows: Ints
    penalty_counts: Ints  # how often it is in the row's output; 0 for one that is in the prompt alone


class TokenCounts:
    """The distinct tokens of a sequence, and how often each is in its output."""

    def __init__(self) -> None:
        self.token_ids, self.counts = array("q"), array("q")
        self._index: dict[int, int] = {}
        self._length = 0

    def catch_up(self, token_ids: NDArray[np.int32], prompt_len: int) -> None:
        """`token_ids` are all of the sequence's; those seen before are not looked at again."""
        for position, token in enumerate(token_ids[self._length :].tolist(), self._length):
            at = self._index.setdefault(token, len(self._index))
            if at == len(self.token_ids):
                self.token_ids.append(token)
                self.counts.append(0)
            self.counts[at] += position >= prompt_len
        self._length = len(token_ids)

    def after(self, drafts: list[int]) -> tuple[Ints, Ints]:
        """The distinct tokens and their counts with `drafts` in the output, too; they are not remembered."""
        new = [token for token in dict.fromkeys(drafts) if token not in self._index]
        # np.array copies: a view of the growing arrays would forbid them to grow.
        distinct = np.concatenate((np.array(self.token_ids, np.int64), np.array(new, np.int64)))
        counts = np.concatenate((np.array(self.counts, np.int64), np.zeros(len(new), np.int64)))
        for token in drafts:
            at = self._index.get(token)
            counts[len(self.token_ids) + new.index(token) if at is None else at] += 1
        return distinct, counts


class SlotEdits:
    """One slot's wishes, with tokens that the model does not have left out: they can never be sampled."""

    def __init__(self, sampling: Sampling, vocab_size: int) -> None:
        def known(token_ids: tuple[int, ...]) -> Ints:
            return np.array(sorted({t for t in token_ids if 0 <= t < vocab_size}), np.int64)

        bias: dict[int, float] = {}
        for token, value in sampling.logit_bias:
            if 0 <= token < vocab_size:
                bias[token] = bias.get(token, 0.0) + value
        self.bias_ids = np.array(list(bias), np.int64)
        self.bias = np.array([within(-MAX_FLOAT, value, MAX_FLOAT) for value in bias.values()], np.float32)
        self.single_bans = known(tuple(word[0] for word in sampling.bad_words if len(word) == 1))
        self.long_words = [
            word for word in sampling.bad_words if len(word) > 1 and all(0 <= t < vocab_size for t in word)
        ]
        self.min_tokens = sampling.min_tokens
        self.end_ids = known(sampling.eos_token_ids + sampling.stop_token_ids)
        penalties = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)
        self.counts = TokenCounts() if penalties != (1.0, 0.0, 0.0) else None
        self.any = bool(
            len(bias) or len(self.single_bans) or self.long_words or self.min_tokens or self.counts is not None
        )

    def bans(self, output_ids: NDArray[np.int32], allowed: NDArray[np.bool_] | None) -> Ints:
        """Bad words whose beginning the output ends with, and end tokens that come too early.

        Where a grammar allows nothing but an end (`allowed`, [V]), the text ends: min_tokens cannot lengthen it.
        """
        bans = [self.single_bans]
        for word in self.long_words:
            start = len(word) - 1
            if len(output_ids) >= start and tuple(output_ids[-start:].tolist()) == word[:-1]:
                bans.append(np.array(word[-1:], np.int64))
        if len(output_ids) < self.min_tokens and not self.must_end(allowed):
            bans.append(self.end_ids)
        return np.unique(np.concatenate(bans))

    def must_end(self, allowed: NDArray[np.bool_] | None) -> bool:
        """Whether a grammar allows nothing but an end."""
        return allowed is not None and int(allowed.sum()) == int(allowed[self.end_ids].sum())


class LogitEditor:
    """Memo of SlotEdits by slot."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.reset()

    def edits(self, slots: SlotTable, ids: Ints, positions: Ints, masks: StepMask | None) -> Edits | None:
        """For logits whose row i is slot ids[i]'s behind its tokens up to positions[i], drafts included; rows ascend in
        each list. None: no edit.
        """
        bias_at: list[Ints] = []
        bias: list[NDArray[np.float32]] = []
        ban_at: list[Ints] = []
        penalty_at: list[Ints] = []
        penalty_rows: list[Ints] = []
        penalty_counts: list[Ints] = []
        for row in self._wishing(slots, ids):
            slot, position = int(ids[row]), int(positions[row])
            wishes, prompt_len = self._slots[slot], int(slots.prompt_lens[slot])
            base = row * self.vocab_size
            bias_at.append(base + wishes.bias_ids)
            bias.append(wishes.bias)
            output = slots.token_ids[slot, prompt_len:position]
            ban_at.append(base + wishes.bans(output, None if masks is None else masks.allowed(row)))
            if wishes.counts is not None:
                known = int(slots.lengths[slot])
                wishes.counts.catch_up(slots.token_ids[slot, :known], prompt_len)
                distinct, counts = wishes.counts.after(slots.token_ids[slot, known:position].tolist())
                penalty_at.append(base + distinct)
                penalty_counts.append(counts)
                penalty_rows.append(np.full(len(distinct), row, np.int64))
        if not ban_at:
            return None
        return Edits(
            bias_at=np.concatenate(bias_at),
            bias=np.concatenate(bias),
            ban_at=np.concatenate(ban_at),
            penalty_at=np.concatenate([NONE, *penalty_at]),
            penalty_rows=np.concatenate([NONE, *penalty_rows]),
            penalty_counts=np.concatenate([NONE, *penalty_counts]),
        )

    def reset(self) -> None:
        self._slots: dict[int, SlotEdits] = {}  # of holders that wish for something
        self._known = self._wishes = NONE  # by slot: the admission that was looked at, and whether it wishes

    def _wishing(self, slots: SlotTable, ids: Ints) -> list[int]:
        """Rows whose slots wish for something; looks at each holder of a slot once."""
        if len(self._known) != len(slots.admissions):
            self._known, self._wishes = np.zeros_like(slots.admissions), np.zeros_like(slots.admissions)
        admissions = slots.admissions[ids]
        for slot in ids[admissions != self._known[ids]].tolist():
            wishes = SlotEdits(slots.held(slot), self.vocab_size)
            self._known[slot], self._wishes[slot] = slots.admissions[slot], wishes.any
            if wishes.any:
                self._slots[slot] = wishes
        return np.flatnonzero(self._wishes[ids]).tolist()

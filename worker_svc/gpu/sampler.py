"""The sampler's launches, and what the words that come back say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.gpu import logit_edits, sampling
from kernels.gpu.grammar_mask import mask_logits
from kernels.gpu.logprobs import logprobs
from kernels.gpu.slot_state import SlotState
from kernels.gpu.speculation import COUNTS, DRAFTED, LENGTHS
from protos.wire import RowResult, StepPlan, TokenLogprobs
from worker_svc.gpu.pooling import vectors_by_row
from worker_svc.gpu.sample_words import PackedSampling, SampleShape
from worker_svc.gpu.step_words import PackedStep, StepShape, Words
from worker_svc.inputs import StepInputs
from worker_svc.results import row_results
from worker_svc.sampling_rules import NONE_ALLOWED, NOT_NUMBERS, SamplerError

SCORED_AT_ONCE = 64  # a prompt's positions of which logits are held
_TROUBLES = {sampling.NOT_NUMBERS: NOT_NUMBERS, sampling.NONE_ALLOWED: NONE_ALLOWED}

Score = Callable[[Tensor, Tensor], None]  # positions [q] of the step's tokens, and where their logits go [q, vocab]


class Sampler:
    """Belongs to one stream. Its memory is as large as a step's logits, where steps are edited, and allocated then."""

    def __init__(self, state: SlotState, max_rows: int) -> None:
        self._state = state
        words = torch.zeros(2, max_rows, dtype=torch.int32, device=state.words.device)
        self._tokens: Tensor = words[0]
        self._status: Tensor = words[1]

    def sample(self, logits: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        """logits [S, vocab] of slots [S], null slots among them, at positions [S] → token ids [S]. What is captured."""
        rows = len(slots)
        tokens = self._tokens[:rows]
        sampling.sample(logits, slots, self._state, positions, tokens, self._status[:rows])
        return tokens

    def sample_edited(
        self, logits: Tensor, slots: Tensor, positions: Tensor, shape: SampleShape, words: Tensor
    ) -> Tensor:
        """The same, of logits as a grammar and the requests change them; `logits` stay as they are."""
        rows = len(slots)
        before = torch.empty_like(self._status[:rows])
        sampling.check(logits, before)
        edited = self._edited(logits, slots, positions, shape, words)
        tokens = self._tokens[:rows]
        sampling.sample(edited, slots, self._state, positions, tokens, self._status[:rows], before)
        return tokens

    def take(
        self,
        logits: Tensor,
        outcome: Tensor,
        shape: SampleShape,
        words: Tensor | None,
        score: Score,
        results: Tensor,
    ) -> None:
        """Tokens [S], status [S], the rows' outcome [3, Q], then log probabilities of sampled and of prompt tokens,
        into `results`.
        """
        rows = len(logits)
        first = 2 * rows + outcome.numel()
        results[: 2 * rows].view(2, rows).copy_(torch.stack((self._tokens[:rows], self._status[:rows])))
        results[2 * rows : first].view_as(outcome).copy_(outcome)
        if words is None:
            return
        *_, wanted, scored, targets, _ = words.split(shape.sizes)
        width = 2 + 2 * shape.num_top
        if shape.logprobs:
            out = results[first : first + shape.logprobs * width].view(-1, width)
            logprobs(logits, wanted, self._tokens.index_select(0, wanted), shape.num_top, out)
        if not shape.scored:
            return
        first, width = first + shape.logprobs * width, 2 + 2 * shape.scored_top
        for part, target in zip(scored.split(SCORED_AT_ONCE), targets.split(SCORED_AT_ONCE), strict=True):
            of_part = torch.empty(len(part), logits.shape[1], dtype=torch.float32, device=logits.device)
            score(part, of_part)
            out = results[first : first + len(part) * width].view(-1, width)
            each = torch.arange(len(part), dtype=torch.int32, device=logits.device)
            logprobs(of_part, each, target, shape.scored_top, out)
            first += len(part) * width

    def _edited(self, logits: Tensor, slots: Tensor, positions: Tensor, shape: SampleShape, words: Tensor) -> Tensor:
        (
            mask_rows, bitmask, bias_at, bias, bans, early, until, word_rows, borders, word_prompts, word_tokens,
            penalized, penalty_prompts, rates, rows, masks, *_,
        ) = words.split(shape.sizes)  # fmt: skip
        edited, state = logits.clone(memory_format=torch.contiguous_format), self._state
        bitmask = bitmask.view(shape.masks, shape.mask_words)
        if shape.masks:
            mask_logits(edited, bitmask, mask_rows)
        logit_edits.add_bias(edited, bias_at, bias.view(torch.float32))
        logit_edits.ban(edited, bans)
        logit_edits.ban_until(edited, early, until, positions)
        if shape.words:
            logit_edits.ban_words(edited, slots, state, word_rows, borders, word_tokens, word_prompts, positions)
        of_rates = rates.view(torch.float32).view(3, shape.penalized)
        logit_edits.penalize(edited, slots, state, penalized, penalty_prompts, of_rates, positions)
        logit_edits.lift(edited, logits, rows, masks, bitmask)
        return edited


def counts_of(words: Words, shape: StepShape, inputs: StepInputs) -> Words:
    """[Q] how many tokens each row was given that samples, null rows aside."""
    first = 2 * shape.outputs + shape.samples
    return words[first : first + len(np.unique(inputs.sample_rows))]


def read_results(words: Words, plan: StepPlan, packed: PackedStep, sampled: PackedSampling) -> list[RowResult]:
    """In the plan's row order. Raises SamplerError where a row could not be sampled."""
    step = packed.shape
    tokens, status = words[: 2 * step.outputs].astype(np.int64).reshape(2, -1)[:, packed.outputs]
    inputs, starts, kept = _stood(words, packed)
    if status[kept].any():
        bad = kept[np.flatnonzero(status[kept])[0]]
        slot = packed.inputs.slots[packed.inputs.sample_rows[bad]]
        raise SamplerError(f"slot {slot}: {_TROUBLES[int(status[bad])]}")
    shape, first = sampled.shape, 2 * step.outputs + 3 * step.samples
    width = 2 + 2 * shape.num_top
    own = words[first:][: shape.logprobs * width].reshape(-1, width)
    entries: list[TokenLogprobs | None] = [None] * len(tokens)
    for row, entry in zip(sampled.wanted, _entries(own, tokens[sampled.wanted].tolist(), sampled.tops), strict=True):
        entries[row] = entry
    width, first = 2 + 2 * shape.scored_top, first + own.size
    scored = words[first:][: shape.scored * width].reshape(-1, width)
    scores = _entries(scored, sampled.targets, sampled.scored_tops)
    pooled = vectors_by_row(words[first + scored.size :], sampled.pooled)
    own_entries = [entries[i] for i in kept.tolist()]
    return row_results(plan, inputs, starts, tokens[kept], own_entries, scores, pooled=pooled)


def _stood(words: Words, packed: PackedStep) -> tuple[StepInputs, list[int], NDArray[np.int64]]:
    """The step's inputs with the outputs that count alone, the slots' lengths before, and which outputs those are."""
    inputs, shape = packed.inputs, packed.shape
    rows, begins, laid = np.unique(inputs.sample_rows, return_index=True, return_counts=True)
    outcome = words[2 * shape.outputs :][: 3 * shape.samples].reshape(3, -1)[:, : len(rows)]
    starts, drafts = packed.starts.copy(), np.zeros_like(packed.starts)
    starts[rows], drafts[rows] = outcome[LENGTHS], outcome[DRAFTED]
    within = np.arange(len(inputs.sample_rows)) - np.repeat(begins, laid)
    kept = np.flatnonzero(within < np.repeat(outcome[COUNTS], laid))
    stood = replace(
        inputs, num_drafts=drafts, sample_rows=inputs.sample_rows[kept], sample_tokens=inputs.sample_tokens[kept]
    )
    return stood, starts.tolist(), kept


def _entries(words: Words, tokens: Sequence[int], tops: Sequence[int]) -> list[TokenLogprobs]:
    most = words.shape[1] // 2 - 1
    floats = words.view(np.float32)
    return [
        TokenLogprobs(
            int(token),
            float(scores[0]),
            int(row[1]),
            tuple(row[2 : 2 + min(n, most)].tolist()),
            tuple(scores[2 + most : 2 + most + min(n, most)].tolist()),
        )
        for row, scores, token, n in zip(words, floats, tokens, tops, strict=True)
    ]

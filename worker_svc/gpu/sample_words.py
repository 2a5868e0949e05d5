"""What a step's sampling needs besides what lies on the device: masks, edits, and whose log probabilities are wanted.

The words go up when the step is sampled, since a mask may come that late (R3). Most steps have none at all, and then
their sampling is replayed.

    mask rows [M] | bitmask [M, W] | bias at [B], by [B] | bans [N] | bans at [D], below a position [D] | words: rows
    [K], borders [K + 1], prompts [K], tokens [X] | penalties: rows [P], prompts [P], rates [3, P] | edited rows [E],
    their masks [E] | logprob rows [L] | scored positions [Q], the tokens there [Q] | what is pooled (pooling.py)

Rows are outputs, by their place on the device; floats are their bits. What follows from a slot's tokens is decided
there, for each output by the tokens before it, drafts among them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from protos.wire import Mask, StepPlan
from worker_svc.gpu.pooling import PoolPacker, PoolShape
from worker_svc.gpu.step_words import PackedStep, Words
from worker_svc.logit_edits import SlotEdits
from worker_svc.sampling_rules import StepMask, step_mask
from worker_svc.slots import SlotTable


@dataclass(frozen=True)
class SampleShape:
    """How many there are of each: what the launches depend on."""

    masks: int = 0
    mask_words: int = 0  # of one
    biases: int = 0
    bans: int = 0
    early: int = 0
    words: int = 0
    word_tokens: int = 0
    penalized: int = 0
    edited: int = 0
    logprobs: int = 0
    num_top: int = 0  # alternatives of those, the most that one wants
    scored: int = 0
    scored_top: int = 0
    pools: PoolShape = field(default_factory=PoolShape)

    @property
    def edits(self) -> bool:
        return bool(self.masks or self.edited)

    @property
    def sizes(self) -> list[int]:
        """Of the parts, in their order."""
        borders = self.words + 1 if self.words else 0
        words = [self.words, borders, self.words, self.word_tokens]
        penalties = [self.penalized, self.penalized, 3 * self.penalized]
        asked = [self.logprobs, self.scored, self.scored]
        return [
            self.masks, self.masks * self.mask_words, self.biases, self.biases, self.bans, self.early, self.early,
            *words, *penalties, self.edited, self.edited, *asked, sum(self.pools.sizes),
        ]  # fmt: skip

    def extra_results(self) -> int:
        """Words that log probabilities take back; pooled outputs come behind them."""
        return self.logprobs * (2 + 2 * self.num_top) + self.scored * (2 + 2 * self.scored_top)


@dataclass(frozen=True)
class PackedSampling:
    """`tops` and `scored_tops` are how many alternatives each output and each prompt token wants."""

    words: Words | None
    shape: SampleShape
    wanted: list[int]  # [L] outputs whose log probabilities are
    tops: list[int]  # [L]
    targets: list[int]  # [Q] the prompt tokens that are scored
    scored_tops: list[int]  # [Q]
    pooled: list[int] = field(default_factory=list)  # [E] rows of the plan whose pooled output comes


class SamplePacker:
    """Keeps what each slot's holder wishes for, and nothing that its admission does not say."""

    def __init__(self, slots: SlotTable) -> None:
        self._slots, self._vocab_size, self._pools = slots, slots.vocab_size, PoolPacker(slots)
        self._wishes: dict[int, tuple[int, SlotEdits]] = {}  # by slot: of which admission

    def pack(self, plan: StepPlan, packed: PackedStep, mask: Mask | None) -> PackedSampling:
        """Raises SamplerError where the mask is not that of the plan, SlotError where a prompt cannot be pooled."""
        inputs, slots = packed.inputs, self._slots
        masks = step_mask(plan, inputs, mask, self._vocab_size)
        edits = self._edits(packed, masks)
        params = slots.params[inputs.slots[inputs.sample_rows]]
        wanted = np.flatnonzero(params["logprobs"] >= 0)
        tops = params["logprobs"][wanted].tolist()
        scored = inputs.prompt_logprob_tokens
        of_scored = inputs.slots[inputs.prompt_logprob_rows]
        scored_tops = slots.params["prompt_logprobs"][of_scored].tolist()
        targets = slots.token_ids[of_scored, inputs.positions[scored] + 1]
        pools = self._pools.pack(inputs)
        outputs = packed.outputs
        parts = [*_mask_parts(masks, outputs), *edits.parts(), outputs[wanted], scored, targets, pools.words]
        shape = SampleShape(
            masks=0 if masks is None else len(masks.words),
            mask_words=0 if masks is None else masks.words.shape[1],
            biases=len(edits.bias_at),
            bans=len(edits.ban_at),
            early=len(edits.early_at),
            words=len(edits.word_rows),
            word_tokens=len(edits.word_tokens),
            penalized=len(edits.penalty_rows),
            edited=len(edits.rows),
            logprobs=len(wanted),
            num_top=min(max(tops, default=0), self._vocab_size),
            scored=len(scored),
            scored_top=min(max(scored_tops, default=0), self._vocab_size),
            pools=pools.shape,
        )
        words = np.concatenate([np.asarray(part).astype(np.int32, copy=False).ravel() for part in parts])
        return PackedSampling(
            words if len(words) else None, shape, wanted.tolist(), tops, targets.tolist(), scored_tops, pools.rows
        )

    def _edits(self, packed: PackedStep, masks: StepMask | None) -> _Edits:
        edits, inputs, vocab = _Edits(), packed.inputs, self._vocab_size
        for i, slot in enumerate(inputs.sample_slots.tolist()):
            wishes = self._of(slot)
            if not wishes.any:
                continue
            row = int(packed.outputs[i])
            edits.rows.append(row)
            edits.masks.append(-1 if masks is None else int(masks.rows[i]))
            prompt = int(self._slots.prompt_lens[slot])
            edits.ban_at += (row * vocab + wishes.single_bans).tolist()
            until = prompt + wishes.min_tokens
            may_be_early = packed.least[inputs.sample_rows[i]] < until
            if may_be_early and not wishes.must_end(None if masks is None else masks.allowed(i)):
                edits.early_at += (row * vocab + wishes.end_ids).tolist()
                edits.until += [until] * len(wishes.end_ids)
            edits.bias_at += (row * vocab + wishes.bias_ids).tolist()
            edits.bias += wishes.bias.view(np.int32).tolist()
            for word in wishes.long_words:
                edits.word_rows.append(row)
                edits.word_prompts.append(prompt)
                edits.word_tokens += word
                edits.borders.append(len(edits.word_tokens))
            if wishes.counts is not None:
                edits.penalty_rows.append(row)
                edits.penalty_prompts.append(prompt)
                of = self._slots.params[slot]
                edits.rates.append([float(of[name]) for name in ("repetition", "frequency", "presence")])
        return edits

    def _of(self, slot: int) -> SlotEdits:
        admission = int(self._slots.admissions[slot])
        known = self._wishes.get(slot)
        if known is None or known[0] != admission:
            known = self._wishes[slot] = admission, SlotEdits(self._slots.held(slot), self._vocab_size)
        return known[1]


@dataclass
class _Edits:
    """Lists by row; `rows` are those of all of them."""

    bias_at: list[int] = field(default_factory=list)
    bias: list[int] = field(default_factory=list)
    ban_at: list[int] = field(default_factory=list)
    early_at: list[int] = field(default_factory=list)
    until: list[int] = field(default_factory=list)
    word_rows: list[int] = field(default_factory=list)
    borders: list[int] = field(default_factory=lambda: [0])
    word_prompts: list[int] = field(default_factory=list)
    word_tokens: list[int] = field(default_factory=list)
    penalty_rows: list[int] = field(default_factory=list)
    penalty_prompts: list[int] = field(default_factory=list)
    rates: list[list[float]] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    masks: list[int] = field(default_factory=list)

    def parts(self) -> list[NDArray[np.int32] | list[int]]:
        rates = np.array(self.rates, np.float32).reshape(-1, 3).T.copy().view(np.int32)
        return [
            self.bias_at, self.bias, self.ban_at, self.early_at, self.until,
            self.word_rows, self.borders if self.word_rows else [], self.word_prompts, self.word_tokens,
            self.penalty_rows, self.penalty_prompts, rates, self.rows, self.masks,
        ]  # fmt: skip


def _mask_parts(masks: StepMask | None, places: NDArray[np.int64]) -> list[NDArray[np.int32]]:
    """Which output each mask is for, by its place, and the masks."""
    if masks is None:
        return []
    outputs = np.full(len(masks.words), -1, np.int32)
    masked = np.flatnonzero(masks.rows >= 0)
    outputs[masks.rows[masked]] = places[masked]
    return [outputs, masks.words.view(np.int32)]

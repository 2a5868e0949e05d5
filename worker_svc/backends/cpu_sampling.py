"""The sampler of the cpu backend: a plan's outputs as the arrays that the C library reads, and its answers as results.

What is sampled, and how, is csrc/sampling.inc's; the semantics are those of worker_svc/sampler.py, to the token. numpy
and ctypes only.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kernels.cpu.library import PARAMS, Model, Samples
from protos.wire import Mask, StepPlan, TokenLogprobs
from worker_svc.inputs import Ints, StepInputs
from worker_svc.logit_edits import LogitEditor
from worker_svc.sampling_rules import NONE_ALLOWED, NOT_NUMBERS, SamplerError, step_mask
from worker_svc.slots import SlotTable

Scores = tuple[NDArray[np.float64], Ints, Ints, NDArray[np.float64]]  # logprobs, ranks [S]; top ids, logprobs [S, most]
_BY_SLOT = tuple(name for name in PARAMS.names or () if name != "position")


class Outputs(Samples):
    """What a step samples: the library's struct, and the arrays that it writes to. [S] of inputs.sample_rows."""

    slots: Ints
    sampled: Ints
    asked: NDArray[np.void]  # PARAMS
    edited: bool  # a slot of them wishes for edits, if perhaps not in this step
    num_top: NDArray[np.int32]  # −1: no logprobs wanted
    scores: Scores | None


class CpuSampler:
    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._editor = LogitEditor(vocab_size)
        self.reset()

    def reset(self) -> None:
        """A new epoch."""
        self._editor.reset()
        self._params = np.zeros(0, PARAMS)  # by slot, without the position
        self._known = np.zeros(0, np.int64)  # by slot: the admission whose parameters those are

    def prepare(self, plan: StepPlan, inputs: StepInputs, slots: SlotTable, mask: Mask | None) -> Outputs:
        """May be called before the forward, of which nothing here depends. Raises SamplerError for a mask that does
        not fit the plan.
        """
        ids, positions = inputs.sample_slots, inputs.sample_positions
        masks = step_mask(plan, inputs, mask, self.vocab_size)
        edits = self._editor.edits(slots, ids, positions, masks)
        params = self._params_of(slots, ids, positions)
        out = Outputs(len(ids))
        out.slots, out.sampled, out.num_top = ids, np.empty(len(ids), np.int64), params["logprobs"]
        out.asked, out.edited = params, edits is not None
        out.point(tokens=inputs.sample_tokens, params=params, token_ids=out.sampled)
        if edits is not None:
            out.num_bias, out.num_bans, out.num_penalties = map(len, (edits.bias_at, edits.ban_at, edits.penalty_at))
            out.point(bias_at=edits.bias_at, bias=edits.bias, ban_at=edits.ban_at)
            out.point(penalty_at=edits.penalty_at, penalty_counts=edits.penalty_counts)
        if masks is not None:
            out.point(mask_rows=masks.rows, bitmask=masks.words)
        out.scores = None
        most = int(out.num_top.max(initial=-1))
        if most >= 0:
            out.max_top = min(most, self.vocab_size)
            tops = len(ids), out.max_top
            out.scores = np.empty(len(ids)), np.empty(len(ids), np.int64), np.empty(tops, np.int64), np.empty(tops)
            out.point(**dict(zip(("logprobs", "ranks", "top_ids", "top_logprobs"), out.scores, strict=True)))
        return out

    @staticmethod
    def finish(out: Outputs) -> tuple[Ints, list[TokenLogprobs | None]]:
        """Tokens and their scores, None where not asked for, once the library has been called; also where that call
        failed: raises SamplerError for the first slot that could not be sampled.
        """
        if len(out.sampled) and out.sampled.min() < 0:
            output = int(np.argmax(out.sampled < 0))
            reason = NONE_ALLOWED if out.sampled[output] == -2 else NOT_NUMBERS
            raise SamplerError(f"slot {out.slots[output]}: {reason}")
        entries: list[TokenLogprobs | None] = [None] * len(out.sampled)
        if out.scores is None:
            return out.sampled, entries
        wanted = np.flatnonzero(out.num_top >= 0)
        logprobs, ranks, top_ids, top_logprobs = out.scores
        scores = logprobs[wanted], ranks[wanted], top_ids[wanted], top_logprobs[wanted]
        for row, entry in zip(wanted.tolist(), _told(out.sampled[wanted], out.num_top[wanted], scores), strict=True):
            entries[row] = entry
        return out.sampled, entries

    def prompt_logprobs(self, model: Model, inputs: StepInputs, slots: SlotTable) -> list[TokenLogprobs]:
        """Scores of the next prompt tokens for inputs.prompt_logprob_tokens, of `model`'s last forward."""
        tokens = inputs.prompt_logprob_tokens
        if not len(tokens):
            return []
        ids = inputs.slots[inputs.prompt_logprob_rows]
        scored = slots.token_ids[ids, inputs.positions[tokens] + 1].astype(np.int64)
        of_slot = {slot: min(slots.held(slot).prompt_logprobs, self.vocab_size) for slot in set(ids.tolist())}
        num_top = np.array([of_slot[slot] for slot in ids.tolist()], np.int32)
        return _told(scored, num_top, model.score(tokens, scored, num_top))

    def _params_of(self, slots: SlotTable, ids: Ints, positions: Ints) -> NDArray[np.void]:
        """[S] PARAMS. A slot's are put together once for each holder."""
        if len(self._known) != len(slots.admissions):
            self._params, self._known = np.zeros(len(slots.admissions), PARAMS), np.zeros_like(slots.admissions)
        admissions = slots.admissions[ids]
        for slot in ids[admissions != self._known[ids]].tolist():
            self._known[slot] = slots.admissions[slot]
            for name in _BY_SLOT:
                self._params[name][slot] = slots.params[name][slot]
        params = self._params[ids]
        params["position"] = positions
        return params


def _told(token_ids: Ints, num_top: NDArray[np.int32], scores: Scores) -> list[TokenLogprobs]:
    """[Q] of each, of whose alternatives a row has min(num_top, vocabulary)."""
    logprobs, ranks, top_ids, top_logprobs = scores
    return [
        TokenLogprobs(token, value, rank, tuple(ids[:n]), tuple(values[:n]))
        for token, n, value, rank, ids, values in zip(
            token_ids.tolist(),
            num_top.tolist(),
            logprobs.tolist(),
            ranks.tolist(),
            top_ids.tolist(),
            top_logprobs.tolist(),
            strict=True,
        )
    ]

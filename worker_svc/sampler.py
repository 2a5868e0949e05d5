"""From logits to tokens, on any torch device, exactly as the house fixes it; the same bits for a row in whatever batch.

Order: mask, bad words, logit_bias, min_tokens, penalties, temperature, min_p, top_k, top_p, then the greatest of
logit / temperature + gumbel(seed, position, token). Rows of temperature 0 take the greatest logit instead.

Ties are broken by the lower token id everywhere: among equal logits the lower id is the likelier token. Therefore
  min_p keeps tokens with logit ≥ max + ln(min_p), top_k the k likeliest, and
  top_p the shortest run of likeliest tokens whose share of what min_p and top_k left reaches top_p, one at least.

That a row never depends on its batch follows from the operations used. Elementwise ones and maxima have no order; sums
of probabilities, which would, are sums of integers: exp(logit − max) in units of 2⁻⁴⁰.

A row fails only for what the model computed or a grammar forbids, never for what a request asks for, since other
people's streams are in the same step: no edit takes a logit beyond LIMIT, and bans that leave nothing are lifted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.philox import MAX_GUMBEL, gumbel
from protos.wire import Mask, StepPlan, TokenLogprobs
from worker_svc.inputs import Ints, StepInputs
from worker_svc.logit_edits import Edits, LogitEditor
from worker_svc.sampling_rules import GREEDY_BELOW, LIMIT, NONE_ALLOWED, NOT_NUMBERS, SamplerError, StepMask, step_mask
from worker_svc.slots import SlotTable

UNIT: Final = 2.0**40  # of integer weights: 2¹⁸ tokens of weight 1 still fit an int64
LOGITS_AT_ONCE: Final = 1 << 19  # so many of all rows: the temporaries are several times as large


@dataclass(frozen=True)
class Sampled:
    token_ids: Ints  # [S]
    logprobs: list[TokenLogprobs | None]  # [S]; None where not asked for


class Survivors(NamedTuple):
    """Tokens that may still be sampled, of all rows, flat: [n] each. Grouped by row."""

    rows: Tensor
    ids: Tensor
    logits: Tensor  # divided by the temperature


class Sampler:
    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._editor = LogitEditor(vocab_size)

    def reset(self) -> None:
        """A new epoch. Only the memory of memos is at stake: they tell one holder of a slot from the next."""
        self._editor.reset()

    def sample(
        self, logits: Tensor, plan: StepPlan, inputs: StepInputs, slots: SlotTable, mask: Mask | None
    ) -> Sampled:
        """`logits` float32 [S, V] of inputs.sample_tokens; left as they are. Appends nothing. Raises SamplerError."""
        ids, positions = inputs.sample_slots, inputs.sample_positions
        params = slots.params[ids]
        masks = step_mask(plan, inputs, mask, self.vocab_size)
        _check(logits, ids)
        edited = self._edit(logits, params, self._editor.edits(slots, ids, positions, masks), masks)
        if masks is not None:
            _check(edited, ids)
        tokens = np.zeros(len(ids), np.int64)
        greedy = params["temperature"] < GREEDY_BELOW
        chosen = _rows(edited, np.flatnonzero(greedy))
        tokens[greedy] = torch.argmax(chosen, dim=-1).cpu().numpy()  # the first of equals: documented, and tested
        cut = _cuts(params, self.vocab_size)
        for group in (np.flatnonzero(~greedy & cut), np.flatnonzero(~greedy & ~cut)):
            for rows in _batches(len(group), self.vocab_size):
                part = group[rows]
                tokens[part] = _draw(_rows(edited, part), params[part], positions[part])
        return Sampled(tokens, self._logprobs(logits, tokens, params["logprobs"]))

    def prompt_logprobs(
        self, logits: Tensor, inputs: StepInputs, slots: SlotTable, first: int = 0
    ) -> list[TokenLogprobs]:
        """Scores of the next prompt tokens for inputs.prompt_logprob_tokens[first : first + Q]; `logits` [Q, V]."""
        part = slice(first, first + len(logits))
        ids = inputs.slots[inputs.prompt_logprob_rows[part]]
        scored = slots.token_ids[ids, inputs.positions[inputs.prompt_logprob_tokens[part]] + 1]
        num_top = [slots.held(slot).prompt_logprobs for slot in ids.tolist()]
        return token_logprobs(logits, scored.astype(np.int64), num_top)

    def _logprobs(self, logits: Tensor, tokens: Ints, num_top: Ints) -> list[TokenLogprobs | None]:
        entries: list[TokenLogprobs | None] = [None] * len(tokens)
        wanted = np.flatnonzero(num_top >= 0)
        scores = token_logprobs(_rows(logits, wanted), tokens[wanted], num_top[wanted].tolist())
        for row, score in zip(wanted.tolist(), scores, strict=True):
            entries[row] = score
        return entries

    def _edit(self, logits: Tensor, params: NDArray[np.void], edits: Edits | None, masks: StepMask | None) -> Tensor:
        if edits is None and masks is None:
            return logits
        edited = logits.clone(memory_format=torch.contiguous_format)
        forbidden = {
            row: ~torch.from_numpy(allowed).to(logits.device)
            for row in range(len(logits))
            if masks is not None and (allowed := masks.allowed(row)) is not None
        }
        for row, bits in forbidden.items():
            edited[row].masked_fill_(bits, -math.inf)
        if edits is not None:
            _apply(edited.view(-1), params, edits)
            for row in (edited.amax(-1) == -math.inf).nonzero()[:, 0].tolist():
                edited[row] = logits[row].masked_fill(forbidden[row], -math.inf) if row in forbidden else logits[row]
        return edited


def _apply(flat: Tensor, params: NDArray[np.void], edits: Edits) -> None:
    """In place. A ban is −inf and stays so under a bias and any penalty."""

    def put(values: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(values).to(flat.device)

    at = put(edits.bias_at)
    flat[at] = _bounded(flat[at] + put(edits.bias))
    flat[put(edits.ban_at)] = -math.inf
    at, counts, of_row = put(edits.penalty_at), put(edits.penalty_counts), params[edits.penalty_rows]
    repetition, frequency, presence = (put(of_row[name].copy()) for name in ("repetition", "frequency", "presence"))
    values = flat[at]
    banned = values == -math.inf
    values = _bounded(torch.where(values > 0, values / repetition, values * repetition))
    values = _bounded(values - _bounded(frequency * counts))
    values = _bounded(values - presence * (counts > 0))
    flat[at] = values.masked_fill_(banned, -math.inf)


def _bounded(values: Tensor) -> Tensor:
    """A ban stays one."""
    return torch.where(values == -math.inf, values, values.clamp(-LIMIT, LIMIT))


def _draw(logits: Tensor, params: NDArray[np.void], positions: Ints) -> Ints:
    """[n] tokens for `logits` [n, V] after edits, at absolute `positions` [n]."""
    device = logits.device
    temperature = torch.from_numpy(params["temperature"].copy()).to(device)
    seeds = torch.from_numpy(params["seed"].copy().view(np.int64)).to(device)
    at = torch.from_numpy(positions).to(device)
    # Adding 0 turns −0 into +0, so that equal logits have equal bits (see _ordered).
    scaled = logits / temperature[:, None] + 0.0
    floor = _floors(scaled, params)
    cuts = _cuts(params, logits.shape[1])
    if cuts.any():
        rows, ids, values = _filter(scaled, floor, params)
    else:
        rows, ids, values = _flat(scaled, scaled >= torch.maximum(floor, _hopeless(scaled, seeds, at))[:, None])
    scores = values + gumbel(seeds[rows], at[rows], ids)
    best = scores.new_full((len(logits),), -math.inf).scatter_reduce(0, rows, scores, "amax")
    winners = scores == best[rows]
    tokens = torch.full_like(at, logits.shape[1]).scatter_reduce(0, rows[winners], ids[winners], "amin")
    return tokens.cpu().numpy()


def _cuts(params: NDArray[np.void], vocab_size: int) -> NDArray[np.bool_]:
    """[n] rows that top_k or top_p cut: their tokens have to be put in order."""
    return (_top_k(params, vocab_size) < vocab_size) | (params["top_p"] < 1)


def _top_k(params: NDArray[np.void], vocab_size: int) -> Ints:
    return np.where(params["top_k"] > 0, np.minimum(params["top_k"], vocab_size), vocab_size)


def _floors(scaled: Tensor, params: NDArray[np.void]) -> Tensor:
    """[n] the least logit that min_p keeps, or the k-th greatest where that is more; never −inf, which is banned."""
    top_k = _top_k(params, scaled.shape[1])
    with np.errstate(divide="ignore"):
        floor = scaled.amax(-1) + torch.from_numpy(np.log(params["min_p"])).to(scaled.device)
    for k in np.unique(top_k[top_k < scaled.shape[1]]).tolist():
        of_k = np.flatnonzero(top_k == k)
        floor[of_k] = torch.maximum(floor[of_k], torch.topk(_rows(scaled, of_k), k).values[:, -1])
    return floor.clamp(min=torch.finfo(floor.dtype).min)


def _hopeless(scaled: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """[n] logits below which a token loses to the likeliest one whatever its noise, which costs most of all here."""
    value, index = scaled.max(-1)
    score = value + gumbel(seeds, positions, index)
    return score - MAX_GUMBEL - score.abs() * 1e-6  # rounding errors are ten times less


def _filter(scaled: Tensor, floor: Tensor, params: NDArray[np.void]) -> Survivors:
    """min_p, top_k and top_p, in this order; `floor` is from _floors."""
    vocab_size, device = scaled.shape[1], scaled.device
    top = scaled.amax(-1)
    keep = scaled >= floor[:, None]
    top_k = _top_k(params, vocab_size)
    totals = torch.zeros(len(scaled), dtype=torch.int64, device=device)
    nucleus = np.flatnonzero(top_k == vocab_size)
    if len(nucleus):
        # All tokens of a weight below (1 − p) · total / V together weigh less than (1 − p) · total: top_p drops them.
        weights = _weights(_rows(scaled, nucleus), top[nucleus, None]) * _rows(keep, nucleus)
        total = totals[nucleus] = weights.sum(-1)
        tail = (1 - 1e-9) * (1 - torch.from_numpy(params["top_p"][nucleus]).to(device)) / vocab_size
        keep[nucleus] &= weights >= (tail * total).to(torch.int64)[:, None]
    return _cut(_ordered(_flat(scaled, keep)), top, top_k, params["top_p"], totals)


def _flat(scaled: Tensor, keep: Tensor) -> Survivors:
    """By row, then by id."""
    rows, ids = keep.nonzero(as_tuple=True)
    return Survivors(rows, ids, scaled[rows, ids])


def _ordered(survivors: Survivors) -> Survivors:
    """By row, then from the likeliest: by logit down, then by id up (the order that `survivors` come in)."""
    bits = survivors.logits.view(torch.int32).to(torch.int64)
    ascending = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # a float's bits, made to sort as integers do
    order = torch.argsort((survivors.rows << 33) - ascending, stable=True)
    return Survivors(*(part[order] for part in survivors))


def _cut(ordered: Survivors, top: Tensor, top_k: Ints, top_p: NDArray[np.float64], totals: Tensor) -> Survivors:
    """Ends each row of `ordered` where top_k and then top_p end it.

    `totals` [n]: what a row's tokens weighed before top_p; 0 where `ordered` has them all.
    """
    rows = ordered.rows
    sizes = torch.bincount(rows, minlength=len(top))
    begins = torch.cumsum(sizes, 0) - sizes
    rank = torch.arange(len(rows), device=top.device) - begins[rows]
    # Where several tokens have the k-th logit, more than k have come this far.
    kept = rank < torch.from_numpy(top_k).to(top.device)[rows]

    weights = _weights(ordered.logits, top[rows]) * kept
    before = torch.cumsum(weights, 0) - weights  # over all rows: may wrap, but differences do not mind
    before -= before[begins][rows]
    totals = torch.where(totals > 0, totals, torch.zeros_like(totals).index_add(0, rows, weights))
    share = torch.from_numpy(top_p.copy()).to(top.device)
    target = torch.ceil(share * totals).to(torch.int64).clamp(min=1)
    kept &= (before < target[rows]) | (share >= 1)[rows]
    return Survivors(*(part[kept] for part in ordered))


def token_logprobs(logits: Tensor, token_ids: Ints, num_top: Sequence[int]) -> list[TokenLogprobs]:
    """Scores of `token_ids` [Q] under the distributions of `logits` [Q, V], each with its num_top likeliest tokens."""
    entries: list[TokenLogprobs] = []
    for part in _batches(len(token_ids), logits.shape[1]):
        entries += _score(logits[part] + 0.0, token_ids[part], num_top[part])
    return entries


def _score(logits: Tensor, token_ids: Ints, num_top: Sequence[int]) -> list[TokenLogprobs]:
    top = logits.amax(-1)
    if not bool(torch.isfinite(top).all()):
        raise SamplerError(NOT_NUMBERS)
    totals = _weights(logits, top[:, None]).sum(-1)
    norm = top.double() + torch.log(totals.double() / UNIT)
    ids = torch.from_numpy(token_ids).to(logits.device)[:, None]
    chosen = logits.gather(1, ids)
    lower = torch.arange(logits.shape[1], device=logits.device) < ids
    ranks = 1 + ((logits > chosen) | ((logits == chosen) & lower)).sum(-1)
    tops = _tops(logits, norm, max(num_top, default=0))
    values = (chosen[:, 0].double() - norm).tolist()
    return [
        TokenLogprobs(int(token), value, rank, tuple(i for i, _ in best[:n]), tuple(v for _, v in best[:n]))
        for token, value, rank, best, n in zip(token_ids, values, ranks.tolist(), tops, num_top, strict=True)
    ]


def _tops(logits: Tensor, norm: Tensor, count: int) -> list[list[tuple[int, float]]]:
    """The `count` likeliest tokens of each row and their logprobs, or a few more."""
    tops: list[list[tuple[int, float]]] = [[] for _ in logits]
    count = min(count, logits.shape[1])
    if count > 0:
        floor = torch.topk(logits, count).values[:, -1:]
        rows, ids, values = _ordered(_flat(logits, logits >= floor))
        scores = values.double() - norm[rows]
        for row, token, score in zip(rows.tolist(), ids.tolist(), scores.tolist(), strict=True):
            tops[row].append((token, score))
    return tops


def _weights(logits: Tensor, top: Tensor) -> Tensor:
    """int64 exp(logit − top) in units of 2⁻⁴⁰: sums of these are exact, so they have no order."""
    return (torch.exp(logits - top) * UNIT).to(torch.int64)


def _batches(count: int, vocab_size: int) -> Iterator[slice]:
    """Rows that are worked on together. Which ones they are shows in the time alone."""
    size = max(1, LOGITS_AT_ONCE // vocab_size)
    return (slice(begin, begin + size) for begin in range(0, count, size))


def _rows(matrix: Tensor, rows: Ints) -> Tensor:
    """matrix[rows] for ascending rows; all of them are the matrix itself, uncopied."""
    return matrix if len(rows) == len(matrix) else matrix[torch.from_numpy(rows).to(matrix.device)]


def _check(logits: Tensor, ids: Ints) -> None:
    top = logits.amax(-1) if len(logits) else logits.new_zeros(0)
    sound = top.abs() <= LIMIT
    if not bool(sound.all()):
        row = int((~sound).nonzero()[0, 0])
        trouble = NONE_ALLOWED if float(top[row]) == -math.inf else NOT_NUMBERS
        raise SamplerError(f"slot {ids[row]}: {trouble}")

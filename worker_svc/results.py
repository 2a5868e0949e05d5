"""A step's answer: what was sampled, in the plan's row order. numpy only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from protos.wire import Row, RowResult, StepPlan, TokenLogprobs
from worker_svc.inputs import Ints, StepInputs
from worker_svc.slots import SlotTable
from worker_svc.speculation.verify import accept

_NONE: Final[Mapping[int, bytes]] = MappingProxyType({})


def build_results(
    plan: StepPlan,
    inputs: StepInputs,
    slots: SlotTable,
    token_ids: Ints,
    logprobs: Sequence[TokenLogprobs | None],
    prompt_logprobs: Sequence[TokenLogprobs] = (),
    pooled: Mapping[int, bytes] = _NONE,
) -> list[RowResult]:
    """One result a row of the plan; appends the sampled tokens to the slots, but for those behind a draft that fell.

    `token_ids` [S] and `logprobs` [S] (None: not asked for) belong to inputs.sample_rows, `prompt_logprobs` [Q] to
    inputs.prompt_logprob_rows; `pooled` is by row.
    """
    starts = slots.lengths[inputs.slots].tolist()
    counts = accept(inputs, slots, token_ids)
    return row_results(plan, inputs, starts, token_ids, logprobs, prompt_logprobs, counts, pooled)


def row_results(
    plan: StepPlan,
    inputs: StepInputs,
    starts: list[int],
    token_ids: Ints,
    logprobs: Sequence[TokenLogprobs | None],
    prompt_logprobs: Sequence[TokenLogprobs] = (),
    counts: NDArray[np.bool_] | None = None,
    pooled: Mapping[int, bytes] = _NONE,
) -> list[RowResult]:
    """As `build_results`, for slots that know the tokens already; `starts` [R] are their lengths before.

    `counts` [S]: which of the tokens are the stream's; None: all of them.
    """
    drafts = inputs.num_drafts
    if len(token_ids) == len(starts) and not prompt_logprobs and not drafts.any():  # most steps
        return sampled_results(plan.rows, starts, token_ids.tolist(), logprobs)
    if counts is None:
        rows, tokens, entries = inputs.sample_rows.tolist(), token_ids.tolist(), logprobs
    else:
        kept = np.flatnonzero(counts)
        rows, tokens = inputs.sample_rows[kept].tolist(), token_ids[kept].tolist()
        entries = [logprobs[i] for i in kept.tolist()]
    of_rows: list[list[int]] = [[] for _ in starts]
    for i, token in zip(rows, tokens, strict=True):
        of_rows[i].append(token)
    slot_ids = inputs.slots.tolist()
    results = [
        RowResult(*each)
        for each in zip(slot_ids, starts, of_rows, _scores(rows, entries, len(starts)), drafts.tolist(), strict=True)
    ]
    for i, scores in _by_row(inputs, prompt_logprobs).items():
        results[i] = msgspec.structs.replace(results[i], prompt_logprobs=scores)
    for i, vector in pooled.items():
        results[i] = msgspec.structs.replace(results[i], pooled=vector)
    return results


def _scores(rows: list[int], entries: Sequence[TokenLogprobs | None], count: int) -> list[list[TokenLogprobs]]:
    """By row."""
    scores: list[list[TokenLogprobs]] = [[] for _ in range(count)]
    for i, entry in zip(rows, entries, strict=True):
        if entry is not None:
            scores[i].append(entry)
    return scores


def sampled_results(
    rows: Sequence[Row], starts: list[int], token_ids: list[int], logprobs: Sequence[TokenLogprobs | None]
) -> list[RowResult]:
    """Of rows that all sampled."""
    return [
        RowResult(row.slot, start, [token]) if entry is None else RowResult(row.slot, start, [token], [entry])
        for row, start, token, entry in zip(rows, starts, token_ids, logprobs, strict=True)
    ]


def _by_row(inputs: StepInputs, prompt_logprobs: Sequence[TokenLogprobs]) -> dict[int, list[TokenLogprobs]]:
    scored: dict[int, list[TokenLogprobs]] = {}
    for i, score in zip(inputs.prompt_logprob_rows.tolist(), prompt_logprobs, strict=True):
        scored.setdefault(i, []).append(score)
    return scored

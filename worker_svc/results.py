"""A step's answer: what was sampled, in the plan's row order. numpy only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

import msgspec

from protos.wire import Row, RowResult, StepPlan, TokenLogprobs
from worker_svc.inputs import Ints, StepInputs
from worker_svc.slots import SlotTable

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
    """One result a row of the plan; appends the sampled tokens to the slots.

    `token_ids` [S] and `logprobs` [S] (None: not asked for) belong to inputs.sample_rows, `prompt_logprobs` [Q] to
    inputs.prompt_logprob_rows; `pooled` is by row.
    """
    starts = slots.lengths[inputs.slots].tolist()
    slots.append_each(inputs.slots[inputs.sample_rows], token_ids)
    return row_results(plan, inputs, starts, token_ids, logprobs, prompt_logprobs, pooled)


def row_results(
    plan: StepPlan,
    inputs: StepInputs,
    starts: list[int],
    token_ids: Ints,
    logprobs: Sequence[TokenLogprobs | None],
    prompt_logprobs: Sequence[TokenLogprobs] = (),
    pooled: Mapping[int, bytes] = _NONE,
) -> list[RowResult]:
    """As `build_results`, for slots that know the tokens already; `starts` [R] are their lengths before."""
    if len(token_ids) == len(starts) and not prompt_logprobs:  # most steps
        return sampled_results(plan.rows, starts, token_ids.tolist(), logprobs)
    results = [RowResult(row.slot, start, []) for row, start in zip(plan.rows, starts, strict=True)]
    for i, token, entry in zip(inputs.sample_rows.tolist(), token_ids.tolist(), logprobs, strict=True):
        results[i] = RowResult(results[i].slot, starts[i], [token], [] if entry is None else [entry])
    for i, scores in _by_row(inputs, prompt_logprobs).items():
        results[i] = msgspec.structs.replace(results[i], prompt_logprobs=scores)
    for i, vector in pooled.items():
        results[i] = msgspec.structs.replace(results[i], pooled=vector)
    return results


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

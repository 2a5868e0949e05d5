"""A step's answer: what was sampled, in the plan's row order. numpy only."""

from __future__ import annotations

from collections.abc import Sequence

from protos.wire import RowResult, StepPlan, TokenLogprobs
from worker_svc.inputs import Ints, StepInputs
from worker_svc.slots import SlotTable


def build_results(
    plan: StepPlan,
    inputs: StepInputs,
    slots: SlotTable,
    token_ids: Ints,
    logprobs: Sequence[TokenLogprobs | None],
    prompt_logprobs: Sequence[TokenLogprobs] = (),
) -> list[RowResult]:
    """One result a row of the plan; appends the sampled tokens to the slots.

    `token_ids` [S] and `logprobs` [S] (None: not asked for) belong to inputs.sample_rows, `prompt_logprobs` [Q] to
    inputs.prompt_logprob_rows.
    """
    sampled = {row: i for i, row in enumerate(inputs.sample_rows.tolist())}
    scored: dict[int, list[TokenLogprobs]] = {}
    for i, score in zip(inputs.prompt_logprob_rows.tolist(), prompt_logprobs, strict=True):
        scored.setdefault(i, []).append(score)
    results = []
    for i, row in enumerate(plan.rows):
        ids: list[int] = []
        entries: list[TokenLogprobs] = []
        if (at := sampled.get(i)) is not None:
            ids = [int(token_ids[at])]
            entry = logprobs[at]
            entries = [] if entry is None else [entry]
        start = slots.append(row.slot, ids)
        results.append(RowResult(row.slot, start, ids, entries, prompt_logprobs=scored.get(i, [])))
    return results

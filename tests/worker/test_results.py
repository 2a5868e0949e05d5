from __future__ import annotations

import sys
from subprocess import run

import numpy as np
import pytest

from protos.wire import Admit, Epoch, Row, RowResult, Sampling, StepPlan, TokenLogprobs
from worker_svc.inputs import build_inputs
from worker_svc.results import build_results
from worker_svc.slots import SlotTable


def step() -> tuple[StepPlan, SlotTable]:
    """Three rows: a sampling one, the middle of a prompt, another sampling one."""
    slots = SlotTable(max_slots=3, max_model_len=16, block_size=4, num_blocks=13, vocab_size=50)
    admit = [
        Admit(slot, list(range(6)), 6, [[4 * slot - 3, 4 * slot - 2]], Sampling(max_tokens=4, prompt_logprobs=0))
        for slot in (1, 2, 3)
    ]
    rows = [Row(3, 0, 6, sample=True), Row(1, 0, 3), Row(2, 5, 1, sample=True)]
    plan = StepPlan(Epoch(1, 1), 1, [], admit, [], rows)
    slots.apply(plan)
    return plan, slots


def score(token: int) -> TokenLogprobs:
    return TokenLogprobs(token, -1.0, 1)


def test_one_result_a_row_in_the_plans_order() -> None:
    plan, slots = step()
    inputs = build_inputs(plan, slots)
    assert inputs.prompt_logprob_rows.tolist() == [0] * 5 + [1] * 3
    prompt = [score(token) for token in (1, 2, 3, 4, 5, 1, 2, 3)]
    results = build_results(plan, inputs, slots, np.array([40, 41]), [score(40), None], prompt)
    assert results == [
        RowResult(3, 6, [40], [score(40)], prompt_logprobs=prompt[:5]),
        RowResult(1, 6, [], prompt_logprobs=prompt[5:]),
        RowResult(2, 6, [41]),
    ]
    assert [slots.output_ids(slot).tolist() for slot in (1, 2, 3)] == [[], [41], [40]]


def test_a_missing_score_is_an_error() -> None:
    plan, slots = step()
    inputs = build_inputs(plan, slots)
    with pytest.raises(ValueError, match="shorter"):
        build_results(plan, inputs, slots, np.array([40, 41]), [None, None], [score(1)])


def test_nothing_above_the_backend_imports_torch() -> None:
    modules = "slots inputs results logit_edits models.checkpoint"
    code = (
        f"import sys; [__import__('worker_svc.' + m) for m in '{modules}'.split()]; assert 'torch' not in sys.modules"
    )
    run([sys.executable, "-c", code], check=True)

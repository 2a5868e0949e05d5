"""How many drafts are asked for: as many as pay, none where none do. Workers here take as long as their tables say."""

from __future__ import annotations

from typing import Any

import pytest

from protos.wire import StepPlan
from scheduler_svc.engine.config import EngineConfig
from scheduler_svc.engine.speculation import LONGEST_PAUSE, PROBES, Costs, Record
from tests.engine.world import Table, World, request

# Seconds by positions: rows beside one cost next to nothing up to 8, and from 16 on each costs the same.
CPU: Table = ((1, 0.008), (8, 0.0085), (16, 0.0115), (32, 0.02), (64, 0.035), (128, 0.067))


def world(
    quality: float, table: Table = CPU, *, num_drafts: int = 7, proposing: Table = (), real: Table = (), **config: Any
) -> World:
    """`real`: how long steps take, where that is not what the table says."""
    costs = Costs(real or table, proposing)
    settings: dict[str, Any] = {"max_num_seqs": 16, "max_step_tokens": 256, "depth": 2, **config}
    return World(
        EngineConfig(num_drafts=num_drafts, **settings),
        num_blocks=600,
        quality=quality,
        seconds=costs.step,
        step_seconds=table,
        propose_seconds=proposing,
    )


def serve(w: World, count: int, max_tokens: int) -> float:
    """Tokens a second of `count` streams."""
    w.ready()
    begun = w.now
    for i in range(count):
        w.submit(request(f"r{i}", [i + 1] * 4, max_tokens, seed=i))
    w.run()
    w.check_ends()
    return count * max_tokens / (w.now - begun)


def drafts(plans: list[StepPlan]) -> float:
    rows = [row.num_drafts for plan in plans for row in plan.rows]
    return sum(rows) / len(rows)


@pytest.mark.parametrize("proposing", [(), ((1, 0.0003), (16, 0.001)), ((1, 0.003), (16, 0.006))])
@pytest.mark.parametrize("streams", [1, 4, 16])
@pytest.mark.parametrize("quality", [0.0, 0.2, 0.5, 0.8, 0.95, 1.0])
def test_it_never_loses(streams: int, quality: float, proposing: Table) -> None:
    without = serve(world(quality, num_drafts=0), streams, 300)
    assert serve(world(quality, proposing=proposing), streams, 300) >= 0.95 * without


@pytest.mark.parametrize("quality", [0.2, 0.5, 0.8])
def test_prompts_are_not_kept_waiting_for_it(quality: float) -> None:
    """Most of each step is prompts: there a draft takes as long as a token of theirs, and is one less often."""

    def tokens_per_second(num_drafts: int) -> float:
        w = world(quality, num_drafts=num_drafts, max_step_tokens=64)
        w.ready()
        begun = w.now
        for i in range(48):
            w.submit(request(f"r{i}", [1 + i % 31, 2 + i // 31, *range(1, 29), *range(1, 31)], 16, seed=i))
        w.run()
        w.check_ends()
        return 48 * 16 / (w.now - begun)

    assert tokens_per_second(7) >= 0.97 * tokens_per_second(0)


@pytest.mark.parametrize(("streams", "quality", "times"), [(1, 1.0, 5.5), (1, 0.8, 2.5), (4, 0.8, 1.8), (16, 1.0, 1.2)])
def test_it_wins_where_drafts_are_right(streams: int, quality: float, times: float) -> None:
    without = serve(world(quality, num_drafts=0), streams, 300)
    assert serve(world(quality), streams, 300) >= times * without


def test_none_are_asked_for_where_they_are_wrong_but_for_a_look() -> None:
    w = world(0.0)
    serve(w, 16, 300)
    late = w.plans[60:]
    looks = [plan.step for plan in late if any(row.num_drafts for row in plan.rows)]
    assert 0 < len(looks) <= len(late) / PROBES
    assert drafts(late) < 0.03
    asked = {plan.num_propose for plan in late}
    assert asked == {0, 2}


def test_costly_proposals_are_not_worth_it() -> None:
    """A draft model as slow as the model itself."""
    slow = ((1, 0.008), (16, 0.0115))
    w = world(0.7, proposing=slow)
    serve(w, 4, 300)
    assert drafts(w.plans[60:]) < 0.3


def test_a_table_that_flatters_drafts_is_not_believed() -> None:
    """Steps with more than their sampling rows take thrice what was measured at the start."""
    real = ((1, 0.008), (2, 0.024), (16, 0.034), (128, 0.2))
    w = world(0.5, real=real)
    serve(w, 1, 400)
    assert drafts(w.plans[200:]) < 0.5


@pytest.mark.parametrize("table", [(), CPU])
def test_drafts_leave_room_for_everybodys_next_token_and_for_prompts(table: Table) -> None:
    w = world(1.0, table, real=CPU, max_num_seqs=16, max_step_tokens=20)
    w.ready()
    for i in range(16):
        w.submit(request(f"r{i}", [i + 1] * 4, 200, seed=i))
    for _ in range(40):
        w.land()
    full = w.plans[30:]
    assert all(len(plan.rows) == 16 for plan in full)
    w.run()
    w.check_ends()


def test_a_prompt_beside_them_is_not_kept_waiting() -> None:
    w = world(0.9, ((1, 0.001), (256, 0.256)))  # each position costs the same
    w.ready()
    for i in range(8):
        w.submit(request(f"r{i}", [i + 1] * 4, 200, seed=i))
    for _ in range(60):
        w.land()
    w.submit(request("long", 480, 4))
    begun = w.plans[-1].step
    while not w.streams["long", 0].token_ids:
        w.land()
    assert w.plans[-1].step - begun <= 6


def test_better_text_is_noticed() -> None:
    w = world(0.0)
    w.ready()
    w.submit(request("r", 4, 600))
    while len(w.streams["r", 0].token_ids) < 200:
        w.land()
    assert w.worker
    w.worker.draft_quality = 1.0
    noticed = len(w.plans)
    w.run()
    assert len(w.plans) - noticed < 2 * LONGEST_PAUSE + 400 / 5


def test_records_look_less_often_the_less_there_is() -> None:
    record, pauses = Record(), []
    for _ in range(6):
        record.learn(2, 2, 0)
        pauses.append(record.pause)
    assert pauses == [PROBES, 16, 32, LONGEST_PAUSE, LONGEST_PAUSE, LONGEST_PAUSE]
    record.learn(2, 0, 0)
    assert record.pause == LONGEST_PAUSE, "nothing held is nothing won"
    record.learn(2, 2, 2)
    assert record.pause == 1


def test_costs_are_lines_between_what_was_measured() -> None:
    costs = Costs(((8, 2.0), (1, 1.0), (16, 1.9)), ((1, 0.5), (3, 0.7)))
    assert [costs.step(n) for n in (0, 1, 8, 12, 16, 99)] == pytest.approx([1.0, 1.0, 2.0, 2.0, 2.0, 2.0])
    assert costs.step(4.5) == pytest.approx(1.5)
    assert costs.proposing(2, 3) == pytest.approx(1.8)
    assert Costs((), ()).proposing(5, 5) == 0.0
    assert Costs(((1, 1.0), (2, 3.0)), ()).step(4) == pytest.approx(7.0)

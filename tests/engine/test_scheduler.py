"""The scheduler on given plans and results: who moves by how much, who comes in, who leaves, how streams end."""

from __future__ import annotations

import gc
from typing import Any

import pytest

from protos.engine_wire import Abort, FinishReason, FrontendLost, Outputs
from protos.wire import Admit, Epoch, Row, RowResult, StepPlan, StepResult, TokenLogprobs
from scheduler_svc.engine.config import EngineConfig
from scheduler_svc.engine.events import Drain, WorkerReady
from scheduler_svc.engine.scheduler import Scheduler
from tests.engine.world import World, request


def world(*, ready: bool = True, num_blocks: int = 64, align: int = 1, max_model_len: int = 0, **config: Any) -> World:
    defaults = {"block_size": 4, "max_num_seqs": 4, "max_step_tokens": 64}
    made = World(
        EngineConfig(**{**defaults, **config}), num_blocks=num_blocks, align=align, max_model_len=max_model_len
    )
    if ready:
        made.ready()
    return made


def rows(plan: StepPlan) -> list[tuple[int, int, int, int, bool]]:
    return [(row.slot, row.start, row.num_tokens, row.num_drafts, row.sample) for row in plan.rows]


# ---------------------------------------------------------------- frontends


def test_a_frontend_aborts_its_own_alone_and_nobodys_name_aborts_any() -> None:
    w = world()
    w.submit(request("r", 6, 30, frontend="f"))
    w.send(Abort("r", frontend="g"))
    assert w.streams["r", 0].end is None
    w.send(Abort("r", frontend="f"))
    assert w.streams["r", 0].reason is FinishReason.ABORTED
    w.submit(request("s", 6, 30, frontend="f"))
    w.send(Abort("s"))
    assert w.streams["s", 0].reason is FinishReason.ABORTED
    w.run()


# ---------------------------------------------------------------- one arithmetic


def test_one_request_in_real_messages() -> None:
    w = world()
    submit = request("r", 6, 3)
    w.submit(submit)
    w.run()
    first, second, third = w.plans
    assert first.admit == [Admit(1, submit.token_ids, 6, [[1, 2]], submit.sampling, "", first.admit[0].domain)]
    assert first.rows == [Row(1, 0, 6, sample=True)]
    assert second.rows == [Row(1, 6, 1, sample=True)]
    assert third.rows == [Row(1, 7, 1, sample=True)]
    assert (first.step, second.step, third.step) == (1, 2, 3)
    w.check_ends()


def test_the_slot_is_released_with_the_next_plan() -> None:
    w = world()
    w.submit(request("r", 6, 1))
    w.run()
    w.submit(request("s", 6, 1))
    assert w.plans[-1].release == [1]
    w.run()
    w.check_ends()


def test_planning_goes_on_while_a_token_is_being_sampled() -> None:
    w = world(depth=3)
    w.submit(request("r", 6, 9))
    assert [rows(plan) for plan in w.plans] == [[(1, 0, 6, 0, True)], [(1, -1, 1, 0, True)], [(1, -1, 1, 0, True)]]
    w.run()
    w.check_ends()
    assert len(w.plans) == 9, "what is in flight may be all that it wants: no row is wasted on the limit"


def test_nothing_is_planned_behind_a_long_step() -> None:
    w = world(depth=2, long_step=4)
    w.submit(request("r", 6, 5))
    w.submit(request("s", 3, 5))
    assert [rows(plan) for plan in w.plans] == [[(1, 0, 6, 0, True)]], "who comes meanwhile is in the next"
    w.land()
    short = [(1, 6, 1, 0, True), (2, 0, 3, 0, True)]  # 4 positions
    assert [rows(plan) for plan in w.plans[1:]] == [short, [(1, -1, 1, 0, True), (2, -1, 1, 0, True)]]
    w.run()
    w.check_ends()


def test_behind_short_steps_more_are_planned_than_behind_others() -> None:
    w = world(depth=2, long_step=4, short_step=1, short_depth=3)
    w.submit(request("r", 6, 20))
    w.land()
    assert [rows(plan) for plan in w.plans[1:]] == [[(1, 6, 1, 0, True)], *[[(1, -1, 1, 0, True)]] * 2]
    w.submit(request("s", 1, 6))
    assert len(w.plans) == 4, "whoever comes waits for what is in flight"
    w.land()
    assert [rows(plan) for plan in w.plans[4:]] == [[(1, -1, 1, 0, True), (2, 0, 1, 0, True)]]
    w.land()
    assert len(w.plans) == 5, "behind two rows there are no three"
    w.run()
    w.check_ends()


def test_blocks_cover_drafts_as_if_all_were_accepted() -> None:
    w = world(depth=2, num_drafts=3, max_step_tokens=64)
    w.submit(request("r", 4, 30))
    assert [row.new_block_ids for plan in w.plans for row in plan.rows] == [[], [[2]]]  # hi 5 + 3 drafts: 8 positions
    w.land()
    assert w.plans[-1].rows[0].num_drafts == 3
    w.run()
    w.check_ends()


def test_drafts_stop_before_the_limit() -> None:
    w = world(num_drafts=3)
    w.quality = 0.0  # no draft is right
    w.ready()
    w.submit(request("r", 4, 5))
    w.run()
    assert [row.num_drafts for plan in w.plans for row in plan.rows] == [0, 3, 2, 1, 0]  # limit 9: hi + 1 + drafts ≤ 9
    w.check_ends()


@pytest.mark.parametrize(
    "field", [{"repetition_penalty": 1.1}, {"presence_penalty": 0.1}, {"frequency_penalty": -0.1}, {"min_tokens": 1}]
)
def test_counted_tokens_take_drafts_too(field: dict[str, Any]) -> None:
    w = world(num_drafts=3)
    w.submit(request("r", 4, 6, **field))
    w.run()
    assert any(row.num_drafts for plan in w.plans for row in plan.rows)
    w.check_ends()


def test_a_prompt_is_computed_in_chunks() -> None:
    w = world(max_step_tokens=10)
    w.submit(request("r", 24, 1))
    w.run()
    assert [rows(plan) for plan in w.plans] == [[(1, 0, 10, 0, False)], [(1, 10, 10, 0, False)], [(1, 20, 4, 0, True)]]


@pytest.mark.parametrize(("align", "starts"), [(1, [0, 10, 20]), (4, [0, 8, 16]), (8, [0, 8, 16])])
def test_chunks_start_on_multiples_of_align(align: int, starts: list[int]) -> None:
    w = world(max_step_tokens=10, align=align)
    w.submit(request("r", 24, 1))
    w.run()
    assert [row.start for plan in w.plans for row in plan.rows] == starts


def test_those_one_token_behind_go_first() -> None:
    w = world(max_step_tokens=8)
    w.submit(request("short", [3, 4], 9, seed=1))
    w.submit(request("long", 30, 2, priority=-1))
    w.run()
    assert [rows(plan) for plan in w.plans[1:4]] == [
        [(1, 2, 1, 0, True), (2, 0, 7, 0, False)],
        [(1, 3, 1, 0, True), (2, 7, 7, 0, False)],
        [(1, 4, 1, 0, True), (2, 14, 7, 0, False)],
    ]
    w.check_ends()


def test_admission_by_priority_then_arrival() -> None:
    w = world(ready=False, max_num_seqs=1)
    for name, priority in [("a", 1), ("b", 0), ("c", 1), ("d", 0)]:
        w.submit(request(name, 4, 1, seed=len(name), priority=priority))
    w.ready()
    w.run()
    ends = [delta.request_id for answer in w.answers for o in answer if isinstance(o, Outputs) for delta in o.items]
    assert ends == ["b", "d", "a", "c"]


# ---------------------------------------------------------------- how streams end


def answer(w: World, token_ids: list[int], logprobs: bool = False) -> None:
    """A result made by hand for the one row in flight; from here on the world's own worker is out of step."""
    flight = w.scheduler.devices[0].sent[0]
    row, settled = flight.plan.rows[0], flight.sequences[0].settled
    made = [TokenLogprobs(t, -1.0, 1) for t in token_ids] if logprobs else []
    result = RowResult(row.slot, settled, token_ids, made, num_drafted=len(token_ids) - 1)
    for instruction in w.scheduler.handle(StepResult(flight.plan.epoch, flight.plan.step, [result])):
        if isinstance(instruction, Outputs):
            w.streams["r", 0].deltas += instruction.items


@pytest.mark.parametrize(
    ("token_ids", "kept", "reason", "stop"),
    [
        ([5, 2, 7, 2], [5, 2], FinishReason.STOP, 2),
        ([5, 9, 2], [5, 9], FinishReason.STOP, 9),
        ([5, 6, 7, 8], [5, 6, 7], FinishReason.LENGTH, -1),
        ([5, 6, 2], [5, 6, 2], FinishReason.STOP, 2),
        ([5, 6], [5, 6], None, -1),
    ],
)
def test_results_are_cut_at_the_first_end(
    token_ids: list[int], kept: list[int], reason: FinishReason | None, stop: int
) -> None:
    w = world(num_drafts=3, max_model_len=12)
    w.submit(request("r", 8, 50, eos_token_ids=(2,), stop_token_ids=(9,), logprobs=0))
    answer(w, [1], logprobs=True)  # settled 9, and three more fit
    answer(w, token_ids[:3] if len(token_ids) > 3 else token_ids, logprobs=True)
    delta = w.streams["r", 0].deltas[-1]
    assert (delta.token_ids, delta.finish_reason, delta.stop_token_id) == (kept, reason, stop)
    assert [t.token_id for t in delta.logprobs] == kept
    assert (delta.num_drafted, delta.num_accepted) == (len(token_ids[:3]) - 1, len(token_ids[:3]) - 1)


def test_a_resumed_stream_goes_on_where_it_was() -> None:
    w = world()
    whole = request("whole", 6, 8)
    w.submit(whole)
    w.run()
    tokens = w.streams["whole", 0].token_ids
    part = request("part", whole.token_ids + tokens[:5], 8)
    part = type(part)(part.request_id, part.token_ids, 6, part.sampling)
    w.submit(part)
    w.run()
    assert w.streams["part", 0].token_ids == tokens[5:]
    done = type(part)("done", whole.token_ids + tokens, 6, part.sampling)
    w.submit(done)
    assert w.streams["done", 0].reason is FinishReason.LENGTH
    w.check_ends()


def test_a_prompt_that_can_never_fit_is_told_so() -> None:
    w = world(ready=False, max_model_len=20)
    w.submit(request("early", 20, 1))
    w.ready()
    w.submit(request("late", 20, 1))
    w.submit(request("fits", 19, 5))
    w.run()
    for name in ("early", "late"):
        end = w.streams[name, 0].end
        assert end is not None
        assert end.finish_reason is FinishReason.INVALID
        assert "20 tokens" in end.detail
        assert "max_model_len 20" in end.detail
    assert w.streams["fits", 0].reason is FinishReason.LENGTH
    assert len(w.streams["fits", 0].token_ids) == 1
    w.check_ends()


def test_a_pool_too_small_for_the_prompt_is_named() -> None:
    w = world(num_blocks=4)
    w.submit(request("r", 12, 4))
    end = w.streams["r", 0].end
    assert end is not None
    assert end.finish_reason is FinishReason.INVALID
    assert "3 KV blocks of 4 tokens" in end.detail
    w.submit(request("s", 11, 4))
    w.run()
    assert w.streams["s", 0].reason is FinishReason.LENGTH
    w.check_ends()


@pytest.mark.parametrize("reason", [FinishReason.ABORTED, FinishReason.STOP])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_an_abort_frees_behind_the_fence(depth: int, reason: FinishReason) -> None:
    w = world(depth=depth)
    w.submit(request("r", 6, 20))
    w.submit(request("s", [7] * 6, 20))
    w.land(2)
    in_flight = len(w.results)
    slots = w.scheduler.stats().free_slots
    w.abort("r", reason)
    assert w.streams["r", 0].reason is reason
    stats = w.scheduler.stats()
    assert (stats.free_slots, stats.running, stats.fenced_blocks > 0) == (slots, 1, True)
    w.land(in_flight)
    assert w.scheduler.stats().free_slots == slots + 1
    assert w.scheduler.stats().fenced_blocks == 0
    w.run()
    w.check_ends()


def test_an_abort_of_one_index_leaves_the_others() -> None:
    w = world()
    for index in range(3):
        w.submit(request("r", 8, 4, seed=index, index=index, num_siblings=3))
    w.abort("r", index=1)
    w.abort("unknown")
    w.run()
    assert [w.streams["r", i].reason for i in range(3)] == [
        FinishReason.LENGTH,
        FinishReason.ABORTED,
        FinishReason.LENGTH,
    ]
    w.check_ends()


def test_a_lost_frontend_takes_its_requests_along() -> None:
    w = world(max_num_seqs=2)
    for i in range(4):
        w.submit(request(f"r{i}", 8, 4, seed=i, frontend="fg"[i % 2]))
    w.streams["r1", 0].asked_to_end.append(FinishReason.ABORTED)
    w.streams["r3", 0].asked_to_end.append(FinishReason.ABORTED)
    w.send(FrontendLost("g"))
    w.run()
    assert [w.streams[f"r{i}", 0].reason for i in (0, 2)] == [FinishReason.LENGTH] * 2
    assert [w.streams[f"r{i}", 0].reason for i in (1, 3)] == [FinishReason.ABORTED] * 2
    w.check_ends()


def test_deadlines() -> None:
    w = world(max_num_seqs=1)
    w.submit(request("running", 8, 9, deadline=1001.0))
    w.submit(request("waiting", 8, 9, deadline=1000.5))
    w.submit(request("patient", 8, 2))
    w.tick(0.4)
    assert w.streams["waiting", 0].end is None
    w.tick(0.2)
    assert w.streams["waiting", 0].reason is FinishReason.DEADLINE
    w.tick(0.5)
    assert w.streams["running", 0].reason is FinishReason.DEADLINE
    w.run()
    assert w.streams["patient", 0].reason is FinishReason.LENGTH
    w.check_ends()


# ---------------------------------------------------------------- out of blocks


def test_the_youngest_of_the_lowest_priority_leaves_first() -> None:
    w = world(num_blocks=11, max_num_seqs=3, prefix_caching=False)
    w.submit(request("low", 8, 16, seed=1, priority=1))
    w.submit(request("old", [3] * 8, 16, seed=2))
    w.submit(request("young", [4] * 8, 16, seed=3))
    w.land(6)
    running = [s.request_id for s in w.scheduler.roster.running]
    assert running == ["old", "young"]
    w.run()
    assert w.scheduler.stats().preemptions >= 1
    w.check_ends()


def test_a_step_that_preempts_admits_nobody() -> None:
    w = world(num_blocks=12, max_num_seqs=2, prefix_caching=False)
    w.submit(request("old", 4, 20))
    w.submit(request("victim", [9] * 30, 9, priority=1))
    w.land()
    w.submit(request("next", [8] * 4, 2))  # would fit as soon as the victim has left
    while not w.scheduler.stats().preemptions:
        w.land()
    assert w.plans[-1].admit == []
    assert w.scheduler.stats().running == 1
    w.land()
    assert [admit.token_ids for admit in w.plans[-1].admit] == [[8] * 4]
    w.run()
    w.check_ends()


def test_the_oldest_is_never_preempted() -> None:
    w = world(num_blocks=7, max_num_seqs=4, num_drafts=2, depth=2)
    w.submit(request("oldest", 4, 18))
    for i in range(4):
        w.submit(request(f"r{i}", [i] * 4, 18, seed=i))
    while w.streams["oldest", 0].end is None:
        w.land()
        assert w.scheduler.roster.find("oldest") == [] or w.scheduler.roster.running[0].request_id == "oldest"
    w.run()
    assert w.scheduler.stats().preemptions > 0
    w.check_ends()


def test_drafts_go_before_anybody_has_to() -> None:
    w = world(num_blocks=5, max_num_seqs=2, num_drafts=3, prefix_caching=False)
    w.submit(request("a", 4, 5, seed=1))
    w.submit(request("b", [9] * 4, 5, seed=2))
    w.run()
    assert w.scheduler.stats().preemptions == 0
    assert {row.num_drafts for plan in w.plans for row in plan.rows} >= {0, 3}
    w.check_ends()


def test_results_of_the_preempted_are_delivered() -> None:
    w = world(num_blocks=8, max_num_seqs=2, depth=3, prefix_caching=False)
    w.submit(request("old", 8, 20, seed=1))
    w.submit(request("young", [9] * 8, 20, seed=2))
    while not w.scheduler.stats().preemptions:
        w.land()
    (young,) = w.scheduler.roster.find("young")
    settled, flying = young.settled, young.flying
    assert flying > 0
    assert young.state.name == "LEAVING"
    w.land(flying)
    assert young.settled == settled + flying
    w.run()
    w.check_ends()


# ---------------------------------------------------------------- crashes and epochs


def test_after_a_crash_all_wait_in_their_old_order_with_their_tokens() -> None:
    w = world(max_num_seqs=2, depth=2)
    for i in range(4):
        w.submit(request(f"r{i}", [i + 1] * 5, 6, seed=i))
    w.land(3)
    known = {f"r{i}": list(w.streams[f"r{i}", 0].token_ids) for i in range(4)}
    w.crash()
    assert w.scheduler.stats().running == 0
    assert w.scheduler.stats().waiting == 4
    w.ready()
    plan = w.plans[-2] if w.config.depth == 2 and len(w.results) == 2 else w.plans[-1]
    assert [admit.token_ids for admit in plan.admit] == [[i + 1] * 5 + known[f"r{i}"] for i in range(2)]
    assert plan.step == 1
    assert plan.release == []
    w.run()
    assert w.scheduler.stats().recoveries == 1
    w.check_ends()


def test_cached_tokens_are_those_of_the_first_admission() -> None:
    w = world()
    w.submit(request("a", 12, 6))
    w.run()
    w.submit(request("b", 12, 6, seed=1))
    w.land(2)
    w.crash()
    w.ready()
    w.run()
    assert {delta.cached_tokens for delta in w.streams["b", 0].deltas} == {8}
    w.check_ends()


def test_prompt_logprobs_are_delivered_once() -> None:
    w = world(max_step_tokens=8)
    w.submit(request("r", 20, 3, prompt_logprobs=0, logprobs=0))
    w.land(2)
    assert len(w.streams["r", 0].prompt_logprobs) == 16
    w.crash()
    w.ready()
    w.land(2)
    assert len(w.streams["r", 0].prompt_logprobs) == 16
    w.run()
    assert [t.token_id for t in w.streams["r", 0].prompt_logprobs] == w.streams["r", 0].submit.token_ids[1:]
    w.check_ends()


def test_a_pool_that_shrinks_ends_what_no_longer_fits() -> None:
    w = world(num_blocks=16)
    w.submit(request("r", 8, 40))
    w.land(6)
    w.crash()
    w.num_blocks = 4
    assert len(w.streams["r", 0].token_ids) == 6
    w.scheduler.handle(WorkerReady(Epoch(1, 2), 4, 8))
    assert w.scheduler.idle


def test_results_of_an_ended_epoch_are_ignored() -> None:
    w = world(depth=2)
    w.submit(request("r", 8, 6))
    late = list(w.results)
    w.crash()
    for result in late:
        assert w.send(result) == []
    w.ready()
    for result in late:
        assert w.send(result) == []
    w.run()
    w.check_ends()


@pytest.mark.parametrize("change", ["gap", "start", "slot", "tokens", "range", "rows"])
def test_a_result_that_cannot_be_true_ends_the_epoch(change: str) -> None:
    w = world(depth=2)
    w.submit(request("r", 8, 6))
    w.submit(request("s", [9] * 8, 6))
    w.land()
    w.spoil(change)
    assert not w.scheduler.devices
    assert w.scheduler.stats().waiting == 2
    w.ready()
    w.run()
    w.check_ends()


@pytest.mark.parametrize(
    ("ready", "name"),
    [
        (WorkerReady(Epoch(1, 1), 64, 8, groups=2), "groups"),
        (WorkerReady(Epoch(1, 1), 64, 8, align=128), "align"),
        (WorkerReady(Epoch(1, 1), 1, 8), "num_blocks"),
        (WorkerReady(Epoch(1, 1), 64, 3), "max_slots"),
    ],
)
def test_a_worker_that_cannot_serve_is_refused_by_name(ready: WorkerReady, name: str) -> None:
    w = world(ready=False)
    w.send(ready)
    assert name in w.ended[0].reason
    w.ready()
    w.submit(request("r"))
    assert not w.plans, "the epoch with this number was refused"


def kill_with(w: World, poison: str) -> None:
    """A worker that dies of every plan that names `poison`, until nobody asks for it any more."""
    for _ in range(200):
        if w.worker is None:
            w.ready()
        if not w.results:
            return
        flight = w.scheduler.devices[0].sent[0]
        if any(s.request_id == poison and s.state.name != "FINISHED" for s in flight.sequences):
            w.crash()
        else:
            w.land()
    raise AssertionError("the poison goes on and on")


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_poisonous_request_fails_alone(depth: int) -> None:
    w = world(depth=depth)
    for i in range(3):
        w.submit(request(f"r{i}", [i + 1] * 6, 5, seed=i))
    w.submit(request("poison", [9] * 6, 5))
    w.submit(request("later", [8] * 6, 5))
    kill_with(w, "poison")
    assert w.crashes == 5
    assert w.streams["poison", 0].reason is FinishReason.ERROR
    assert [s.reason for (name, _), s in w.streams.items() if name != "poison"] == [FinishReason.LENGTH] * 4
    w.check_ends()


@pytest.mark.parametrize("depth", [1, 2])
def test_a_suspect_runs_alone_until_a_token_clears_it(depth: int) -> None:
    w = world(ready=False, depth=depth)
    for i in range(3):
        w.submit(request(f"r{i}", [i + 1] * 6, 5, seed=i))
    for _ in range(2):
        w.ready()
        w.crash()
    w.ready()
    for name in ("r0", "r1", "r2"):  # one after the other, each until its first token is known
        assert {s.request_id for f in w.scheduler.devices[0].sent for s in f.sequences} == {name}
        while w.scheduler.roster.find(name)[0].suspect:
            w.land()
        if depth == 2 and name != "r2":
            w.land()  # planned while it was a suspect
    w.run()
    w.check_ends()


def test_three_kills_fail_nobody() -> None:
    w = world(depth=2)
    for i in range(6):
        w.submit(request(f"r{i}", [i + 1] * 6, 5, seed=i))
    for _ in range(3):
        w.crash()
        w.ready()
    w.run()
    assert {stream.reason for stream in w.streams.values()} == {FinishReason.LENGTH}
    w.check_ends()


def test_a_stop_that_was_asked_for_blames_nobody() -> None:
    w = world()
    w.submit(request("r"))
    for _ in range(9):
        w.crash(blameless=True)
        w.ready()
    assert w.scheduler.roster.find("r")[0].deaths == 0
    w.run()
    assert w.scheduler.stats().recoveries == 0
    w.check_ends()


# ---------------------------------------------------------------- the rest


def test_draining_finishes_what_was_accepted() -> None:
    w = world(max_num_seqs=1)
    w.submit(request("a"))
    w.submit(request("b", seed=1, num_siblings=2))
    w.send(Drain())
    w.submit(request("c", seed=2))
    w.submit(request("b", seed=3, index=1, num_siblings=2))
    assert w.streams["c", 0].reason is FinishReason.DRAINING
    assert w.scheduler.stats().draining
    assert not w.scheduler.idle
    w.run()
    assert [w.streams[key].reason for key in (("a", 0), ("b", 0), ("b", 1))] == [FinishReason.LENGTH] * 3
    w.check_ends()


def test_one_message_a_step_and_frontend() -> None:
    w = world()
    for i in range(4):
        w.submit(request(f"r{i}", 8, 2, seed=i, frontend="fg"[i % 2]))
    while w.results:
        w.land()
        outputs = [o for o in w.answers[-1] if isinstance(o, Outputs)]
        assert len(outputs) == len({o.frontend for o in outputs})


def test_everything_waits_while_there_is_no_worker() -> None:
    w = world(ready=False)
    w.submit(request("r"))
    assert "r" in w.scheduler
    assert w.scheduler.stats().waiting == 1
    w.tick(5.0)
    w.ready()
    w.run()
    assert "r" not in w.scheduler
    w.check_ends()


def test_the_engine_leaves_nothing_for_the_cycle_collector() -> None:
    def serve() -> None:
        w = world(depth=2, num_blocks=12)
        for i in range(20):
            w.scheduler.handle(request(f"r{i}", [i] * 5, 5, seed=i))
        w.results.clear()
        while w.scheduler.devices and w.scheduler.devices[0].sent:
            flight = w.scheduler.devices[0].sent[0]
            answers = [
                RowResult(row.slot, s.settled, [1] if row.sample else [])
                for row, s in zip(flight.plan.rows, flight.sequences, strict=True)
            ]
            w.scheduler.handle(StepResult(flight.plan.epoch, flight.plan.step, answers))

    serve()
    gc.collect()
    gc.disable()
    try:
        serve()
        assert gc.collect() == 0
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"block_size": 0}, "block_size"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"depth": 0}, "depth"),
        ({"num_drafts": -1}, "num_drafts"),
        ({"max_waiting": 0}, "max_waiting"),
        ({"max_num_seqs": 8, "max_step_tokens": 7}, "max_step_tokens"),
    ],
)
def test_a_configuration_that_serves_nobody_is_refused_by_name(config: dict[str, int], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} is {config[name]}"):
        Scheduler(EngineConfig(**config))  # type: ignore[arg-type]

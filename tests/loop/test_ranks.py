"""A group of several ranks is one worker: it begins when all have come, and ends with any of them (R5)."""

from __future__ import annotations

import os
import random
import signal
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import pytest

from protos.engine_wire import FinishReason, Question, Submit
from protos.wire import (
    PROTOCOL,
    Epoch,
    Fault,
    Hello,
    Phase,
    Ready,
    Sampling,
    Setup,
    Shutdown,
    Status,
    StepPlan,
    StepResult,
    Wire,
)
from scheduler_svc.config import LoopConfig
from scheduler_svc.engine.events import Event, WorkerLost, WorkerReady
from scheduler_svc.rank import Rank
from scheduler_svc.worker_link import WorkerLink
from scheduler_svc.worker_socket import Gone
from tests.loop.harness import Observer, assert_undisturbed, loop_config, running, submits


def split_in(size: int, model: str, **changes: Any) -> LoopConfig:
    config = loop_config(model, **changes)
    return replace(config, setup=msgspec.structs.replace(config.setup, tp_size=size))


def pids(observer: Observer) -> list[int]:
    observer.until_serving()
    return [worker.pid for worker in observer.status.workers]


def end_first_group(observer: Observer, place: int) -> None:
    """kill -9 of one of its two ranks; returns when both are gone."""
    observer.until(lambda: observer.status.workers[0].state == "serving", "the first group")
    before = [worker.pid for worker in observer.status.workers[:2]]
    os.kill(before[place], signal.SIGKILL)
    observer.until(lambda: not {one.pid for one in observer.status.workers} & set(before), "the end of both")


# ---------------------------------------------------------------- real processes


@pytest.mark.parametrize(("workers", "overlap"), [(1, 0), (1, 1), (2, 0)])
def test_kill_9_of_any_rank_loses_and_repeats_no_token(workers: int, overlap: int) -> None:
    rng = random.Random(workers + overlap)
    config = split_in(2, f"fake:delay_ms=1,blocks=60,overlap={overlap}", workers=workers)
    config = replace(config, engine=replace(config.engine, depth=2))
    made = submits(40, rng)
    total = sum(submit.sampling.max_tokens for submit in made)
    with running(config) as observer:
        observer.until(lambda: observer.statuses and len(observer.status.workers) == 2 * workers, "all ranks")
        for submit in made:
            observer.loop.send(submit)
        for place, moment in enumerate(sorted(rng.randrange(total * 3 // 4) for _ in range(4))):
            observer.until_tokens(moment)
            end_first_group(observer, place % 2)
        observer.until_finished(made)
        assert_undisturbed(observer, made)
        answer = observer.ask(Question.STATS).status
        assert answer.stats.recoveries >= 2
        ends = ("it was killed by SIGKILL", "its connection broke")  # the latter where the kernel is slow to tell
        assert {loss.reason for loss in answer.losses} <= {f"rank {n}: {end}" for n in (0, 1) for end in ends}
        steps = [figures.steps for figures in answer.figures]
        assert sum(steps[::2]) > 0
        assert sum(steps[1::2]) == 0, "rank 0 answers"


@pytest.mark.full
def test_a_rank_that_is_stopped_ends_the_group() -> None:
    """The other one answers meanwhile: only the missing heartbeat tells."""
    made = [Submit("r", [300, 301], 2, Sampling(max_tokens=4000, seed=3))]
    with running(split_in(2, "fake:delay_ms=5")) as observer:
        before = pids(observer)
        observer.loop.send(made[0])
        observer.until_tokens(4)
        os.kill(before[1], signal.SIGSTOP)
        observer.until(lambda: not observer.status.serving, "the loss")
        assert "rank 1: it" in observer.status.reason
        assert not set(pids(observer)) & set(before)


def test_a_request_that_kills_all_ranks_fails_alone() -> None:
    bad = Submit("bad", [300, 7, 8], 3, Sampling(max_tokens=5))
    made = submits(10, random.Random(6))
    with running(split_in(2, "fake:poison=7")) as observer:
        for submit in [*made[:5], bad, *made[5:]]:
            observer.loop.send(submit)
        observer.until_finished([*made, bad])
        assert_undisturbed(observer, made)
        assert observer.streams["bad", 0].finish == FinishReason.ERROR


def test_what_no_rank_can_load_fails_the_service() -> None:
    with running(split_in(2, "fake:load_fails=0")) as observer:
        observer.until(lambda: observer.statuses and observer.status.failed, "failure")
        assert "cannot be read" in observer.status.reason


# ---------------------------------------------------------------- the link alone


@dataclass
class Process:
    """What a link wants of a spawned one."""

    pid: int
    start_at: float = 0.0
    started_at: float = 0.0
    end: str = ""
    killed: int = 0
    ready: int = 0

    def kill(self) -> None:
        self.killed += 1

    def obituary(self, patience: float) -> str:
        return self.end

    def was_ready(self) -> None:
        self.ready += 1


@dataclass
class Group:
    """Two ranks, 100 and 101, and all that was sent to them."""

    setup: Setup = field(default_factory=lambda: Setup(Epoch(5, 0), "fake:", max_slots=4, tp_size=2))
    sent: list[tuple[list[bytes], Wire]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.processes = [Process(100), Process(101)]
        self.epochs = 0
        self.link = WorkerLink(
            self.setup,
            self._next,
            self._send,
            [Rank(number, process) for number, process in enumerate(self.processes)],  # type: ignore[arg-type]
            group=3,
            meeting=lambda group, epoch: f"meeting {group} {epoch.counter}",
            refuse=lambda ready: "",
            step_deadline=1.0,
            load_deadline=10.0,
        )

    def _next(self) -> Epoch:
        self.epochs += 1
        return Epoch(5, self.epochs)

    def _send(self, peers: list[bytes], *messages: Wire) -> bool:
        self.sent += [(list(peers), message) for message in messages]
        return True

    def hello(self, rank: int, pid: int = 0, now: float = 0.0) -> list[Event]:
        message = Hello(rank, "test", PROTOCOL, pid=pid or 100 + rank)
        return list(self.link.hear(b"peer%d" % rank, message, now))

    def say(self, rank: int, message: Any, now: float = 0.0) -> list[Event]:
        return list(self.link.hear(b"peer%d" % rank, message, now))

    def ready(self, rank: int, num_blocks: int = 9, now: float = 0.0) -> list[Event]:
        return self.say(rank, Ready(Epoch(5, self.epochs), rank, num_blocks), now)

    def serve(self) -> None:
        for rank in (0, 1):
            self.hello(rank)
        for rank in (0, 1):
            self.ready(rank)
        assert self.link.serving
        self.sent.clear()


def test_all_are_set_up_together_each_with_its_rank() -> None:
    group = Group()
    assert group.hello(1) == []
    assert not group.sent
    group.hello(0)
    setups = [replaced(group.setup, tp_rank=rank, epoch=Epoch(5, 1), tp_address="meeting 3 1") for rank in (0, 1)]
    assert group.sent == [([b"peer0"], setups[0]), ([b"peer1"], setups[1])]


def replaced(setup: Setup, **fields: Any) -> Setup:
    return msgspec.structs.replace(setup, **fields)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_it_serves_when_all_are_ready(order: tuple[int, int]) -> None:
    group = Group()
    for rank in order:
        group.hello(rank)
    assert group.ready(order[0]) == []
    assert not group.link.serving
    assert [type(event) for event in group.ready(order[1])] == [WorkerReady]
    assert group.link.serving
    assert [process.ready for process in group.processes] == [1, 1]
    assert [status.detail for status in group.link.statuses] == ["rank 0 of 2", "rank 1 of 2"]


def test_ranks_that_differ_are_no_group() -> None:
    group = Group()
    for rank in (0, 1):
        group.hello(rank)
    group.ready(0)
    assert group.ready(1, num_blocks=8) == [], "it never served, so the engine has lost nothing"
    assert [process.killed for process in group.processes] == [1, 1]
    assert not group.link.serving
    assert "rank 1" in group.link.reason


def test_every_rank_gets_the_plans_and_the_first_one_answers() -> None:
    group = Group()
    group.serve()
    plans = [StepPlan(Epoch(5, 1), step, [], [], [], []) for step in (1, 2)]
    for plan in plans:
        group.link.add_plan(plan, 0.0)
    assert list(group.link.send_plans(0.0)) == []
    assert group.sent == [([b"peer0", b"peer1"], plan) for plan in plans]
    result = StepResult(Epoch(5, 1), 1, [])
    assert group.say(1, result) == []
    assert group.say(0, result) == [result]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("how", ["gone", "fault", "exit"])
def test_the_end_of_one_is_the_end_of_all(rank: int, how: str) -> None:
    group = Group()
    group.serve()
    match how:
        case "gone":
            events = group.say(rank, Gone())
        case "fault":
            events = group.say(rank, Fault(Epoch(5, 1), 0, "a reason"))
        case _:
            events = list(group.link.exited(group.link.ranks[rank], "was killed", 0.0))
    assert [type(event) for event in events] == [WorkerLost]
    assert [process.killed for process in group.processes] == [1, 1]
    assert f"rank {rank}: " in group.link.reason
    assert not group.link.peers


def test_who_faults_over_a_dead_rank_is_not_blamed() -> None:
    group = Group()
    group.serve()
    group.processes[1].end = "was killed by SIGKILL"
    group.say(0, Fault(Epoch(5, 1), 1, "step 1 failed: connection closed by peer"))
    assert group.link.reason == "the worker was lost: rank 1: it was killed by SIGKILL"


def test_a_new_life_of_one_waits_for_that_of_the_other() -> None:
    """The one that was killed first is back before the other has ended."""
    group = Group()
    group.serve()
    group.say(0, Gone())
    group.processes[0].pid = 200
    assert group.hello(0, pid=200) == []
    assert list(group.link.exited(group.link.ranks[1], "", 0.0)) == []
    group.processes[1].pid = 201
    group.hello(1, pid=201)
    assert [status.pid for status in group.link.statuses] == [200, 201]
    assert group.link.epoch == Epoch(5, 2)


def test_a_fatal_fault_of_one_leaves_no_other_waiting() -> None:
    group = Group()
    for rank in (0, 1):
        group.hello(rank)
    group.say(1, Fault(Epoch(5, 1), 0, "no such model", fatal=True))
    assert group.link.fatal == "no such model"
    assert [process.killed for process in group.processes] == [1, 1]


@pytest.mark.parametrize(("rank", "pid"), [(0, 101), (1, 100), (2, 100), (-1, 101), (0, 7)])
def test_whoever_is_not_the_rank_that_it_says_is_refused(rank: int, pid: int) -> None:
    group = Group()
    group.hello(rank, pid)
    assert [type(message) for _, message in group.sent] == [Shutdown]
    assert not group.link.peers


def test_only_what_is_late_is_ended() -> None:
    """One has not been started again yet, the other starts: neither is late."""
    group = Group()
    group.processes[0].pid, group.processes[0].start_at = 0, 3.0
    group.processes[1].started_at = 2.0
    assert group.link.deadline == 3.0
    assert list(group.link.expire(4.0)) == []
    assert [process.killed for process in group.processes] == [0, 0]
    group.processes[0].pid, group.processes[0].started_at = 200, 4.0
    assert group.link.deadline == 12.0
    list(group.link.expire(12.0))
    assert "rank 1: nothing was heard of its start" in group.link.reason
    assert [process.killed for process in group.processes] == [1, 1]


def test_a_rank_that_loads_forever_is_ended() -> None:
    group = Group()
    for rank in (0, 1):
        group.hello(rank)
    group.say(1, Status(Epoch(5, 1), Phase.LOADING, rank=1, progress=0.5), now=4.0)
    group.ready(0, now=5.0)
    assert group.link.deadline == 15.0
    assert [(status.state, status.progress) for status in group.link.statuses] == [("loading", 0.0), ("loading", 0.5)]
    list(group.link.expire(15.0))
    assert "rank 1: nothing was heard" in group.link.reason


def test_a_step_that_one_compiles_may_take_as_long_as_a_start() -> None:
    group = Group()
    group.serve()
    group.link.add_plan(StepPlan(Epoch(5, 1), 1, [], [], [], []), 0.0)
    assert group.link.deadline == 1.0
    group.say(1, Status(Epoch(5, 1), Phase.COMPILING, rank=1))
    assert group.link.deadline == 10.0
    group.say(0, StepResult(Epoch(5, 1), 1, []))
    group.link.add_plan(StepPlan(Epoch(5, 1), 2, [], [], [], []), 2.0)
    assert group.link.deadline == 3.0

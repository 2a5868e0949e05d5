"""Streams over a worker that dies: real processes, real sockets, and an oracle for every token."""

from __future__ import annotations

import os
import random
import select
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from protos.engine_wire import Abort, FinishReason, Question, Submit
from protos.wire import Sampling
from scheduler_svc.engine.scheduler import Scheduler
from tests.loop.harness import Observer, assert_undisturbed, loop_config, running, submits

ROOT = Path(__file__).parents[2]


def _assert_nothing_left(observer: Observer) -> None:
    stats = observer.ask(Question.STATS).status.stats
    assert (stats.running, stats.waiting, stats.owned_blocks, stats.fenced_blocks) == (0, 0, 0, 0)
    assert stats.free_slots == stats.num_slots
    assert stats.free_blocks + stats.cached_blocks == stats.num_blocks


@pytest.mark.parametrize(("depth", "seed"), [(1, 0), (1, 1), (2, 2), (3, 3)])
def test_kill_9_at_random_moments_loses_and_repeats_no_token(depth: int, seed: int) -> None:
    rng = random.Random(seed)
    config = loop_config("fake:delay_ms=1,blocks=60")  # few blocks: preemption takes part
    config = replace(config, engine=replace(config.engine, depth=depth))
    made = submits(40, rng)
    total = sum(submit.sampling.max_tokens for submit in made)
    with running(config) as observer:
        for submit in made:
            observer.loop.send(submit)
        for moment in sorted(rng.randrange(total) for _ in range(4)):
            observer.until_tokens(moment)
            observer.until_serving()
            os.kill(observer.status.workers[0].pid, signal.SIGKILL)
            observer.until(lambda: not observer.status.serving, "the loss")
        observer.until_finished(made)
        assert_undisturbed(observer, made)
        assert observer.ask(Question.STATS).status.stats.recoveries >= 1
        _assert_nothing_left(observer)


def test_health_follows_within_a_second() -> None:
    with running(loop_config()) as observer:
        observer.until_serving()
        before = observer.statuses[-1][0]
        os.kill(observer.status.workers[0].pid, signal.SIGKILL)
        observer.until(lambda: not observer.status.serving, "NOT_SERVING", patience=3.0)
        assert "SIGKILL" in observer.status.reason
        observer.until_serving()
        assert observer.statuses[-1][0] > before


def test_a_step_past_its_deadline_costs_the_worker_its_life_and_the_request_its_own() -> None:
    config = loop_config("fake:hang=7", step_deadline=0.2)
    bad = Submit("bad", [7, 8, 9], 3, Sampling(max_tokens=5))
    made = submits(10, random.Random(5))
    with running(config) as observer:
        observer.until_serving()
        for submit in [*made[:5], bad, *made[5:]]:
            observer.loop.send(submit)
        observer.until_finished([*made, bad])
        assert_undisturbed(observer, made)
        assert observer.streams["bad", 0].finish == FinishReason.ERROR
        assert any("longer than 0.2 s" in status.reason for _, status in observer.statuses)
        observer.until_serving()
        assert observer.loop._workers.deadline is None, "nothing is in flight, so nothing is late"


@pytest.mark.parametrize("kind", ["poison", "fault"])
def test_a_request_that_kills_workers_fails_alone(kind: str) -> None:
    bad = Submit("bad", [300, 7, 8], 3, Sampling(max_tokens=5))
    made = submits(20, random.Random(6))
    with running(loop_config(f"fake:{kind}=7")) as observer:
        for submit in [*made[:10], bad, *made[10:]]:
            observer.loop.send(submit)
        observer.until_finished([*made, bad])
        assert_undisturbed(observer, made)
        assert observer.streams["bad", 0].finish == FinishReason.ERROR
        assert observer.streams["bad", 0].token_ids == []
        observer.until_serving()
        _assert_nothing_left(observer)


def test_a_stopped_worker_is_noticed_by_its_silence() -> None:
    """SIGSTOP stops ZeroMQ's thread as well: only the missing heartbeat, or the deadline of a step, can tell."""
    with running(loop_config("fake:delay_ms=5", step_deadline=0.3)) as observer:
        made = submits(3, random.Random(7))
        observer.until_serving()
        for submit in made:
            observer.loop.send(submit)
        observer.until_tokens(4)
        os.kill(observer.status.workers[0].pid, signal.SIGSTOP)
        observer.until_finished(made)
        assert_undisturbed(observer, made)


def test_cancel_and_abort_leave_nothing_behind() -> None:
    with running(loop_config("fake:delay_ms=2")) as observer:
        made = [_longer(submit, 4000) for submit in submits(12, random.Random(8))]
        for submit in made:
            observer.loop.send(submit)
        observer.until_tokens(20)
        for submit in made[::2]:
            assert observer.ask(Question.CANCEL, submit.request_id).found
        for submit in made[1::2]:
            observer.loop.send(Abort(submit.request_id))
        observer.until_finished(made)
        assert {stream.finish for stream in observer.streams.values()} == {FinishReason.ABORTED}
        assert not observer.ask(Question.CANCEL, "r0").found
        observer.ask(Question.DRAIN)  # answered when the last plan has landed
        _assert_nothing_left(observer)
        flushed = observer.ask(Question.FLUSH_CACHE)
        assert flushed.status.stats.cached_blocks == 0
        assert flushed.status.stats.free_blocks == flushed.status.stats.num_blocks


def test_a_drain_finishes_what_runs_and_refuses_the_rest() -> None:
    with running(loop_config("fake:delay_ms=2")) as observer:
        made = submits(6, random.Random(9))
        for submit in made:
            observer.loop.send(submit)
        observer.until_tokens(5)
        observer.ask(Question.DRAIN)
        assert all(observer.streams[submit.request_id, 0].finish for submit in made), (
            "answered before the last had ended"
        )
        assert_undisturbed(observer, made)
        assert not observer.status.serving
        late = Submit("late", [1, 2], 2, Sampling(max_tokens=1))
        observer.loop.send(late)
        observer.until_finished([late])
        assert observer.streams["late", 0].finish == FinishReason.DRAINING


def test_the_books_are_audited_when_nobody_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    audits = threading.Semaphore(0)
    check = Scheduler.check_integrity

    def noted(engine: Scheduler) -> None:
        audits.release()
        check(engine)

    monkeypatch.setattr(Scheduler, "check_integrity", noted)
    with running(loop_config()) as observer:
        observer.until_serving()
        for name in ("a", "b"):
            made = Submit(name, [300, 301], 2, Sampling(max_tokens=3))
            observer.loop.send(made)
            observer.until_finished([made])
            assert audits.acquire(timeout=10), "once after each time"
        assert not observer.status.failed
        observer.loop._engine.devices[0].free_slots.pop(0)
        last = Submit("last", [300, 301], 2, Sampling(max_tokens=3))
        observer.loop.send(last)
        observer.until(lambda: any("do not add up" in status.reason for _, status in observer.statuses), "the doubt")
        assert observer.streams["last", 0].finish == FinishReason.LENGTH, "served first, audited later"
        observer.until_serving()
        again = Submit("again", [300, 301], 2, Sampling(max_tokens=3))
        observer.loop.send(again)
        observer.until_finished([again])
        assert not observer.status.failed, "a new epoch has new books"


@pytest.mark.parametrize("option", ["load_fails=1", "load_fails=2"])
def test_a_service_whose_first_worker_never_comes_up_gives_up(option: str) -> None:
    with running(loop_config(f"fake:{option}")) as observer:
        observer.until(lambda: observer.statuses and observer.status.failed, "giving up")
        assert "gave up after 5 starts" in observer.status.reason


def test_a_worker_killed_by_a_signal_without_a_name_is_replaced() -> None:
    made = submits(4, random.Random(3))
    with running(loop_config("fake:delay_ms=2")) as observer:
        observer.until_serving()
        for submit in made:
            observer.loop.send(submit)
        observer.until_tokens(5)
        os.kill(observer.status.workers[0].pid, signal.SIGRTMIN + 6)
        observer.until_finished(made)
        assert_undisturbed(observer, made)


@pytest.mark.parametrize("stopped", [False, True], ids=["hanging", "stopped"])
def test_workers_die_with_their_scheduler(stopped: bool, tmp_path: Path) -> None:
    """By the closed link; and by the kernel, where the worker cannot even run."""
    script = (
        "from tests.loop.harness import *\n"
        "with running(loop_config('fake:hang=5')) as o:\n"
        "    o.until_serving()\n"
        "    print(o.status.workers[0].pid, flush=True)\n"
        "    o.loop.send(Submit('r', [5], 1, Sampling(max_tokens=1)))\n"  # in a step that never ends
        "    o.until(lambda: False, 'never', 60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout
    assert parent.stderr
    with parent.stdout, parent.stderr:
        pid = int(parent.stdout.readline())
        assert "hangs" in parent.stderr.readline()
    worker = os.pidfd_open(pid)
    if stopped:
        os.kill(pid, signal.SIGSTOP)
    parent.kill()
    parent.wait()
    assert select.select([worker], [], [], 6.0)[0], "the worker outlived its parent (2 s are promised)"
    os.close(worker)


def _longer(submit: Submit, max_tokens: int) -> Submit:
    sampling = Sampling(max_tokens=max_tokens, seed=submit.sampling.seed, temperature=submit.sampling.temperature)
    return Submit(submit.request_id, submit.token_ids, submit.prompt_len, sampling)

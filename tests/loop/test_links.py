"""Who may be a worker, who comes and goes, and what nobody may do to the loop."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import zmq

from protos.codec import decode_to_worker, encode
from protos.wire import (
    PROTOCOL,
    Epoch,
    Fault,
    Hello,
    Ready,
    RowResult,
    Sampling,
    Setup,
    Shutdown,
    StepPlan,
    StepResult,
    ToWorker,
)
from scheduler_svc import worker_groups
from scheduler_svc.config import LoopConfig
from scheduler_svc.loop import EngineLoop
from scheduler_svc.worker_socket import Gone, WorkerSocket
from tests.loop.harness import Observer, assert_undisturbed, loop_config, running, submits
from worker_svc.backends.fake import FakeBackend

ROOT = Path(__file__).parents[2]
PATIENCE_MS = 30_000


def sampled(backend: FakeBackend) -> list[RowResult]:
    rows = backend.sample(None)
    assert isinstance(rows, list)
    return rows


class Peer:
    """Somebody at the other end of the ROUTER, who says what the test wants."""

    def __init__(self, endpoint: str) -> None:
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(endpoint)
        self.backend = FakeBackend()

    def say(self, *messages: msgspec.Struct) -> None:
        for message in messages:
            self.socket.send(encode(message))  # type: ignore[arg-type]

    def hear(self) -> ToWorker:
        assert self.socket.poll(PATIENCE_MS), "nothing was said"
        return decode_to_worker(self.socket.recv())

    def begin(self) -> Setup:
        """From Hello to Ready, as a worker does."""
        self.say(Hello(0, "test", PROTOCOL, pid=os.getpid()))
        setup = self.hear()
        assert isinstance(setup, Setup)
        capacity = self.backend.load(setup, lambda what, share: None)
        self.say(Ready(setup.epoch, 0, capacity.num_blocks))
        return setup

    def step(self) -> StepPlan:
        plan = self.hear()
        assert isinstance(plan, StepPlan)
        self.backend.forward(plan)
        self.say(StepResult(plan.epoch, plan.step, sampled(self.backend)))
        return plan

    def close(self) -> None:
        self.socket.close()
        self._context.term()


@contextmanager
def peer(endpoint: str) -> Iterator[Peer]:
    made = Peer(endpoint)
    try:
        yield made
    finally:
        made.close()


@contextmanager
def answering(peer: Peer) -> Iterator[None]:
    """It does every step: how many there are depends on what was in flight at a loss, and who is suspected of it."""
    done = threading.Event()

    def answer() -> None:
        while not done.is_set():
            if peer.socket.poll(20):
                peer.step()

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def external_worker(endpoint: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "worker_svc", "--connect", endpoint]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def external(tmp_path: Path, model: str = "fake:", **changes: object) -> LoopConfig:
    return loop_config(model, workers=0, listen=f"ipc://{tmp_path}/workers", **changes)


def junk(rng: random.Random) -> list[bytes]:
    some = encode(StepResult(Epoch(1, 1), 1, [RowResult(1, 1, [1])]))
    return [
        b"",
        b"\xc1",
        b"\x00" * 1000,
        b"\x94\xa5Hello\x00",
        encode(Shutdown("you are a worker, are you not?")),
        *(some[:n] for n in range(1, len(some), 7)),
        *(rng.randbytes(rng.randrange(1, 300)) for _ in range(200)),
    ]


def test_malformed_bytes_of_strangers_do_nothing() -> None:
    with running(loop_config("fake:delay_ms=1")) as observer, peer(observer.loop.endpoint) as stranger:
        observer.until_serving()
        made = submits(10, random.Random(1))
        rng = random.Random(2)
        for submit in made:
            observer.loop.send(submit)
            for data in junk(rng):
                stranger.socket.send(data)
            stranger.socket.send_multipart([b"many", b"", b"frames"])
            stranger.say(Ready(Epoch(1, 1), 0, 100), StepResult(Epoch(1, 1), 1, []), Fault(Epoch(1, 1), 0, "", True))
        observer.until_finished(made)
        assert_undisturbed(observer, made)
        assert all(status.serving for _, status in observer.statuses[1:] if status.ready)


def test_a_stranger_is_no_worker_where_the_scheduler_spawned_its_own() -> None:
    with running(loop_config()) as observer, peer(observer.loop.endpoint) as stranger:
        observer.until_serving()
        stranger.say(Hello(0, "test", PROTOCOL, pid=os.getpid()))
        answer = stranger.hear()
        assert isinstance(answer, Shutdown)
        assert "spawned" in answer.reason


def test_another_protocol_is_refused_with_both_numbers(tmp_path: Path) -> None:
    with running(external(tmp_path)) as observer, peer(observer.loop.endpoint) as newer:
        newer.say(Hello(0, "test", PROTOCOL + 1))
        answer = newer.hear()
        assert isinstance(answer, Shutdown)
        assert f"protocol {PROTOCOL + 1}" in answer.reason
        assert f"speaks {PROTOCOL}" in answer.reason


def test_malformed_bytes_of_the_worker_end_its_epoch(tmp_path: Path) -> None:
    with running(external(tmp_path)) as observer, peer(observer.loop.endpoint) as worker:
        first = worker.begin()
        made = submits(2, random.Random(3))
        for submit in made:
            observer.loop.send(submit)
        worker.step()
        worker.socket.send(b"\xc1 no message")
        while not isinstance(setup := worker.hear(), Setup):
            pass
        assert setup.epoch == Epoch(first.epoch.boot, first.epoch.counter + 1)
        assert msgspec.structs.replace(setup, epoch=first.epoch) == first


@pytest.mark.parametrize(
    "wrong",
    [
        lambda plan, rows: StepResult(plan.epoch, plan.step + 1, rows),
        lambda plan, rows: StepResult(plan.epoch, plan.step, rows[1:]),
        lambda plan, rows: StepResult(
            plan.epoch, plan.step, [msgspec.structs.replace(row, start=row.start + 1) for row in rows]
        ),
    ],
    ids=["gap", "rows", "length"],
)
def test_a_worker_that_contradicts_the_engine_gets_a_new_epoch(tmp_path: Path, wrong: object) -> None:
    with running(external(tmp_path)) as observer, peer(observer.loop.endpoint) as worker:
        first = worker.begin()
        made = submits(1, random.Random(4))
        observer.loop.send(made[0])
        plan = worker.hear()
        assert isinstance(plan, StepPlan)
        worker.backend.forward(plan)
        worker.say(wrong(plan, sampled(worker.backend)))  # type: ignore[operator]
        setup = worker.hear()
        assert isinstance(setup, Setup)
        assert setup.epoch.counter == first.epoch.counter + 1
        worker.backend.reset(setup)
        worker.say(Ready(setup.epoch, 0, 1024))
        for _ in range(made[0].sampling.max_tokens):  # the first computes the whole prompt, too
            worker.step()
        observer.until_finished(made)
        assert_undisturbed(observer, made)


def test_plans_of_one_moment_travel_together(tmp_path: Path) -> None:
    config = external(tmp_path)
    config = replace(config, engine=replace(config.engine, depth=3))
    with running(config) as observer, peer(observer.loop.endpoint) as worker:
        worker.begin()
        made = submits(1, random.Random(4), max_tokens=1)
        made[0] = msgspec.structs.replace(made[0], sampling=Sampling(max_tokens=5))
        observer.loop.send(made[0])
        together, results = [3, 2], list[StepResult]()
        for count in together:
            assert worker.socket.poll(PATIENCE_MS), "no plan"
            plans = [decode_to_worker(frame) for frame in worker.socket.recv_multipart()]
            assert len(plans) == count
            for plan in plans:
                assert isinstance(plan, StepPlan)
                worker.backend.forward(plan)
                results.append(StepResult(plan.epoch, plan.step, sampled(worker.backend)))
            worker.socket.send_multipart([encode(result) for result in results[-count:]])
        observer.until_finished(made)
        assert_undisturbed(observer, made)


def test_results_of_an_epoch_that_has_ended_are_not_heard(tmp_path: Path) -> None:
    with running(external(tmp_path)) as observer, peer(observer.loop.endpoint) as worker:
        worker.begin()
        made = submits(1, random.Random(4))
        observer.loop.send(made[0])
        plan = worker.hear()
        assert isinstance(plan, StepPlan)
        worker.backend.forward(plan)
        rows = sampled(worker.backend)
        old = StepResult(plan.epoch, plan.step, rows)
        worker.say(Fault(plan.epoch, plan.step, "a reason"), old, Fault(plan.epoch, plan.step, "another"))
        setup = worker.hear()
        assert isinstance(setup, Setup)
        worker.backend.reset(setup)
        worker.say(old, Ready(setup.epoch, 0, 1024), old, Fault(plan.epoch, plan.step, "a third"))
        assert worker.step().epoch == setup.epoch
        assert worker.step().step == 2


def test_workers_come_die_and_come_again(tmp_path: Path) -> None:
    made = submits(10, random.Random(5))
    with running(external(tmp_path, "fake:delay_ms=1")) as observer:
        for submit in made:  # nobody is there: they wait
            observer.loop.send(submit)
        total = sum(submit.sampling.max_tokens for submit in made)
        for moment in (total // 4, total // 2):
            with external_worker(observer.loop.endpoint) as process:
                observer.until_tokens(moment)
                process.kill()
                observer.until(lambda: not observer.status.serving, "the loss")
                assert observer.status.workers[0].state == "lost"
        with external_worker(observer.loop.endpoint):
            observer.until_finished(made)
        assert_undisturbed(observer, made)


def test_a_second_worker_serves_beside_the_first(tmp_path: Path) -> None:
    with (
        running(external(tmp_path)) as observer,
        peer(observer.loop.endpoint) as one,
        peer(observer.loop.endpoint) as two,
    ):
        setups = [one.begin(), two.begin()]
        assert len({setup.epoch for setup in setups}) == 2
        made = submits(2, random.Random(9), max_tokens=1)
        for submit in made:
            observer.loop.send(submit)
        assert [worker.step().epoch for worker in (one, two)] == [setup.epoch for setup in setups]
        observer.until_finished(made)
        assert_undisturbed(observer, made)
        assert [worker.state for worker in observer.status.workers] == ["serving", "serving"]


def test_a_worker_of_another_arithmetic_is_told_so(tmp_path: Path) -> None:
    """A stream may move from one to the other, and would not be the same there."""
    with (
        running(external(tmp_path)) as observer,
        peer(observer.loop.endpoint) as one,
        peer(observer.loop.endpoint) as two,
    ):
        one.begin()
        observer.until_serving()
        two.say(Hello(0, "test", PROTOCOL, pid=os.getpid()))
        setup = two.hear()
        assert isinstance(setup, Setup)
        two.say(Ready(setup.epoch, 0, 100, fingerprint="another"))
        answer = two.hear()
        assert isinstance(answer, Shutdown)
        assert "its arithmetic is another one: fingerprint 'another'" in answer.reason
        assert observer.status.serving


def test_nor_does_it_take_over_from_a_dead_one(tmp_path: Path) -> None:
    """What is served waits for a worker that goes on with the same stream."""
    with running(external(tmp_path)) as observer:
        with peer(observer.loop.endpoint) as one:
            one.begin()
            observer.until_serving()
            made = submits(2, random.Random(9), max_tokens=2)
            for submit in made:
                observer.loop.send(submit)
            one.step()
        with peer(observer.loop.endpoint) as two:
            two.say(Hello(0, "test", PROTOCOL, pid=os.getpid()))
            setup = two.hear()
            assert isinstance(setup, Setup)
            two.say(Ready(setup.epoch, 0, 100, fingerprint="another"))
            answer = two.hear()
            assert isinstance(answer, Shutdown)
            assert "start the service anew" in answer.reason
            observer.until(lambda: not observer.status.serving, "that nobody serves")
        with peer(observer.loop.endpoint) as three:
            three.begin()
            with answering(three):
                observer.until_finished(made)
            assert_undisturbed(observer, made)


def test_only_so_many_workers_come_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_groups, "MAX_GROUPS", 1)
    with running(external(tmp_path)) as observer, external_worker(observer.loop.endpoint):
        observer.until_serving()
        with external_worker(observer.loop.endpoint) as second:
            _, err = second.communicate(timeout=30)
            assert "has a worker already" in err
        assert observer.status.serving


@pytest.mark.parametrize("transport", ["ipc", "tcp"])
def test_a_worker_outlives_its_scheduler(tmp_path: Path, transport: str) -> None:
    """The same process serves the next scheduler: found again by its pid, with its weights, and no KV."""
    config = external(tmp_path, "fake:load_ms=20")
    if transport == "tcp":
        with running(replace(config, listen="tcp://127.0.0.1:*")) as observer:
            config = replace(config, listen=observer.loop.endpoint)
    with running(config) as observer, external_worker(config.listen) as process:
        observer.until_serving()
        made = submits(4, random.Random(6))
        for submit in made:
            observer.loop.send(submit)
        observer.until_finished(made)
        _vanish(observer.loop)
        setup = msgspec.structs.replace(config.setup, epoch=Epoch(config.setup.epoch.boot + 1, 0))
        with running(replace(config, setup=setup)) as next_observer:
            for submit in made:
                next_observer.loop.send(submit)
            next_observer.until_finished(made)
            assert_undisturbed(next_observer, made)
            assert next_observer.status.workers[0].pid == process.pid
            states = [status.workers[0].detail for _, status in next_observer.statuses]
            assert "weights" not in states, "nothing was loaded again"


def _vanish(loop: EngineLoop) -> None:
    """Ends a loop as a crash would: without a word to its worker."""
    for group in loop._workers.groups:
        group.link.shut_down = lambda reason: False  # type: ignore[method-assign]
    loop.stop()


def test_a_model_that_no_worker_can_serve_fails_the_service() -> None:
    with running(loop_config("fake:load_fails=0")) as observer:
        observer.until(lambda: observer.statuses and observer.status.failed, "failure")
        assert not observer.status.serving
        assert "cannot be read" in observer.status.reason


def test_an_engine_that_cannot_use_the_worker_fails_the_service() -> None:
    with running(loop_config("fake:align=100000")) as observer:
        observer.until(lambda: observer.statuses and observer.status.failed, "failure")
        assert "align" in observer.status.reason


def test_a_status_tells_of_the_start() -> None:
    with running(loop_config("fake:load_ms=20")) as observer:
        observer.until_serving()
        states = [status.workers[0].state for _, status in observer.statuses]
        assert states == sorted(states, key=["lost", "starting", "loading", "serving"].index)
        assert {"loading", "serving"} <= set(states)
        assert max(status.workers[0].progress for _, status in observer.statuses) > 0
        assert not any(status.reason for _, status in observer.statuses if status.serving)
        assert all(status.reason for _, status in observer.statuses if not status.serving)


@pytest.mark.parametrize("deadline", [0.01, 0.5], ids=["before its hello", "after it"])
def test_a_start_that_says_nothing_is_given_up(deadline: float) -> None:
    with running(loop_config("fake:load_ms=4000000", load_deadline=deadline)) as observer:
        observer.until(lambda: any("nothing was heard" in s.reason for _, s in observer.statuses), "impatience")


def test_the_private_endpoint_is_private_and_gone_afterwards() -> None:
    with running(loop_config()) as observer:
        directory = Path(observer.loop.endpoint.removeprefix("ipc://")).parent
        assert directory.stat().st_mode & 0o777 == 0o700
    assert not directory.exists()


def test_an_endpoint_in_use_is_an_error_in_words(tmp_path: Path) -> None:
    with running(replace(external(tmp_path), listen="tcp://127.0.0.1:*")) as observer:
        taken = replace(external(tmp_path), listen=observer.loop.endpoint)
        with pytest.raises(OSError, match="cannot listen for workers"):
            EngineLoop(taken, lambda: 0.0)


def test_an_end_is_heard_before_the_newcomer_that_follows_it(tmp_path: Path) -> None:
    """Or a worker that reconnects would be turned away as a second one."""
    sock = WorkerSocket(f"ipc://{tmp_path}/workers")
    try:
        with peer(sock.endpoint) as first:
            first.say(Hello(0, "first", PROTOCOL))
            assert sock.router.poll(PATIENCE_MS)
            ((one, _),) = sock.hear()
        with peer(sock.endpoint) as second:
            assert sock.monitor.poll(PATIENCE_MS)
            second.say(Hello(0, "second", PROTOCOL))
            assert sock.router.poll(PATIENCE_MS)
            heard = list(sock.hear())
        assert [type(message) for _, message in heard] == [Gone, Hello]
        assert [who == one for who, _ in heard] == [True, False]
    finally:
        sock.close()


def test_whoever_attaches_hears_the_status_at_once() -> None:
    with running(loop_config()) as observer:
        observer.until_serving()
        late = Observer(observer.loop)
        late.until(lambda: late.statuses, "a status")
        assert late.status.serving


def test_nobody_speaks_for_the_worker(tmp_path: Path) -> None:
    """Not even who knows its epoch."""
    made = submits(1, random.Random(8))
    with running(external(tmp_path)) as observer, peer(observer.loop.endpoint) as worker:
        epoch = worker.begin().epoch
        with peer(observer.loop.endpoint) as stranger:
            stranger.say(Fault(epoch, 0, "not its own", True), Hello(0, "stranger", PROTOCOL))
            own = stranger.hear()  # so the Fault was heard, too
            assert isinstance(own, Setup)
            assert own.epoch != epoch, "it is a worker of its own"
        observer.loop.send(made[0])
        for _ in range(made[0].sampling.max_tokens):
            assert worker.step().epoch == epoch
        observer.until_finished(made)
        assert not observer.status.failed

"""The worker as a process: what it says, what it keeps, and when it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from protos.wire import (
    Admit,
    Epoch,
    Fault,
    FromWorker,
    Hello,
    Mask,
    Row,
    Sampling,
    Shutdown,
    Status,
    StepPlan,
    StepResult,
)
from tests.worker.scheduler_end import ROOT, SchedulerEnd, first_plan, next_plan, plan, setup, worker
from worker_svc.backends.fake import expected

PROMPT = [300, 301, 302, 303, 304]
PATIENCE = 30.0
OVERLAPPING = "fake:overlap=1,delay_ms=3"
either = pytest.mark.parametrize("model", ["fake:", OVERLAPPING])


def _tokens(result: StepResult) -> list[int]:
    return [token for row in result.rows for token in row.token_ids]


@either
def test_setup_plans_and_results(model: str) -> None:
    with worker() as (end, _):
        _, statuses = end.until_ready(setup(model=model))
        assert statuses
        assert [s.progress for s in statuses] == sorted(s.progress for s in statuses)
        got = []
        end.send(first_plan(PROMPT), *(next_plan(step) for step in range(2, 11)))
        for step in range(1, 11):
            result = end.receive(StepResult)
            assert result.step == step
            assert result.rows[0].start == len(PROMPT) + step - 1
            got += _tokens(result)
        assert got == expected(PROMPT, Sampling(max_tokens=10))


def test_ready_tells_what_it_can() -> None:
    with worker() as (end, _):
        ready, _ = end.until_ready(setup(model="fake:vocab=300,blocks=17,align=4,context=99"))
        assert (ready.vocab_size, ready.num_blocks, ready.align, ready.max_model_len) == (300, 17, 4, 99)
        assert ready.exact
        assert ready.fingerprint


def test_another_epoch_of_the_same_setup_keeps_weights_and_forgets_slots() -> None:
    with worker() as (end, _):
        assert end.loads(setup(1))
        end.send(first_plan(PROMPT))
        end.receive(StepResult)
        assert not end.loads(setup(2)), "nothing is loaded again"
        end.send(next_plan(2, counter=1))  # of the epoch that has ended: not heard
        end.send(first_plan(PROMPT, counter=2))  # the slot is free again
        assert end.receive(StepResult).epoch == Epoch(7, 2)
        assert not end.loads(setup(1, boot=8)), "a scheduler that was started anew asks for the same weights"
        assert end.loads(setup(3, model="fake:vocab=300")), "another model is loaded"


def test_a_gap_in_steps_ends_the_epoch() -> None:
    with worker() as (end, _):
        end.until_ready(setup())
        end.send(first_plan(PROMPT), next_plan(3))
        end.receive(StepResult)
        fault = end.receive(Fault)
        assert not fault.fatal
        assert "step 3" in fault.reason
        end.send(next_plan(2))  # nothing of a faulted epoch is taken
        assert not end.loads(setup(2))


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (next_plan(1), "slot 1"),
        (plan(1, [], release=[3]), "slot 3"),
        (plan(1, [Row(1, 0, 2)], [Admit(1, PROMPT, 5, [[99999]], Sampling(max_tokens=1))]), "block 99999"),
        (plan(1, [Row(1, 0, 5)], [Admit(1, PROMPT, 5, [[1]], Sampling(max_tokens=1))]), "1 blocks"),
        (plan(1, [Row(1, 4, 1)], [Admit(1, PROMPT, 5, [[1, 2]], Sampling(max_tokens=1))]), "position 3"),
        (plan(1, [Row(1, 0, 4, sample=True)], [Admit(1, PROMPT, 5, [[1, 2]], Sampling(max_tokens=1))]), "sample at 4"),
        (plan(1, [Row(1, -1, 5)], [Admit(1, PROMPT, 5, [[1, 2]], Sampling(max_tokens=1))]), "start -1"),
    ],
)
def test_a_plan_that_the_backend_cannot_do_is_a_fault(bad: StepPlan, words: str) -> None:
    with worker() as (end, process):
        end.until_ready(setup())
        end.send(bad)
        fault = end.receive(Fault)
        assert words in fault.reason
        assert "\n" not in fault.reason
        assert end.loads(setup(2)), "a backend that raised is not trusted with another epoch"
        assert process.poll() is None


def test_a_model_that_cannot_be_served_is_fatal() -> None:
    with worker() as (end, _):
        for model, words in (
            ("fake:load_fails=0", "cannot be read"),
            ("fake:nonsense=1", "nonsense"),
        ):
            end.send(setup(model=model))
            fault = end.receive(Fault)
            assert fault.fatal
            assert words in fault.reason
            assert "\n" not in fault.reason


def test_a_backend_that_is_not_exact_is_refused_where_it_has_to_be() -> None:
    with worker() as (end, _):
        assert not end.until_ready(setup(model="fake:exact=0"))[0].exact
        end.send(setup(model="fake:exact=0", batch_invariant=True))
        while isinstance(fault := end.receive_any(), Status):
            pass
        assert isinstance(fault, Fault)
        assert (fault.fatal, fault.reason) == (True, "batch_invariant: the fake backend is not exact here")


def test_another_failure_of_loading_is_not() -> None:
    with worker() as (end, _):
        end.send(setup(model="fake:load_fails=1"))
        assert not end.receive(Fault).fatal


def _mask(step: int, allowed: int, counter: int = 1) -> Mask:
    bits = bytearray(64)  # vocabulary 512
    bits[allowed // 8] |= 1 << (allowed % 8)
    return Mask(Epoch(7, counter), step, [0], bytes(bits))


@either
def test_a_masked_row_waits_for_its_mask(model: str) -> None:
    with worker() as (end, _):
        end.until_ready(setup(model=model))
        # the next plan may come before the mask of this one, but not the one after
        end.send(first_plan(PROMPT, masked=True), next_plan(2, masked=True), _mask(1, 77), next_plan(3), _mask(2, 78))
        assert _tokens(end.receive(StepResult)) == [77]
        assert _tokens(end.receive(StepResult)) == [78]
        known = [*PROMPT, 77, 78]
        assert _tokens(end.receive(StepResult)) == expected(known, Sampling(max_tokens=1))


def test_a_missing_mask_never_samples() -> None:
    with worker("--mask-deadline", "0.05") as (end, _):
        end.until_ready(setup())
        end.send(first_plan(PROMPT, masked=True), _mask(2, 77), _mask(1, 77, counter=9))
        assert "mask" in end.receive(Fault).reason


@either
def test_a_new_setup_ends_the_wait_for_a_mask(model: str) -> None:
    with worker() as (end, _):
        end.until_ready(setup(model=model))
        end.send(first_plan(PROMPT, masked=True))
        assert not end.loads(setup(2, model=model))


def test_bytes_that_are_no_message_are_a_fault() -> None:
    with worker() as (end, process):
        end.until_ready(setup())
        for junk in (b"", b"\xc1", b"\x93\x01\x02\x03", os.urandom(200)):
            end.router.send_multipart((end.peer, junk))
            assert "no message" in end.receive(Fault).reason
        end.until_ready(setup(2))
        assert process.poll() is None


def test_shutdown_ends_it_with_one_line() -> None:
    with worker(stderr=subprocess.PIPE) as (end, process):
        end.until_ready(setup())
        end.send(Shutdown("enough"))
        _, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0
        assert err.count("\n") == 1
        assert "enough" in err


@pytest.mark.parametrize("hanging", [False, True])
def test_a_spawned_worker_ends_with_its_link(hanging: bool) -> None:
    with worker(stderr=subprocess.PIPE) as (end, process):
        end.until_ready(setup(model="fake:hang=5"))
        if hanging:
            end.send(first_plan([5, 6]))
            assert process.stderr
            assert "hangs" in process.stderr.readline()
        end.hang_up()
        assert process.wait(PATIENCE) == (1 if hanging else 0)


def test_a_worker_of_its_own_waits_for_a_scheduler_that_comes_back() -> None:
    with worker(spawned=False) as (end, process):
        end.until_ready(setup())
        end.hang_up()
        end.listen()
        assert end.receive(Hello).pid == process.pid
        assert not end.loads(setup(boot=8)), "the weights are still there"


def test_it_leaves_signals_to_its_parent() -> None:
    with worker() as (end, process):
        os.kill(process.pid, signal.SIGINT)
        end.until_ready(setup())
        os.kill(process.pid, signal.SIGTERM)
        end.send(first_plan(PROMPT))
        end.receive(StepResult)


def test_an_orphan_does_not_start() -> None:
    command = [sys.executable, "-m", "worker_svc", "--connect", "tcp://127.0.0.1:9", "--parent-pid", "1"]
    assert subprocess.run(command, cwd=ROOT, timeout=PATIENCE, check=False).returncode == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["udp://127.0.0.1:5"],
        ["nonsense"],
        ["ipc://here"],
        ["tcp://127.0.0.1:*"],
        ["ipc:///here", "--curve-keys", "keys"],
    ],
)
def test_it_connects_to_nothing_else(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "worker_svc", "--connect", *arguments]
    done = subprocess.run(command, cwd=ROOT, timeout=PATIENCE, check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert arguments[0] in done.stderr


def test_it_connects_to_no_other_host_without_keys(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "worker_svc", "--connect", "tcp://192.0.2.1:5555", "--home", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr
        assert process.stderr.readline().startswith(f"pagewire worker: waits for keys in {tmp_path / 'curve'}")
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


def test_with_the_fake_backend_it_imports_neither_torch_nor_grpc() -> None:
    """Seen from inside: the real entry point, through a step, in a process that tells its modules when it ends."""
    script = (
        "import atexit, runpy, sys\n"
        "atexit.register(lambda: print('MODULES', *sorted({m.partition('.')[0] for m in sys.modules})))\n"
        "runpy.run_module('worker_svc', run_name='__main__', alter_sys=True)\n"
    )
    end = SchedulerEnd()
    command = [sys.executable, "-c", script, "--connect", end.endpoint]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        end.receive(Hello)
        end.until_ready(setup())
        end.send(first_plan(PROMPT))
        end.receive(StepResult)
        end.send(Shutdown("seen"))
        out, _ = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
        end.close()
    modules = set(out.partition("MODULES")[2].split())
    assert "msgspec" in modules
    assert not modules & {"torch", "grpc", "numpy", "transformers", "scheduler_svc", "client"}


@either
def test_steps_go_on_in_order_over_many_plans_at_once(model: str) -> None:
    with worker() as (end, _):
        end.until_ready(setup(model=model))
        end.send(first_plan(PROMPT), *(next_plan(step) for step in range(2, 21)), plan(21, []))
        assert [end.receive(StepResult).step for _ in range(21)] == list(range(1, 22))


def _steps(messages: list[FromWorker]) -> list[int]:
    assert all(isinstance(message, StepResult) for message in messages)
    return [message.step for message in messages if isinstance(message, StepResult)]


def test_results_travel_together_while_more_plans_wait_than_results() -> None:
    with worker() as (end, _):
        end.until_ready(setup())
        end.send_together(first_plan(PROMPT), *(next_plan(step) for step in range(2, 7)))
        assert [_steps(end.receive_together()) for _ in range(3)] == [[1, 2, 3], [4, 5], [6]]
        end.send_together(next_plan(7), next_plan(8))
        assert [_steps(end.receive_together()) for _ in range(2)] == [[7], [8]], "nobody waits for a plan of its own"


def test_no_result_waits_that_a_mask_depends_on() -> None:
    """Not even for the forward pass of the step that it is for: here one that never ends."""
    with worker() as (end, _):
        end.until_ready(setup(model="fake:hang=5"))
        newcomer = Admit(2, [5, 6], 2, [[9]], Sampling(max_tokens=9))
        masked = plan(2, [Row(1, -1, 1, sample=True, masked=True), Row(2, 0, 2, sample=True)], [newcomer])
        end.send_together(first_plan(PROMPT), masked, next_plan(3), next_plan(4), next_plan(5))
        assert _steps(end.receive_together()) == [1]


def test_a_fault_comes_behind_the_results_before_it() -> None:
    with worker() as (end, _):
        end.until_ready(setup())
        end.send_together(first_plan(PROMPT), next_plan(3), next_plan(4), next_plan(5))
        result, fault = end.receive_together()
        assert isinstance(result, StepResult)
        assert isinstance(fault, Fault)
        assert "step 3" in fault.reason


def test_the_next_step_is_launched_while_one_is_in_flight() -> None:
    """Here one that would land in ten minutes, and a next one whose forward pass never ends, and says so."""
    with worker(stderr=subprocess.PIPE) as (end, process):
        end.until_ready(setup(model="fake:overlap=1,delay_ms=600000,hang=5"))
        newcomer = Admit(2, [5, 6], 2, [[9]], Sampling(max_tokens=9))
        end.send_together(first_plan(PROMPT), plan(2, [Row(2, 0, 2, sample=True)], [newcomer]))
        assert process.stderr is not None
        assert "hangs, as asked" in process.stderr.readline()
        process.kill()


def test_what_is_in_flight_when_an_epoch_ends_is_not_answered_in_the_next() -> None:
    with worker() as (end, _):
        model = "fake:overlap=1,delay_ms=50"
        end.until_ready(setup(model=model))
        end.send_together(first_plan(PROMPT), next_plan(2))
        end.until_ready(setup(2, model=model))
        end.send(first_plan(PROMPT, counter=2))
        result = end.receive(StepResult)
        assert (result.epoch, result.step) == (Epoch(7, 2), 1)

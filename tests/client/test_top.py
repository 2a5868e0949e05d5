"""`pagewire top`: its arithmetic, its frame, and the command against real services."""

from __future__ import annotations

import asyncio
import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from pagewire.v1 import admin_pb2, inference_pb2
from rich.console import Console

from client.figures import WINDOW, Change, History, Reading, quantile
from client.top_frame import Head, frame
from tests.client.scripted import PATIENCE, ScriptedServer
from tests.e2e.service import Service, generate, service

CLI = [sys.executable, "-m", "client.cli", "top"]
SERVING, LOST = admin_pb2.WORKER_STATE_SERVING, admin_pb2.WORKER_STATE_LOST


def stats(**fields: object) -> admin_pb2.GetStatsResponse:
    return admin_pb2.GetStatsResponse(**{"uptime_seconds": 60, "serving": True, **fields})  # type: ignore[arg-type]


def histogram(*counts: int) -> admin_pb2.Histogram:
    return admin_pb2.Histogram(bounds=[1, 2, 4], counts=counts)


def drawn(head: Head, change: Change | None) -> str:
    console = Console(file=io.StringIO(), width=110, color_system=None)
    console.print(frame(head, change))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def between(before: admin_pb2.GetStatsResponse, after: admin_pb2.GetStatsResponse, seconds: float = 2) -> Change:
    return Change(Reading(10.0, before), Reading(10.0 + seconds, after))


# ---------------------------------------------------------------- arithmetic


def test_rates_are_of_the_time_between() -> None:
    change = between(stats(generated_tokens=100), stats(generated_tokens=150))
    assert change.rate("generated_tokens") == 25
    assert change.rate("steps") == 0
    one = Reading(10.0, stats(generated_tokens=100))
    assert Change(one, one).rate("generated_tokens") == 0


def test_quantiles_are_those_of_the_window_or_else_of_all_time() -> None:
    change = between(stats(first_token=histogram(10, 0, 0, 0)), stats(first_token=histogram(10, 0, 4, 0)))
    assert change.quantiles("first_token", [0.5, 1.0]) == [3.0, 4.0]
    quiet = between(change.now, change.now)
    assert quiet.quantiles("first_token", [0.5]) == [0.7]
    assert quiet.quantiles("step", [0.5]) is None


@pytest.mark.parametrize(("share", "value"), [(0.0, 0.0), (0.25, 1.0), (0.5, 2.0), (0.75, 4.0), (1.0, 4.0)])
def test_a_quantile_lies_evenly_in_its_range(share: float, value: float) -> None:
    assert quantile([1.0, 2.0, 4.0], [1, 1, 1, 1], share) == value


def test_a_history_keeps_the_window_and_forgets_another_service() -> None:
    history = History()
    for second in range(30):
        history.add(Reading(float(second), stats(uptime_seconds=second, steps=second)))
    assert history.change is not None
    assert history.change.seconds == WINDOW
    assert history.change.rate("steps") == 1
    history.add(Reading(30.0, stats(uptime_seconds=1, steps=2)))
    assert history.change.seconds == 0
    assert history.change.rate("steps") == 0


# ---------------------------------------------------------------- the frame


def test_a_frame_shows_what_there_is() -> None:
    before = stats(generated_tokens=100, prompt_tokens=50, workers=[admin_pb2.WorkerStats(state=SERVING)])
    worker = admin_pb2.WorkerStats(state=SERVING, pid=4711, device="cpu", steps=50, busy_seconds=1.5, state_seconds=75)
    tenants = [admin_pb2.TenantStats(name="acme", running=2, output_tokens=60), admin_pb2.TenantStats(waiting=3)]
    now = stats(
        generated_tokens=160,
        prompt_tokens=100,
        cached_tokens=25,
        running=2,
        waiting=3,
        total_blocks=100,
        owned_blocks=20,
        cached_blocks=30,
        free_blocks=50,
        first_token=histogram(0, 4, 0, 0),
        draft_tokens=30,
        accepted_draft_tokens=12,
        workers=[worker],
        tenants=tenants,
        losses=[admin_pb2.WorkerLoss(seconds_ago=3, pid=4700, reason="it was killed by SIGKILL")],
    )
    text = drawn(Head("h:1", "m, cpu"), between(before, now))
    for words in (
        "pagewire h:1  m, cpu  serving  up 1:00 min",
        "2 run, 3 wait",
        "25 in, 30 out; 25% of all prompts",
        "████████▒▒▒▒▒▒▒▒▒▒▒▒···················· 20%",
        "15.0 a second; 40% of all were right",
        "first token     1.500  1.900  1.990",
        "between tokens      –",
        "serving  1:15 min  4711  25.0     75%   0",
        "acme",
        "(none)",
        "3 s  4700  it was killed by SIGKILL",
    ):
        assert words in text, f"{words!r} in\n{text}"


def test_nobody_can_draw_beyond_their_cell() -> None:
    """Names and reasons come from callers and dying processes."""
    evil = "[red]\x1b[2Jx\ny\u2028"
    worker = admin_pb2.WorkerStats(state=LOST, detail=evil)
    now = stats(workers=[worker], tenants=[admin_pb2.TenantStats(name=evil)], serving=False, reason=evil)
    text = drawn(Head("h:1", evil), between(now, now)) + drawn(Head("h:1", evil, evil), None)
    assert "\x1b" not in text
    assert text.count("[red]·[2Jx·y·") == 6
    assert "\u2028" not in text


def test_before_anything_came_it_says_so() -> None:
    assert drawn(Head("h:1"), None) == "pagewire h:1  connecting\n"
    assert "not reachable" in drawn(Head("h:1", trouble="no server answers"), None)
    assert "no server answers: trying again" in drawn(Head("h:1", trouble="no server answers"), None)


# ---------------------------------------------------------------- the command


def once(address: str, *more: str) -> subprocess.CompletedProcess[str]:
    command = [*CLI, "--once", "--interval", "0.2", "--address", address, *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_once_without_a_service_is_one_line(server: ScriptedServer) -> None:
    server.close()
    done = once(server.address)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"pagewire: no server answers at {server.address} (UNAVAILABLE)\n"


@pytest.mark.parametrize("arguments", [["--interval", "0"], ["--interval", "x"], []])
def test_wrong_usage_is_exit_code_2(arguments: list[str]) -> None:
    done = subprocess.run([*CLI, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "--interval" in done.stderr or "--once" in done.stderr


@contextmanager
def screen(address: str) -> Iterator[Screen]:
    """The command in a terminal of 110 columns and 50 lines."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": "110", "LINES": "50", "TERM": "xterm"}
    command = [*CLI, "--interval", "0.1", "--address", address]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        try:
            yield Screen(process, ours)
        finally:
            process.kill()
            os.close(ours)


class Screen:
    def __init__(self, process: subprocess.Popen[bytes], descriptor: int) -> None:
        self.process, self.descriptor, self.seen = process, descriptor, ""

    async def shows(self, text: str) -> None:
        """Reads until `text` comes, and forgets what was before."""
        deadline = time.monotonic() + PATIENCE
        while text not in self.seen:
            assert time.monotonic() < deadline, f"no {text!r} in {self.seen[-6000:]}"
            ready, _, _ = await asyncio.to_thread(select.select, [self.descriptor], [], [], 1.0)
            if ready:
                self.seen += os.read(self.descriptor, 65536).decode(errors="replace")
        self.seen = ""


async def _stream(running: Service, tokens: int) -> None:
    sampling = inference_pb2.SamplingParams(max_tokens=tokens, ignore_eos=True)
    await generate(running, inference_pb2.GenerateRequest(text="hello", sampling=sampling))


async def test_it_is_alive_while_workers_die_and_while_nobody_answers() -> None:
    async with service("fake:delay_ms=5,load_ms=1000") as running:
        streams = [asyncio.ensure_future(_stream(running, 4000)) for _ in range(3)]
        with screen(running.address) as top:
            await top.shows("3 run, 0 wait")
            done = await asyncio.to_thread(once, running.address)
            assert (done.returncode, done.stderr) == (0, "")
            assert "load_ms=1000, fake, float32, KV float32  serving" in done.stdout
            assert "3 run, 0 wait" in done.stdout
            pid = await running.worker_pid()
            os.kill(pid, signal.SIGKILL)
            await top.shows("the worker was lost: it was killed by SIGKILL")
            await top.shows("loading")
            await top.shows(f"{pid}  it was killed by SIGKILL")
            await top.shows("3 run, 0 wait")
            running.process.kill()
            await asyncio.to_thread(running.process.wait)
            await top.shows("not reachable")
            top.process.send_signal(signal.SIGINT)
            assert await asyncio.to_thread(top.process.wait, 30) == 0
        await asyncio.gather(*streams, return_exceptions=True)

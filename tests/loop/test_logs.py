"""Lines for people and lines for collectors; nothing in one can begin another."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from scheduler_svc import logs

ROOT = Path(__file__).parents[2]
log = logging.getLogger("scheduler_svc.test")


@pytest.fixture
def stream(logging_restored: None) -> io.StringIO:
    return io.StringIO()


def test_text_is_for_a_person(stream: io.StringIO) -> None:
    logs.configure("text", "info", stream)
    log.info("worker %d: serves again", 7)
    log.info("ready: m at h:1", extra=logs.HEADLINE)
    log.info("call", extra=logs.about(code="OK", seconds=0.5))
    log.debug("not this one")
    assert stream.getvalue().splitlines() == [
        "pagewire: worker 7: serves again",
        "pagewire ready: m at h:1",
        "pagewire: call code=OK seconds=0.5",
    ]


def test_json_is_an_object_a_line(stream: io.StringIO) -> None:
    logs.configure("json", "info", stream)
    token = logs.CALL.set({"request_id": "r", "tenant": "t"})
    try:
        log.warning("careful", extra=logs.about(code="OK", seconds=0.5))
    finally:
        logs.CALL.reset(token)
    entry = json.loads(stream.getvalue())
    assert entry.pop("time").endswith("+00:00")
    known = {"request_id": "r", "tenant": "t", "code": "OK", "seconds": 0.5}
    assert entry == {"level": "warning", "logger": "scheduler_svc.test", "message": "careful", **known}


@pytest.mark.parametrize("form", logs.FORMATS)
def test_a_line_stays_one_line(form: str, stream: io.StringIO) -> None:
    logs.configure(form, "info", stream)
    evil = 'x\n{"level":"error"}\r\x1b[2J\u2028\x85\x9bm\x00'
    log.warning("bad: %s", evil, extra=logs.about(tenant=evil))
    text = stream.getvalue()
    assert text.endswith("\n")
    assert len(text.splitlines()) == 1
    assert not set(text[:-1]) & set("\n\r\x1b\u2028\x85\x9b\x00")
    if form == "json":
        assert json.loads(text)["tenant"] == evil


@pytest.mark.parametrize("form", logs.FORMATS)
def test_a_traceback_comes_with_its_line(form: str, stream: io.StringIO) -> None:
    logs.configure(form, "info", stream)
    try:
        raise ValueError("two\nlines")
    except ValueError:
        log.exception("it failed")
    first, *rest = stream.getvalue().splitlines()
    if form == "json":
        assert not rest
        assert "ValueError: two\nlines" in json.loads(first)["exception"]
    else:
        assert first == "pagewire: it failed"
        assert all(line.startswith("  | ") for line in rest)
        assert any("ValueError: two" in line for line in rest)


def test_other_libraries_are_heard_from_warnings_on(stream: io.StringIO) -> None:
    logs.configure("text", "debug", stream)
    logging.getLogger("asyncio").info("selector")
    logging.getLogger("asyncio").warning("slow")
    log.debug("ours")
    assert stream.getvalue() == "pagewire: slow\npagewire: ours\n"
    logs.configure("text", "error", stream)
    logging.getLogger("asyncio").warning("slow")
    log.warning("ours")
    assert stream.getvalue().count("\n") == 2


def test_a_workers_own_lines_become_ours() -> None:
    """Of a real service, from its start to its end: every line on stderr is an object, its worker's too."""
    command = [sys.executable, "-m", "scheduler_svc", "fake:", "--port", "0", "--log-format", "json"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        entries = []
        for line in process.stderr:
            entries.append(json.loads(line))
            if entries[-1]["message"].startswith("ready: "):
                process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    messages = [entry["message"] for entry in entries]
    assert [m.partition(":")[0] for m in messages if "worker" not in m] == ["ready", "SIGTERM", "drained"]
    (words,) = [entry for entry in entries if "ends: the scheduler stops" in entry["message"]]
    assert (words["logger"], words["level"]) == ("scheduler_svc.worker", "info")
    assert words["worker_pid"] != process.pid
    assert f"worker {words['worker_pid']}" in words["message"]


def test_a_dead_worker_is_a_warning_with_its_reason() -> None:
    command = [sys.executable, "-m", "scheduler_svc", "fake:", "--port", "0", "--log-format", "json"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            entry = json.loads(line)
            if entry["message"].startswith("ready: "):
                (worker,) = _children(process.pid)
                os.kill(worker, signal.SIGKILL)
            elif "lost" in entry["message"]:
                break
        process.kill()
    assert entry["level"] == "warning"
    assert entry["message"] == f"worker {worker}: lost: it was killed by SIGKILL"


def _children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]

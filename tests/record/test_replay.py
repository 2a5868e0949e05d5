"""A log of a real loop with real workers, replayed by the command."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from protos.engine_wire import Question, Submit
from scheduler_svc.engine.events import FlushCache, WorkerLost
from scheduler_svc.engine.scheduler import Scheduler
from scheduler_svc.record import RecordConfig
from scheduler_svc.record_format import LogError, read_log
from scheduler_svc.replay import Log, main, replay
from tests.loop.harness import loop_config, running, submits

ROOT = Path(__file__).parents[2]


def record(record: RecordConfig) -> None:
    """A run with preemptions and a dead worker."""
    made = submits(30, random.Random(1))
    with running(loop_config("fake:blocks=30", record=record)) as observer:
        for submit in made:
            observer.loop.send(submit)
        observer.until_tokens(100)
        os.kill(observer.status.workers[0].pid, signal.SIGKILL)
        observer.until_finished(made)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a log, and what its worker's death left."""
    path = tmp_path_factory.mktemp("log")
    record(RecordConfig(path / "engine.log", crash_dir=path / "crashes"))
    return path


@pytest.fixture(scope="module")
def log(directory: Path) -> Path:
    return directory / "engine.log"


def replay_command(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "client.cli", "replay", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_the_log_holds_everything_that_the_engine_heard(log: Path) -> None:
    header, entries = read_log(log)
    events = [entry.event for entry in entries]
    assert header.model == "fake:blocks=30"
    assert header.config == loop_config().engine
    assert sum(isinstance(event, Submit) for event in events) == 30
    assert sum(isinstance(event, WorkerLost) for event in events) >= 1


def test_a_worker_that_dies_leaves_a_log_that_replays(directory: Path) -> None:
    (crash,) = (directory / "crashes").iterdir()
    header, entries = read_log(crash)
    assert "a worker was lost: it was killed by SIGKILL" in header.reason
    assert isinstance(list(entries)[-1].event, WorkerLost)
    done = replay_command(crash, "--check")
    assert done.returncode == 0, done.stderr
    assert "all as recorded" in done.stdout


def test_a_private_run_replays(tmp_path: Path) -> None:
    record(RecordConfig(tmp_path / "log", crash_dir=tmp_path / "crashes", key=bytes(32)))
    (crash,) = (tmp_path / "crashes").iterdir()
    for path in (tmp_path / "log", crash):
        result = replay(Log(path))
        assert result.difference == ""
        assert result.plans > 10
    assert read_log(crash)[0].reason == "a worker was lost"


def test_an_engine_that_fails_leaves_what_led_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    submit = Scheduler._submit

    def fail(self: Scheduler, request: Submit) -> None:
        if request.request_id == "r3":
            raise ZeroDivisionError("a defect")
        submit(self, request)

    monkeypatch.setattr(Scheduler, "_submit", fail)
    with running(loop_config(record=RecordConfig(crash_dir=tmp_path))) as observer:
        for request in submits(4, random.Random(1)):
            observer.loop.send(request)
        observer.until(lambda: observer.statuses and observer.status.failed, "the end of it")
    (crash,) = tmp_path.iterdir()
    assert f"the last seconds before it are in {crash}" in capfd.readouterr().err
    assert read_log(crash)[0].reason == "the engine loop failed: ZeroDivisionError('a defect')"
    assert main([str(crash)]) == 0
    assert "the last event raises ZeroDivisionError: a defect, as it did" in capfd.readouterr().out


def test_a_private_log_gets_its_flush_when_nobody_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scheduler_svc.loop._AUDIT_AFTER", 0.0)
    made = submits(10, random.Random(1))
    with running(loop_config(record=RecordConfig(tmp_path / "log", key=bytes(32)))) as observer:
        for submit in made[:-1]:
            observer.loop.send(submit)
        observer.until_finished(made[:-1])
        for sink in observer.loop._recorder._sinks:
            sink.limit = sink.size  # so the last one's few events are over it, and not twice over it
        observer.loop.send(made[-1])
        observer.until_finished(made)
        while not (tmp_path / "log.1").exists():
            observer.ask(Question.STATS)
    assert isinstance(list(read_log(tmp_path / "log.1")[1])[-1].event, FlushCache)
    for path in tmp_path.iterdir():
        assert replay(Log(path)).difference == ""


def test_a_full_disk_ends_the_log_and_not_the_service(capfd: pytest.CaptureFixture[str]) -> None:
    made = submits(60, random.Random(2))
    with running(loop_config(record=RecordConfig(Path("/dev/full")))) as observer:
        for submit in made:
            observer.loop.send(submit)
        observer.until_finished(made)
        assert not observer.status.failed
    assert capfd.readouterr().err.count("recording stops: ") == 1


def test_a_replay_gives_the_same_instructions_under_another_hash_seed(log: Path) -> None:
    for seed in ("1", "2"):
        done = replay_command(log, PYTHONHASHSEED=seed)
        assert done.returncode == 0, done.stderr
        assert "all as recorded" in done.stdout


def test_a_replay_finds_the_first_difference(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, entries = read_log(log)
    first = next(entry.digest for entry in entries if entry.digest)
    changed = tmp_path / "changed.log"
    changed.write_bytes(log.read_bytes().replace(first, bytes(8), 1))
    result = replay(Log(changed))
    assert "is now answered by" in result.difference
    assert result.events < replay(Log(log)).events
    assert main([str(changed), "--timeline"]) == 1
    assert "is now answered by" in capsys.readouterr().err


def test_a_log_that_was_cut_is_read_up_to_the_cut(log: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.log"
    cut.write_bytes(log.read_bytes()[:-5])
    assert replay(Log(cut)).events == replay(Log(log)).events - 1


def test_the_timeline_tells_what_happened(log: Path) -> None:
    done = replay_command(log, "--timeline")
    assert done.returncode == 0, done.stderr
    for words in ("30 came", "WORKER LOST", "killed by SIGKILL", "preempted", "worker ready: epoch 2", "finished"):
        assert words in done.stdout, done.stdout


def test_lanes_show_what_became_of_each_request(log: Path) -> None:
    done = replay_command(log, "--lanes", "20")
    lanes = re.findall(r"^r(\d+)/0 (.*)$", done.stdout, re.MULTILINE)
    assert [int(number) for number, _ in lanes] == list(range(20))
    marks = "".join(lane for _, lane in lanes)
    assert {"·", "█", "!", "x"} <= set(marks), "some waited, ran, were preempted, and lost their worker"


def test_the_timeline_by_steps_has_a_line_for_each_plan(log: Path) -> None:
    done = replay_command(log, "--timeline", "steps")
    assert len(re.findall(r"│ [12]:\d+ +│", done.stdout)) == replay(Log(log)).plans


def test_a_step_is_shown_with_the_engine_behind_it(log: Path) -> None:
    by_number, by_name = replay_command(log, "--step", "3"), replay_command(log, "--step", "1:3")
    assert by_number.stdout == by_name.stdout
    assert "plan 3: epoch 1, step 3" in by_number.stdout
    for words in ("RUNNING", "WAITING", "r0/0", "blocks 29 ="):
        assert words in by_number.stdout, by_number.stdout


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        ("--step 99999", 1, "has no plan 99999"),
        ("--step x", 2, "is neither N nor EPOCH:STEP"),
        ("--step 3 --check", 2, "--check goes with neither"),
        ("--lanes 0", 2, "must be at least 1"),
        ("--timeline minutes", 2, "minutes"),
    ],
)
def test_what_cannot_be_shown_is_said(
    log: Path, flags: str, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        found = main([str(log), *flags.split()])
    except SystemExit as exit_:
        found = int(exit_.code or 0)
    assert found == code
    assert words in capsys.readouterr().err


def test_a_log_of_another_engine_is_told(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header, _ = read_log(log)
    changed = tmp_path / "other.log"
    changed.write_bytes(log.read_bytes().replace(header.engine.encode(), b"0" * 16, 1))
    assert main([str(changed)]) == 0
    assert "the log is of engine 0000000000000000" in capsys.readouterr().err


@pytest.mark.parametrize("data", [b"", b"no log at all", b"\x03\x00\x00\x00abc", b"\x01\x00\x00\x00\xc1"])
def test_what_is_no_log_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x"
    path.write_bytes(data)
    with pytest.raises(LogError, match="not an engine log"):
        Log(path)

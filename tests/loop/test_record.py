"""A recorded engine log, and its replay."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from protos.engine_wire import Submit
from scheduler_svc.engine.events import WorkerLost
from scheduler_svc.record import LogError, read_log, replay
from tests.loop.harness import loop_config, running, submits

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run with preemptions and a dead worker."""
    path = tmp_path_factory.mktemp("log") / "engine.log"
    made = submits(30, random.Random(1))
    with running(loop_config("fake:blocks=60", record=path)) as observer:
        for submit in made:
            observer.loop.send(submit)
        observer.until_tokens(100)
        os.kill(observer.status.workers[0].pid, signal.SIGKILL)
        observer.until_finished(made)
    return path


def test_the_log_holds_everything_that_the_engine_heard(log: Path) -> None:
    header, entries = read_log(log)
    events = [entry.event for entry in entries]
    assert header.model == "fake:blocks=60"
    assert header.config == loop_config().engine
    assert sum(isinstance(event, Submit) for event in events) == 30
    assert sum(isinstance(event, WorkerLost) for event in events) >= 1


def test_a_full_disk_ends_the_log_and_not_the_service(capfd: pytest.CaptureFixture[str]) -> None:
    made = submits(60, random.Random(2))
    with running(loop_config(record=Path("/dev/full"))) as observer:
        for submit in made:
            observer.loop.send(submit)
        observer.until_finished(made)
        assert not observer.status.failed
    assert capfd.readouterr().err.count("recording stops: ") == 1


def test_a_replay_gives_the_same_instructions_under_another_hash_seed(log: Path) -> None:
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-m", "scheduler_svc", "replay", str(log)],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        assert "all as recorded" in done.stdout


def test_a_replay_finds_the_first_difference(log: Path, tmp_path: Path) -> None:
    data = log.read_bytes()
    _, entries = read_log(log)
    first = next(entry.digests[0] for entry in entries if entry.digests)
    changed = tmp_path / "changed.log"
    changed.write_bytes(data.replace(first, bytes(8), 1))
    result = replay(changed)
    assert "is now answered by" in result.difference
    assert result.events < replay(log).events


def test_a_log_that_was_cut_is_read_up_to_the_cut(log: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.log"
    cut.write_bytes(log.read_bytes()[:-5])
    assert replay(cut).events == replay(log).events - 1


@pytest.mark.parametrize("data", [b"", b"no log at all", b"\x03\x00\x00\x00abc", b"\x01\x00\x00\x00\xc1"])
def test_what_is_no_log_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x"
    path.write_bytes(data)
    with pytest.raises(LogError, match="not an engine log"):
        replay(path)

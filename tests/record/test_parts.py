"""A log in parts: bounded, each part replays by itself, and together they are the whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from protos.engine_wire import Submit
from scheduler_svc import replay
from scheduler_svc.engine.events import FlushCache, Tick
from scheduler_svc.engine.scheduler import Scheduler
from scheduler_svc.record import CRASH_LOGS, RecordConfig, Recorder
from scheduler_svc.record_format import read_log
from tests.engine.world import World, request
from tests.record import busy

KEY = bytes(range(32))
LIMIT = 10_000  # bytes of a part, for a run that makes some hundred thousand


def recorder(engine: Scheduler, config: RecordConfig, limit: int = LIMIT) -> Recorder:
    made = Recorder(config, engine, boot=7, model="m")
    for sink in made._sinks:
        sink.limit = limit
    return made


def is_due_and_need_not_pause(made: Recorder) -> None:
    """Another part, with the next event if that can be."""
    for sink in made._sinks:
        sink.limit = max(500, sink.size)


def record(world: World, config: RecordConfig, limit: int = LIMIT) -> Scheduler:
    """What the world heard, heard again by an engine that is recorded."""
    engine = Scheduler(world.config)
    made = recorder(engine, config, limit)
    for event in world.log:
        made.write(event, engine.handle(event))
        if engine.idle:
            made.rest()
    made.close()
    return engine


@pytest.fixture(scope="module")
def world() -> World:
    return busy.run(5)


@pytest.fixture
def parts(tmp_path: Path, world: World) -> list[Path]:
    """Oldest first."""
    record(world, RecordConfig(tmp_path / "log"))
    return [tmp_path / name for name in ("log.3", "log.2", "log.1", "log")]


def test_old_parts_go_and_the_rest_is_bounded(parts: list[Path]) -> None:
    assert sorted(path.name for path in parts[0].parent.iterdir()) == sorted(path.name for path in parts)
    headers = [read_log(path)[0] for path in parts]
    assert headers[0].part > 1, "the beginning is gone"
    assert [header.part - headers[0].part for header in headers] == [0, 1, 2, 3]
    for path, header in zip(parts, headers, strict=True):
        assert path.stat().st_size < len(header.state) + LIMIT + 5000, "a part and one frame"
        assert path.stat().st_mode & 0o777 == 0o600


def test_each_part_replays_by_itself(parts: list[Path]) -> None:
    for path in parts:
        result = replay.replay(replay.Log(path, check=True))
        assert result.difference == ""
        assert result.plans > 5 or path == parts[-1], "only the newest may have just begun"


def test_parts_in_order_are_one_log(parts: list[Path], world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert replay.main([*map(str, parts)]) == 0
    assert capsys.readouterr().out.count("all as recorded") == 4
    last = replay.Log(parts[-1])
    replay.replay(last)
    assert last.engine.stats() == world.scheduler.stats()


def test_a_part_that_begins_elsewhere_is_told(parts: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    parts[1].write_bytes(parts[1].read_bytes()[:-1])
    assert replay.main([*map(str, parts[1:])]) == 1
    assert "begins with another state than" in capsys.readouterr().err


def test_another_boot_takes_nothing_from_the_log_of_the_one_before(tmp_path: Path, world: World) -> None:
    """A service that comes back after a crash must not wipe out what led to it."""
    path = tmp_path / "log"
    record(world, RecordConfig(path), limit=1 << 30)
    before = path.read_bytes()
    record(world, RecordConfig(path), limit=1 << 30)
    assert (tmp_path / "log.1").read_bytes() == before


def test_a_private_log_begins_its_parts_at_rest(tmp_path: Path, world: World) -> None:
    record(world, RecordConfig(tmp_path / "log", key=KEY))
    logs = sorted(tmp_path.iterdir())
    assert len(logs) == 4
    for path in logs:
        header, entries = read_log(path)
        assert header.private
        events = [entry.event for entry in entries]
        assert all(token >= 1 << 31 for event in events if isinstance(event, Submit) for token in event.token_ids[:-1])
        assert replay.replay(replay.Log(path)).difference == ""


def test_a_private_log_never_begins_with_a_cache_that_it_cannot_name(tmp_path: Path) -> None:
    """At rest, but not flushed: whoever comes next finds blocks whose digests are of the tokens themselves."""
    world, engine = World(busy.CONFIG, num_blocks=64), Scheduler(busy.CONFIG)
    made = recorder(engine, RecordConfig(tmp_path / "log", key=KEY))
    world.ready()
    for number in range(6):
        world.submit(request(f"r{number}", 20, 8))
        world.run()
        if number == 3:
            world.send(FlushCache())
    assert world.scheduler.stats().cached_tokens > 0
    for event in world.log:
        is_due_and_need_not_pause(made)
        made.write(event, engine.handle(event))
    made.close()
    parts = sorted(tmp_path.iterdir())
    assert len(parts) == 2
    for path in parts:
        assert replay.replay(replay.Log(path)).difference == ""


def test_nobody_who_was_crowded_out_stays_in_a_private_state(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = World(replace(busy.CONFIG, max_waiting=4, tenants=()), num_blocks=64)
    made = recorder(world.scheduler, RecordConfig(tmp_path / "log", key=KEY))
    for number in range(4):
        world.submit(request(f"r{number}", 20, 8, tenant="many"))
    world.submit(request("last", 20, 8, tenant="few"))
    assert world.scheduler.stats().rejected == 1
    world.ready()
    world.run()
    for event, answer in zip(world.log, world.answers, strict=True):
        made.write(event, answer)
    is_due_and_need_not_pause(made)
    world.send(FlushCache())
    made.write(world.log[-1], world.answers[-1])
    assert capsys.readouterr().err == ""
    assert (tmp_path / "log.1").exists()


def test_a_private_part_that_would_hold_a_sequence_is_not_begun(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = World(busy.CONFIG, num_blocks=64)
    made = recorder(world.scheduler, RecordConfig(tmp_path / "log", key=KEY))
    world.ready()
    world.submit(request("r", 20, 8))
    world.scheduler.roster.kept = world.scheduler.roster.find("r")  # type: ignore[attr-defined]
    world.run()
    world.send(FlushCache())
    for event, answer in zip(world.log, world.answers, strict=True):
        is_due_and_need_not_pause(made)
        made.write(event, answer)
    assert "recording stops: the engine's state holds a Sequence" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_a_private_log_that_finds_no_rest_pauses_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, world = tmp_path / "log", World(busy.CONFIG)
    made = recorder(world.scheduler, RecordConfig(path, key=KEY))

    def tick() -> None:
        world.tick(1.0)  # with each, what is buffered is written
        made.write(world.log[-1], world.answers[-1])

    world.ready()
    world.submit(request("r", 8, 20))
    made.write(world.log[-1], world.answers[-1])
    said = ""
    while "recording pauses until nobody is served" not in said:
        assert path.stat().st_size < 3 * LIMIT
        tick()
        said += capsys.readouterr().err
    assert made.rest(), "it wants to begin again"
    paused = path.read_bytes()
    tick()
    assert path.read_bytes() == paused
    world.run()
    world.send(FlushCache())
    made.write(world.log[-1], world.answers[-1])
    tick()
    made.close()
    assert (tmp_path / "log.1").read_bytes() == paused
    assert read_log(path)[0].part == 2
    assert replay.replay(replay.Log(path)).events == 1


def test_of_a_very_long_queue_no_state_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would take seconds, in which nobody is served."""
    monkeypatch.setattr("scheduler_svc.record.MOST_LIVE", 9)
    world = World(busy.CONFIG, num_blocks=64)
    made = recorder(world.scheduler, RecordConfig(tmp_path / "log"), limit=2000)

    def heard() -> None:
        made.write(world.log[-1], world.answers[-1])

    world.ready()
    heard()
    for number in range(10):
        world.submit(request(f"r{number}", 20, 8))
        heard()
    while "recording pauses until no more than 9 sequences are live" not in capsys.readouterr().err:
        world.tick(1.0)
        heard()
    world.abort("r9")
    heard()
    while world.results:
        world.land()
        heard()
    made.close()
    for path in tmp_path.iterdir():
        result = replay.replay(replay.Log(path, check=True))
        assert result.difference == ""
    assert read_log(tmp_path / "log")[0].state, "it goes on where it can begin again"


def test_the_last_seconds_replay_from_where_they_begin(tmp_path: Path, world: World) -> None:
    """A worker's loss writes them by itself; the next one within a minute does not."""
    lost: list[Path] = []
    engine = Scheduler(world.config)
    made = recorder(engine, RecordConfig(crash_dir=tmp_path))
    for event in world.log:
        made.write(event, engine.handle(event))
        if len(logs := list(tmp_path.iterdir())) > len(lost):
            lost = logs
            (path,) = logs
            result = replay.replay(replay.Log(path, check=True))
            assert result.difference == ""
            assert "a worker was lost: killed" in read_log(path)[0].reason
    assert len(lost) == 1, "a worker was lost several times, within a minute"
    made.dump("now")
    newest = max(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert read_log(newest)[0].state, "it begins in the middle of a life"
    assert newest.stat().st_size < 2 * LIMIT + len(read_log(newest)[0].state) + 5000
    log = replay.Log(newest)
    assert replay.replay(log).difference == ""
    assert log.engine.stats() == engine.stats()


def test_the_event_that_broke_the_engine_breaks_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: Scheduler, now: float) -> None:
        if now > 1000.5:
            raise ZeroDivisionError("a defect")

    monkeypatch.setattr(Scheduler, "_tick", fail)
    engine = Scheduler(busy.CONFIG)
    made = recorder(engine, RecordConfig(crash_dir=tmp_path))
    made.write(Tick(1000.0), engine.handle(Tick(1000.0)))
    with pytest.raises(ZeroDivisionError) as caught:
        engine.handle(Tick(1001.0))
    made.raised(Tick(1001.0), caught.value)
    made.dump("the engine loop failed")
    (path,) = tmp_path.iterdir()
    assert str(path) in capsys.readouterr().err
    assert replay.main([str(path)]) == 0
    assert "the last event raises ZeroDivisionError: a defect, as it did" in capsys.readouterr().out
    monkeypatch.undo()
    assert replay.main([str(path)]) == 1, "mended"
    assert "raises nothing; it was ZeroDivisionError: a defect" in capsys.readouterr().err


def test_crash_logs_do_not_fill_the_disk(tmp_path: Path) -> None:
    made = recorder(Scheduler(busy.CONFIG), RecordConfig(crash_dir=tmp_path / "crashes"))
    for _ in range(CRASH_LOGS + 3):
        made.dump("again")
    kept = sorted(int(path.stem.rpartition("-")[2]) for path in (tmp_path / "crashes").iterdir())
    assert kept == list(range(4, CRASH_LOGS + 4))
    assert (tmp_path / "crashes").stat().st_mode & 0o777 == 0o700


def test_a_directory_that_cannot_be_written_is_said_and_no_more(capsys: pytest.CaptureFixture[str]) -> None:
    made = recorder(Scheduler(busy.CONFIG), RecordConfig(crash_dir=Path("/dev/null/crashes")))
    made.dump("now")
    assert "cannot be written" in capsys.readouterr().err


def test_a_state_that_cannot_be_written_ends_the_recording_and_not_the_service(
    tmp_path: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = Scheduler(world.config)
    engine.roster.told = print  # type: ignore[attr-defined]
    made = recorder(engine, RecordConfig(tmp_path / "log", crash_dir=tmp_path), limit=1000)
    for event in world.log:
        made.write(event, engine.handle(event))
    assert capsys.readouterr().err.count("recording stops: ") == 2, "one for each of file and memory"

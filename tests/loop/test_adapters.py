"""Adapters through the loop, with real worker processes whose tokens depend on an adapter's files."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest
from msgspec.structs import replace

from protos.adapter_files import CONFIG, WEIGHTS, digest
from protos.engine_wire import Adapter, FinishReason, Question, Submit
from scheduler_svc.config import LoopConfig
from tests.loop.harness import Observer, assert_undisturbed, loop_config, running, submits

LOAD, UNLOAD, LIST = Question.LOAD_ADAPTER, Question.UNLOAD_ADAPTER, Question.LIST_ADAPTERS


def adapter(path: Path, name: str, content: str = "") -> Adapter:
    directory = path / f"{name}{content}"
    directory.mkdir()
    (directory / CONFIG).write_text("{}")
    (directory / WEIGHTS).write_text(name + content)
    return Adapter(name, str(directory), digest(directory))


def config(
    model: str = "fake:delay_ms=2", *, most: int = 4, workers: int = 1, initial: tuple[Adapter, ...] = ()
) -> LoopConfig:
    setup = replace(loop_config(model).setup, max_adapters=most, max_adapter_rank=16)
    return loop_config(model, setup=setup, workers=workers, adapters=initial)


def using(made: list[Submit], *adapters: Adapter) -> list[Submit]:
    """In turn; every third has none."""
    chosen = [adapters[i % len(adapters)] if i % 3 else Adapter("") for i in range(len(made))]
    return [replace(one, adapter=a.name, adapter_digest=a.digest) for one, a in zip(made, chosen, strict=True)]


def kill_a_worker(observer: Observer) -> None:
    pid = observer.status.workers[0].pid
    os.kill(pid, signal.SIGKILL)
    observer.until(lambda: all(worker.pid != pid for worker in observer.status.workers), "the worker's loss")


@pytest.mark.parametrize("workers", [1, 2])
def test_streams_with_adapters_outlive_their_workers(tmp_path: Path, workers: int) -> None:
    one, other = adapter(tmp_path, "one"), adapter(tmp_path, "other")
    with running(config(workers=workers, initial=(one,))) as observer:
        observer.until_serving()
        assert observer.ask(LOAD, adapter=other).trouble == ""
        made = using(submits(24, random.Random(workers)), one, other)
        observer.loop.send(*made)
        observer.until_tokens(60)
        kill_a_worker(observer)
        observer.until_finished(made)
        assert_undisturbed(observer, made)
        listed = observer.ask(LIST)
        assert [(a.name, a.rank, a.users) for a in listed.adapters] == [("one", 1, 0), ("other", 1, 0)]
        assert (listed.status.max_adapters, [a.name for a in listed.status.adapters]) == (4, ["one", "other"])


def test_one_is_unloaded_when_its_last_request_has_ended(tmp_path: Path) -> None:
    one = adapter(tmp_path, "one")
    with running(config("fake:delay_ms=5", most=1)) as observer:
        observer.until_serving()
        assert observer.ask(LOAD, adapter=one).trouble == ""
        assert "so many are loaded: one" in observer.ask(LOAD, adapter=adapter(tmp_path, "two")).trouble
        (long,) = submits(1, random.Random(5))
        long = replace(long, adapter="one", adapter_digest=one.digest)
        long = replace(long, sampling=replace(long.sampling, max_tokens=120))
        observer.loop.send(long)
        observer.until_tokens(3)
        asked = observer.begin(UNLOAD, adapter=one)
        late = replace(long, request_id="late")
        observer.loop.send(late)
        observer.until_finished([late])
        assert observer.streams["late", 0].finish is FinishReason.NOT_FOUND
        assert asked not in observer.answers
        assert "is being unloaded" in observer.ask(LOAD, adapter=one).trouble
        assert observer.answer_to(asked, UNLOAD).trouble == ""
        assert_undisturbed(observer, [long])
        assert observer.ask(LIST).adapters == []
        assert not observer.ask(UNLOAD, adapter=one).found
        assert observer.ask(LOAD, adapter=one).trouble == ""  # there is room again


def test_other_files_under_the_same_name_share_no_blocks(tmp_path: Path) -> None:
    old, new = adapter(tmp_path, "one"), adapter(tmp_path, "one", "-new")
    (made,) = submits(1, random.Random(1))
    made = replace(made, token_ids=list(range(300, 340)), prompt_len=40, adapter="one")
    with running(config()) as observer:
        observer.until_serving()
        for i, files in enumerate((old, new)):
            assert observer.ask(LOAD, adapter=files).trouble == ""
            request = replace(made, request_id=f"r{i}", adapter_digest=files.digest)
            observer.loop.send(request)
            observer.until_finished([request])
            assert_undisturbed(observer, [request])
            assert "had other files" in observer.ask(LOAD, adapter=new if files is old else old).trouble
            stats = observer.ask(UNLOAD, adapter=files).status.stats
            assert stats.cached_tokens == 0


def test_trouble_is_nobody_elses(tmp_path: Path) -> None:
    """A worker that finds other files than the scheduler had seen."""
    one = adapter(tmp_path, "one")
    with running(config(workers=2)) as observer:
        observer.until_serving()
        made = submits(8, random.Random(2))
        observer.loop.send(*made)
        observer.until_tokens(5)
        (Path(one.path) / WEIGHTS).write_text("something else")
        assert "its files are not those that were asked for" in observer.ask(LOAD, adapter=one).trouble
        assert observer.ask(LIST).adapters == []
        observer.until_finished(made)
        assert_undisturbed(observer, made)
        assert observer.status.stats.recoveries == 0


def test_one_that_a_new_worker_cannot_load_is_lost_and_no_other(tmp_path: Path) -> None:
    one, other = adapter(tmp_path, "one"), adapter(tmp_path, "other")
    with running(config("fake:delay_ms=4", initial=(one, other))) as observer:
        observer.until_serving()
        made = using(submits(9, random.Random(3)), one, other)
        made = [replace(each, sampling=replace(each.sampling, max_tokens=60)) for each in made]
        observer.loop.send(*made)
        observer.until_tokens(20)
        (Path(one.path) / WEIGHTS).unlink()
        kill_a_worker(observer)
        observer.until_finished(made)
        lost = [each for each in made if each.adapter == "one"]
        assert {observer.streams[each.request_id, 0].finish for each in lost} == {FinishReason.ERROR}
        assert_undisturbed(observer, [each for each in made if each.adapter != "one"])
        assert [a.name for a in observer.ask(LIST).adapters] == ["other"]


def test_one_of_the_start_that_cannot_be_loaded_ends_it(tmp_path: Path) -> None:
    one = adapter(tmp_path, "one")
    (Path(one.path) / WEIGHTS).write_text("something else")
    with running(config(initial=(one,))) as observer:
        observer.until(lambda: observer.statuses and observer.status.failed, "the end")
        assert "adapter 'one'" in observer.status.reason


def test_none_are_served_unless_asked_for(tmp_path: Path) -> None:
    with running(config(most=0)) as observer:
        observer.until_serving()
        assert "start with --max-adapters" in observer.ask(LOAD, adapter=adapter(tmp_path, "one")).trouble

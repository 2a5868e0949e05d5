"""The team of threads: every item once, whoever is held up; no CPU time while idle; no hang at a close or a fork."""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from kernels.cpu.cpus import usable_cpus, usable_threads
from kernels.cpu.library import LibraryError, Model
from tests.kernels_cpu.tiny import TINY, Text, advance, opened, random_tokens


def _share(cdll: ctypes.CDLL, threads: int, spin: bool, repeats: int, count: int, work: int = 0) -> NDArray[np.int32]:
    done = np.zeros(count, np.int32)
    cdll.pw_test_share.argtypes = [ctypes.c_int, ctypes.c_bool, *(ctypes.c_int,) * 3, ctypes.c_void_p]
    cdll.pw_test_share.restype = ctypes.c_int
    assert cdll.pw_test_share(threads, spin, repeats, count, work, done.ctypes.data) == 0
    return done


def _step(model: Model, count: int) -> None:
    advance(model, (Text(random_tokens(count), [1, 2]), count))


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [1, 2, 5, 64])
def test_every_item_is_done_once_before_the_next_share(cdll: ctypes.CDLL, threads: int, count: int) -> None:
    assert (_share(cdll, threads, threads <= 2, 300, count) == 300).all()


def test_ranges_outlive_the_wrap_of_their_numbers(cdll: ctypes.CDLL) -> None:
    assert (_share(cdll, 2, True, 66_000, 3) == 66_000).all()


def test_items_of_a_slow_thread_are_taken_by_others(cdll: ctypes.CDLL) -> None:
    assert (_share(cdll, 3, False, 20, 50, work=20_000) == 20).all()


def test_more_threads_than_cpus_still_end(cdll: ctypes.CDLL) -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        start = time.perf_counter()
        _share(cdll, 4, False, 500, 16, work=100)
        assert time.perf_counter() - start < 20
    finally:
        os.sched_setaffinity(0, before)


def test_an_idle_model_takes_no_cpu_time(cdll: ctypes.CDLL) -> None:
    with opened(TINY, threads=3) as model:
        _step(model, 5)
        time.sleep(0.01)
        before = time.process_time()
        time.sleep(0.3)
        assert time.process_time() - before < 0.03


def test_models_come_and_go(cdll: ctypes.CDLL) -> None:
    threads = len(os.listdir("/proc/self/task"))
    for i in range(30):
        with opened(TINY, threads=1 + i % 4) as model:
            if i % 3:
                _step(model, 1 + i)
    assert len(os.listdir("/proc/self/task")) == threads


def test_a_forked_child_is_told_and_can_close(cdll: ctypes.CDLL) -> None:
    with opened(TINY, threads=2) as model:
        _step(model, 3)
        child = os.fork()
        if child == 0:  # the child must not come back into pytest, whatever happens
            told = False
            try:
                _step(model, 3)
            except LibraryError as error:
                told = "fork" in str(error)
            model.close()
            os._exit(0 if told else 1)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        _step(model, 3)


def _cpu(root: Path, cpu: int, siblings: str) -> None:
    topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
    topology.mkdir(parents=True)
    (topology / "core_cpus_list").write_text(siblings + "\n")


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_threads_are_the_least_of_affinity_quota_and_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    assert usable_cpus(tmp_path) == usable_threads(tmp_path) == 4
    for cpu in range(4):
        _cpu(tmp_path, cpu, f"{cpu % 2},{cpu % 2 + 2}")
    assert (usable_cpus(tmp_path), usable_threads(tmp_path)) == (4, 2)
    _write(tmp_path / "proc/self/cgroup", "0::/a/b\n")
    _write(tmp_path / "sys/fs/cgroup/a/b/cpu.max", "max 100000\n")
    assert usable_cpus(tmp_path) == 4
    _write(tmp_path / "sys/fs/cgroup/a/cpu.max", "250000 100000\n")
    assert (usable_cpus(tmp_path), usable_threads(tmp_path)) == (3, 2)
    _write(tmp_path / "sys/fs/cgroup/cpu.max", "50000 100000\n")
    assert (usable_cpus(tmp_path), usable_threads(tmp_path)) == (1, 1)


def test_a_quota_of_cgroup_version_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    _write(tmp_path / "proc/self/cgroup", "4:memory:/x\n2:cpu,cpuacct:/x\n0::/\n")
    _write(tmp_path / "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us", "-1\n")
    _write(tmp_path / "sys/fs/cgroup/cpu/x/cpu.cfs_period_us", "100000\n")
    assert usable_cpus(tmp_path) == 4
    _write(tmp_path / "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us", "150000\n")
    assert usable_cpus(tmp_path) == 2


def test_a_team_as_large_as_the_machine_has_a_cpu_each_and_leaves_the_caller_free() -> None:
    cpus = os.sched_getaffinity(0)
    known = set(os.listdir("/proc/self/task"))
    with opened(TINY, threads=len(cpus)) as model:
        _step(model, 5)
        team = [int(task) for task in os.listdir("/proc/self/task") if task not in known]
        homes = [os.sched_getaffinity(task) for task in team]
        assert os.sched_getaffinity(0) == cpus
    assert len(team) == len(cpus) - 1
    assert all(len(home) == 1 for home in homes)
    assert len(set.union(set(), *homes)) == len(team)

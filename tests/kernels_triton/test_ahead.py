"""Compiled ahead of time for GPUs that are not here, in processes where Triton compiles; and that failures show."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.kernels_triton import compare

ROOT = Path(__file__).parents[2]
TARGETS = {"sm_80", "sm_90", "gfx942"}

pytestmark = pytest.mark.skipif(not compare.INTERPRETED, reason="compiled where kernels are interpreted")


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.mark.timeout(900)
def test_every_kernel_compiles_for_every_target_and_none_spills(tmp_path: Path) -> None:
    done = run("kernels.ahead", "--json", str(tmp_path / "found.json"))
    assert done.returncode == 0, done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    print(done.stdout.splitlines()[-1])
    assert not found["failures"]
    assert not [usage for usage in found["usages"] if usage["spills"]]
    kernels = {usage["kernel"] for usage in found["usages"]}
    assert kernels >= {"rms_norm_kernel", "rope_kernel", "kv_write_kernel"}
    for kernel in kernels:
        assert {usage["target"] for usage in found["usages"] if usage["kernel"] == kernel} == TARGETS
    assert all(usage["registers"] > 0 for usage in found["usages"])


@pytest.fixture(scope="module")
def cases() -> dict[str, list[dict[str, Any]]]:
    done = run("tests.kernels_triton.usage_of")
    assert done.returncode == 0, done.stderr
    cases: dict[str, list[dict[str, Any]]] = {}
    for case in json.loads(done.stdout):
        cases.setdefault(case["name"], []).append(case)
    return cases


def test_what_a_compilation_takes_is_told(cases: dict[str, list[dict[str, Any]]]) -> None:
    assert all(case["fine"] and case["registers"] and not case["spills"] for case in cases["small"])
    crowded = [case["spills"] for case in cases["crowded"] if case["target"] != "gfx942"]
    assert all(crowded), "512 values a thread, in one warp, and all wanted again"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("broken", "no_such_function"),
        ("unnamed", "missing or not the kernel's: y"),
        ("twice", "in signature and constants: BLOCK"),
    ],
)
def test_what_cannot_be_compiled_is_a_failure(name: str, words: str, cases: dict[str, list[dict[str, Any]]]) -> None:
    assert {case["target"] for case in cases[name]} == TARGETS
    assert all(not case["fine"] and words in case["error"] for case in cases[name])


def test_more_shared_memory_than_there_is_is_a_failure(cases: dict[str, list[dict[str, Any]]]) -> None:
    by_target = {case["target"]: case for case in cases["large"]}
    assert "bytes of shared memory, 65536 exist" in by_target["gfx942"]["error"]

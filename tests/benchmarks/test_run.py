"""The command: what it measures, writes and refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from benchmarks import contestants, record
from benchmarks import run as bench
from benchmarks.measure import one_run
from benchmarks.process import running
from client import load
from tests.benchmarks.runs import result, run
from tests.client.scripted import ScriptedServer

SMALL = load.Workload("b", "small", concurrency=3, requests=7, prompt_tokens=5, output_tokens=4, shared_tokens=2)


def test_run_measures_a_service_that_runs(server: ScriptedServer, tmp_path: Path) -> None:
    done = _run("--address", server.address, "--workloads", "ab", "--seed", "3", "--out", str(tmp_path), "--name", "x")
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "x.json").read_text())
    measured = written["runs"][0]["measured"]
    assert [each["result"]["workload"] for each in measured] == ["a", "b"]
    assert all(0 < each["client_share"] <= 1 for each in measured)
    assert written["versions"]["pagewire"]
    assert written["machine"]["cores"] >= 1
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "x.md").read_text() in done.stdout


def test_run_reports_on_earlier_files(tmp_path: Path) -> None:
    for name, who, rate in (("one", "bf16", 150), ("two", "llama-bf16", 100)):
        record.write(tmp_path / name, [run(who, 0, result("a", rate))], seed=1)
    files = [str(tmp_path / f"{name}.json") for name in ("one", "two")]
    done = _run("--report", *files, "--out", str(tmp_path), "--name", "both")
    assert done.returncode == 0, done.stderr
    assert "1.50×" in (tmp_path / "both.md").read_text()


def test_run_says_why_a_start_failed(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"no model")
    done = _run("--model", str(tmp_path / "broken.gguf"), "--workloads", "a", "--out", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith("benchmarks/run.py: bf16 exited with ")


@pytest.mark.parametrize(
    "arguments", [["--workloads", "az"], ["--peer", "no-port=command"], ["--ours", "path"], ["--rounds", "0"]]
)
def test_run_refuses_wrong_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as left:
        bench._parser().parse_args(arguments)
    assert left.value.code == 2


async def test_a_peer_is_started_measured_and_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.measure.SETTLE", 0.0)
    monkeypatch.setattr("benchmarks.measure.IDLE", 0.2)
    script = Path(__file__).parent / "fake_peer.py"
    peer = replace(contestants.openai("fake", f"{sys.executable} {script} {{port}} {tmp_path}"), checkpoint=True)
    prompts = [[i] * SMALL.prompt_tokens for i in range(SMALL.requests)]
    measured = await one_run(peer, [SMALL], {(0, "b"): prompts}, 0, patience=30)
    assert measured.measured[0].result.output_tokens == 28
    assert measured.checkpoint, "whose the model is goes into the record"
    assert measured.ready_seconds is not None
    assert measured.first_token_seconds is not None
    assert 0 < measured.ready_seconds < measured.first_token_seconds
    assert measured.loaded_mib is not None
    assert 5 < measured.loaded_mib < 100, "a Python interpreter"
    assert measured.idle_cores is not None
    assert measured.idle_cores < 0.2
    heard = [json.loads(line) for line in (tmp_path / "requests").read_text().splitlines()]
    assert sorted(request["prompt"] for request in heard[1:]) == prompts, (
        "the first asks for one token, to time the start"
    )
    assert {(request["max_tokens"], request["temperature"], request["ignore_eos"]) for request in heard[1:]} == {
        (4, 0, True)
    }
    assert (tmp_path / "stopped").exists()


async def test_what_a_peer_started_ends_with_it(tmp_path: Path) -> None:
    child = "import time, signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    script = tmp_path / "parent.py"
    script.write_text(
        f"import subprocess, sys, runpy\nsubprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "runpy.run_path(sys.argv[3], run_name='__main__')\n"
    )
    fake = Path(__file__).parent / "fake_peer.py"
    command = (sys.executable, str(script), "{port}", str(tmp_path), str(fake))
    async with running(contestants.Contestant("parent", command, "openai"), patience=30) as started:
        (left,) = psutil.Process(started.pid).children()
    assert not left.is_running()


async def test_a_peer_that_dies_is_told_with_its_last_words() -> None:
    peer = contestants.openai("broken", f"{sys.executable} -c 'raise SystemExit(\"no such model {{port}}\")'")
    failed = await one_run(peer, [SMALL], {}, 0, patience=30)
    assert failed.failure is not None
    assert re.fullmatch(r"broken exited with 1: no such model \d+", failed.failure)
    assert failed.measured == []


async def test_of_last_words_whole_lines_are_kept_and_of_paths_names() -> None:
    words = "/aa/bb/lost: " + 200 * "/ee/ff/cut " + "\n/cc/dd/kept: no model"
    command = (sys.executable, "-c", f"raise SystemExit({words!r})")
    contestant = contestants.Contestant("mine", command, "grpc", checkpoint=True)
    failed = await one_run(contestant, [SMALL], {}, 0, patience=30)
    assert failed.failure == "mine exited with 1: …/kept: no model"
    assert failed.checkpoint


async def test_a_peer_that_never_is_ready_is_a_failure() -> None:
    peer = contestants.openai("slow", f"{sys.executable} -m http.server {{port}}")  # /health is 404: never ready
    failed = await one_run(peer, [SMALL], {}, 0, patience=0.5)
    assert failed.failure is not None
    assert failed.failure.startswith("slow not ready after 0.5 s")


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.run", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)

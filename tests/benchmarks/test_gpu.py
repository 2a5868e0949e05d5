"""The stages of `make gpu`, with commands that need no GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import gpu

SAYS = f"says={sys.executable} -c 'print(1); print(2)'"
FAILS = f"fails={sys.executable} -c 'raise SystemExit(3)'"


def test_what_stages_said_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peers = ["--peer", SAYS, "--peer", FAILS, "--peer", "absent=/no/such/command"]
    assert gpu.main(["model", *peers, "--only", "says", "fails", "absent", "--into", str(tmp_path)]) == 1
    assert (tmp_path / "says.txt").read_text() == "1\n2\n"
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [(stage["name"], stage["code"]) for stage in summary["stages"]] == [
        ("says", 0),
        ("fails", 3),
        ("absent", 127),
    ]
    assert summary["stages"][0]["said"] == "2"
    assert summary["commit"]
    assert "failed (3)" in capsys.readouterr().out
    assert gpu.main(["model", "--peer", SAYS, "--only", "says", "--into", str(tmp_path)]) == 0


def test_a_stage_that_does_not_fit_is_named(tmp_path: Path) -> None:
    given = ["model", "--peer", SAYS, "--only", "says", "--minutes", "0.1", "--into", str(tmp_path)]
    assert gpu.main(given) == 1
    (stage,) = json.loads((tmp_path / "summary.json").read_text())["stages"]
    assert (stage["code"], stage["said"]) == (None, "not run: no time was left")


def test_the_most_telling_comes_first(tmp_path: Path) -> None:
    names = [stage.name for stage in gpu.stages("model", tmp_path, ["vllm=run vllm"])]
    assert names[:2] == ["worker-tests", "step"]
    assert names[-1] == "vllm"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--peer", "vllm"], "'vllm' is not NAME=COMMAND"), (["--only", "x"], "--only 'x' is none of worker-tests, step")],
)
def test_refusals(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["model", *arguments])
    assert words in capsys.readouterr().err

"""A model split among two processes, each with a device of the tests: the tokens of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu_worker.rank_process import Rows, computed
from tests.models import checkpoints
from tests.models.lora import save_adapter
from tests.models.test_families import CONFIGS

ROOT = Path(__file__).parents[2]
OTHERS = ["qwen3moe-some-layers", "gemma2-capped-biases", "phi3", "mixtral", "gemma3"]


@pytest.mark.parametrize(
    "family", ["llama-tied-biases", *(pytest.param(name, marks=pytest.mark.full) for name in OTHERS)]
)
def test_two_ranks_give_the_tokens_of_one(family: str, tmp_path: Path) -> None:
    checkpoints.save(tmp_path / family, CONFIGS[family])
    compare(tmp_path / family, tmp_path / "meeting")


@pytest.mark.full
def test_two_ranks_have_an_adapters_parts(tmp_path: Path) -> None:
    base = checkpoints.save(tmp_path / "base", CONFIGS["llama-tied-biases"])
    save_adapter(tmp_path / "adapter", base, size=0.3)
    adapted = compare(tmp_path / "base", tmp_path / "meeting", str(tmp_path / "adapter"))
    assert tokens(adapted) != tokens(computed(tmp_path / "base"))


def compare(path: Path, meeting: Path, *adapter: str) -> list[Rows]:
    """What both have computed."""
    command = [sys.executable, "-m", "tests.gpu_worker.rank_process"]
    processes = [
        subprocess.Popen(
            [*command, str(rank), "2", str(meeting), str(path), *adapter],
            cwd=ROOT,
            env={**os.environ, "TRITON_INTERPRET": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = []
        for process in processes:
            out, err = process.communicate(timeout=110)
            assert process.returncode == 0, err
            said.append(json.loads(out.splitlines()[-1]))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    first, second = said
    assert first == second, "every rank draws the same"
    expected = computed(path, 0, 1, "", *adapter)
    assert len(tokens(first)) > 5
    assert tokens(first) == tokens(expected)
    assert scores(first) == pytest.approx(scores(expected), abs=1e-4)
    return expected


def tokens(steps: list[Rows]) -> list[int]:
    return [token for rows in steps for ids, _ in rows for token in ids]


def scores(steps: list[Rows]) -> list[float]:
    return [score for rows in steps for _, score in rows]

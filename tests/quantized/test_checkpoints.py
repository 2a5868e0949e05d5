"""The fixtures are whole, name no machine, and say what a reading of them that shares nothing with Pagewire says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.quantized.make import common, reading

FIXTURES = sorted(common.CHECKPOINTS.iterdir())


def config(path: Path) -> dict[str, Any]:
    whole: dict[str, Any] = json.loads((path / "config.json").read_text())
    return whole


def test_there_are_files_of_every_producer() -> None:
    made = [json.loads((path / "made.json").read_text()) for path in FIXTURES]
    assert {one["producer"] for one in made} == {"AutoRound", "LLM Compressor", "GPTQModel", "bitsandbytes"}
    assert len(FIXTURES) > 50
    assert sum(file.stat().st_size for path in FIXTURES for file in path.iterdir()) < 10 * 2**20


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.name)
def test_a_fixture_is_whole(path: Path) -> None:
    assert {file.name for file in path.iterdir()} == {
        *("config.json", "model.safetensors", "expected.safetensors", "made.json")
    }
    for file in ("config.json", "made.json"):
        assert not re.search(r'"[^"]*(/tmp|/work|/root|/home)\b', (path / file).read_text())


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.name)
def test_what_is_expected_is_what_a_second_reading_gives(path: Path) -> None:
    expected = load_file(path / "expected.safetensors")
    made = json.loads((path / "made.json").read_text())
    weights, rest = reading.read(config(path), load_file(path / "model.safetensors"))
    kept = expected.keys() - {"tokens", "logits"}
    assert any(key.endswith("down_proj.weight") for key in kept)
    for key in kept:
        assert torch.equal(expected[key], weights[key]), key
    assert expected["tokens"].tolist() == common.TOKENS
    assert ("logits" in expected) == (made["logits_beside_float32"] is not None)
    if "logits" in expected:
        far = common.relative(expected["logits"], common.plain_logits(config(path), rest | weights))
        assert far == pytest.approx(made["logits_beside_float32"], rel=0.01, abs=1e-5)

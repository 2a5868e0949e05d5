"""`pagewire model inspect`: what it tells of a checkpoint that can be served, and of one that cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import GPT2Config

from tests.models import checkpoints
from tests.quantized.stored import stored
from tests.quantized.test_fixtures import FOLDER
from worker_svc import inspect


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = inspect.main(arguments)
    out = capsys.readouterr()
    return code, out.out + out.err


def test_layers_that_differ_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = told(capsys, str(FOLDER / "auto_round_own_mixed"))
    assert code == 0
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "quantized by auto-round" in lines
    assert "0 qkv 128 × 96 int8 g32 sym, int4 g32 sym w8a16" in lines
    assert "0-1 o 96 × 64 int4 g32 sym w4a16" in lines
    assert "1 gate_up 384 × 96 int4 g32 sym, BF16 bf16 its parts differ: int4 g32 sym, BF16" in lines


def test_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = told(capsys, str(FOLDER / "llm_compressor_w8a8"), "--json")
    report = json.loads(text)
    assert code == 0
    assert (report["quantization"], report["refused"]) == ("compressed-tensors", [])
    assert {each["kernel"] for each in report["products"] if each["layers"]} == {"w8a8"}
    assert report["packed_bytes"] > 0
    assert report["kv_bytes_per_token"].keys() == {"bf16", "int8"}


def test_all_that_is_wrong_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    whole = stored(FOLDER / "auto_round_awq_w4_g32")
    for module in ("model.layers.0.mlp.up_proj", "model.layers.0.self_attn.o_proj"):
        dtype, shape, data = whole.tensors.pop(f"{module}.scales")
        whole.tensors[f"{module}.scales"] = dtype, shape, b"\xff" * len(data)
    code, text = told(capsys, str(whole.write(tmp_path)))
    assert code == 1
    assert "model.layers.0.mlp.up_proj.scales" in text
    assert "model.layers.0.self_attn.o_proj.scales" in text


def test_what_is_none_of_ours(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=50)
    checkpoints.save(tmp_path / "gpt2", config)
    assert told(capsys, str(tmp_path / "gpt2"))[0] == 1
    assert "GPT2LMHeadModel is no family of ours" in told(capsys, str(tmp_path / "gpt2"))[1]
    assert told(capsys, str(tmp_path)) == (
        1,
        f"pagewire model inspect: {tmp_path} has no config.json: not a model directory\n",
    )


def test_a_mode_is_for_float_checkpoints(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = told(capsys, str(FOLDER / "auto_round_awq_w4_g32"), "--quantization", "int8")
    assert code == 1
    assert "this one is quantized already, by awq" in text

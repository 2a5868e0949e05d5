"""What a person can ask for beside what a checkpoint says: activations of 8 bits, and float8 on load."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig

from tests.models import checkpoints
from tests.models.cpu_stepping import Runner, packed
from tests.models.session import Session, setup
from tests.models.stepping import Sequence
from tests.quantized.test_fixtures import FOLDER, error, float32_logits, tokens_of
from worker_svc import backends
from worker_svc.backends.base import BackendError, Options

# What is multiplied how, and how near the logits stay to those of float activations.
NARROW = {
    "auto_round_gptq_w4_g32_asym": "int4",
    "gptqmodel_w4_g32_desc_act": "int4",
    "gptqmodel_w2_g32_asym": "int4",
    "auto_round_gptq_w8_g32": "int8",
    "llm_compressor_w8a16_channel": "int8",
    "llm_compressor_w8a8": "w8a8",
    "llm_compressor_fp8_dynamic": "bf16",
}


@pytest.mark.parametrize("name", NARROW)
def test_activations_of_8_bits(name: str, tmp_path: Path) -> None:
    shutil.copytree(FOLDER / name, tmp_path / name)
    model = packed(tmp_path / name, "a8", tmp_path)
    assert {matrix.kind for role, matrix in model.layout.matrices.items() if role != "lm_head"} == {NARROW[name]}
    (ours,) = Runner(model, max_model_len=64).run([Sequence(tokens_of(name), [5, len(tokens_of(name))])])
    assert error(ours, float32_logits(name, tokens_of(name))) < 0.06


def capacity(path: Path, **fields: Any) -> str:
    message = setup(path, **{"block_size": 32, **fields})
    with_options = Options(path / "home")
    return Session(message, backends.create("cpu", message, with_options)).capacity.quantization


def test_what_is_done_is_said(tmp_path: Path) -> None:
    shutil.copytree(FOLDER / "auto_round_awq_w4_g32", tmp_path / "awq")
    assert capacity(tmp_path / "awq") == "awq (4 × int4 g32 sym: w4a16; 1 × float: bf16)"
    said = "awq (4 × int4 g32 sym (zero points are multiplied by scales, in float16): int4; 1 × float: bf16)"
    assert capacity(tmp_path / "awq", activations="int8") == said


def test_float8_on_load(tmp_path: Path) -> None:
    """Against the same weights rounded by torch."""
    import torch

    model = checkpoints.save(tmp_path, LlamaConfig(**checkpoints.SMALL))
    tokens = list(range(3, 60))
    with torch.no_grad():
        for layer in model.model.layers:
            for module in layer.modules():
                if isinstance(module, torch.nn.Linear):
                    scale = module.weight.abs().amax(1, keepdim=True) / 448
                    module.weight.copy_((module.weight / scale).to(torch.float8_e4m3fn).float() * scale)
    expected = checkpoints.logits(model, tokens).numpy()
    (ours,) = Runner(packed(tmp_path, "fp8", tmp_path)).run([Sequence(tokens, [20, len(tokens)])])
    assert error(ours, expected) < 0.015
    (plain,) = Runner(packed(tmp_path, "", tmp_path)).run([Sequence(tokens, [20, len(tokens)])])
    assert error(plain, expected) > 0.02
    assert np.isfinite(ours).all()
    assert capacity(tmp_path, quantization="fp8") == "fp8"


def test_what_cannot_be_done_is_said(tmp_path: Path) -> None:
    checkpoints.save(tmp_path / "float", LlamaConfig(**checkpoints.SMALL))
    with pytest.raises(BackendError, match="activations 'int8' is for quantized checkpoints, or goes with"):
        capacity(tmp_path / "float", activations="int8")
    assert capacity(tmp_path / "float", activations="int8", quantization="int4") == "int4"
    shutil.copytree(FOLDER / "auto_round_awq_w4_g32", tmp_path / "awq")
    with pytest.raises(BackendError, match="quantization 'int8' is for float checkpoints: this one is"):
        capacity(tmp_path / "awq", quantization="int8")
    for name in ("float", "awq"):
        with pytest.raises(BackendError, match="activations 'int8' does not go with quantization 'fp8'"):
            capacity(tmp_path / name, quantization="fp8", activations="int8")
    message = setup(tmp_path / "awq", activations="int8", dtype="float32")
    with pytest.raises(BackendError, match="activations 'int8' is not supported by the torch backend"):
        Session(message)

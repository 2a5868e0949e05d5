"""Checkpoints as their producers wrote them: the weights that those read in them, and the logits that those compute."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from tests.models import stepping
from tests.models.cpu_stepping import Runner, packed
from tests.models.stepping import Sequence
from worker_svc.model_runner import ModelRunner
from worker_svc.models.loader import Model, open_model
from worker_svc.models.spec import SpecError

FOLDER = Path(__file__).parent / "checkpoints"
REFUSED = ("bitsandbytes_int8", "bitsandbytes_nf4")
NAMES = sorted(path.name for path in FOLDER.iterdir() if path.name not in REFUSED)
# Mean error of a logit in standard deviations of logits. The cpu backend rounds activations to bfloat16 or 8 bits; a
# producer whose scheme has activations of 8 bits rounds them, and the torch backend does not.
OURS, OURS_W8A8, THEIRS_8_BITS = 0.015, 0.05, 0.15


@cache
def opened(name: str) -> Model:
    model = open_model(FOLDER / name)
    assert model is not None
    return model


@cache
def expected(name: str) -> dict[str, torch.Tensor]:
    with safe_open(FOLDER / name / "expected.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def test_there_are_many() -> None:
    assert len(NAMES) >= 30


@pytest.mark.parametrize("name", REFUSED)
def test_some_are_refused(name: str) -> None:
    with pytest.raises(SpecError, match="quant_method 'bitsandbytes' is not supported: its codes look up a table"):
        open_model(FOLDER / name)


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_what_the_producer_reads(name: str) -> None:
    weights = {key: value.float().numpy() for key, value in expected(name).items() if key.endswith(".weight")}
    assert weights
    for key, theirs in weights.items():
        np.testing.assert_array_equal(opened(name).checkpoint.tensor(key).float32(), theirs, err_msg=key)


def activations(name: str) -> set[str]:
    config: Any = json.loads((FOLDER / name / "config.json").read_text())["quantization_config"]
    groups = config.get("config_groups", {}).values()
    found = {group["input_activations"]["type"] for group in groups if group["input_activations"]}
    return found | ({"float"} if config["quant_method"] == "fp8" else set())


def tokens_of(name: str) -> list[int]:
    found: list[int] = expected(name).get("tokens", torch.arange(1, 13)).tolist()
    return found


def float32_logits(name: str, tokens: list[int]) -> NDArray[np.float32]:
    """The torch backend's."""
    runner = ModelRunner(opened(name), "float32", 64, lambda share: None)
    return stepping.run(runner, [Sequence(tokens, [5, len(tokens)])])[0].numpy()


def error(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    return float(np.abs(ours - theirs).mean() / theirs.std())


@pytest.mark.parametrize("name", [name for name in NAMES if "logits" in expected(name)])
def test_logits_are_the_producers(name: str) -> None:
    theirs = expected(name)["logits"].float().numpy()
    assert error(float32_logits(name, tokens_of(name)), theirs) < (THEIRS_8_BITS if activations(name) else 0.002)


@pytest.mark.parametrize("name", NAMES)
def test_the_cpu_backend_multiplies_codes_as_they_are(name: str, tmp_path: Path) -> None:
    shutil.copytree(FOLDER / name, tmp_path / name)  # packed weights lie beside the checkpoint
    model = packed(tmp_path / name, "", tmp_path)
    assert ("w8a8" in model.about) == (activations(name) == {"int"} and "asym" not in name)
    tokens = tokens_of(name)
    (ours,) = Runner(model, max_model_len=64).run([Sequence(tokens, [3, 4, len(tokens)])])
    assert error(ours, float32_logits(name, tokens)) < (OURS_W8A8 if "w8a8" in model.about else OURS)

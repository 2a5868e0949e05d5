"""The cpu backend's logits, for every family, mode and instruction set, beside the torch runner's in float32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, PretrainedConfig, Qwen3Config

from kernels.cpu import library
from tests.models import checkpoints, stepping
from tests.models.checkpoints import SMALL
from tests.models.cpu_stepping import Logits, Runner, packed
from tests.models.stepping import Sequence, cuts, tokens
from tests.models.test_families import CONFIGS
from tests.models.test_int4 import decoded
from worker_svc.backends.cpu_model import unfit
from worker_svc.model_runner import ModelRunner
from worker_svc.models.checkpoint import Checkpoint, RawTensor
from worker_svc.models.loader import Model, open_model
from worker_svc.models.raw_tensor import Tensor
from worker_svc.quant.int4 import int4

ISAS = library.load().isas
# Mean error of a logit in standard deviations of logits: what activations lose, for weights are compared as rounded.
TOLERANCE = {"": 0.015, "int8": 0.05, "int4": 0.04}
OTHER_HEADS = ("llama-odd", "qwen3-windows-biases")  # of 10 and of 24
EXPERTS = tuple(name for name in CONFIGS if name.startswith(("mixtral", "qwen3moe")))
PROMPTS = [tokens(n, 97, seed=n) for n in (203, 60, 1, 131)]

SHAPES: dict[str, PretrainedConfig] = {
    **{name: config for name, config in CONFIGS.items() if name not in (*OTHER_HEADS, *EXPERTS)},
    # No dimension is a multiple of what the kernels like: a panel is 48 columns, a group 32 weights, a vector 16 lanes.
    "llama-odd-16": LlamaConfig(
        **{**SMALL, "vocab_size": 97, "hidden_size": 54, "intermediate_size": 77, "num_attention_heads": 6}
        | {"num_key_value_heads": 3},
        head_dim=16,
        attention_bias=True,
        mlp_bias=True,
    ),
    "llama-9-3-64": LlamaConfig(
        **{**SMALL, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3},
        tie_word_embeddings=True,
    ),
    "qwen3-80": Qwen3Config(
        **{**SMALL, "num_attention_heads": 5, "num_key_value_heads": 1},
        head_dim=80,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=33,
        max_window_layers=2,
    ),
}


@dataclass(frozen=True)
class Rounded:
    """A checkpoint whose products have the weights that int4 makes of them."""

    checkpoint: Checkpoint
    products: frozenset[str]

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self.checkpoint.metadata

    def names(self) -> list[str]:
        return self.checkpoint.names()

    def __contains__(self, name: object) -> bool:
        return name in self.checkpoint

    def tensor(self, name: str) -> Tensor:
        raw = self.checkpoint.tensor(name)
        if name not in self.products:
            return raw
        return RawTensor(name, "F32", raw.shape, decoded(int4(raw)))


def reference(path: Path, mode: str, max_model_len: int = 512) -> ModelRunner:
    model = open_model(path)
    assert model is not None
    if mode == "int4":
        roles = [part.role for product in ("qkv", "o", "gate_up", "down") for part in model.spec.parts(product)]
        products = frozenset(model.layer(i, role) for i in range(model.spec.num_layers) for role in roles)
        model = Model(model.spec, Rounded(model.checkpoint, products))
    return ModelRunner(model, "float32", max_model_len, lambda share: None)


def error(ours: Logits, theirs: torch.Tensor) -> float:
    return float(np.abs(ours - theirs.numpy()).mean() / theirs.numpy().std())


def compare(path: Path, mode: str, kv: str, isa: str) -> None:
    runner = Runner(packed(path, mode, path), kv=kv, isa=isa, threads=2)
    expected = [stepping.run(reference(path, mode), [Sequence(p, [len(p)])])[0] for p in PROMPTS]
    ours = runner.run([Sequence(prompt, cuts(len(prompt), seed=i)) for i, prompt in enumerate(PROMPTS)])
    worst = max(error(a, b) for a, b in zip(ours, expected, strict=True))
    assert worst < TOLERANCE[mode] + (0.02 if kv == "int8" else 0)


@pytest.mark.parametrize("mode", ["", "int8", "int4"])
@pytest.mark.parametrize("name", SHAPES)
def test_logits_are_near_those_of_float32(name: str, mode: str, tmp_path: Path) -> None:
    checkpoints.save(tmp_path, SHAPES[name])
    compare(tmp_path, mode, "bf16", "auto")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("mode", ["", "int8", "int4"])
@pytest.mark.parametrize("name", ["llama-odd-16", "qwen3-80"])
def test_on_every_instruction_set_with_int8_kv(name: str, mode: str, isa: str, tmp_path: Path) -> None:
    checkpoints.save(tmp_path, SHAPES[name])
    compare(tmp_path, mode, "int8", isa)


def test_what_the_kernels_cannot_do_is_known_before_weights_are_read(tmp_path: Path) -> None:
    for name in (*OTHER_HEADS, *EXPERTS):
        checkpoints.save(tmp_path / name, CONFIGS[name])
        model = open_model(tmp_path / name)
        assert model is not None
        assert ("no kernels for experts" if name in EXPERTS else "only multiples of 16") in unfit(model.spec)

"""Quantized checkpoints on a device: each scheme by the kernel that takes its codes, against the CPU's float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from tests.gpu_worker.runner import KIND, WHERE, GpuRunner
from tests.models import checkpoints
from tests.models.stepping import Sequence, run
from tests.quantized.test_fixtures import FOLDER, float32_logits, tokens_of
from worker_svc.gpu.quantized import LIBRARY_ROWS, Float8Product, Target
from worker_svc.models.loader import open_model
from worker_svc.models.spec import SpecError

# Which kernels a fixture's layers get. Float8 activations and those of 8 bits are as the checkpoint wants them.
CHOSEN = {
    "auto_round_awq_w4_g32_asym": {"int4 g32 asym: w4a16"},
    "auto_round_gptq_w3_g32": {"int3 g32 sym: w4a16"},
    "auto_round_own_mixed": {
        "int4 g32 sym: w4a16", "int2 g32 sym: w4a16", "int8 g32 sym: w8a16", "BF16: float",
    },
    "gptqmodel_w4_g32_desc_act": {"int4 g32 sym permuted: w4a16"},
    "gptqmodel_lm_head": {"int4 g32 sym: w4a16", "int8 g32 sym: w8a16"},
    "llm_compressor_w8a16_channel": {"int8 channel sym: w8a16"},
    "llm_compressor_w8a8": {"int8 channel sym, activations int8: w8a8"},
    "llm_compressor_fp8_dynamic": {"e4m3 channel, activations e4m3: fp8"},
    "llm_compressor_fp8_static": {"e4m3 channel, activations e4m3: fp8"},
    "llm_compressor_fp8_block": {"e4m3 channel, activations e4m3: fp8", "e4m3 g128, activations e4m3: fp8"},
}  # fmt: skip


def logits(runner: GpuRunner, tokens: list[int]) -> np.ndarray[Any, Any]:
    return run(runner, [Sequence(tokens, [5, 6, len(tokens)])])[0].numpy()


def error(ours: np.ndarray[Any, Any], theirs: np.ndarray[Any, Any]) -> float:
    return float(np.abs(ours - theirs).mean() / theirs.std())


@pytest.mark.parametrize("name", CHOSEN)
def test_logits_of_a_fixture(name: str) -> None:
    runner, tokens = GpuRunner(FOLDER / name), tokens_of(name)
    assert {what for what in runner.model.kernels if what != "float: float"} == CHOSEN[name]
    rounds_activations = any(what.endswith(("w8a8", ": fp8")) for what in CHOSEN[name])
    assert error(logits(runner, tokens), float32_logits(name, tokens)) < (0.1 if rounds_activations else 1e-5)


def test_without_float8_activations_stay() -> None:
    name = "llm_compressor_fp8_dynamic"
    runner, tokens = GpuRunner(FOLDER / name, float8=None), tokens_of(name)
    assert all(": fp8 a16" in what for what in runner.model.kernels if what != "float: float")
    assert error(logits(runner, tokens), float32_logits(name, tokens)) < 1e-5


def test_scales_of_keys_and_values_are_the_checkpoints() -> None:
    runner = GpuRunner(FOLDER / "llm_compressor_fp8_kv")
    model = open_model(FOLDER / "llm_compressor_fp8_kv")
    assert model is not None
    for i, layer in enumerate(runner.model.layers):
        stored = [model.checkpoint.tensor(f"model.layers.{i}.self_attn.{which}_scale").float32() for which in "kv"]
        assert [scale.item() for scale in layer.kv_scales] == [scale.item() for scale in stored]
        assert stored[0] != 1


@pytest.mark.parametrize(("mode", "most"), [("int8", 0.03), ("int4", 0.25), ("fp8", 0.12)])
def test_a_float_checkpoint_quantized_as_it_is_loaded(mode: str, most: float, tmp_path: Path) -> None:
    config = LlamaConfig(**checkpoints.SMALL, attention_bias=True)
    theirs = checkpoints.save(tmp_path, config)
    tokens = list(range(3, 40))
    runner = GpuRunner(tmp_path, quantization=mode)
    assert all(what.split(": ")[1] != "float" for what in runner.model.kernels)
    expected = checkpoints.logits(theirs, tokens).numpy()
    assert 0 < error(logits(runner, tokens), expected) < most


def test_what_is_quantized_is_not_quantized_again() -> None:
    with pytest.raises(SpecError, match="this one is quantized already, by awq"):
        GpuRunner(FOLDER / "auto_round_awq_w4_g32", quantization="int8")


def test_rows_do_not_feel_each_other_where_they_must_not() -> None:
    name = "gptqmodel_w4_g32_desc_act"
    runner = GpuRunner(FOLDER / name, "bfloat16", batch_invariant=True)
    prompts = [list(range(3, 30)), list(range(40, 45)), [7]]
    together = run(runner, [Sequence(prompt, [len(prompt)]) for prompt in prompts])
    for prompt, ours in zip(prompts, together, strict=True):
        (alone,) = run(runner, [Sequence(prompt, [len(prompt)])])
        assert torch.equal(alone, ours)


@pytest.mark.parametrize(("per", "given"), [("token", None), ("tensor", 0.02)])
def test_prompts_are_the_librarys(per: str, given: float | None) -> None:
    """The same product as our kernel's, but for rounding; where rows must not feel each other it is ours."""
    rng = torch.Generator().manual_seed(1)
    codes = torch.randn(48, 96, generator=rng).to(WHERE, torch.float8_e4m3fn)
    scales, bias = torch.rand(48, 1, generator=rng).to(WHERE) + 0.5, torch.randn(48, generator=rng).to(WHERE)
    x = torch.randn(LIBRARY_ROWS, 96, generator=rng).to(WHERE)

    def product(rows: int, batch_invariant: bool) -> torch.Tensor:
        target = Target(WHERE, KIND.kind, torch.float8_e4m3fn, batch_invariant)
        scale = None if given is None else torch.tensor([given], device=WHERE)
        made = Float8Product(codes, scales, per, scale, bias, target)
        assert made._is_the_librarys(rows) == (rows >= LIBRARY_ROWS and not batch_invariant)
        return made(x[:rows])

    library, ours = product(LIBRARY_ROWS, False), product(LIBRARY_ROWS, True)
    torch.testing.assert_close(library, ours, rtol=0.01, atol=0.1)
    torch.testing.assert_close(product(9, False), ours[:9])

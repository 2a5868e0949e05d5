"""Fixtures written by AutoRound: GPTQ, AWQ, its own packing, compressed-tensors and native FP8.

`python -m tests.quantized.make.auto_round [NAME ...]` from the root of the repository, in the venv of README.md here.
"""

from __future__ import annotations

import copy
import functools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound
from auto_round.export.export_to_awq.utils import dequantize_gemm
from auto_round_extension.torch.qlinear_torch_zp import QuantLinear
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoRoundConfig, AutoTokenizer

from tests.quantized.make import common, compressed

POSITIVE = {"positive": True, "also": "o_proj"}
ASYM = {"sym": False}
BF16 = {"dtype": "bfloat16"}
G32 = {"group_size": 32}
# One of q, k, v and one of gate, up are unlike their neighbours: those cannot be one matrix.
MIXED = {
    "model.layers.0.self_attn.q_proj": {"bits": 8, "group_size": 32},
    "model.layers.1.mlp.up_proj": {"bits": 16},
    "model.layers.1.self_attn.v_proj": {"bits": 2, "group_size": 32},
}
# name: (format, scheme, arguments of AutoRound, model)
RECIPES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "auto_round_gptq_w4_g32": ("auto_gptq", "W4A16", G32, {}),
    "auto_round_gptq_w2_g32": ("auto_gptq", "W2A16", G32, {}),
    "auto_round_gptq_w3_g32": ("auto_gptq", "W3A16", G32, {}),
    "auto_round_gptq_w8_g32": ("auto_gptq", "W8A16", G32, {}),
    "auto_round_gptq_w4_g64_short": ("auto_gptq", "W4A16", {"group_size": 64}, {}),
    "auto_round_gptq_w4_channel": ("auto_gptq", "W4A16", {"group_size": -1}, {}),
    "auto_round_gptq_w4_g32_asym": ("auto_gptq", "W4A16", G32 | ASYM, {}),
    "auto_round_gptq_w4_g32_zero_points_0": ("auto_gptq", "W4A16", G32 | ASYM, POSITIVE),
    "auto_round_gptq_mixed": (
        "auto_gptq",
        "W4A16",
        G32 | {"layer_config": MIXED},
        {"shape": common.DEEP, "also": r"0.self_attn.q_proj|1.self_attn.v_proj"},
    ),
    "auto_round_awq_w4_g32": ("auto_awq", "W4A16", G32, {}),
    "auto_round_awq_w4_g32_asym": ("auto_awq", "W4A16", G32 | ASYM, {}),
    "auto_round_awq_w4_g128_asym": ("auto_awq", "W4A16", {"group_size": 128} | ASYM, {"shape": common.WIDE}),
    "auto_round_own_gptq_w4_g32": ("auto_round:auto_gptq", "W4A16", G32, {}),
    "auto_round_own_gptq_w4_g64_asym": (
        "auto_round:auto_gptq",
        "W4A16",
        {"group_size": 64} | ASYM,
        BF16,
    ),
    "auto_round_own_awq_w4_g32_asym": ("auto_round:auto_awq", "W4A16", G32 | ASYM, BF16),
    "auto_round_own_mixed": (
        "auto_round",
        "W4A16",
        G32 | {"layer_config": MIXED},
        {"shape": common.DEEP, "also": r"0.self_attn.q_proj|1.self_attn.v_proj"},
    ),
    "auto_round_ct_w4a16_g32": ("llm_compressor", "W4A16", G32, {}),
    "auto_round_ct_int8": ("llm_compressor", "INT8", {}, BF16),
    "auto_round_ct_fp8_static": ("llm_compressor", "FP8_STATIC", {}, BF16),
    "auto_round_ct_fp8_block_short": ("llm_compressor", "FP8_BLOCK", {}, BF16),
    "auto_round_fp8_block": ("fp8", "FP8_BLOCK", {}, BF16 | {"shape": common.WIDE}),
    "auto_round_fp8_block_short": ("fp8", "FP8_BLOCK", {}, BF16),
}


def write(
    source: Path, target: str, scheme: str, options: dict[str, Any], tokens: list[torch.Tensor] | None = None
) -> Path:
    """tokens: to calibrate by, int64 [1, length] each; by default random ones."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    tokens = tokens or common.calibration(model.config.to_dict())
    rounding = AutoRound(
        model,
        AutoTokenizer.from_pretrained(source),
        scheme=scheme,
        iters=0,
        disable_opt_rtn=True,
        device_map="cpu",
        dataset=[{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in tokens],
        nsamples=8,
        seqlen=tokens[0].shape[1],
        batch_size=1,
        **copy.deepcopy(options),  # which it writes to
    )
    rounding.quantize_and_save("out", format=target)
    return next(Path("out").rglob("config.json")).parent


def dequantized(written: Path) -> tuple[dict[str, torch.Tensor] | None, str]:
    """By AutoRound's (or compressed-tensors') own code for the format, its scales widened to float32 first."""
    whole = json.loads((written / "config.json").read_text())
    config = whole["quantization_config"]
    tensors = load_file(written / "model.safetensors")
    if config["quant_method"] == "compressed-tensors":
        return compressed.weights(whole, tensors), compressed.DEQUANTIZER
    if config["quant_method"] == "fp8":
        return None, f"{common.SECOND}: transformers takes the size of a block from the number of scales"
    awq = config["quant_method"] == "awq" or "awq" in config.get("packing_format", "")
    weights = {}
    for module in (name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")):
        words, zeros = tensors[module + ".qweight"], tensors[module + ".qzeros"]
        scales = tensors[module + ".scales"].float()
        if awq:
            group = words.shape[0] // scales.shape[0]
            weights[module + ".weight"] = dequantize_gemm(words, zeros, scales, 4, group).T.contiguous()
            continue
        bits = 32 * zeros.shape[1] // words.shape[1]
        columns = 32 * words.shape[0] // bits
        group = config["group_size"] if config["group_size"] > 0 else columns
        if columns % group:
            return None, f"{common.SECOND}: auto_round's QuantLinear takes no short last group"
        linear = QuantLinear(bits, group, columns, words.shape[1], False)
        linear.qweight, linear.qzeros, linear.scales = words, zeros, scales
        weights[module + ".weight"] = linear(torch.eye(columns)).T.contiguous()
    return weights, "auto_round " + (
        "dequantize_gemm" if awq else "QuantLinear (qlinear_torch_zp)"
    ) + ", float32 scales"


def load(written: Path) -> tuple[Any, str]:
    """Transformers with AutoRound's CPU kernels, all in float32 but for what a kernel rounds by itself; and what its
    layers are. Raises whatever keeps it from being loaded here.
    """
    config = json.loads((written / "config.json").read_text())
    method = config["quantization_config"]["quant_method"]
    if method == "compressed-tensors":
        return compressed.load(written)
    if method == "fp8" and config["hidden_size"] % 128:
        raise ValueError("transformers takes the size of a block from the number of scales: wrong where one is short")
    options = {"quantization_config": AutoRoundConfig()} if method in ("gptq", "awq") else {}
    model = AutoModelForCausalLM.from_pretrained(written, device_map="cpu", dtype=torch.float32, **options)
    kinds = {f"{type(m).__module__}.{type(m).__name__}" for n, m in model.named_modules() if n.endswith("_proj")}
    return model, f"transformers in float32 on a CPU; linear layers are {', '.join(sorted(kinds))}"


def logits(written: Path) -> tuple[torch.Tensor | None, str]:
    if json.loads((written / "config.json").read_text())["quantization_config"]["quant_method"] == "compressed-tensors":
        return compressed.logits(written)
    try:
        model, runner = load(written)
        return common.run(model), runner
    except (Exception, SystemExit) as error:  # whatever keeps it from running here is told
        return None, f"none: {type(error).__name__}: {str(error)[:160]}"


def reference(written: Path) -> common.Reference:
    weights, dequantizer = dequantized(written)
    whole, runner = logits(written)
    return common.Reference(weights, dequantizer, whole, runner)


def main(names: list[str]) -> None:
    for name in names or RECIPES:
        target, scheme, options, how = RECIPES[name]
        made = {"shape": common.NARROW, "dtype": "float16"} | how
        built = common.model(made["shape"], getattr(torch, made["dtype"]), made.get("positive", False))
        recipe = {"format": target, "scheme": scheme, "iters": 0, "disable_opt_rtn": True} | options
        common.fixture(
            name,
            "AutoRound",
            ["auto-round", "compressed-tensors"],
            {"model": made, "AutoRound": recipe},
            built,
            functools.partial(write, target=target, scheme=scheme, options=options),
            reference,
            also=made.get("also", r"$^"),
            mistaken="AutoRound's CPU code reads a zero point that borrowed as 16, not 0" if "positive" in how else "",
        )


if __name__ == "__main__":
    main(sys.argv[1:])

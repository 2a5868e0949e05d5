"""Fixtures written by LLM Compressor, all in the formats of compressed-tensors.

`python -m tests.quantized.make.llm_compressor [NAME ...]` from the root of the repository, in README.md's venv.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.quantized.make import common, compressed

MODIFIERS = {"QuantizationModifier": QuantizationModifier, "GPTQModifier": GPTQModifier}
INT = {"type": "int", "symmetric": True}
W4_G32 = INT | {"num_bits": 4, "strategy": "group", "group_size": 32}
W8_CHANNEL = INT | {"num_bits": 8, "strategy": "channel"}
FP8_TENSOR = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


def linear(**scheme: Any) -> dict[str, Any]:
    """One group of all linear layers."""
    return {"config_groups": {"group_0": {"targets": ["Linear"]} | scheme}}


# name: (modifier, its arguments, model)
RECIPES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llm_compressor_w4a16_g32": ("QuantizationModifier", linear(weights=W4_G32), {}),
    "llm_compressor_w4a16_g128": ("QuantizationModifier", {"scheme": "W4A16"}, {"shape": common.WIDE}),
    "llm_compressor_w4a16_g32_asym": ("QuantizationModifier", linear(weights=W4_G32 | {"symmetric": False}), {}),
    "llm_compressor_w4a16_g32_gptq": ("GPTQModifier", linear(weights=W4_G32), {"dtype": "float16"}),
    "llm_compressor_w4a16_g32_actorder_weight": ("GPTQModifier", linear(weights=W4_G32) | {"actorder": "weight"}, {}),
    "llm_compressor_w3a16_g32": ("QuantizationModifier", linear(weights=W4_G32 | {"num_bits": 3}), {}),
    "llm_compressor_w8a16_channel": ("QuantizationModifier", linear(weights=W8_CHANNEL), {}),
    "llm_compressor_w8a8": ("QuantizationModifier", {"scheme": "W8A8"}, {}),
    "llm_compressor_w8a8_gptq": ("GPTQModifier", {"scheme": "W8A8"}, {}),
    "llm_compressor_w8a8_static": (
        "QuantizationModifier",
        linear(weights=W8_CHANNEL, input_activations=INT | {"num_bits": 8, "strategy": "tensor", "dynamic": False}),
        {},
    ),
    "llm_compressor_w8a8_asym_activations": (
        "QuantizationModifier",
        linear(
            weights=W8_CHANNEL,
            input_activations={
                "num_bits": 8,
                "type": "int",
                "strategy": "tensor",
                "dynamic": False,
                "symmetric": False,
            },
        ),
        {},
    ),
    "llm_compressor_fp8_dynamic": ("QuantizationModifier", {"scheme": "FP8_DYNAMIC"}, {}),
    "llm_compressor_fp8_static": ("QuantizationModifier", {"scheme": "FP8"}, {}),
    "llm_compressor_fp8_block": ("QuantizationModifier", {"scheme": "FP8_BLOCK"}, {"shape": common.WIDE}),
    "llm_compressor_fp8_kv": (
        "QuantizationModifier",
        {"scheme": "FP8_DYNAMIC", "kv_cache_scheme": FP8_TENSOR},
        {"shape": common.DEEP},
    ),
    "llm_compressor_groups": (
        "QuantizationModifier",
        {
            "config_groups": {
                "attention": {"targets": ["re:.*self_attn.(q|k|o)_proj$"], "weights": W8_CHANNEL},
                "values": {"targets": ["re:.*v_proj$"], "weights": FP8_TENSOR},
                "mlp": {"targets": ["re:.*mlp.*"], "weights": W4_G32},
            },
            "ignore": ["lm_head", "re:.*layers.0.mlp.up_proj", "model.layers.1.self_attn.k_proj"],
        },
        {"shape": common.DEEP, "also": "0.self_attn.v_proj"},
    ),
    "llm_compressor_lm_head": ("QuantizationModifier", linear(weights=W4_G32) | {"ignore": []}, {}),
}


def write(source: Path, modifier: str, options: dict[str, Any], calibration: list[torch.Tensor] | None = None) -> Path:
    """calibration: tokens, int64 [1, length] each; by default random ones."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    tokens = [one[0].tolist() for one in calibration or common.calibration(model.config.to_dict())]
    oneshot(
        model=model,
        recipe=MODIFIERS[modifier](**options),
        tokenizer=AutoTokenizer.from_pretrained(source),
        dataset=Dataset.from_dict({"input_ids": tokens, "attention_mask": [[1] * len(one) for one in tokens]}),
        num_calibration_samples=len(tokens),
        max_seq_length=len(tokens[0]),
    )
    model.save_pretrained("out", save_compressed=True)
    return Path("out")


def reference(written: Path) -> common.Reference:
    config = json.loads((written / "config.json").read_text())
    weights = compressed.weights(config, load_file(written / "model.safetensors"))
    return common.Reference(weights, compressed.DEQUANTIZER, *compressed.logits(written))


def main(names: list[str]) -> None:
    for name in names or RECIPES:
        modifier, options, how = RECIPES[name]
        made = {"shape": common.NARROW, "dtype": "bfloat16"} | how
        options = ({} if "config_groups" in options else {"targets": "Linear"}) | {"ignore": ["lm_head"]} | options
        common.fixture(
            name,
            "LLM Compressor",
            ["llmcompressor", "compressed-tensors"],
            {"model": made, modifier: options},
            common.model(made["shape"], getattr(torch, made["dtype"])),
            functools.partial(write, modifier=modifier, options=options),
            reference,
            also=made.get("also", r"$^"),
        )


if __name__ == "__main__":
    main(sys.argv[1:])

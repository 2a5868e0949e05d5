"""Fixtures written by an LLM Compressor of 2025, which still reordered columns: such files are about.

`python -m tests.quantized.make.old_llm_compressor [NAME ...]` from the root of the repository, in a venv of README.md
here.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.quantized.make import common
from tests.quantized.make.oneshot import W4_G32, linear, write

RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "old_llm_compressor_w4a16_g32_actorder_group": ("GPTQModifier", linear(weights=W4_G32 | {"actorder": "group"})),
}


def reference(written: Path, weights: dict[str, Any]) -> common.Reference:
    compressor = BaseCompressor.load_from_registry("pack-quantized")
    tensors = load_file(written / "model.safetensors")
    read = {}
    for module in (name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")):
        own = {name.removeprefix(module + "."): tensors[name] for name in tensors if name.startswith(module + ".")}
        own["weight_scale"] = own["weight_scale"].float()
        args = QuantizationArgs(**weights)
        read[f"{module}.weight"] = compressor.decompress_weight(own, quantization_args=args).contiguous()
    model = AutoModelForCausalLM.from_pretrained(written, dtype=torch.float32)
    return common.Reference(
        read,
        "compressed_tensors PackedQuantizationCompressor.decompress_weight, float32 scales",
        common.run(model),
        "transformers with compressed-tensors on a CPU in float32: plain weights",
    )


def main(names: list[str]) -> None:
    for name in names or RECIPES:
        modifier, options = RECIPES[name]
        options = options | {"ignore": ["lm_head"]}
        common.fixture(
            name,
            "LLM Compressor",
            ["llmcompressor", "compressed-tensors"],
            {"model": {"shape": common.NARROW, "dtype": "bfloat16"}, modifier: options},
            common.model(common.NARROW, torch.bfloat16),
            functools.partial(write, modifier=modifier, options=options),
            functools.partial(reference, weights=options["config_groups"]["group_0"]["weights"]),
        )


if __name__ == "__main__":
    main(sys.argv[1:])

"""Fixtures that transformers wrote with bitsandbytes.

`python -m tests.quantized.make.bitsandbytes [NAME ...]` from the root of the repository, in a venv of README.md here.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, int8_vectorwise_dequant
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.quantized.make import common

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
# name: (arguments of BitsAndBytesConfig, shape)
RECIPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # Wide, since on a CPU bitsandbytes 0.50.2 misreads a block of 64 that ends in the next row.
    "bitsandbytes_nf4": (NF4 | {"bnb_4bit_use_double_quant": True}, common.WIDE),
    "bitsandbytes_int8": ({"load_in_8bit": True}, common.NARROW),
}


def write(tiny: Path, options: dict[str, Any]) -> Path:
    config: Any = BitsAndBytesConfig
    model = AutoModelForCausalLM.from_pretrained(
        tiny, quantization_config=config(**options), device_map="cpu", dtype="auto"
    )
    model.save_pretrained("out")
    return Path("out")


def reference(written: Path) -> common.Reference:
    """By bitsandbytes' functions, asked for float32."""
    tensors = load_file(written / "model.safetensors")
    weights = {}
    for name, tensor in tensors.items():
        if name.endswith(".SCB"):
            module = name.removesuffix(".SCB")
            weights[f"{module}.weight"] = int8_vectorwise_dequant(tensors[f"{module}.weight"], tensor)
        if name.endswith(".quant_map"):
            weight = name.removesuffix(".quant_map")
            own = {key: tensors[key] for key in tensors if key.startswith(weight + ".")}
            state = QuantState.from_dict(own, device=torch.device("cpu"))
            state.dtype = torch.float32
            weights[weight] = dequantize_4bit(tensors[weight], state).contiguous()
    try:
        model = AutoModelForCausalLM.from_pretrained(written, device_map="cpu", dtype=torch.float32)
        return common.Reference(weights, "bitsandbytes.functional, float32", common.run(model), "transformers on a CPU")
    except Exception as error:  # whatever keeps it from running here is told
        return common.Reference(weights, "bitsandbytes.functional, float32", None, f"none: {str(error)[:160]}")


def main(names: list[str]) -> None:
    for name in names or RECIPES:
        options, shape = RECIPES[name]
        common.fixture(
            name,
            "bitsandbytes",
            ["bitsandbytes"],
            {"model": {"shape": shape, "dtype": "bfloat16"}, "BitsAndBytesConfig": options},
            common.model(shape, torch.bfloat16),
            functools.partial(write, options=options),
            reference,
        )


if __name__ == "__main__":
    main(sys.argv[1:])

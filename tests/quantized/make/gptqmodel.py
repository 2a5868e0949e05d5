"""Fixtures written by GPTQModel: both versions of GPTQ, with reordered columns or without, and AWQ.

`GPTQMODEL_CPU_WORKERS=2 python -m tests.quantized.make.gptqmodel [NAME ...]` from the root of the repository, in a venv
of README.md here.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from safetensors.torch import load_file

from tests.quantized.make import common

W4 = {"bits": 4, "group_size": 32}
ASYM = {"sym": False}
DESC = {"desc_act": True}
V2 = {"format": "gptq_v2"}
AWQ = {"method": "awq", "format": "gemm"}
# name: (arguments of QuantizeConfig, model)
RECIPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gptqmodel_w4_g32": (W4, {}),
    "gptqmodel_w4_g128_short": (W4 | {"group_size": 128}, {"dtype": "bfloat16"}),
    "gptqmodel_w4_g32_asym": (W4 | ASYM, {}),
    "gptqmodel_w4_g32_zero_points_0": (W4 | ASYM, {"positive": True, "also": "o_proj"}),
    "gptqmodel_w2_g32_asym": (W4 | {"bits": 2} | ASYM, {}),
    "gptqmodel_w3_g32_zero_points_0": (W4 | {"bits": 3} | ASYM, {"positive": True, "also": "o_proj"}),
    "gptqmodel_w8_g32_asym": (W4 | {"bits": 8} | ASYM, {}),
    "gptqmodel_w4_g32_desc_act": (W4 | DESC, {}),
    "gptqmodel_w4_channel_desc_act": (W4 | {"group_size": -1} | DESC, {}),
    "gptqmodel_v2_w4_g32_asym": (W4 | ASYM | V2, {"positive": True}),
    "gptqmodel_v2_w4_g64_asym_desc_act_short": (W4 | {"group_size": 64} | ASYM | DESC | V2, {}),
    "gptqmodel_v2_w3_g32": (W4 | {"bits": 3} | V2, {}),
    "gptqmodel_dynamic": (
        W4
        | DESC
        | {
            "dynamic": {
                r"+:.*\.0\.self_attn\.q_proj": {"bits": 8, "group_size": 64},
                r"+:.*\.1\.self_attn\.v_proj": {"sym": False, "desc_act": False},
                r"-:.*\.1\.mlp\.up_proj": {},
            }
        },
        {"shape": common.DEEP, "also": r"0.self_attn.q_proj|1.self_attn.v_proj"},
    ),
    "gptqmodel_lm_head": (W4 | {"lm_head": True}, {}),
    "gptqmodel_awq_gemm_g32_asym": (W4 | ASYM | AWQ, {"shape": common.WIDE}),
}


def write(source: Path, options: dict[str, Any], calibration: list[torch.Tensor] | None = None) -> Path:
    """calibration: tokens, int64 [1, length] each; by default random ones."""
    config = QuantizeConfig(**options, offload_to_disk=False, device="cpu")
    shape = json.loads((source / "config.json").read_text())
    model = GPTQModel.load(str(source), config)
    tokens = [one[0].tolist() for one in calibration or common.calibration(shape)]
    data = [{"input_ids": one, "attention_mask": [1] * len(one)} for one in tokens]
    model.quantize(data, batch_size=1, calibration_data_min_length=1)
    model.save("out")
    return Path("out")


def awq_weights(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By the function of its AWQ layers, the scales widened to float32 first."""
    weights = {}
    for module in (name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")):
        words, zeros, scales = (tensors[f"{module}.{kind}"] for kind in ("qweight", "qzeros", "scales"))
        weights[f"{module}.weight"] = dequantize_gemm(words, zeros, scales.float(), 4, len(words) // len(scales)).T
    return weights


def load(written: Path) -> tuple[Any, str]:
    """Its model in float32, with the scales that are in the file; and what its layers are."""
    model = GPTQModel.load(str(written), device="cpu", backend=BACKEND.TORCH).model.float()
    tensors = load_file(written / "model.safetensors")
    packed = {name: module for name, module in model.named_modules() if hasattr(module, "qweight")}
    for name, module in packed.items():
        module.scales = tensors[f"{name}.scales"].float()  # loading has rounded them to bfloat16
    kinds = ", ".join(sorted({type(module).__name__ for module in packed.values()}))
    return model, f"GPTQModel on a CPU, backend TORCH ({kinds}), all but what a kernel rounds by itself in float32"


def reference(written: Path) -> common.Reference:
    model, runner = load(written)
    if json.loads((written / "config.json").read_text())["quantization_config"]["quant_method"] == "awq":
        weights = awq_weights(load_file(written / "model.safetensors"))
        return common.Reference(weights, "gptqmodel dequantize_gemm, float32 scales", common.run(model), runner)
    packed = {name: module for name, module in model.named_modules() if hasattr(module, "qweight")}
    weights = {f"{name}.weight": module.dequantize_weight().T.contiguous() for name, module in packed.items()}
    kinds = ", ".join(sorted({type(module).__name__ for module in packed.values()}))
    dequantizer = f"gptqmodel {kinds}.dequantize_weight, float32 scales"
    return common.Reference(weights, dequantizer, common.run(model), runner)


def main(names: list[str]) -> None:
    for name in names or RECIPES:
        options, how = RECIPES[name]
        made = {"shape": common.NARROW, "dtype": "float16"} | how
        common.fixture(
            name,
            "GPTQModel",
            ["gptqmodel"],
            {"model": made, "QuantizeConfig": options},
            common.model(made["shape"], getattr(torch, made["dtype"]), made.get("positive", False)),
            functools.partial(write, options=options),
            reference,
            also=made.get("also", r"$^"),
        )


if __name__ == "__main__":
    main(sys.argv[1:])

"""Random adapters in PEFT's files, and what a base model's weights are with one merged in, computed by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from protos.adapter_files import CONFIG, WEIGHTS
from worker_svc.inputs import StepInputs

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


def adapted(inputs: StepInputs, adapters: list[int]) -> StepInputs:
    """The same step, its rows with these adapters."""
    return replace(inputs, adapters=np.array(adapters, np.int32))


def modules_of(model: nn.Module, names: tuple[str, ...]) -> dict[str, nn.Linear]:
    """The layers' projections that PEFT would find under these names."""
    found = dict(model.named_modules())
    return {
        name: module
        for name, module in found.items()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in names and "layers." in name
    }


def save_adapter(
    path: Path,
    model: nn.Module,
    *,
    rank: int = 4,
    alpha: float = 8.0,
    names: tuple[str, ...] = ALL,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    size: float = 1.0,
    **config: Any,
) -> dict[str, Tensor]:
    """Writes a random adapter; answers with its tensors by name. `size`: of what it adds, in that of the weights."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, module in modules_of(model, names).items():
        r = _of(config.get("rank_pattern", {}), name, rank)
        for side, shape in (("A", (r, module.in_features)), ("B", (module.out_features, r))):
            values = torch.randn(shape, generator=generator) * (size * shape[1] ** -0.5)
            tensors[f"base_model.model.{name}.lora_{side}.weight"] = values.to(dtype)
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / WEIGHTS)
    said = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(names),
        "bias": "none",
        **config,
    }
    (path / CONFIG).write_text(json.dumps(said))
    return tensors


@torch.no_grad()
def merge(model: nn.Module, path: Path) -> None:
    """Adds scale · B A to the model's own weights, in float64: what PEFT's merge_and_unload does in float32."""
    from safetensors.torch import load_file

    config, tensors = json.loads((path / CONFIG).read_text()), load_file(path / WEIGHTS)
    for name, module in modules_of(model, (*ALL, "qkv_proj", "gate_up_proj")).items():
        a, b = (tensors.get(f"base_model.model.{name}.lora_{side}.weight") for side in "AB")
        if a is None or b is None:
            continue
        alpha = _of(config.get("alpha_pattern", {}), name, config["lora_alpha"])
        scale = alpha / (a.shape[0] ** 0.5 if config.get("use_rslora") else a.shape[0])
        module.weight.copy_((module.weight.double() + scale * (b.double() @ a.double())).to(module.weight.dtype))


def _of(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)

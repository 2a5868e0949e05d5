"""How compressed-tensors itself reads its files: its weights, and the logits of transformers with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.quantized.make import common

DEQUANTIZER = "compressed_tensors BaseCompressor.decompress with the scheme its config gives a module, float32 scales"


def weights(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of the modules that have a scale, float32 [N, K] under "x.weight"."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**{name: config[name] for name in common.NARROW}))
    apply_quantization_config(model, QuantizationConfig.model_validate(config["quantization_config"]))
    read = {}
    for name, module in model.named_modules():
        own = {key.rpartition(".")[2]: tensors[key] for key in tensors if key.rpartition(".")[0] == name}
        if "weight_scale" not in own:
            continue
        scheme: Any = module.quantization_scheme
        layout = scheme.format or infer_module_format(type(module), scheme)
        own["weight_scale"] = own["weight_scale"].float()
        compressor: Any = BaseCompressor.get_value_from_registry(getattr(layout, "value", layout))
        read[f"{name}.weight"] = compressor.decompress(own, scheme)["weight"].contiguous()
    return read


def load(written: Path) -> tuple[Any, str]:
    """With activations rounded as the config asks, in float32; and that in words. Raises whatever keeps it from it."""
    model = AutoModelForCausalLM.from_pretrained(written, dtype=torch.float32)
    return model, "transformers with compressed-tensors on a CPU in float32: plain weights, activations fake-quantized"


def logits(written: Path) -> tuple[torch.Tensor | None, str]:
    """None, and why, where that does not run."""
    try:
        model, runner = load(written)
        whole = common.run(model)
    except Exception as error:  # whatever keeps it from running here is told
        return None, f"none: {type(error).__name__}: {str(error)[:160]}"
    if not torch.isfinite(whole).all():
        return None, "none: transformers gives NaN, its config quantizes a layer that the file keeps plain"
    return whole, runner

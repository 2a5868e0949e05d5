"""LLM Compressor's one call, alike in its old versions and new ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.quantized.make import common

MODIFIERS = {"QuantizationModifier": QuantizationModifier, "GPTQModifier": GPTQModifier}
W4_G32 = {"type": "int", "symmetric": True, "num_bits": 4, "strategy": "group", "group_size": 32}


def linear(**scheme: Any) -> dict[str, Any]:
    """One group of all linear layers."""
    return {"config_groups": {"group_0": {"targets": ["Linear"]} | scheme}}


def write(source: Path, modifier: str, options: dict[str, Any], calibration: list[torch.Tensor] | None = None) -> Path:
    """Quantizes the model in a folder as the modifier's `options` say; answers with the folder it wrote.

    `calibration`: tokens, int64 [1, length] each; by default random ones.
    """
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

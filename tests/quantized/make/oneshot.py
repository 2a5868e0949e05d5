"""LLM Compressor's one call, alike in its old versions and new ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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


def write(tiny: Path, modifier: str, options: dict[str, Any]) -> Path:
    """Quantizes the model in the folder `tiny` as the modifier's `options` say; answers with the folder it wrote."""
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype="auto")
    tokens = [one[0].tolist() for one in common.calibration(model.config.to_dict())]
    oneshot(
        model=model,
        recipe=MODIFIERS[modifier](**options),
        tokenizer=AutoTokenizer.from_pretrained(tiny),
        dataset=Dataset.from_dict({"input_ids": tokens, "attention_mask": [[1] * len(one) for one in tokens]}),
        num_calibration_samples=len(tokens),
        max_seq_length=len(tokens[0]),
    )
    model.save_pretrained("out", save_compressed=True)
    return Path("out")

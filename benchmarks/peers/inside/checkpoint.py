"""Run inside a peer's environment: `checkpoint.py FILE.gguf DIRECTORY DTYPE` writes a transformers checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    source, out, dtype = Path(sys.argv[1]), Path(sys.argv[2]), getattr(torch, sys.argv[3])
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    tensors = {name: tensor.detach().to(dtype).contiguous() for name, tensor in model.named_parameters()}  # tied: once
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = model.config
    if hasattr(config, "quantization_config"):  # newer versions remember the file's; the tensors are whole by now
        del config.quantization_config
    config.architectures, config.dtype = [type(model).__name__], dtype
    config.save_pretrained(out)
    model.generation_config.save_pretrained(out)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(out)


if __name__ == "__main__":
    main()

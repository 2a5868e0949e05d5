"""A random LoRA adapter of a model, in PEFT's files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from protos.adapter_files import CONFIG, WEIGHTS
from worker_svc.models.spec import ModelSpec

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
ALL = (*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def write(path: Path, spec: ModelSpec, rank: int, seed: int, modules: tuple[str, ...] = ALL, size: float = 0.3) -> Path:
    """`size`: of what it adds, in that of a model's random weights. Answers with `path`."""
    rng = np.random.default_rng(seed)
    rows = {part.role: part.rows for product in ("qkv", "o", "gate_up", "down") for part in spec.sections(product)}
    columns = {"o": spec.num_heads * spec.head_dim, "down": spec.intermediate_size}
    tensors = {}
    for i in range(spec.num_layers):
        for module in modules:
            role = module.partition(".")[2].removesuffix("_proj")
            inner = columns.get(role, spec.hidden_size)
            for side, shape in (("A", (rank, inner)), ("B", (rows[role], rank))):
                name = f"base_model.model.model.layers.{i}.{module}.lora_{side}.weight"
                tensors[name] = (rng.standard_normal(shape) * size * shape[1] ** -0.5).astype(np.float32)
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / WEIGHTS)
    names = [module.partition(".")[2] for module in modules]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": names}
    (path / CONFIG).write_text(json.dumps(config))
    return path

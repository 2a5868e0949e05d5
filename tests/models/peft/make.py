"""Has PEFT write the adapters beside this file, and what it computes with them: `python -m tests.models.peft.make`.

PEFT is no dependency of ours: this runs in an environment that has it (0.21.2), and only when fixtures change.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig

from tests.models import checkpoints
from tests.models.checkpoints import SMALL
from tests.models.stepping import tokens

HERE = Path(__file__).parent
CONFIG: dict[str, Any] = {**SMALL, "num_hidden_layers": 2}
PROMPT = tokens(12, 151, seed=3)
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    "patterns": {
        "r": 4,
        "lora_alpha": 6,
        "use_rslora": True,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"v_proj": 2, r"layers\.1\.mlp\.down_proj": 6},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 11},
    },
}


def base(path: Path) -> Any:
    return checkpoints.save(path, LlamaConfig(**CONFIG))


def main() -> None:
    from peft import LoraConfig, get_peft_model

    for name, fields in ADAPTERS.items():
        with TemporaryDirectory() as directory:
            model: Any = get_peft_model(base(Path(directory)), LoraConfig(task_type="CAUSAL_LM", **fields))
        torch.manual_seed(1)
        with torch.no_grad():
            for tensor_name, tensor in model.named_parameters():
                if "lora_" in tensor_name:
                    tensor.copy_(torch.randn_like(tensor) * tensor.shape[-1] ** -0.5)
        model.save_pretrained(HERE / name)
        config = json.loads((HERE / name / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = ""  # where it lay
        (HERE / name / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
        (HERE / name / "README.md").unlink(missing_ok=True)
        np.save(HERE / name / "logits.npy", checkpoints.logits(model, PROMPT).numpy())


if __name__ == "__main__":
    main()

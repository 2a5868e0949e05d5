"""Small random checkpoints as transformers writes them, and its own logits for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

SMALL: dict[str, Any] = {
    "vocab_size": 151,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def save(path: Path, config: PretrainedConfig, shard: str = "5GB", seed: int = 0) -> Any:
    """Writes a model whose every weight is random (biases and norms too; norms around what they start as:
    1, or 0 where a model adds 1); answers with it."""
    torch.manual_seed(seed)
    factory: Any = AutoModelForCausalLM
    model = factory.from_config(config, dtype=torch.float32, attn_implementation="eager")
    model.eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                weight.add_(0.2 * torch.randn_like(weight))
            else:
                weight.copy_(torch.randn_like(weight) * (0.5 if weight.ndim == 1 else weight.shape[-1] ** -0.5))
    model.save_pretrained(path, max_shard_size=shard)
    return model


@torch.no_grad()
def overflow(model: Any, token: int) -> None:
    """Weights that are finite, of which this token's logits alone are no numbers: no other has a last dimension."""
    layer, embed = model.model.layers[0], model.model.embed_tokens.weight
    embed[:, -1] = 0
    embed[token] = 0
    embed[token, -1] = 1
    layer.self_attn.o_proj.weight[-1] = 0
    layer.mlp.gate_proj.weight[:, -1] = 1e25
    layer.mlp.up_proj.weight[:, -1] = 1e25


@torch.no_grad()
def logits(model: Any, tokens: list[int]) -> torch.Tensor:
    """[len(tokens), vocab], of the whole sequence at once."""
    whole: torch.Tensor = model(torch.tensor([tokens]), use_cache=False).logits[0].float()
    return whole

"""An EAGLE-3 head in torch, float32: ours's oracle, and what is trained. Its parameters have the published names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb


class Norm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self._eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self._eps))


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        h, d = config.hidden_size, int(config.head_dim or 0)
        heads, kv_heads = config.num_attention_heads, int(config.num_key_value_heads or 0)
        self._shape = heads, kv_heads, d
        q, kv = heads * d, kv_heads * d
        self.q_proj, self.o_proj = nn.Linear(2 * h, q, bias=False), nn.Linear(q, h, bias=False)
        self.k_proj, self.v_proj = nn.Linear(2 * h, kv, bias=False), nn.Linear(2 * h, kv, bias=False)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        b, t, _ = x.shape
        heads, kv_heads, d = self._shape
        q = self.q_proj(x).view(b, t, heads, d).transpose(1, 2)
        k, v = (p(x).view(b, t, kv_heads, d).transpose(1, 2) for p in (self.k_proj, self.v_proj))
        q, k = apply_rotary_pos_emb(q, k, *turn)
        seen = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(seen.transpose(1, 2).reshape(b, t, heads * d))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        h, inner = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj = nn.Linear(h, inner, bias=False), nn.Linear(h, inner, bias=False)
        self.down_proj = nn.Linear(inner, h, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Midlayer(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        h, eps = config.hidden_size, config.rms_norm_eps
        self.hidden_norm, self.input_layernorm = Norm(h, eps), Norm(h, eps)
        self.post_attention_layernorm = Norm(h, eps)
        self.self_attn, self.mlp = Attention(config), Mlp(config)

    def forward(self, states: Tensor, embedded: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        joined = torch.cat([self.input_layernorm(embedded), self.hidden_norm(states)], -1)
        x = states + self.self_attn(joined, turn)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Head(nn.Module):
    """`config`: the model's, `layers`: those whose inputs it reads; `targets` [draft vocabulary]: ids, ascending."""

    def __init__(self, config: LlamaConfig, layers: tuple[int, ...], targets: Tensor) -> None:
        super().__init__()
        self.layers = layers
        self.config, h = config, config.hidden_size
        self.fc = nn.Linear(len(layers) * h, h, bias=False)
        self.midlayer, self.norm = Midlayer(config), Norm(h, config.rms_norm_eps)
        self.lm_head = nn.Linear(h, len(targets), bias=False)
        self.targets = targets
        self._rotary = LlamaRotaryEmbedding(config)

    def layer(self, states: Tensor, embedded: Tensor) -> Tensor:
        """[B, T, h] states and embeddings of the tokens behind them → states of the head's own."""
        turn = self._rotary(states, torch.arange(states.shape[1])[None])
        out: Tensor = self.midlayer(states, embedded, turn)
        return out

    def logits(self, states: Tensor) -> Tensor:
        out: Tensor = self.lm_head(self.norm(states))
        return out

    @torch.no_grad()
    def draft(self, taps: Tensor, embed: Tensor, token_ids: list[int], count: int) -> list[int]:
        """What it says comes behind the tokens: `taps` [T − 1, 3 h] of all but the last, `embed` [vocabulary, h]."""
        states, tokens = self.fc(taps)[None], token_ids[1:]
        drafts: list[int] = []
        for _ in range(count):
            out = self.layer(states, embed[torch.tensor(tokens)][None])[:, -1:]
            drafts.append(int(self.targets[self.logits(out).argmax()]))
            states, tokens = torch.cat([states, out], 1), [*tokens, drafts[-1]]
        return drafts

    def save(self, path: Path, **more: Tensor) -> None:
        path.mkdir(parents=True, exist_ok=True)
        vocab = self.config.vocab_size
        chosen = torch.zeros(vocab, dtype=torch.bool)
        chosen[self.targets] = True
        tensors = {name: weight.detach().contiguous() for name, weight in self.named_parameters()}
        tensors |= {"d2t": self.targets - torch.arange(len(self.targets)), "t2d": chosen, **more}
        save_file(tensors, path / "model.safetensors")
        fields = {**self.config.to_diff_dict(), "architectures": ["LlamaForCausalLMEagle3"], "num_hidden_layers": 1}
        sizes: dict[str, Any] = {
            name: getattr(self.config, name)
            for name in (
                "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
                "max_position_embeddings", "rms_norm_eps", "vocab_size",
            )
        }  # fmt: skip
        fields |= {**sizes, "draft_vocab_size": len(self.targets), "tie_word_embeddings": False}
        fields["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": list(self.layers)}
        (path / "config.json").write_text(json.dumps(fields, indent=1))


def random_head(config: LlamaConfig, num_layers: int, seed: int = 5) -> Head:
    """Of a model of so many layers: it knows a hundred tokens."""
    torch.manual_seed(seed)
    chosen = torch.randperm(config.vocab_size)[:100].sort().values
    head = Head(config, (num_layers // 3, num_layers // 2, num_layers - 1), chosen)
    with torch.no_grad():
        for name, weight in head.named_parameters():
            noise = torch.randn_like(weight)
            weight.copy_(1 + 0.2 * noise if "norm" in name else noise * 1.5 * weight.shape[-1] ** -0.5)
    return head.eval()


@torch.no_grad()
def taps(model: Any, token_ids: Tensor, layers: tuple[int, ...]) -> Tensor:
    """[B, T] → [B, T, 3 h]: what goes into these layers of a transformers model."""
    hidden = model(token_ids, output_hidden_states=True).hidden_states
    return torch.cat([hidden[layer] for layer in layers], -1)

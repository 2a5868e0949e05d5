"""A model family is data: everything a backend needs to know to execute a decoder-only transformer. No torch here.

x = embed[token] * embedding_scale
each layer:  h = x + o(attention(rope(q_norm(q)), rope(k_norm(k)), v))      q, k, v from attn_norm(x)
             x = h + down(activation(gate(m)) * up(m))                      m = mlp_norm(h)
logits = softcap(lm_head(final_norm(x)))
"""

from __future__ import annotations

from dataclasses import dataclass

from worker_svc.models.rope import Rope

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")

# What a layer's and a model's tensors are called in a transformers checkpoint of the Llama lineage.
HF_LAYER = {
    "attn_norm": "model.layers.{i}.input_layernorm.{p}",
    "q": "model.layers.{i}.self_attn.q_proj.{p}",
    "k": "model.layers.{i}.self_attn.k_proj.{p}",
    "v": "model.layers.{i}.self_attn.v_proj.{p}",
    "o": "model.layers.{i}.self_attn.o_proj.{p}",
    "q_norm": "model.layers.{i}.self_attn.q_norm.{p}",
    "k_norm": "model.layers.{i}.self_attn.k_norm.{p}",
    "mlp_norm": "model.layers.{i}.post_attention_layernorm.{p}",
    "gate": "model.layers.{i}.mlp.gate_proj.{p}",
    "up": "model.layers.{i}.mlp.up_proj.{p}",
    "down": "model.layers.{i}.mlp.down_proj.{p}",
}
HF_TOP = {"embed": "model.embed_tokens.{p}", "final_norm": "model.norm.{p}", "lm_head": "lm_head.{p}"}


@dataclass(frozen=True)
class WeightNames:
    """Where each weight is found: templates with {i} for the layer and {p} for "weight" or "bias"."""

    layer: dict[str, str]
    top: dict[str, str]
    interleaved_qk: bool = False  # rotary pairs are neighbours (2j, 2j+1), as GGUF has them; ours are halves (j, j+d/2)


@dataclass(frozen=True)
class ModelSpec:
    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int  # divides num_heads
    head_dim: int
    max_model_len: int  # what the model serves unless asked otherwise
    max_positions: int  # what it can be asked for
    norm_eps: float
    rope: Rope
    names: WeightNames
    activation: str = "silu"  # one of ACTIVATIONS
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMS norm of each head's q and k, before rope
    windows: tuple[
        int, ...
    ] = ()  # per layer: positions seen, the token's own included; 0 is all. Empty: all layers all
    attention_softcap: float = 0.0  # scores become cap * tanh(scores / cap); 0 is off
    logit_softcap: float = 0.0
    embedding_scale: float = 1.0
    tied: bool = False  # lm_head is the embedding

    def window(self, layer: int) -> int:
        return self.windows[layer] if self.windows else 0


class SpecError(ValueError):
    """A config that says something which no ModelSpec can, in one line for the person who started it."""

"""A model family is data: everything a backend needs to know to execute a decoder-only transformer. No torch here.

x = embed[token] * embedding_scale
each layer:  h = x + o(attention(rope(q_norm(q)), rope(k_norm(k)), v))      q, k, v from attn_norm(x)
             x = h + down(activation(gate(m)) * up(m))                      m = mlp_norm(h)
logits = softcap(lm_head(final_norm(x)))

With `post_norms` what o and down give is normed before it is added; with `experts` a layer's gate, up and down are
those of the experts that a router of m chooses, their outputs added by its weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

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
# How transformers names experts in memory, and saves them unless asked for a checkpoint's original form.
HF_EXPERTS = {
    "router": "model.layers.{i}.mlp.gate.{p}",
    "expert_gate_up": "model.layers.{i}.mlp.experts.gate_up_proj",
    "expert_down": "model.layers.{i}.mlp.experts.down_proj",
}
HF_TOP = {"embed": "model.embed_tokens.{p}", "final_norm": "model.norm.{p}", "lm_head": "lm_head.{p}"}


@dataclass(frozen=True)
class WeightNames:
    """Where each weight is found: templates with {i} for the layer, {e} for the expert, {p} for "weight" or "bias".

    Where a checkpoint has the parts of a product in one tensor, one below the other, that has a name of its own instead
    of theirs: "qkv", "gate_up", "expert_gate_up". An expert's name without {e} is that of all of them in one tensor
    [experts, rows, columns].
    """

    layer: dict[str, str]
    top: dict[str, str]
    interleaved_qk: bool = False  # rotary pairs are neighbours (2j, 2j+1), as GGUF has them; ours are halves (j, j+d/2)


class Part(NamedTuple):
    """A tensor of a product's rows: its role, its rows, and for q and k the heads that those belong to."""

    role: str
    rows: int
    heads: int = 0


@dataclass(frozen=True)
class Experts:
    """MLPs of which a token takes the `top_k` that its router finds likeliest (among equals the one of lower number).

    Their outputs are added by the router's probabilities, which are a softmax over all experts.
    """

    num: int
    top_k: int
    intermediate_size: int
    normalized: bool  # the weights of the chosen are scaled to add up to 1
    layers: tuple[bool, ...] = ()  # which layers have experts; the others have one MLP. Empty: all have


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
    attention_scale: float = 0.0  # of queries; 0 is 1 / √head_dim
    norm_offset: float = 0.0  # added to the weights of every norm
    post_norms: bool = False  # norms of what attention and MLP give, before it is added to the residual
    local_rope: Rope | None = None  # turns the layers that have a window, of as many dimensions; None: `rope` does
    experts: Experts | None = None
    tied: bool = False  # lm_head is the embedding

    other_names: tuple[WeightNames, ...] = ()  # that a checkpoint may go by instead: the loader finds out

    def window(self, layer: int) -> int:
        return self.windows[layer] if self.windows else 0

    def layer_rope(self, layer: int) -> Rope:
        return self.local_rope if self.local_rope and self.window(layer) else self.rope

    @property
    def ropes(self) -> tuple[Rope, ...]:
        return (self.rope, self.local_rope) if self.local_rope else (self.rope,)

    @property
    def query_scale(self) -> float:
        return self.attention_scale or self.head_dim**-0.5

    def sparse(self, layer: int) -> bool:
        """Whether it has experts."""
        return self.experts is not None and (not self.experts.layers or self.experts.layers[layer])

    def parts(self, product: str) -> tuple[Part, ...]:
        """The tensors, one below the other, that a product's rows come in: "qkv", "o", "gate_up", "down", and with
        experts "router", "expert_gate_up" and "expert_down".
        """
        sections = self.sections(product)
        stacked = product in self.names.layer
        return (Part(product, sum(section.rows for section in sections)),) if stacked else sections

    def sections(self, product: str) -> tuple[Part, ...]:
        """What a product's rows are, whether they come in one tensor or in several."""
        q_rows, kv_rows = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        inner, experts = self.intermediate_size, self.experts
        match product:
            case "qkv":
                return (Part("q", q_rows, self.num_heads), Part("k", kv_rows, self.num_kv_heads), Part("v", kv_rows))
            case "gate_up":
                return (Part("gate", inner), Part("up", inner))
            case "expert_gate_up" if experts:
                return (Part("expert_gate", experts.intermediate_size), Part("expert_up", experts.intermediate_size))
            case "router" if experts:
                return (Part("router", experts.num),)
        return (Part(product, self.hidden_size),)


class SpecError(ValueError):
    """A config that says something which no ModelSpec can, in one line for the person who started it."""

"""Executes any ModelSpec with torch on the CPU: one forward pass over a step's rows."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from worker_svc.attention import cpu as attention
from worker_svc.inputs import Ints, StepInputs
from worker_svc.kv_cache import KVCache, KVShape
from worker_svc.layers.activation import ACTIVATIONS
from worker_svc.layers.embedding import Embedding
from worker_svc.layers.linear import Linear, padded_rows
from worker_svc.layers.mlp import GatedMLP
from worker_svc.layers.moe import MoE
from worker_svc.layers.norm import rms_norm
from worker_svc.layers.rotary import rotate
from worker_svc.models.loader import DType, Model
from worker_svc.models.rope import Rope
from worker_svc.models.spec import Experts
from worker_svc.parallel.ranks import Ranks
from worker_svc.parallel.shard import Piece, Shard


@dataclass(frozen=True)
class Layer:
    attn_norm: Tensor
    qkv: Linear  # rows: all q heads, then all k, then all v
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Linear
    attn_post_norm: Tensor | None
    mlp_norm: Tensor
    mlp: GatedMLP | MoE
    mlp_post_norm: Tensor | None
    window: int
    rope: Rope


@dataclass(frozen=True)
class StepOutputs:
    """Of a step's tokens [S], given as indices into T."""

    runner: ModelRunner
    hidden: Tensor  # [T, hidden] of `forward`

    def __call__(self, tokens: Ints) -> Tensor:
        """Logits [S, vocab] float32."""
        return self.runner.logits(self.hidden, tokens)

    def states(self, tokens: Ints) -> Tensor:
        """After the final norm [S, hidden] float32."""
        return self.runner.states(self.hidden, tokens)[: len(tokens)]


class ModelRunner:
    """The residual stream, norms, rope and attention are float32; products are in `dtype`.

    Of several ranks each has its heads and its part of every MLP; the residual stream is whole, and the same bits, on
    all of them. So each of its methods is called on every rank, or on none.
    """

    def __init__(
        self,
        model: Model,
        dtype: DType,
        max_model_len: int,
        progress: Callable[[float], None],
        ranks: Ranks | None = None,
    ) -> None:
        """Reads the weights of this rank. Raises CheckpointError where one is missing or misshapen, SpecError where the
        model cannot be split among so many.
        """
        self.ranks = ranks or Ranks()
        self._shard = Shard(model.spec, self.ranks.rank, self.ranks.size)
        spec = self.spec = self._shard.spec
        self._model, self._name, self.max_model_len = model, dtype, max_model_len
        self.dtype = getattr(torch, dtype)
        self.vocab_size, self.hidden_size = spec.vocab_size, spec.hidden_size
        self.kv_shape = KVShape(spec.num_layers, spec.num_kv_heads, spec.head_dim, self.dtype)
        self._activation = ACTIVATIONS[spec.activation]
        tables = {rope: rope.tables(max_model_len) for rope in spec.ropes}
        self._ropes = {rope: (torch.from_numpy(cos), torch.from_numpy(sin)) for rope, (cos, sin) in tables.items()}
        self._embed = Embedding(self._read(model.top("embed"), self._shard.vocab), self._shard.vocab.cut.top)
        self.layers: list[Layer] = []
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # dequantizing and packing leave the GIL
            for layer in pool.map(self._layer, range(spec.num_layers)):
                self.layers.append(layer)
                progress(len(self.layers) / (spec.num_layers + 1))
        self._final_norm = _tensor(model.read_norm(model.top("final_norm"), spec.hidden_size))
        head = self._embed.weight if spec.tied else self._read(model.top("lm_head"), self._shard.vocab)
        self._lm_head = Linear(head)

    def linears(self) -> list[Linear]:
        """One of each shape."""
        every = [linear for layer in self.layers for linear in (layer.qkv, layer.o, *layer.mlp.linears())]
        return list({(x.in_features, x.out_features, x.dtype): x for x in [*every, self._lm_head]}.values())

    def step(self, inputs: StepInputs, cache: KVCache) -> StepOutputs:
        """Writes the step's K and V."""
        return StepOutputs(self, self.forward(inputs, cache))

    def forward(self, inputs: StepInputs, cache: KVCache) -> Tensor:
        """Writes the step's K and V to their blocks; answers the last layer's output [T, hidden], before the norm."""
        num_tokens = len(inputs.token_ids)
        rows = padded_rows(num_tokens)
        tokens = torch.from_numpy(_padded(inputs.token_ids, rows))
        positions = torch.from_numpy(_padded(inputs.positions, rows))
        turns = {rope: (cos[positions][:, None], sin[positions][:, None]) for rope, (cos, sin) in self._ropes.items()}
        kv_rows = cache.rows_of(torch.from_numpy(inputs.slot_mapping))
        layouts = {w: attention.lay_out(inputs, cache, w) for w in {layer.window: None for layer in self.layers}}
        add = self.ranks.add
        x = add(self._embed(tokens)) * self.spec.embedding_scale
        for i, layer in enumerate(self.layers):
            q, k, v = self._qkv(layer, x, *turns[layer.rope])
            cache.write(i, kv_rows, k[:num_tokens], v[:num_tokens])
            scale, softcap = self.spec.query_scale, self.spec.attention_softcap
            attended = attention.attend(q, layouts[layer.window], cache, i, scale, softcap)
            x = x + self._normed(add(layer.o(attended.to(self.dtype))), layer.attn_post_norm)
            m = self._normed(x, layer.mlp_norm).to(self.dtype)
            out = layer.mlp(m, num_tokens) if isinstance(layer.mlp, MoE) else layer.mlp(m)
            x = x + self._normed(add(out), layer.mlp_post_norm)
        return x

    def logits(self, hidden: Tensor, tokens: Ints) -> Tensor:
        """hidden [T, hidden] of `forward`, tokens [S] indices into T → [S, vocab] float32."""
        if not len(tokens):  # in the middle of a prompt
            return torch.empty(0, self.vocab_size)
        x = self.states(hidden, tokens)
        logits = self._side_by_side(self._lm_head(x.to(self.dtype))[: len(tokens)]).float()
        cap = self.spec.logit_softcap
        return torch.tanh(logits / cap) * cap if cap else logits

    def states(self, hidden: Tensor, tokens: Ints) -> Tensor:
        """After the final norm [padded_rows(S), hidden] float32."""
        rows = torch.from_numpy(_padded(tokens, padded_rows(len(tokens))))
        return rms_norm(hidden.index_select(0, rows), self._final_norm, self.spec.norm_eps)

    def _side_by_side(self, logits: Tensor) -> Tensor:
        """[S, this rank's rows of lm_head] → [S, vocab]."""
        if self.ranks.size == 1:
            return logits
        short = self._shard.vocab_share - logits.shape[1]
        parts = self.ranks.gather(functional.pad(logits, (0, short)))
        return parts.transpose(0, 1).flatten(1)[:, : self.vocab_size].contiguous()

    def _normed(self, x: Tensor, weight: Tensor | None) -> Tensor:
        """float32; as it is where there is no such norm."""
        return x.float() if weight is None else rms_norm(x.float(), weight, self.spec.norm_eps)

    def _qkv(self, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [T, heads, head_dim], k and v [T, kv_heads, head_dim], q and k turned."""
        spec = self.spec
        normed = rms_norm(x, layer.attn_norm, spec.norm_eps).to(self.dtype)
        heads = layer.qkv(normed).float().view(-1, spec.num_heads + 2 * spec.num_kv_heads, spec.head_dim)
        q, k, v = heads.split([spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], 1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = rms_norm(q, layer.q_norm, spec.norm_eps), rms_norm(k, layer.k_norm, spec.norm_eps)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def _layer(self, i: int) -> Layer:
        spec, hidden = self.spec, self.spec.hidden_size

        def norm(role: str, size: int = hidden) -> Tensor:
            return _tensor(self._model.read_norm(self._model.layer(i, role), size))

        return Layer(
            attn_norm=norm("attn_norm"),
            qkv=self._linear(i, "qkv", spec.qkv_bias),
            q_norm=norm("q_norm", spec.head_dim) if spec.qk_norm else None,
            k_norm=norm("k_norm", spec.head_dim) if spec.qk_norm else None,
            o=self._linear(i, "o", spec.o_bias),
            attn_post_norm=norm("attn_post_norm") if spec.post_norms else None,
            mlp_norm=norm("mlp_norm"),
            mlp=self._experts(i, spec.experts) if spec.experts and spec.sparse(i) else self._mlp(i),
            mlp_post_norm=norm("mlp_post_norm") if spec.post_norms else None,
            window=spec.window(i),
            rope=spec.layer_rope(i),
        )

    def _mlp(self, i: int) -> GatedMLP:
        spec = self.spec
        gate_up, down = (self._linear(i, product, spec.mlp_bias) for product in ("gate_up", "down"))
        return GatedMLP(gate_up, down, self._activation)

    def _experts(self, i: int, experts: Experts) -> MoE:
        """The router decides, and near decisions are many: it is float32 whatever the rest is."""
        spec, model = self.spec, self._model

        def linear(expert: int, product: str) -> Linear:
            pieces = self._shard.pieces(product)
            arrays = [model.read_expert(i, expert, p.role, p.shape, self._name, p.cut) for p in pieces]
            return Linear(torch.cat([_tensor(array).view(self.dtype) for array in arrays]))

        def mlp(e: int) -> GatedMLP:
            return GatedMLP(linear(e, "expert_gate_up"), linear(e, "expert_down"), self._activation)

        router = model.read(model.layer(i, "router"), (experts.num, spec.hidden_size), "float32")
        each = [mlp(e) for e in range(experts.num)]
        return MoE(Linear(_tensor(router)), each, experts.top_k, experts.normalized)

    def _linear(self, i: int, product: str, bias: bool) -> Linear:
        """This rank's pieces, stacked into one product."""
        names, pieces = self._model.layer, self._shard.pieces(product)
        weight = torch.cat([self._read(names(i, piece.role), piece) for piece in pieces])
        if not bias or not self._shard.adds_bias(product):
            return Linear(weight)
        biases = [piece._replace(shape=piece.shape[:1]) for piece in pieces]
        return Linear(weight, torch.cat([self._read(names(i, piece.role, "bias"), piece) for piece in biases]))

    def _read(self, name: str, piece: Piece) -> Tensor:
        array = self._model.read(name, piece.shape, self._name, piece.heads, piece.cut)
        return _tensor(array).view(self.dtype)


def _tensor(array: NDArray[Any]) -> Tensor:
    """Copies what is read-only, so that torch never holds a view that it might write through."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _padded(values: Ints, rows: int) -> Ints:
    return np.concatenate([values, np.zeros(rows - len(values), np.int64)])

"""Executes any ModelSpec with torch on the CPU: one forward pass over a step's rows."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from worker_svc.attention import cpu as attention
from worker_svc.inputs import Ints, StepInputs
from worker_svc.kv_cache import KVCache, KVShape
from worker_svc.layers.activation import ACTIVATIONS
from worker_svc.layers.linear import Linear, padded_rows
from worker_svc.layers.norm import rms_norm
from worker_svc.layers.rotary import rotate
from worker_svc.models.loader import DType, Model


@dataclass(frozen=True)
class Layer:
    attn_norm: Tensor
    qkv: Linear  # rows: all q heads, then all k, then all v
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Linear
    mlp_norm: Tensor
    gate_up: Linear  # rows: gate, then up
    down: Linear
    window: int


class ModelRunner:
    """The residual stream, norms, rope and attention are float32; products are in `dtype`."""

    def __init__(self, model: Model, dtype: DType, max_model_len: int, progress: Callable[[float], None]) -> None:
        """Reads all weights. Raises CheckpointError where one is missing or misshapen."""
        spec = self.spec = model.spec
        self._model, self._name, self.max_model_len = model, dtype, max_model_len
        self.dtype = getattr(torch, dtype)
        self.vocab_size = spec.vocab_size
        self.kv_shape = KVShape(spec.num_layers, spec.num_kv_heads, spec.head_dim, self.dtype)
        self._activation = ACTIVATIONS[spec.activation]
        cos, sin = spec.rope.tables(max_model_len)
        self._cos, self._sin = torch.from_numpy(cos), torch.from_numpy(sin)
        embed = self._read(model.top("embed"), (spec.vocab_size, spec.hidden_size))
        self._embed = embed
        self.layers: list[Layer] = []
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # dequantizing and packing leave the GIL
            for layer in pool.map(self._layer, range(spec.num_layers)):
                self.layers.append(layer)
                progress(len(self.layers) / (spec.num_layers + 1))
        self._final_norm = self._vector(model.top("final_norm"), spec.hidden_size)
        head = embed if spec.tied else self._read(model.top("lm_head"), (spec.vocab_size, spec.hidden_size))
        self._lm_head = Linear(head)

    def linears(self) -> list[Linear]:
        """One of each shape."""
        every = [linear for layer in self.layers for linear in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        return list({(x.in_features, x.out_features): x for x in [*every, self._lm_head]}.values())

    def step(self, inputs: StepInputs, cache: KVCache) -> Callable[[Ints], Tensor]:
        """Writes the step's K and V; answers with tokens [S] (indices into T) → logits [S, vocab] float32."""
        return partial(self.logits, self.forward(inputs, cache))

    def forward(self, inputs: StepInputs, cache: KVCache) -> Tensor:
        """Writes the step's K and V to their blocks; answers the last layer's output [T, hidden], before the norm."""
        num_tokens = len(inputs.token_ids)
        rows = padded_rows(num_tokens)
        tokens = torch.from_numpy(_padded(inputs.token_ids, rows))
        positions = torch.from_numpy(_padded(inputs.positions, rows))
        cos, sin = self._cos[positions][:, None], self._sin[positions][:, None]
        kv_rows = cache.rows_of(torch.from_numpy(inputs.slot_mapping))
        layouts = {w: attention.lay_out(inputs, cache, w) for w in {layer.window: None for layer in self.layers}}
        x = self._embed[tokens].float() * self.spec.embedding_scale
        for i, layer in enumerate(self.layers):
            q, k, v = self._qkv(layer, x, cos, sin)
            cache.write(i, kv_rows, k[:num_tokens], v[:num_tokens])
            scale = self.spec.head_dim**-0.5
            attended = attention.attend(q, layouts[layer.window], cache, i, scale, self.spec.attention_softcap)
            x = x + layer.o(attended.to(self.dtype))
            m = rms_norm(x, layer.mlp_norm, self.spec.norm_eps).to(self.dtype)
            gate, up = layer.gate_up(m).float().chunk(2, -1)
            x = x + layer.down((self._activation(gate) * up).to(self.dtype))
        return x

    def logits(self, hidden: Tensor, tokens: Ints) -> Tensor:
        """hidden [T, hidden] of `forward`, tokens [S] indices into T → [S, vocab] float32."""
        if not len(tokens):  # in the middle of a prompt
            return torch.empty(0, self.vocab_size)
        rows = torch.from_numpy(_padded(tokens, padded_rows(len(tokens))))
        x = rms_norm(hidden.index_select(0, rows), self._final_norm, self.spec.norm_eps)
        logits = self._lm_head(x.to(self.dtype))[: len(tokens)].float()
        cap = self.spec.logit_softcap
        return torch.tanh(logits / cap) * cap if cap else logits

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
        spec, hidden, inner = self.spec, self.spec.hidden_size, self.spec.intermediate_size
        q_rows, kv_rows = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        qkv = [("q", q_rows, spec.num_heads), ("k", kv_rows, spec.num_kv_heads), ("v", kv_rows, 0)]
        names = self._model.layer
        return Layer(
            attn_norm=self._vector(names(i, "attn_norm"), hidden),
            qkv=self._linear(i, qkv, hidden, spec.qkv_bias),
            q_norm=self._vector(names(i, "q_norm"), spec.head_dim) if spec.qk_norm else None,
            k_norm=self._vector(names(i, "k_norm"), spec.head_dim) if spec.qk_norm else None,
            o=self._linear(i, [("o", hidden, 0)], q_rows, spec.o_bias),
            mlp_norm=self._vector(names(i, "mlp_norm"), hidden),
            gate_up=self._linear(i, [("gate", inner, 0), ("up", inner, 0)], hidden, spec.mlp_bias),
            down=self._linear(i, [("down", hidden, 0)], inner, spec.mlp_bias),
            window=spec.window(i),
        )

    def _linear(self, i: int, parts: list[tuple[str, int, int]], columns: int, bias: bool) -> Linear:
        """Parts (role, rows, heads to reorder) stacked into one product."""
        names = self._model.layer
        weight = torch.cat([self._read(names(i, role), (rows, columns), heads) for role, rows, heads in parts])
        if not bias:
            return Linear(weight)
        return Linear(weight, torch.cat([self._read(names(i, role, "bias"), (rows,), h) for role, rows, h in parts]))

    def _read(self, name: str, shape: tuple[int, ...], heads: int = 0) -> Tensor:
        array = self._model.read(name, shape, self._name, heads)
        return _tensor(array).view(self.dtype)

    def _vector(self, name: str, size: int) -> Tensor:
        return _tensor(self._model.read(name, (size,), "float32"))


def _tensor(array: NDArray[Any]) -> Tensor:
    """Copies what is read-only, so that torch never holds a view that it might write through."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _padded(values: Ints, rows: int) -> Ints:
    return np.concatenate([values, np.zeros(rows - len(values), np.int64)])

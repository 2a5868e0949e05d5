"""Executes any ModelSpec on a device: one forward pass over a step's tokens, by our Triton kernels.

Nothing here waits for the device, looks at a value on it, or has a shape that depends on one: the same calls are
launched one by one or captured as a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kernels.gpu.embedding import embed
from kernels.gpu.norm import add_rms_norm, rms_norm
from kernels.gpu.rope import rope_kv_write
from worker_svc.attention.paged import PagedAttention, Rows
from worker_svc.gpu.lora import Adapters
from worker_svc.gpu.mlp import DenseMLP, ExpertMLP
from worker_svc.gpu.quantized import Multiply, Target
from worker_svc.gpu.weights import WeightReader
from worker_svc.layers.lora import Adapt
from worker_svc.models.loader import DType, Model
from worker_svc.models.rope import Rope
from worker_svc.parallel.ranks import Ranks
from worker_svc.parallel.shard import Shard
from worker_svc.quant.plan import check_mode


@dataclass(frozen=True)
class StepTensors:
    """What a forward pass reads, on the device. T tokens; those behind the last row's are computed and written nowhere.

    `plans`: of the step's attention, by window. `adapters`: None where no token has one.
    """

    token_ids: Tensor  # [T] int32
    positions: Tensor  # [T] int32
    slot_mapping: Tensor  # [T] int32: block * block_size + offset, −1 is nowhere
    rows: Rows
    plans: Mapping[int, Any]
    adapters: Tensor | None = None  # [T] int32: the index of each token's


@dataclass(frozen=True)
class Layer:
    attn_norm: Tensor
    qkv: Multiply  # rows: all q heads, then all k, then all v
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Multiply
    attn_post_norm: Tensor | None
    mlp_norm: Tensor
    mlp: DenseMLP | ExpertMLP
    mlp_post_norm: Tensor | None
    window: int
    rope: Tensor  # [positions, rotary dim] float32: cosines, then sines
    kv_scales: tuple[Tensor, Tensor]  # [1] each, of keys and values where pages are float8


class GpuModel:
    """Weights, products, activations and the residual stream are in `dtype`; norms, rope and softmax compute in float32
    and round once.
    """

    def __init__(
        self,
        model: Model,
        dtype: DType,
        where: torch.device,
        kind: str,
        max_model_len: int,
        progress: Callable[[float], None],
        *,
        batch_invariant: bool = False,
        ranks: Ranks | None = None,
        float8: torch.dtype | None = None,
        quantization: str = "",
        max_adapters: int = 0,
        max_adapter_rank: int = 0,
    ) -> None:
        """Reads this rank's weights onto the device, which is one of `kind`. `batch_invariant`: a token's bits do not
        depend on the others of its step, if those of its attention do not. `float8`: what the device multiplies of
        such; `quantization`: what a float checkpoint becomes; `max_adapters` of `max_adapter_rank` there is room for.
        Raises CheckpointError where a weight is missing or misshapen, SpecError where the model cannot be split among
        so many, or quantized so, BackendError where no kernel has that rank.
        """
        check_mode(model, quantization)
        self.ranks, self._invariant = ranks or Ranks(), batch_invariant
        self._shard = Shard(model.spec, self.ranks.rank, self.ranks.size)
        spec = self.spec = self._shard.spec
        self.whole, self.dtype = model.spec, _dtype(dtype)
        self.adapters = Adapters(self._shard, max_adapters, max_adapter_rank, self.dtype, where)
        target = Target(where, kind, float8, batch_invariant)
        self._reader = WeightReader(model, self._shard, dtype, target, quantization)
        self._tables = {rope: _table(rope, max_model_len, where) for rope in spec.ropes}
        self._embed = self._reader.piece(model.top("embed"), self._shard.vocab)
        self.layers: list[Layer] = []
        for i in range(spec.num_layers):
            self.layers.append(self._layer(i))
            progress((i + 1) / (spec.num_layers + 1))
        self._final_norm = self._reader.norm(model.top("final_norm"), spec.hidden_size)
        tied, reader = spec.tied, self._reader
        self._lm_head = reader.as_product(self._embed) if tied else reader.head(model.top("lm_head"), self._shard.vocab)
        self.kernels = reader.kernels

    def windows(self) -> list[int]:
        """Each that some layer has: a step's attention is planned once for each."""
        return list(dict.fromkeys(layer.window for layer in self.layers))

    def forward(
        self, step: StepTensors, pages: Tensor, attention: Mapping[int, PagedAttention]
    ) -> tuple[Tensor, Tensor]:
        """Writes the step's K and V to `pages` [layers, 2, blocks, kv heads, block_size, dim].

        What the last layer adds, and the residual stream that it is not added to yet: both [T, hidden].
        """
        spec = self.spec
        residual = torch.empty(len(step.token_ids), spec.hidden_size, dtype=self.dtype, device=pages.device)
        embed(step.token_ids, self._embed, residual, first_id=self._shard.vocab.cut.top, scale=spec.embedding_scale)
        residual = self._summed(residual)
        normed = torch.empty_like(residual)
        rms_norm(residual, self.layers[0].attn_norm, spec.norm_eps, normed)
        adapted = self.adapters.of(step.adapters)
        for i, layer in enumerate(self.layers):
            adapt = adapted(i)
            attended = self._attend(layer, step, normed, pages[i], attention[layer.window], adapt)
            out = self._normed(self._summed(adapt("o", attended, layer.o(attended))), layer.attn_post_norm)
            add_rms_norm(out, residual, layer.mlp_norm, spec.norm_eps, normed)
            out = layer.mlp(normed) if isinstance(layer.mlp, ExpertMLP) else layer.mlp(normed, adapt)
            out = self._normed(self._summed(out), layer.mlp_post_norm)
            if i + 1 < len(self.layers):
                add_rms_norm(out, residual, self.layers[i + 1].attn_norm, spec.norm_eps, normed)
        return out, residual

    def logits(self, hidden: tuple[Tensor, Tensor], tokens: Tensor, out: Tensor) -> None:
        """`hidden` as `forward` gives it, tokens [S] indices into T; `out` [S, vocab] float32."""
        normed = torch.empty(len(tokens), self.spec.hidden_size, dtype=self.dtype, device=out.device)
        self.states(hidden, tokens, normed)
        out.copy_(self._side_by_side(self._lm_head(normed)))
        if cap := self.spec.logit_softcap:
            out.div_(cap).tanh_().mul_(cap)

    def states(self, hidden: tuple[Tensor, Tensor], tokens: Tensor, out: Tensor) -> None:
        """After the final norm, `out` [S, hidden] of any dtype; arguments as of `logits`."""
        last, residual = (part.index_select(0, tokens) for part in hidden)
        add_rms_norm(last, residual, self._final_norm, self.spec.norm_eps, out)

    def _summed(self, x: Tensor) -> Tensor:
        """Over the ranks, each of which has a part of every sum."""
        if self._invariant:
            return self.ranks.add(x).to(x.dtype)
        return self.ranks.sum(x)

    def _side_by_side(self, logits: Tensor) -> Tensor:
        """[S, this rank's rows of lm_head] → [S, vocab]."""
        if self.ranks.size == 1:
            return logits
        parts = self.ranks.gather(functional.pad(logits, (0, self._shard.vocab_share - logits.shape[1])))
        return parts.transpose(0, 1).flatten(1)[:, : self.spec.vocab_size]

    def _attend(
        self, layer: Layer, step: StepTensors, x: Tensor, pages: Tensor, attention: PagedAttention, adapt: Adapt
    ) -> Tensor:
        spec, qkv = self.spec, adapt("qkv", x, layer.qkv(x))
        q = x.new_empty(len(x), spec.num_heads, spec.head_dim)
        scales = layer.kv_scales if pages.dtype == torch.float8_e4m3fn else None
        k_scale, v_scale = scales or (None, None)
        rope_kv_write(
            qkv, step.positions, layer.rope, step.slot_mapping, q, pages,
            q_norm=layer.q_norm, k_norm=layer.k_norm, eps=spec.norm_eps, k_scale=k_scale, v_scale=v_scale,
        )  # fmt: skip
        out = torch.empty_like(q)
        attention.run(step.plans[layer.window], q, pages, step.rows, out, scales)
        return out.view(len(x), -1)

    def _normed(self, x: Tensor, weight: Tensor | None) -> Tensor:
        """As it is where there is no such norm."""
        if weight is not None:
            rms_norm(x, weight, self.spec.norm_eps, x)
        return x

    def _layer(self, i: int) -> Layer:
        spec, reader, hidden = self.spec, self._reader, self.spec.hidden_size
        where, (k_scale, v_scale) = self._embed.device, reader.model.kv_scales(i)

        def norm(role: str, size: int = hidden) -> Tensor:
            return reader.norm(reader.model.layer(i, role), size)

        return Layer(
            attn_norm=norm("attn_norm"),
            qkv=reader.product(i, "qkv", spec.qkv_bias),
            q_norm=norm("q_norm", spec.head_dim) if spec.qk_norm else None,
            k_norm=norm("k_norm", spec.head_dim) if spec.qk_norm else None,
            o=reader.product(i, "o", spec.o_bias),
            attn_post_norm=norm("attn_post_norm") if spec.post_norms else None,
            mlp_norm=norm("mlp_norm"),
            mlp=reader.mlp(i),
            mlp_post_norm=norm("mlp_post_norm") if spec.post_norms else None,
            window=spec.window(i),
            rope=self._tables[spec.layer_rope(i)],
            # A plain checkpoint does not say how large keys and values become. Those of known models are far below the
            # 448 that float8 e4m3 holds, and a scale of 1 loses no bits of them: it only leaves exponents as they are.
            kv_scales=(torch.full((1,), k_scale, device=where), torch.full((1,), v_scale, device=where)),
        )


def _dtype(name: DType) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _table(rope: Rope, max_model_len: int, where: torch.device) -> Tensor:
    cos, sin = rope.tables(max_model_len)
    return torch.cat([torch.from_numpy(cos), torch.from_numpy(sin)], 1).to(where)

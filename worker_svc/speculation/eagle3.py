"""An EAGLE-3 head (Li et al. 2025) as its authors publish it: one layer that reads three of the model's hidden states.

    config.json          of a Llama of one layer; draft_vocab_size; maybe eagle_config.eagle_aux_hidden_state_layer_ids
    model.safetensors    fc.weight [h, 3 h]; midlayer.{hidden_norm,input_layernorm,post_attention_layernorm}.weight [h]
                         midlayer.self_attn.{q,k,v}_proj.weight [heads, 2 h], o_proj; midlayer.mlp.{gate,up,down}_proj
                         norm.weight, lm_head.weight [draft vocabulary, h]; d2t [draft vocabulary] what to add to one of
                         its ids; t2d, the same as booleans, is not needed; embed_tokens.weight where it has its own

numpy only. What it computes is in csrc/abi.h, at `fuse`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from worker_svc.models import llama
from worker_svc.models.fields import Fields
from worker_svc.models.raw_tensor import CheckpointError, RawTensor
from worker_svc.models.safetensors_reader import SafetensorsCheckpoint
from worker_svc.models.spec import ModelSpec

Floats = NDArray[np.float32]
ARCHITECTURE: Final = "LlamaForCausalLMEagle3"
FILE: Final = "config.json"


@dataclass(frozen=True)
class Eagle3Head:
    """`taps`: the layers of the model whose inputs it reads. Products are [rows, columns]."""

    spec: ModelSpec  # vocab_size: its own
    taps: tuple[int, ...]
    products: dict[str, Floats]  # fuse, qkv, o, gate, up, down, lm_head
    norms: dict[str, Floats]  # state, embed, mlp, final
    targets: NDArray[np.int64]  # [draft vocabulary] the model's id of each of its own
    embed: NDArray[np.uint16] | None  # [the model's vocabulary, h] bfloat16; None: the model's


def read_head(path: Path, target: ModelSpec) -> Eagle3Head:
    """Raises CheckpointError or SpecError naming field or tensor, and OSError."""
    try:
        config = json.loads((path / FILE).read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path / FILE}: no JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path / FILE}: is no object")
    fields = Fields(FILE, config)
    if ARCHITECTURE not in (known := fields.texts("architectures")):
        raise CheckpointError(f"{path / FILE}: architectures is {known}, and an EAGLE-3 head's is {ARCHITECTURE}")
    vocab_size = fields.whole("draft_vocab_size", fields.whole("vocab_size"))
    spec = llama.spec({**config, "vocab_size": vocab_size, "tie_word_embeddings": False})
    if (found := (spec.num_layers, spec.hidden_size)) != (wanted := (1, target.hidden_size)):
        raise CheckpointError(
            f"{path / FILE}: num_hidden_layers, hidden_size are {found}, and must be {wanted}, as the model's"
        )
    return _Reader(SafetensorsCheckpoint(path), path, spec, target).read(_taps(fields, target))


def _taps(fields: Fields, target: ModelSpec) -> tuple[int, ...]:
    """Those named, or those that the paper's heads are trained with."""
    last = target.num_layers - 1
    named = Fields(FILE, fields.group("eagle_config")).wholes("eagle_aux_hidden_state_layer_ids", most=last)
    taps = named or (2, target.num_layers // 2, target.num_layers - 3)
    if not all(0 <= tap <= last for tap in taps):
        raise CheckpointError(f"an EAGLE-3 head reads layers {taps}, and the model has {target.num_layers}")
    return taps


class _Reader:
    def __init__(self, checkpoint: SafetensorsCheckpoint, path: Path, spec: ModelSpec, target: ModelSpec) -> None:
        self._checkpoint, self._path, self._spec, self._target = checkpoint, path, spec, target

    def read(self, taps: tuple[int, ...]) -> Eagle3Head:
        spec, h, inner = self._spec, self._spec.hidden_size, self._spec.intermediate_size
        q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        attention = "midlayer.self_attn"
        sections = [self._product(f"{attention}.{name}_proj", n, 2 * h) for name, n in (("q", q), ("k", kv), ("v", kv))]
        products = {
            "fuse": self._product("fc", h, len(taps) * h),
            "qkv": np.concatenate(sections),
            "o": self._product(f"{attention}.o_proj", h, q),
            "gate": self._product("midlayer.mlp.gate_proj", inner, h),
            "up": self._product("midlayer.mlp.up_proj", inner, h),
            "down": self._product("midlayer.mlp.down_proj", h, inner),
            "lm_head": self._product("lm_head", spec.vocab_size, h),
        }
        norms = {
            "state": self._tensor("midlayer.hidden_norm.weight", (h,)).finite(),
            "embed": self._tensor("midlayer.input_layernorm.weight", (h,)).finite(),
            "mlp": self._tensor("midlayer.post_attention_layernorm.weight", (h,)).finite(),
            "final": self._tensor("norm.weight", (h,)).finite(),
        }
        embed = None
        if "embed_tokens.weight" in self._checkpoint:
            embed = self._tensor("embed_tokens.weight", (self._target.vocab_size, h)).finite_bfloat16()
        return Eagle3Head(spec, taps, products, norms, self._targets(), embed)

    def _product(self, name: str, rows: int, columns: int) -> Floats:
        return self._tensor(f"{name}.weight", (rows, columns)).finite()

    def _tensor(self, name: str, shape: tuple[int, ...]) -> RawTensor:
        tensor = self._checkpoint.tensor(name)
        if tensor.shape != shape:
            raise CheckpointError(f"{self._path}: {name} is {list(tensor.shape)}, and must be {list(shape)}")
        return tensor

    def _targets(self) -> NDArray[np.int64]:
        own, vocab_size = np.arange(self._spec.vocab_size), self._target.vocab_size
        if "d2t" in self._checkpoint:
            own = own + self._offsets()
        if own.min() < 0 or own.max() >= vocab_size:
            raise CheckpointError(f"{self._path}: d2t leads out of the model's vocabulary of {vocab_size}")
        return own

    def _offsets(self) -> NDArray[Any]:
        tensor = self._tensor("d2t", (self._spec.vocab_size,))
        if tensor.dtype not in ("I64", "I32"):
            raise CheckpointError(f"{self._path}: d2t is {tensor.dtype}, and must be I64 or I32")
        return tensor.data

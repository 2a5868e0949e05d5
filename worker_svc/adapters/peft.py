"""LoRA adapters (Hu et al., 2106.09685) as PEFT saves them: adapter_config.json, adapter_model.safetensors. No torch.

    y = W x + scale · B (A x)      scale = alpha / r, or alpha / √r of rank-stabilized ones (Kalajdzievski, 2312.03732)

Whatever the file has joined or apart, here each role of a layer has its own A and B, as ModelSpec names roles: q, k, v,
o, gate, up, down. Roles that the file has in one tensor (Phi's qkv_proj) share their A.
Nothing of a config is passed over: what would change the arithmetic and is not built is refused by its name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from protos.adapter_files import CONFIG, WEIGHTS, AdapterFilesError, digest
from worker_svc.adapters.places import AdapterError
from worker_svc.models.checkpoint import CheckpointError
from worker_svc.models.fields import Fields
from worker_svc.models.loader import read_json
from worker_svc.models.safetensors_reader import SafetensorsFile
from worker_svc.models.spec import ModelSpec, SpecError

Floats = NDArray[np.float32]

PRODUCTS: Final = {"qkv": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}
_ROLES: Final = {  # by the module's name in transformers
    "self_attn.q_proj": ("q",),
    "self_attn.k_proj": ("k",),
    "self_attn.v_proj": ("v",),
    "self_attn.o_proj": ("o",),
    "self_attn.qkv_proj": ("q", "k", "v"),
    "mlp.gate_proj": ("gate",),
    "mlp.up_proj": ("up",),
    "mlp.gate_up_proj": ("gate", "up"),
    "mlp.down_proj": ("down",),
}
_TENSOR: Final = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_MODULE: Final = re.compile(r"(?:.+\.)?layers\.(\d+)\.(\w+\.\w+)")

# What says how it was trained or found, and nothing of how it is computed.
_HARMLESS: Final = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "megatron_core",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip
_READ: Final = {
    "alpha_pattern", "bias", "init_lora_weights", "lora_alpha", "peft_type", "r", "rank_pattern", "use_rslora",
}  # fmt: skip
# Others (pissa, olora, loftq, corda …) change the base model's weights, which a server of many adapters has once.
_STARTS: Final = (True, False, "gaussian", "eva", "orthogonal")


class Lora(NamedTuple):
    """What is added to the rows of one role."""

    a: Floats  # [r, in]
    b: Floats  # [out, r]
    scale: float


@dataclass(frozen=True)
class LoraAdapter:
    layers: tuple[Mapping[str, Lora], ...]  # by role

    @property
    def rank(self) -> int:
        """The greatest of any role."""
        return max((lora.a.shape[0] for layer in self.layers for lora in layer.values()), default=0)


def read_adapter(path: Path, spec: ModelSpec, max_rank: int, expected_digest: str = "") -> LoraAdapter:
    """`expected_digest`: what its files must be. Raises AdapterError."""
    try:
        if expected_digest and digest(path) != expected_digest:
            raise AdapterError(f"{path}: its files are not those that were asked for")
        config = _Config(Fields(CONFIG, read_json(path / CONFIG)))
        return _Reader(config, SafetensorsFile(path / WEIGHTS), spec, max_rank).read()
    except (CheckpointError, SpecError, AdapterFilesError) as error:
        raise AdapterError(str(error)) from None
    except OSError as error:
        raise AdapterError(f"{path}: {error.strerror or error}") from None


class _Config:
    """Raises SpecError for a field that is wrong, or asks for what is not built."""

    def __init__(self, fields: Fields) -> None:
        if (kind := fields.text("peft_type", "")) != "LORA":
            raise fields.trouble("peft_type", "'LORA'", kind)
        self._rank, self._alpha = fields.whole("r"), fields.number("lora_alpha")
        self._stable = fields.flag("use_rslora", False)
        self._ranks, self._alphas = (Fields(CONFIG, fields.group(f"{what}_pattern")) for what in ("rank", "alpha"))
        if (bias := fields.text("bias", "none")) != "none":
            raise fields.trouble("bias", "'none': biases are the base model's", bias)
        start = fields.values.get("init_lora_weights", True)
        if start not in _STARTS:
            allowed = f"one of {', '.join(map(str, _STARTS))}: others change the base model's weights"
            raise fields.trouble("init_lora_weights", allowed, start)
        for name, value in fields.values.items():
            if value and name not in _HARMLESS | _READ:
                raise SpecError(f"{CONFIG}: {name} is not supported, and must not be set (it is {str(value)[:80]})")

    def rank(self, module: str) -> int:
        key = _pattern(self._ranks, module)
        return self._ranks.whole(key) if key else self._rank

    def scale(self, module: str) -> float:
        key, rank = _pattern(self._alphas, module), self.rank(module)
        alpha = self._alphas.number(key) if key else self._alpha
        return alpha / math.sqrt(rank) if self._stable else alpha / rank


def _pattern(patterns: Fields, module: str) -> str:
    """PEFT's way: the first that is the module's name or its end, at a dot; empty where none is."""
    for key in patterns.values:
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                return key
        except re.error as error:
            raise SpecError(f"{CONFIG}: pattern {key!r} is no regular expression: {error}") from None
    return ""


class _Reader:
    def __init__(self, config: _Config, file: SafetensorsFile, spec: ModelSpec, max_rank: int) -> None:
        self._config, self._file, self._spec, self._max_rank = config, file, spec, max_rank
        sections = [part for product in PRODUCTS for part in spec.sections(product)]
        self._rows = {part.role: part.rows for part in sections}
        inner = {"o": spec.num_heads * spec.head_dim, "down": spec.intermediate_size}
        self._columns = {role: inner.get(role, spec.hidden_size) for role in self._rows}

    def read(self) -> LoraAdapter:
        layers: list[dict[str, Lora]] = [{} for _ in range(self._spec.num_layers)]
        modules: dict[str, set[str]] = {}
        for name in self._file.entries:
            match = _TENSOR.fullmatch(name)
            if not match:
                raise self._trouble(name, "is none of LoRA on a layer's projection: nothing else of a model is adapted")
            modules.setdefault(match[1], set()).add(match[2])
        if not modules:
            raise AdapterError(f"{WEIGHTS}: there is no tensor in it")
        for module, sides in modules.items():
            for missing in {"A", "B"} - sides:
                raise AdapterError(f"{WEIGHTS}: tensor {_name(module, missing)!r} is missing")
            self._add(module, layers)
        return LoraAdapter(tuple(layers))

    def _add(self, module: str, layers: list[dict[str, Lora]]) -> None:
        match, name = _MODULE.fullmatch(module), _name(module, "A")
        if not match or match[2] not in _ROLES:
            raise self._trouble(name, f"adapts {module}; only {', '.join(_ROLES)} of layers are served")
        i, roles = int(match[1]), _ROLES[match[2]]
        if i >= len(layers):
            raise self._trouble(name, f"is of layer {i}, and the base model has {len(layers)}")
        if self._spec.sparse(i) and roles[0] in ("gate", "up", "down"):
            raise self._trouble(name, f"adapts the MLP of layer {i}, which has experts: those are not adapted")
        rank = self._config.rank(module)
        if rank > self._max_rank:
            raise self._trouble(name, f"is of rank {rank}, over max_adapter_rank {self._max_rank}")
        scale = self._config.scale(module)
        a = self._read(name, (rank, self._columns[roles[0]]))
        b = self._read(_name(module, "B"), (sum(self._rows[role] for role in roles), rank))
        top = 0
        for role in roles:
            if role in layers[i]:
                raise self._trouble(name, f"adapts what another tensor of layer {i} adapts as well")
            layers[i][role] = Lora(a, b[top : top + self._rows[role]], scale)
            top += self._rows[role]

    def _read(self, name: str, shape: tuple[int, int]) -> Floats:
        """A copy: the file may change as long as an adapter is served."""
        tensor = self._file.tensor(name)
        if tensor.shape != shape:
            raise self._trouble(
                name, f"has shape {list(tensor.shape)}; config and base model imply {list(shape)}: is it of this model?"
            )
        return np.array(tensor.finite(), np.float32)

    def _trouble(self, tensor: str, what: str) -> AdapterError:
        return AdapterError(f"{WEIGHTS}: tensor {tensor!r} {what}")


def part(product: str, lora: Lora, rank: int, size: int) -> Lora:
    """What rank `rank` of `size` adds: of q, k, v, gate and up its rows; of o and down a part of every sum, by its
    columns, as of the weights themselves.
    """
    if product in ("qkv", "gate_up"):
        return lora._replace(b=np.split(lora.b, size)[rank])
    return lora._replace(a=np.split(lora.a, size, axis=1)[rank])


def _name(module: str, side: str) -> str:
    return f"base_model.model.{module}.lora_{side}.weight"

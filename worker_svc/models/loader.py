"""From a path to a ModelSpec and its weights in one naming, whatever the file's. numpy and mmap views only."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from worker_svc.models import gguf_spec, registry
from worker_svc.models.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from worker_svc.models.fields import described_by
from worker_svc.models.raw_tensor import Cut, Tensor
from worker_svc.models.safetensors_reader import SafetensorsCheckpoint
from worker_svc.models.spec import ModelSpec, SpecError, WeightNames
from worker_svc.quant.checkpoint import QuantizedCheckpoint, method_of

DType = Literal["float32", "bfloat16"]
_SAMPLE = 1 << 16  # bytes
_OLD_CONFIGS = (("quantize_config.json", "gptq"), ("quant_config.json", "awq"))  # of early producers, and their method


@dataclass(frozen=True)
class Model:
    """An opened model: headers have been read, weights come in as they are asked for."""

    spec: ModelSpec
    checkpoint: Checkpoint

    def top(self, role: str, part: str = "weight") -> str:
        return self.spec.names.top[role].format(p=part)

    def layer(self, i: int, role: str, part: str = "weight") -> str:
        return self.spec.names.layer[role].format(i=i, p=part)

    @property
    def quantization(self) -> str:
        """What the checkpoint is quantized by, as its producers call it; empty for any other."""
        return self.checkpoint.method.name if isinstance(self.checkpoint, QuantizedCheckpoint) else ""

    def read(
        self, name: str, shape: tuple[int, ...], dtype: DType, heads: int = 0, cut: Cut | None = None
    ) -> NDArray[Any]:
        """[shape], or the cut of it: float32, or bfloat16 as uint16 bits. `heads`: the rows that are asked for are q or
        k, for so many heads.

        Raises CheckpointError where the tensor is missing, or is not of the shape that the config implies.
        """
        array = _form(self.tensor(name, shape), dtype, cut)
        return split_halves(array, heads) if heads and self.spec.names.interleaved_qk else array

    def read_norm(self, name: str, size: int) -> NDArray[np.float32]:
        """[size] the weights of a norm, the model's offset added. Raises CheckpointError as `read` does."""
        return self.tensor(name, (size,)).float32() + np.float32(self.spec.norm_offset)

    def read_expert(
        self, i: int, expert: int, role: str, shape: tuple[int, ...], dtype: DType, cut: Cut | None = None
    ) -> NDArray[Any]:
        """[shape] of one expert, whether it is a tensor or a part of one, or the cut of it. Raises CheckpointError as
        `read` does.
        """
        template, experts = self.spec.names.layer[role], self.spec.experts
        name = template.format(i=i, e=expert, p="weight")
        if "{e}" in template:
            return self.read(name, shape, dtype, cut=cut)
        assert experts is not None
        return _form(self.tensor(name, (experts.num, *shape)).part(expert), dtype, cut)

    def kv_scales(self, i: int) -> tuple[float, float]:
        """Of keys and of values in float8, as a quantized checkpoint may have measured them; else 1 of both."""
        found = []
        attention = self.layer(i, "qkv" if "qkv" in self.spec.names.layer else "k").rsplit(".", 2)[0]
        for name in (f"{attention}.{which}_scale" for which in "kv"):
            tensor = self.checkpoint.tensor(name) if name in self.checkpoint else None
            if tensor is not None and tensor.shape not in ((), (1,)):
                raise CheckpointError(f"tensor {name!r} has shape {list(tensor.shape)}, and must be one number")
            scale = 1.0 if tensor is None else float(tensor.finite().reshape(()))
            if scale <= 0:
                raise CheckpointError(f"tensor {name!r} is {scale}, and must be above 0")
            found.append(scale)
        return found[0], found[1]

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Raises CheckpointError where it is missing, or is not of the shape that the config implies."""
        tensor = self.checkpoint.tensor(name)
        if tensor.shape != shape:
            raise CheckpointError(f"tensor {name!r} has shape {list(tensor.shape)}, the config implies {list(shape)}")
        return tensor


def _form(tensor: Tensor, dtype: DType, cut: Cut | None = None) -> NDArray[Any]:
    columns = slice(None)
    if cut:
        tensor, columns = tensor.cut(cut)
    array = tensor.float32() if dtype == "float32" else tensor.bfloat16()
    return array[..., columns]


def split_halves(array: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows of each head from rotary neighbours (0, 1, 2, 3 …) to rotary halves (0, 2 … 1, 3 …): undoes GGUF's order."""
    rows, rest = array.shape[0], array.shape[1:]
    return array.reshape(heads, rows // heads // 2, 2, *rest).swapaxes(1, 2).reshape(rows, *rest)


def read_config(path: Path) -> dict[str, Any]:
    """The config.json of a model directory. Raises CheckpointError where there is none, or it is no JSON object."""
    try:
        return read_json(path / "config.json")
    except FileNotFoundError:
        raise CheckpointError(f"{path} has no config.json: not a model directory") from None


def read_json(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} is not a JSON object")
    return config


def open_model(path: Path) -> Model | None:
    """A `.gguf` file or a directory of safetensors with its config.json; None where its architecture is none of ours.

    Raises CheckpointError or SpecError for a model that cannot be read, OSError for a file that cannot be opened.
    """
    if path.suffix == ".gguf":
        gguf = open_checkpoint(path)
        with described_by("GGUF metadata"):
            return Model(_followed(gguf_spec.spec(gguf)), gguf)
    config = read_config(path)
    with described_by("config.json"):
        spec = registry.spec_of(config)
        if spec is None:
            return None
        followed, checkpoint = _followed(spec), _opened(path, config)
        if spec.tied and isinstance(checkpoint, QuantizedCheckpoint) and "lm_head" in checkpoint.quantized:
            followed = replace(followed, tied=False)  # what is quantized is no longer the embedding
        return Model(_named(followed, checkpoint), checkpoint)


def _opened(path: Path, config: dict[str, Any]) -> Checkpoint:
    checkpoint, said = SafetensorsCheckpoint(path), _quantization(path, config)
    return QuantizedCheckpoint(checkpoint, method_of(said)) if said else checkpoint


def _quantization(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The config's `quantization_config`, or what early producers wrote beside it; empty for a float checkpoint."""
    said = config.get("quantization_config")
    if said is None:
        for name, method in _OLD_CONFIGS:
            if (path / name).is_file():
                return {"quant_method": method} | read_json(path / name)
        return {}
    if not isinstance(said, dict):
        raise SpecError(f"config.json: quantization_config must be an object, not {type(said).__name__}")
    return said


def _followed(spec: ModelSpec) -> ModelSpec:
    """The spec, if its ropes can be computed: the one part of it that is arithmetic."""
    for rope in spec.ropes:
        dim, frequencies = rope.dim, rope.frequencies(spec.max_model_len)
        if frequencies.shape != (dim // 2,) or not 0 < dim <= spec.head_dim or not np.isfinite(frequencies).all():
            raise SpecError(
                f"rope of {dim} dimensions in heads of {spec.head_dim} gives no {dim // 2} finite frequencies"
            )
    return spec


def _named(spec: ModelSpec, checkpoint: Checkpoint) -> ModelSpec:
    """The spec with those of its names by which most of the checkpoint's tensors go."""
    if not spec.other_names:
        return spec

    def found(names: WeightNames) -> int:
        of_layers = (t.format(i=i, e=0, p="weight") for t in names.layer.values() for i in range(spec.num_layers))
        return sum(name in checkpoint for name in (*of_layers, *(t.format(p="weight") for t in names.top.values())))

    return replace(spec, names=max((spec.names, *spec.other_names), key=found), other_names=())


def weights_digest(path: Path) -> str:
    """Identifies weights without reading them all: every file's name and size, and 65 samples of 64 KiB spread evenly
    from its first byte (the header) to its last. A retrained or requantized model differs everywhere, so any sample
    tells it; a single flipped bit between two samples is not seen.
    """
    said = ["config.json", *(name for name, _ in _OLD_CONFIGS if (path / name).is_file())]
    files = [path] if path.is_file() else [*sorted(path.glob("*.safetensors")), *(path / name for name in said)]
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name if path.is_dir() else ''}:{size};".encode())
        with file.open("rb") as opened:
            for offset in np.unique(np.linspace(0, max(size - _SAMPLE, 0), 65, dtype=np.int64)).tolist():
                opened.seek(offset)
                digest.update(opened.read(_SAMPLE))
    return digest.hexdigest()

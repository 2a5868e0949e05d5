"""A model's matrices as the cpu backend multiplies them: by its mode, or by what each is in a quantized checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Final, NamedTuple

from kernels.cpu.library import Kind
from worker_svc.models.loader import Model
from worker_svc.models.raw_tensor import Tensor
from worker_svc.models.spec import ModelSpec, SpecError
from worker_svc.quant.choice import choose
from worker_svc.quant.form import QuantizedTensor
from worker_svc.quant.layout import Matrix, panels


class Mode(NamedTuple):
    """Which form a model's products have. Embedding rows are bfloat16 in each, for they are read, not multiplied."""

    layers: Kind
    head: Kind


MODES: Final = {
    "": Mode("bf16", "bf16"),
    "int8": Mode("int8", "int8"),
    "int4": Mode("int4", "int8"),  # the head decides between near tokens, and is read once a step
    "fp8": Mode("bf16", "bf16"),  # layers are float8 by channel: bfloat16 holds each of those numbers
    "a8": Mode("bf16", "bf16"),  # of quantized checkpoints alone, whose activations get 8 bits
}


def mode_of(quantization: str, activations: str) -> str:
    """Float checkpoints in integers have activations of 8 bits anyhow. Raises SpecError for what goes not together."""
    if activations == "auto" or quantization in ("int8", "int4"):
        return quantization
    if quantization:
        raise SpecError(f"activations {activations!r} does not go with quantization {quantization!r}")
    return "a8"


def plan(model: Model, mode: str) -> dict[str, Matrix]:
    """Raises CheckpointError where a tensor is missing or misshapen, SpecError for a mode that is not for it."""
    check_mode(model, mode)
    matrices = uniform(model.spec, mode)
    if not model.quantization:
        return matrices
    narrow = mode == "a8"
    return {name: chosen(name, matrix, tensors_of(model, name, matrix), narrow) for name, matrix in matrices.items()}


def check_mode(model: Model, mode: str) -> None:
    """Raises SpecError for a mode that is not for this model."""
    by = model.quantization
    if mode == "a8" and not by:
        raise SpecError("activations 'int8' is for quantized checkpoints, or goes with --quantization int8 or int4")
    if mode not in ("", "a8") and by:
        raise SpecError(f"quantization {mode!r} is for float checkpoints: this one is quantized already, by {by}")
    if mode and model.spec.experts:
        raise SpecError(f"quantization {mode!r}: experts are not quantized as they are loaded")


def tensors_of(model: Model, name: str, matrix: Matrix) -> list[Tensor]:
    """What a matrix's rows are in, one below the other."""
    if name == "lm_head":
        return [model.tensor(model.top("embed" if model.spec.tied else "lm_head"), (matrix.n, matrix.k))]
    layer, _, role = name.partition(".")
    parts = model.spec.parts(role)
    return [model.tensor(model.layer(int(layer), part.role), (part.rows, matrix.k)) for part in parts]


def described(matrices: Mapping[str, Matrix]) -> list[str]:
    """How many matrices of which scheme are multiplied by which kernel, most first; none where nothing is quantized."""
    if not any(matrix.origin for matrix in matrices.values()):
        return []
    counts: Counter[str] = Counter()
    for matrix in matrices.values():
        why = f" ({matrix.why})" if matrix.why else ""
        counts[f"{matrix.origin or 'float'}{why}: {matrix.kind}"] += 1
    return [f"{count} × {what}" for what, count in counts.most_common()]


def chosen(name: str, matrix: Matrix, tensors: list[Tensor], narrow: bool) -> Matrix:
    """The matrix by what its tensors are. `narrow`: activations get 8 bits where a kernel takes them."""
    choice = choose(tensors, may_permute=name != "lm_head", narrow=narrow)
    schemes = dict.fromkeys(tensor.dtype for tensor in tensors if isinstance(tensor, QuantizedTensor))
    return matrix._replace(
        kind=choice.kind,
        group=choice.group,
        scaled=choice.scaled,
        ordered=choice.permuted and not name.endswith(".down"),  # whose columns others make in order: see pack
        origin=", ".join(schemes),
        why=choice.why,
    )


def uniform(spec: ModelSpec, mode: str) -> dict[str, Matrix]:
    """The matrices of a float checkpoint in a mode."""
    layers, head = MODES[mode]
    q_rows, kv_rows = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    hidden, inner = spec.hidden_size, spec.intermediate_size
    of_layer = {
        "qkv": Matrix(layers, q_rows + 2 * kv_rows, hidden, spec.qkv_bias),
        "o": Matrix(layers, hidden, q_rows, spec.o_bias),
        "gate_up": Matrix(layers, 2 * panels(inner), hidden, spec.mlp_bias),
        "down": Matrix(layers, hidden, inner, spec.mlp_bias),
    }
    if mode == "fp8":
        of_layer = {name: matrix._replace(scaled=True) for name, matrix in of_layer.items()}
    found = {f"{i}.{name}": matrix for i in range(spec.num_layers) for name, matrix in of_layer.items()}
    return found | {"lm_head": Matrix(head, spec.vocab_size, hidden)}

"""compressed-tensors, as llm-compressor and auto-round write it: groups of modules, each with its own scheme.

    pack-quantized   weight_packed i32 [N, ⌈K · b / 32⌉] lowest bits first along K; weight_scale [N, G]; weight_shape;
                     weight_zero_point i32 [⌈N · b / 32⌉, G] lowest bits first along N; weight_g_idx i32 [K]
    int-quantized    weight i8 [N, K]; weight_scale [N, 1]
    float-quantized  weight e4m3 [N, K]; weight_scale, as fp8.py has it

Packed codes and zero points are both stored with 2^(b−1) added, so q − z is what it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from worker_svc.models.fields import Fields
from worker_svc.models.spec import SpecError
from worker_svc.quant.bits import Codes, num_words, unpacked
from worker_svc.quant.form import Activations, Ints, QuantizedTensor, Scheme, quantized
from worker_svc.quant.formats import fp8
from worker_svc.quant.formats.module import Module, middle, num_groups
from worker_svc.quant.formats.names import keys, matches

FORMATS: Final = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision")
KNOWN: Final = keys(
    "quant_method config_groups format ignore kv_cache_scheme quantization_status global_compression_ratio version "
    "sparsity_config transform_config provider autoround_version compression_ratio"
)
ARGUMENTS: Final = keys(
    "num_bits type symmetric group_size strategy block_structure dynamic actorder scale_dtype zp_dtype observer "
    "observer_kwargs"
)
STRATEGIES: Final = ("tensor", "channel", "group", "block")


@dataclass(frozen=True)
class Weights:
    """A config group's `weights`."""

    kind: str  # int or float
    bits: int
    strategy: str
    group_size: int
    block: fp8.Block | None
    symmetric: bool
    ordered: bool  # columns are in an order of their own, which weight_g_idx tells


@dataclass(frozen=True)
class Inputs:
    """Its `input_activations`."""

    kind: str
    dynamic: bool
    per: str  # token, tensor or group
    symmetric: bool


@dataclass(frozen=True)
class Group:
    targets: tuple[str, ...]
    weights: Weights
    inputs: Inputs | None


class CompressedTensors:
    name = "compressed-tensors"
    markers = frozenset({"weight_packed", "weight_scale"})
    suffixes = keys(
        "weight_packed weight_scale weight_shape weight_zero_point weight_g_idx weight input_scale input_zero_point"
    )

    def __init__(self, config: Mapping[str, Any]) -> None:
        source = "quantization_config"
        fields = Fields(source, config)
        if unknown := sorted(config.keys() - KNOWN):
            raise SpecError(f"{source}: {unknown[0]!r} is not known of compressed-tensors: it may change what it means")
        layout = fields.text("format", "")
        if layout not in FORMATS:
            raise fields.trouble("format", f"one of {', '.join(FORMATS)}", layout)
        sparsity = fields.group("sparsity_config")
        if sparsity and sparsity.get("format") != "dense":
            raise SpecError(
                f"{source}: sparsity_config {sparsity.get('format')!r}: sparse checkpoints are not supported"
            )
        if fields.group("transform_config"):
            raise SpecError(f"{source}: transform_config: checkpoints with rotations of their own are not supported")
        if fields.text("quantization_status", "compressed") not in ("compressed", "frozen"):
            raise fields.trouble("quantization_status", "compressed", config["quantization_status"])
        named = fields.group("config_groups")
        self._groups = [_group(f"{source}: config_groups.{name}", values) for name, values in named.items()]
        if not self._groups:
            raise fields.trouble("config_groups", "an object with a group", dict(named))
        self._ignored = tuple(fields.texts("ignore"))

    def read(self, module: Module) -> QuantizedTensor:
        group = self._group_of(module)
        weights = group.weights
        if weights.ordered and "weight_g_idx" not in module:
            raise module.trouble("weight_g_idx", "is missing, though quantization_config says actorder group")
        if weights.kind == "float":
            for suffix in ("weight_g_idx", "weight_zero_point"):
                if suffix in module and module.tensors[suffix].data.any():
                    raise module.trouble(suffix, "is there, and float weights have no such thing")
            return fp8.read(module, "weight_scale", weights.block, _activations(module, group.inputs, "e4m3"))
        activations = _activations(module, group.inputs, "int8")
        if "weight_packed" in module:
            if "weight" in module:
                raise module.trouble("weight", "is there beside weight_packed: one of them is too many")
            return _packed(module, weights, activations)
        return _bytes(module, weights, activations)

    def _group_of(self, module: Module) -> Group:
        """Names come before patterns, and those before classes, of which all that is quantized here is a Linear."""
        marker = min(self.markers & module.tensors.keys())
        for target in self._ignored:
            if target == "Linear" or _is_named(module.name, target):
                raise module.trouble(marker, f"is there, though quantization_config ignores {target!r}")
        for is_for in (_is_the_name, _is_named, lambda _, target: target == "Linear"):
            for group in self._groups:
                if any(is_for(module.name, target) for target in group.targets):
                    return group
        raise module.trouble(marker, "is there, and no group of quantization_config.config_groups is for the module")


def _is_the_name(name: str, target: str) -> bool:
    return target == name


def _is_named(name: str, target: str) -> bool:
    return matches(target[3:], name) if target.startswith("re:") else target == name


def _group(source: str, values: Any) -> Group:
    if not isinstance(values, dict):
        raise SpecError(f"{source} must be an object, not {type(values).__name__}")
    fields = Fields(source, values)
    if unknown := sorted(values.keys() - {"targets", "weights", "input_activations", "output_activations", "format"}):
        raise SpecError(f"{source}: {unknown[0]!r} is not known: it may change what the weights mean")
    if fields.group("output_activations"):
        raise SpecError(f"{source}: output_activations: outputs that are quantized are not supported")
    layout = fields.text("format", "pack-quantized")
    if layout not in FORMATS:
        raise fields.trouble("format", f"one of {', '.join(FORMATS)}", layout)
    if not fields.group("weights"):
        raise SpecError(f"{source}: weights must be an object: a group without is not supported")
    inputs = fields.group("input_activations")
    weights = _weights(f"{source}.weights", fields.group("weights"))
    made = _inputs(f"{source}.input_activations", inputs) if inputs else None
    if made and made.kind != weights.kind:
        raise SpecError(
            f"{source}: weights are {weights.kind} and input_activations {made.kind}: not supported together"
        )
    return Group(tuple(fields.texts("targets")), weights, made)


def _checked(source: str, values: Mapping[str, Any]) -> Fields:
    fields = Fields(source, values)
    if unknown := sorted(values.keys() - ARGUMENTS):
        raise SpecError(f"{source}: {unknown[0]!r} is not known: it may change what the weights mean")
    kind = fields.text("type", "int")
    if kind not in ("int", "float"):
        raise fields.trouble("type", "int or float", kind)
    return fields


def _weights(source: str, values: Mapping[str, Any]) -> Weights:
    fields = _checked(source, values)
    kind, bits = fields.text("type", "int"), fields.whole("num_bits", 8)
    if bits not in ((8,) if kind == "float" else (2, 3, 4, 8)):
        raise fields.trouble("num_bits", "8" if kind == "float" else "2, 3, 4 or 8", bits)
    size = fields.values.get("group_size")
    if size is not None and (type(size) is not int or not (size == -1 or 0 < size <= 1 << 20)):
        raise fields.trouble("group_size", "-1 or at least 1", size)
    if fields.values.get("dynamic", False) not in (False, None):
        raise fields.trouble("dynamic", "false for weights", values["dynamic"])
    otherwise = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = fields.text("strategy", otherwise)
    if strategy not in STRATEGIES:
        raise fields.trouble("strategy", f"one of {', '.join(STRATEGIES)}", strategy)
    if strategy == "group" and (size is None or size < 1):
        raise fields.trouble("group_size", "a size for the strategy group", size)
    block = _block(fields) if strategy == "block" else None
    if kind == "float" and strategy == "group":
        raise fields.trouble("strategy", "tensor, channel or block for float weights", strategy)
    symmetric = fields.flag("symmetric", True)
    if kind == "float" and not symmetric:
        raise fields.trouble("symmetric", "true for float weights", symmetric)
    order = fields.values.get("actorder")
    if order not in (None, False, True, "group", "dynamic", "weight", "static"):
        raise fields.trouble("actorder", "group, weight or null", order)
    ordered = order in (True, "group", "dynamic")
    return Weights(kind, bits, strategy, size if strategy == "group" and size else 0, block, symmetric, ordered)


def _block(fields: Fields) -> fp8.Block:
    given = fields.values.get("block_structure")
    if isinstance(given, str):  # "128x128" before a list
        given = [int(part) if part.isdigit() else 0 for part in given.split("x")]
    sizes = Fields(fields.source, {"block_structure": given}).wholes("block_structure")
    if len(sizes) != 2 or 0 in sizes:
        raise fields.trouble("block_structure", "two sizes above 0", given)
    return sizes[0], sizes[1]


def _inputs(source: str, values: Mapping[str, Any]) -> Inputs:
    fields = _checked(source, values)
    if (bits := fields.whole("num_bits", 8)) != 8:
        raise fields.trouble("num_bits", "8 for activations", bits)
    dynamic, strategy = fields.flag("dynamic", False), fields.text("strategy", "")
    if strategy not in ("", "token", "tensor", "group", "channel"):
        raise fields.trouble("strategy", "token, tensor or group", strategy)
    if strategy == "group" and fields.whole("group_size") != 128:
        raise fields.trouble("group_size", "128 for activations", values["group_size"])
    per = "group" if strategy == "group" else "token" if dynamic and strategy != "tensor" else "tensor"
    return Inputs(fields.text("type", "int"), dynamic, per, fields.flag("symmetric", True))


def _activations(module: Module, inputs: Inputs | None, kind: Any) -> Activations | None:
    if inputs is None:
        return None
    per: Any = inputs.per
    scale = None if inputs.dynamic else fp8.one_scale(module, "input_scale")
    return Activations(kind, per, scale, inputs.symmetric)


def _packed(module: Module, weights: Weights, activations: Activations | None) -> QuantizedTensor:
    bits, words = weights.bits, module.words("weight_packed")
    shape = module.shaped(module.tensor("weight_shape", ("I64", "I32"), 1), "weight_shape", (2,))
    rows, columns = (int(size) for size in shape)
    if rows != words.shape[0]:
        raise module.trouble("weight_packed", f"has {words.shape[0]} rows, and weight_shape says {rows}")
    if words.shape[1] != num_words(columns, bits):
        fill = num_words(columns, bits)
        raise module.trouble(
            "weight_packed", f"has {words.shape[1]} words a row, and {columns} columns of {bits} bits fill {fill}"
        )
    size = 0 if weights.group_size >= columns else weights.group_size
    scales, size = _scales(module, weights, rows, columns, size)
    count = scales.shape[1]
    if weights.symmetric:
        if "weight_zero_point" in module:
            raise module.trouble("weight_zero_point", "is there, though quantization_config says symmetric")
        zeros = middle(bits, scales.shape)
    else:
        stored = module.words("weight_zero_point", (num_words(rows, bits), count))
        zeros = np.ascontiguousarray(unpacked(np.ascontiguousarray(stored.T), bits, rows).T)
    groups = module.groups("weight_g_idx", columns, count)
    permuted = groups is not None and bool((np.diff(groups) < 0).any())
    scheme = Scheme("int", bits, size, weights.symmetric, permuted, activations)

    def unpack(of_rows: Ints) -> Codes:
        return unpacked(words[of_rows], bits, columns)

    return quantized(f"{module.name}.weight", scheme, unpack, scales, zeros, columns, groups)


def _scales(module: Module, weights: Weights, rows: int, columns: int, size: int) -> tuple[Any, int]:
    """Scales [N, G], and the size of a group (0: all columns)."""
    if weights.strategy == "group":
        return module.floats("weight_scale", (rows, num_groups(columns, size))), size
    return fp8.row_scales(module, "weight_scale", rows, columns, weights.block)


def _bytes(module: Module, weights: Weights, activations: Activations | None) -> QuantizedTensor:
    """Whole bytes, of 8 bits."""
    weight = module.tensor("weight", ("I8",), 2)
    if weights.bits != 8:
        raise module.trouble("weight", f"has bytes, and quantization_config says {weights.bits} bits")
    rows, columns = weight.shape
    size = 0 if weights.group_size >= columns else weights.group_size
    scales, size = _scales(module, weights, rows, columns, size)
    zeros = middle(8, scales.shape)
    if not weights.symmetric:
        given = module.tensor("weight_zero_point", ("I8",), 2)
        zeros = np.ascontiguousarray(
            module.shaped(given, "weight_zero_point", scales.shape).view(np.uint8) ^ np.uint8(128)
        )
    elif "weight_zero_point" in module and module.tensors["weight_zero_point"].data.any():
        raise module.trouble("weight_zero_point", "is not 0, though quantization_config says symmetric")
    groups = module.groups("weight_g_idx", columns, scales.shape[1])
    permuted = groups is not None and bool((np.diff(groups) < 0).any())
    scheme = Scheme("int", 8, size, weights.symmetric, permuted, activations)

    def unpack(of_rows: Ints) -> Codes:
        return weight.data[of_rows].view(np.uint8) ^ np.uint8(128)

    return quantized(f"{module.name}.weight", scheme, unpack, scales, zeros, columns, groups)

"""Weights as e4m3 floats with one scale, one a row, or one a block, which multiplies them whatever it is called.

    weight e4m3 [N, K]; weight_scale or weight_scale_inv [], [1], [1, 1], [N], [N, 1] or [⌈N / n⌉, ⌈K / k⌉]

transformers' and DeepSeek's `fp8` method is here; compressed-tensors reads its own by the same function.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from worker_svc.models.fields import Fields
from worker_svc.models.raw_tensor import CheckpointError
from worker_svc.models.spec import SpecError
from worker_svc.quant.form import Activations, Codes, Floats, Ints, QuantizedTensor, Scheme, quantized
from worker_svc.quant.formats.module import FLOATS, Module
from worker_svc.quant.formats.names import MADE_BY, keys

NAN: Final = 0x7F
KNOWN: Final = MADE_BY | keys(
    "activation_scheme weight_block_size modules_to_not_convert ignored_layers fmt scale_fmt kv_cache_scheme "
    "kv_cache_quant_method exclude dequantize dtype weight_dtype bits group_size sym act_bits act_data_type "
    "act_dynamic act_group_size act_sym"
)
Block = tuple[int, int]


class Fp8:
    name = "fp8"
    markers = frozenset({"weight_scale_inv", "weight_scale"})
    suffixes = frozenset({"weight", "weight_scale_inv", "weight_scale", "input_scale", "activation_scale"})

    def __init__(self, config: Mapping[str, Any]) -> None:
        fields = Fields("quantization_config", config)
        if unknown := sorted(config.keys() - KNOWN):
            raise SpecError(
                f"quantization_config: {unknown[0]!r} is not known of fp8: it may change what the weights mean"
            )
        for key, only in (("fmt", ("e4m3",)), ("scale_fmt", ("", "float", "fp32", "ue8m0"))):
            if fields.text(key, only[0]) not in only:
                raise fields.trouble(key, " or ".join(map(repr, only)), config[key])
        if (bits := fields.whole("bits", 8)) != 8:
            raise fields.trouble("bits", "8", bits)
        scheme = fields.text("activation_scheme", "dynamic")
        if scheme not in ("dynamic", "static"):
            raise fields.trouble("activation_scheme", "dynamic or static", scheme)
        self._static = scheme == "static"
        sizes = fields.wholes("weight_block_size")
        if sizes and (len(sizes) != 2 or 0 in sizes):
            raise fields.trouble("weight_block_size", "two sizes above 0", list(sizes))
        self._block: Block | None = (sizes[0], sizes[1]) if sizes else None

    def read(self, module: Module) -> QuantizedTensor:
        if "weight_scale_inv" in module and "weight_scale" in module:
            raise module.trouble("weight_scale", "is there beside weight_scale_inv: one of them is too many")
        scale = "weight_scale_inv" if "weight_scale_inv" in module else "weight_scale"
        given = "input_scale" if "input_scale" in module else "activation_scale"
        activations = activations_of(module, given if self._static else "", "group" if self._block else "token")
        return read(module, scale, self._block, activations)


def activations_of(module: Module, static: str, dynamic_per: Any) -> Activations:
    """`static`: the suffix of a scale for all tokens; empty: they are dynamic."""
    return Activations("e4m3", "tensor", one_scale(module, static)) if static else Activations("e4m3", dynamic_per)


def one_scale(module: Module, suffix: str) -> float:
    found = module.tensors.get(suffix)
    if found is None or found.dtype not in FLOATS:
        raise module.trouble(suffix, "is missing, or no float" if found is None else f"has type {found.dtype}")
    if found.shape not in ((), (1,), (1, 1)):
        raise module.trouble(suffix, f"has shape {list(found.shape)}, and must be one number")
    scale = float(found.finite().reshape(()))
    if scale <= 0:
        raise module.trouble(suffix, f"is {scale}, and must be above 0")
    return scale


def read(module: Module, scale: str, block: Block | None, activations: Activations | None) -> QuantizedTensor:
    """Raises CheckpointError naming the tensor that does not fit."""
    weight = module.tensor("weight", ("F8_E4M3",), 2)
    rows, columns = weight.shape
    scales, size = row_scales(module, scale, rows, columns, block)

    def unpack(of_rows: Ints) -> Codes:
        codes: Codes = weight.data[of_rows]
        if ((codes & NAN) == NAN).any():
            raise CheckpointError(f"tensor {weight.name!r} has weights that are not finite numbers")
        return codes

    scheme = Scheme("e4m3", 8, size, symmetric=True, activations=activations)
    return quantized(f"{module.name}.weight", scheme, unpack, scales, None, columns)


def row_scales(module: Module, suffix: str, rows: int, columns: int, block: Block | None) -> tuple[Floats, int]:
    """Scales as [N, G], whatever they are one of, and the size of a group (0: all columns)."""
    found = module.tensors.get(suffix)
    if found is None:
        raise module.trouble(suffix, f"is missing beside {', '.join(sorted(module.tensors))}")
    if found.dtype not in FLOATS:
        raise module.trouble(suffix, f"has type {found.dtype}, not {' or '.join(FLOATS)}")
    values = found.finite()
    if block:
        grid = -(-rows // block[0]), -(-columns // block[1])
        if found.shape != grid:
            raise module.trouble(
                suffix, f"has shape {list(found.shape)}, and blocks of {list(block)} make {list(grid)}"
            )
        spread = np.repeat(values, block[0], axis=0)[:rows]
        return np.ascontiguousarray(spread), 0 if block[1] >= columns else block[1]
    if found.shape in ((), (1,), (1, 1)):
        return np.full((rows, 1), values.reshape(()), np.float32), 0
    if found.shape in ((rows,), (rows, 1)):
        return values.reshape(rows, 1), 0
    raise module.trouble(suffix, f"has shape {list(found.shape)}, not one scale or one for each of {rows} rows")

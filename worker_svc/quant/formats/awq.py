"""AWQ, as AutoAWQ, llm-awq and auto-round write it: 4 bits, zero points as they are.

gemm   qweight i32 [K, N / 8], qzeros i32 [G, N / 8], scales [G, N]: of each eight columns the one numbered
       0, 2, 4, 6, 1, 3, 5, 7 sits in bits 0, 4, 8 …
gemv   qweight i32 [N, K / 8], qzeros i32 [N, Z], scales [N, 8 Z]: lowest bits first along K; Z words hold the zero
       points of a row, filled up
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from worker_svc.models.fields import Fields
from worker_svc.models.spec import SpecError
from worker_svc.quant.bits import Codes, Words, unpacked
from worker_svc.quant.form import Ints, QuantizedTensor, Scheme, quantized
from worker_svc.quant.formats.gptq import HARMLESS, MARKERS, OFF, refuse_on
from worker_svc.quant.formats.module import Module, num_groups
from worker_svc.quant.formats.names import keys

BITS: Final = 4
PLACE: Final = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # of each eight columns: which nibble of the word
SUFFIXES: Final = frozenset({"qweight", "qzeros", "scales"})
KNOWN: Final = (
    HARMLESS
    | OFF
    | keys(
        "bits w_bit group_size q_group_size zero_point version modules_to_not_convert do_fuse fuse_max_seq_len "
        "modules_to_fuse sym checkpoint_format desc_act"
    )
)


class Awq:
    name = "awq"
    markers, suffixes = MARKERS, SUFFIXES

    def __init__(self, config: Mapping[str, Any]) -> None:
        fields = Fields("quantization_config", config)
        if unknown := sorted(config.keys() - KNOWN):
            raise SpecError(
                f"quantization_config: {unknown[0]!r} is not known of awq: it may change what the weights mean"
            )
        refuse_on(fields, OFF)
        bits = fields.whole("bits", fields.whole("w_bit", BITS))
        if bits != BITS:
            raise fields.trouble("bits", "4: awq's packing has no other", bits)
        self.group_size = group_size(fields)
        self.version = fields.text("version", "gemm").lower()
        if self.version not in ("gemm", "gemv"):
            raise fields.trouble("version", "gemm or gemv", self.version)
        if fields.flag("desc_act", False):
            raise fields.trouble("desc_act", "false: awq's packing has no order of columns", True)
        for key, only in (("method", "awq"), ("pack_dtype", "int32"), ("data_type", "int")):
            if fields.text(key, only) != only:
                raise fields.trouble(key, only, config[key])
        self._symmetric = fields.flag("sym", False) or not fields.flag("zero_point", True)
        self._skipped = tuple(fields.texts("modules_to_not_convert"))

    def read(self, module: Module) -> QuantizedTensor:
        for name in self._skipped:
            if name in module.name:
                raise module.trouble("qweight", f"is there, though modules_to_not_convert has {name!r}")
        read = read_gemm if self.version == "gemm" else read_gemv
        return symmetric_if(self._symmetric, module, read(module, self.group_size))


def symmetric_if(said: bool, module: Module, tensor: QuantizedTensor) -> QuantizedTensor:
    """Raises CheckpointError where the config says so, and zero points do not."""
    if said and not tensor.scheme.symmetric:
        raise module.trouble("qzeros", "has zero points other than 8, though quantization_config says symmetric")
    return tensor


def group_size(fields: Fields) -> int:
    """0: all columns."""
    key = "group_size" if fields.has("group_size") else "q_group_size"
    size = fields.values.get(key, 128)
    if type(size) is not int or not (size == -1 or 0 < size <= 1 << 20):
        raise fields.trouble(key, "-1 or at least 1", size)
    return max(size, 0)


def read_gemm(module: Module, size: int) -> QuantizedTensor:
    """Raises CheckpointError naming the tensor that does not fit."""
    words = module.words("qweight")
    columns, rows = words.shape[0], words.shape[1] * 8
    size = 0 if size >= columns else size
    count = num_groups(columns, size)
    scales = np.ascontiguousarray(module.floats("scales", (count, rows)).T)
    zeros = _placed(module.words("qzeros", (count, rows // 8)), np.arange(rows))

    def unpack(of_rows: Ints) -> Codes:
        return _placed(words, of_rows)

    return _made(module, size, unpack, scales, zeros, columns)


def read_gemv(module: Module, size: int) -> QuantizedTensor:
    """Raises CheckpointError naming the tensor that does not fit."""
    words = module.words("qweight")
    rows, columns = words.shape[0], words.shape[1] * 8
    size = 0 if size >= columns else size
    count = num_groups(columns, size)
    packed = module.words("qzeros")
    if packed.shape[0] != rows or packed.shape[1] * 8 < count:
        raise module.trouble("qzeros", f"has shape {list(packed.shape)}, and must hold {count} for each of {rows} rows")
    scales = module.floats("scales", (rows, packed.shape[1] * 8))[:, :count]
    zeros = unpacked(packed, BITS, count)

    def unpack(of_rows: Ints) -> Codes:
        return unpacked(words[of_rows], BITS, columns)

    return _made(module, size, unpack, np.ascontiguousarray(scales), np.ascontiguousarray(zeros), columns)


def _made(module: Module, size: int, unpack: Any, scales: Any, zeros: Codes, columns: int) -> QuantizedTensor:
    scheme = Scheme("int", BITS, size, symmetric=bool((zeros == 8).all()))
    return quantized(f"{module.name}.weight", scheme, unpack, scales, zeros, columns)


def _placed(words: Words, rows: Ints) -> Codes:
    """[X, N / 8] → [len(rows), X]: the codes of some of the N columns."""
    shifts = (PLACE[rows % 8] * BITS).astype(np.uint32)
    return np.ascontiguousarray((words[:, rows // 8] >> shifts & 15).astype(np.uint8).T)

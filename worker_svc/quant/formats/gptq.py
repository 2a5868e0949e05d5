"""GPTQ, as AutoGPTQ, GPTQModel, auto-round and Optimum write it.

    qweight i32 [K · b / 32, N]   codes, lowest bits first along K
    qzeros  i32 [G, N · b / 32]   zero points, lowest bits first along N
    scales      [G, N]
    g_idx   i32 [K]               the group of each column; with desc_act in no order

W[n, k] = (q − z) · s. A v1 file has z − 1 in its place. Its writers subtract from whole words, and a zero point of 0
borrows from its neighbours (auto-round and GPTQModel write 0xEEEEEEEF for eight of them): so does this add to whole
words, which gives the borrowed back. Three bits go over from one word into the next: there the writers disagree about a
zero point of 0, and only GPTQModel's, which borrows nothing, is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from worker_svc.models.fields import Fields
from worker_svc.models.spec import SpecError
from worker_svc.quant.bits import Codes, num_words, unpacked
from worker_svc.quant.form import Ints, QuantizedTensor, Scheme, quantized
from worker_svc.quant.formats.module import Module, num_groups
from worker_svc.quant.formats.names import MADE_BY, keys, matches

BITS: Final = (2, 3, 4, 8)
ONES: Final = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}  # one in each place of a word

MARKERS: Final = frozenset({"qweight"})
SUFFIXES: Final = frozenset({"qweight", "qzeros", "scales", "g_idx"})
# What tells how a file was made, and nothing about how it is read.
HARMLESS: Final = MADE_BY | keys(
    "model_file_base_name static_groups true_sequential damp_percent damp_auto_increment mse "
    "module_name_preceding_first_block pad_token_id disable_exllama use_exllama exllama_config max_input_length "
    "use_cuda_fp16 model_seqlen cache_block_outputs modules_in_block_to_quantize quantizer method format "
    "act_group_aware hyb_act group_aware lm_head dtype offload_to_disk offload_to_disk_path gptaq gptaq_alpha"
)
# What would change them, where it is anything but off.
OFF: Final = keys("rotation is_marlin_format super_bits super_group_size")
KNOWN: Final = HARMLESS | OFF | {"bits", "group_size", "desc_act", "sym", "checkpoint_format", "dynamic"}


@dataclass(frozen=True)
class Rule:
    """What the config says about one module."""

    bits: int
    group_size: int  # 0: all columns
    symmetric: bool | None  # None: the zero points tell
    ordered: bool = False  # columns are in an order of their own, which g_idx tells


def read_rule(source: str, values: Mapping[str, Any], base: Rule | None = None) -> Rule:
    """`base`: for what is left out. Raises SpecError naming the field."""
    fields = Fields(source, values)
    bits = fields.whole("bits", base.bits if base else None)
    if bits not in BITS:
        raise fields.trouble("bits", f"one of {', '.join(map(str, BITS))}", bits)
    size = values.get("group_size", (base.group_size or -1) if base else -1)
    if type(size) is not int or not (size == -1 or 0 < size <= 1 << 20):
        raise fields.trouble("group_size", "-1 or at least 1", size)
    symmetric = fields.flag("sym", base.symmetric) if base and base.symmetric is not None else None
    if fields.has("sym"):
        symmetric = fields.flag("sym", True)
    return Rule(bits, max(size, 0), symmetric, fields.flag("desc_act", base.ordered if base else False))


class Gptq:
    """`v2`: zero points are as they are. `rules`: (pattern, what it overrides or None for what is not quantized)."""

    name = "gptq"
    markers, suffixes = MARKERS, SUFFIXES

    def __init__(self, config: Mapping[str, Any]) -> None:
        source = "quantization_config"
        fields = Fields(source, config)
        if unknown := sorted(config.keys() - KNOWN):
            raise SpecError(f"{source}: {unknown[0]!r} is not known of gptq: it may change what the weights mean")
        refuse_on(fields, OFF)
        for key, only in (("method", "gptq"), ("pack_dtype", "int32"), ("data_type", "int")):
            if fields.text(key, only) != only:
                raise fields.trouble(key, only, config[key])
        layout = fields.text("format", "gptq")
        if fields.text("checkpoint_format", layout) != layout and fields.has("format"):
            raise fields.trouble("checkpoint_format", f"{layout!r}, as format is", config["checkpoint_format"])
        layout = fields.text("checkpoint_format", layout)
        if layout not in ("gptq", "gptq_v2"):
            raise fields.trouble("checkpoint_format", "gptq or gptq_v2", layout)
        self.rule = read_rule(source, config)
        self.v2 = layout == "gptq_v2"
        self._borrows = not _of_gptqmodel(fields)
        self._rules = dynamic_rules(fields, self.rule)

    def read(self, module: Module) -> QuantizedTensor:
        rule = self.rule
        for pattern, override in self._rules:
            if matches(pattern, module.name):
                if override is None:
                    raise module.trouble("qweight", f"is there, though quantization_config skips it by {pattern!r}")
                rule = override
                break
        return read(module, rule, v2=self.v2, borrows=self._borrows)


def dynamic_rules(fields: Fields, base: Rule) -> list[tuple[str, Rule | None]]:
    """GPTQModel's: "-:pattern" is not quantized; "+:pattern", or the pattern alone, is so by other numbers."""
    rules: list[tuple[str, Rule | None]] = []
    for pattern, values in fields.group("dynamic").items():
        if pattern.startswith("-:"):
            rules.append((pattern[2:], None))
            continue
        source = f"quantization_config: dynamic {pattern!r}"
        if not isinstance(values, dict):
            raise SpecError(f"{source} must be an object, not {type(values).__name__}")
        if unknown := sorted(values.keys() - HARMLESS - {"bits", "group_size", "desc_act", "sym"}):
            raise SpecError(f"{source}: {unknown[0]!r} is not known: it may change what the weights mean")
        rules.append((pattern.removeprefix("+:"), read_rule(source, values, base)))
    return rules


def refuse_on(fields: Fields, keys_off: frozenset[str]) -> None:
    """Raises SpecError where one of them is anything but null, false or 0."""
    for key in sorted(keys_off):
        if fields.values.get(key):
            raise fields.trouble(key, "null: what it does to weights is not supported", fields.values[key])


def _of_gptqmodel(fields: Fields) -> bool:
    """Whether it wrote the file, by what it writes about itself."""
    wrote = fields.group("meta").get("quantizer", fields.values.get("quantizer"))
    return "gptqmodel" in str(wrote).lower()


def read(module: Module, rule: Rule, *, v2: bool, borrows: bool = True) -> QuantizedTensor:
    """`borrows`: whoever wrote 3 bits took a zero point of 0 from its neighbours.

    Raises CheckpointError naming the tensor that does not fit."""
    words, bits = module.words("qweight"), rule.bits
    columns, rows = words.shape[0] * 32 // bits, words.shape[1]
    if "g_idx" in module:  # where codes do not fill their last word
        said = module.tensor("g_idx", ("I32",), 1).shape[0]
        if num_words(said, bits) != words.shape[0]:
            raise module.trouble(
                "qweight", f"has {words.shape[0]} rows, and g_idx's {said} columns of {bits} bits are not so many"
            )
        columns = said
    size = 0 if rule.group_size >= columns else rule.group_size
    if rule.ordered and size and "g_idx" not in module:
        raise module.trouble("g_idx", "is missing, though quantization_config says desc_act")
    count = num_groups(columns, size)
    scales = np.ascontiguousarray(module.floats("scales", (count, rows)).T)
    zeros = _zeros(module, count, rows, bits, v2=v2, borrows=borrows)
    symmetric = bool((zeros == 1 << (bits - 1)).all())
    if rule.symmetric and not symmetric:
        raise module.trouble(
            "qzeros",
            f"has zero points other than {1 << (bits - 1)}, though quantization_config says sym: is checkpoint_format "
            f"{'gptq_v2' if v2 else 'gptq'} right?",
        )
    groups = module.groups("g_idx", columns, count)
    permuted = groups is not None and bool((np.diff(groups) < 0).any())
    scheme = Scheme("int", bits, size, symmetric, permuted)

    def unpack(of_rows: Ints) -> Codes:
        return unpacked(np.ascontiguousarray(words[:, of_rows].T), bits, columns)

    return quantized(f"{module.name}.weight", scheme, unpack, scales, zeros, columns, groups)


def _zeros(module: Module, count: int, rows: int, bits: int, *, v2: bool, borrows: bool) -> Codes:
    """[N, G]"""
    words = module.words("qzeros", (count, num_words(rows, bits)))
    if not v2 and bits in ONES:
        words = words + np.uint32(ONES[bits])  # what a word carries over is lost, as it was when 1 was taken
    zeros = np.ascontiguousarray(unpacked(words, bits, rows).T)
    if v2 or bits in ONES:
        return zeros
    if borrows and (zeros == 7).any():
        raise module.trouble("qzeros", "has a zero point of 0 in 3 bits, which its writer took from its neighbours")
    return zeros + np.uint8(1) & np.uint8(7)

"""What is wrong with a quantized checkpoint is said, with the tensor or the field that it is wrong with.

A fixture of each format, and every way of damaging one of its modules that came to mind. What is damaged is refused
when the checkpoint is opened or when the module is read: never a crash, and never another model.
"""

from __future__ import annotations

import copy
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.quantized import packers
from tests.quantized.packers import random_matrix
from tests.quantized.stored import Stored, stored
from tests.quantized.test_fixtures import FOLDER
from worker_svc.models.checkpoint import CheckpointError
from worker_svc.models.loader import open_model
from worker_svc.models.spec import SpecError
from worker_svc.quant.formats.gptq import Gptq

MODULE = "model.layers.0.mlp.up_proj"  # N = 160, K = 96
FORMATS = {
    "gptq": "auto_round_gptq_w4_g32",
    "gptq-3": "auto_round_gptq_w3_g32",
    "gptq-8": "auto_round_gptq_w8_g32",
    "awq": "auto_round_awq_w4_g32_asym",
    "auto-round": "auto_round_own_gptq_w4_g32",
    "pack-quantized": "llm_compressor_w4a16_g32_asym",
    "pack-quantized-sym": "llm_compressor_w4a16_g32",
    "int-quantized": "llm_compressor_w8a8_static",
    "float-quantized": "llm_compressor_fp8_static",
    "float-quantized-block": "auto_round_ct_fp8_block_short",
    "fp8": "auto_round_fp8_block_short",
}
OTHER_TYPES = {
    "I32": ("I64", 2), "I8": ("U8", 1), "F8_E4M3": ("U8", 1), "I64": ("F64", 1), "F16": ("I16", 1), "BF16": ("I16", 1),
    "F32": ("I32", 1),
}  # fmt: skip
SCALES = ("scales", "weight_scale", "weight_scale_inv", "input_scale")
Change = Callable[[Stored], None]


def own(whole: Stored) -> list[str]:
    return [name.removeprefix(f"{MODULE}.") for name in whole.tensors if name.startswith(f"{MODULE}.")]


def changed(suffix: str, how: Callable[[str, list[int], bytes], tuple[str, list[int], bytes]]) -> Change:
    def change(whole: Stored) -> None:
        name = f"{MODULE}.{suffix}"
        whole.tensors[name] = how(*whole.tensors[name])

    return change


def removed(suffix: str) -> Change:
    return lambda whole: whole.tensors.__delitem__(f"{MODULE}.{suffix}")


def number(dtype: str, value: float) -> bytes:
    if dtype == "BF16":
        return struct.pack("<f", value)[2:]
    return np.array(value, {"F16": "<f2", "F32": "<f4"}[dtype]).tobytes()


def with_first(value: float) -> Callable[[str, list[int], bytes], tuple[str, list[int], bytes]]:
    def how(dtype: str, shape: list[int], data: bytes) -> tuple[str, list[int], bytes]:
        first = number(dtype, value)
        return dtype, shape, first + data[len(first) :]

    return how


def of_another_type(dtype: str, shape: list[int], data: bytes) -> tuple[str, list[int], bytes]:
    other, times = OTHER_TYPES[dtype]
    return other, shape, data * times


def one_row_more(dtype: str, shape: list[int], data: bytes) -> tuple[str, list[int], bytes]:
    return dtype, [shape[0] + 1, *shape[1:]], data + data[: len(data) // shape[0]]


def of_tensors(whole: Stored) -> Iterator[tuple[str, Change]]:
    for suffix in own(whole):
        dtype, shape, _ = whole.tensors[f"{MODULE}.{suffix}"]
        if suffix != "g_idx":  # which says nothing new where columns are in order
            yield f"{suffix} missing", removed(suffix)
        yield f"{suffix} of another type", changed(suffix, of_another_type)
        yield f"{suffix} of more dimensions", changed(suffix, lambda d, s, b: (d, [1, *s, 1], b))
        yield (
            f"{suffix} of one row more",
            changed(suffix, one_row_more),
        )
        yield f"{suffix} with nothing in it", changed(suffix, lambda d, s, b: (d, [0, *s[1:]], b""))
        if len(shape) == 2 and shape[0] != shape[1]:
            yield f"{suffix} turned", changed(suffix, lambda d, s, b: (d, s[::-1], b))
        if suffix in SCALES:
            if dtype != "F16" and suffix != "input_scale":
                yield f"{suffix} of weights beyond a float32", changed(suffix, with_first(1e38))
            for value in (float("nan"), float("inf")):
                yield f"{suffix} {value}", changed(suffix, with_first(value))
        if suffix == "input_scale":
            yield f"{suffix} 0", changed(suffix, with_first(0.0))
    yield "a tensor that nobody knows", lambda w: w.tensors.update({f"{MODULE}.pre_quant": ("F32", [1], bytes(4))})
    if f"{MODULE}.weight" in whole.tensors and whole.tensors[f"{MODULE}.weight"][0] == "F8_E4M3":
        yield "a weight that is no number", changed("weight", lambda d, s, b: (d, s, b"\x7f" + b[1:]))


def set_to(key: str, value: Any) -> Change:
    return lambda whole: whole.quantization.update({key: value})


def of_config(whole: Stored) -> Iterator[tuple[str, Change]]:
    """Fields of all configs; then of each kind its own."""
    yield "a field that nobody knows", set_to("rotate_weights", True)
    yield "a method that nobody knows", set_to("quant_method", "exl3")
    yield "no method", lambda w: w.quantization.pop("quant_method")
    yield "no object", lambda w: w.config.update(quantization_config=[1])
    method = whole.quantization["quant_method"]
    if method in ("gptq", "awq", "auto-round"):
        for bits in (0, 5, 16, "4", None if method == "gptq" else 3):
            yield f"bits {bits!r}", set_to("bits", bits)
        for size in (0, -7, "32", 17, 2.5):
            yield f"group_size {size!r}", set_to("group_size", size)
        other_bits = {2: 4, 3: 4, 4: 8, 8: 4}[whole.quantization["bits"]]
        yield "other bits", set_to("bits", other_bits)
        yield "other groups", set_to("group_size", 16)
    if method == "gptq":
        yield "another layout", set_to("checkpoint_format", "marlin")
        yield "v1 said to be v2", set_to("checkpoint_format", "gptq_v2")
        yield "rotated", set_to("rotation", "hadamard")
        yield "words of 16 bits", set_to("pack_dtype", "int16")
        yield "another method inside", set_to("method", "qqq")
        yield "a rule that says nothing", set_to("dynamic", {"+:.*up_proj": 4})
        yield "a rule of other bits", set_to("dynamic", {"+:.*up_proj": {"bits": 2}})
        yield "a rule that skips what is there", set_to("dynamic", {"-:.*up_proj": {}})
        yield "a pattern too deep", set_to("dynamic", {"+:" + "(" * 400 + ")" * 400: {"bits": 8}})
        yield "a pattern that takes all memory", set_to("dynamic", {"+:((((a{999}){999}){999}){999})": {"bits": 8}})
        yield "a pattern that is none", set_to("dynamic", {"+:(": {"bits": 4}})
        yield "a pattern that never ends", set_to("dynamic", {r"+:(\w|\w)+(\.|\w|\w)*(.|.)*(.|.)*\d$": {"bits": 8}})
    if method == "awq":
        yield "another layout", set_to("version", "gemv_fast")
        yield "gemm said to be gemv", set_to("version", "gemv")
        yield "skipped and there", set_to("modules_to_not_convert", ["mlp"])
        yield "no zero points, which are there", set_to("zero_point", False)
    if method == "auto-round":
        yield "another packing", set_to("packing_format", "auto_round:mlx")
        yield "gptq said to be awq", set_to("packing_format", "auto_round:auto_awq")
        yield "v1 said to be v2", set_to("packing_format", "auto_round:gptqmodel")
        yield "16 bits said of what is there", set_to("extra_config", {MODULE: {"bits": 16}})
        yield "other bits said of a module", set_to("extra_config", {MODULE: {"bits": 2}})
        yield "activations", set_to("act_bits", 8)
        yield "another order", set_to("extra_config", {MODULE: {"desc_act": True}})
    if method == "fp8":
        for block in ([128], [128, 0], "128", [64, 64]):
            yield f"blocks {block!r}", set_to("weight_block_size", block)
        yield "another float", set_to("fmt", "e5m2")
        yield "other bits", set_to("bits", 4)
        yield "two scales", lambda w: w.tensors.update({f"{MODULE}.weight_scale": ("F32", [1], bytes(4))})
        yield "other activations", set_to("activation_scheme", "sometimes")
        yield "static without a scale", set_to("activation_scheme", "static")
    if method == "compressed-tensors":
        yield from of_compressed_tensors(whole)


def of_compressed_tensors(whole: Stored) -> Iterator[tuple[str, Change]]:
    def group(key: str, value: Any, part: str = "weights") -> Change:
        return lambda w: next(iter(w.quantization["config_groups"].values()))[part].update({key: value})

    def whole_group(key: str, value: Any) -> Change:
        return lambda w: next(iter(w.quantization["config_groups"].values())).update({key: value})

    weights = next(iter(whole.quantization["config_groups"].values()))["weights"]
    yield "another layout", set_to("format", "marlin-24")
    yield "sparse", set_to("sparsity_config", {"format": "sparse-24-bitmask"})
    yield "rotated", set_to("transform_config", {"config_groups": {"R1": {}}})
    yield "no groups", set_to("config_groups", {})
    yield "a group that is none", set_to("config_groups", {"group_0": 4})
    yield "groups for nobody", whole_group("targets", ["re:.*embed.*"])
    yield "quantized outputs", whole_group("output_activations", {"num_bits": 8})
    yield "no weights", whole_group("weights", None)
    yield "a field of a group that nobody knows", whole_group("rotate", True)
    yield "ignored and there", set_to("ignore", ["re:.*up_proj"])
    yield "other bits", group("num_bits", 5)
    yield "a field of weights that nobody knows", group("codebook", "nf4")
    yield "another kind", group("type", "int" if weights["type"] == "float" else "float")
    yield "another strategy", group("strategy", "tensor_group")
    yield "dynamic weights", group("dynamic", True)
    if weights["type"] == "int":
        yield "symmetric or not", group("symmetric", not weights["symmetric"])
        yield "bits of another size", group("num_bits", 4 if weights["num_bits"] == 8 else 8)
    yield "an order that nobody knows", group("actorder", "random")
    if weights["type"] == "int":
        yield "an order that is not there", group("actorder", "group")
    if weights.get("group_size"):
        yield "other groups", group("group_size", 16)
        yield "groups of nothing", group("group_size", 0)


def cases() -> Iterator[Any]:
    for kind, name in FORMATS.items():
        whole = stored(FOLDER / name)
        for what, change in (*of_tensors(whole), *of_config(whole)):
            yield pytest.param(name, change, id=f"{kind}: {what}")


def read_all(path: Path) -> None:
    model = open_model(path)
    assert model is not None
    model.tensor(f"{MODULE}.weight", (160, 96)).finite()


@pytest.mark.parametrize("name", FORMATS.values())
def test_what_is_not_damaged_is_read(name: str, tmp_path: Path) -> None:
    read_all(stored(FOLDER / name).write(tmp_path))


@pytest.mark.parametrize(("name", "change"), list(cases()))
def test_damage_is_told(name: str, change: Change, tmp_path: Path) -> None:
    whole = copy.deepcopy(stored(FOLDER / name))
    change(whole)
    with pytest.raises((CheckpointError, SpecError)) as told:
        read_all(whole.write(tmp_path))
    assert MODULE in str(told.value) or "quantization_config" in str(told.value)


@pytest.mark.parametrize("said", [{"desc_act": True}, {"dynamic": {"+:.*up_proj": {"desc_act": True}}}])
def test_an_order_that_is_not_there(said: dict[str, Any]) -> None:
    module = packers.module(**packers.gptq(random_matrix(1, 4, 32, 64, 32)))
    with pytest.raises(CheckpointError, match="g_idx' is missing, though quantization_config says desc_act"):
        Gptq({"bits": 4, "group_size": 32, "sym": False} | said).read(module)


def test_there_are_twenty_of_each_format() -> None:
    for name in FORMATS.values():
        whole = stored(FOLDER / name)
        assert len([*of_tensors(whole), *of_config(whole)]) >= 20, name


@pytest.mark.parametrize("name", FORMATS.values())
def test_a_file_cut_short(name: str, tmp_path: Path) -> None:
    path = stored(FOLDER / name).write(tmp_path) / "model.safetensors"
    data = path.read_bytes()
    for length in (0, 7, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            read_all(tmp_path)

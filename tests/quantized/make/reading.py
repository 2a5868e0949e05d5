"""A second reading of quantized checkpoints, from the description of the formats alone.

It shares no code with Pagewire nor with any producer: what a fixture expects is what the producer's own dequantizer and
this one agree upon, bit for bit. It is slow, it infers from shapes what a config would say, and it knows only Llama.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

# What GPTQ's first version took from the packed zero points: 1 from each value, as one subtraction from the whole word,
# so that a zero point of 0 borrows from its neighbour. (At 3 bits values straddle words, and each is by itself.)
ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
# Where an AWQ word keeps the value of its column: column j sits at nibble AWQ[j].
AWQ = [0, 4, 1, 5, 2, 6, 3, 7]


def read(
    config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What was quantized, float32 [N, K] under "x.weight"; and the tensors that were not, as they are.

    Raises ValueError on tensors that no format here has.
    """
    quantization = config["quantization_config"]
    weights: dict[str, torch.Tensor] = {}
    used: set[str] = set()
    for name in tensors:
        module, _, kind = name.rpartition(".")
        own = {key.removeprefix(module + "."): tensors[key] for key in tensors if key.rpartition(".")[0] == module}
        if kind == "qweight":
            reader = _awq if _is_awq(quantization) else _gptq
            weights[module + ".weight"] = reader(quantization, own, _columns(config, module))
        elif kind == "weight_packed":
            weights[module + ".weight"] = _packed(own)
        elif kind == "weight" and own.keys() & {"weight_scale", "weight_scale_inv"}:
            weights[module + ".weight"] = _scaled(own)
        elif kind == "weight" and "SCB" in own:
            weights[module + ".weight"] = own["weight"].float() * own["SCB"][:, None] * (1 / 127)
        elif name + ".quant_map" in tensors:
            of = {key.removeprefix(name + "."): tensors[key] for key in tensors if key.startswith(name + ".")}
            weights[name] = _nf4(tensors[name], of)
            used |= {f"{name}.{key}" for key in of}
        else:
            continue
        used |= {f"{module}.{key}" for key in own if key != "bias"}
    rest = {name: tensor for name, tensor in tensors.items() if name not in used}
    kv = {name for name in rest if name.endswith(("k_scale", "v_scale"))}
    if any(tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32) for tensor in rest.values()):
        raise ValueError({name: tensor.dtype for name, tensor in rest.items()})
    return weights, {name: tensor for name, tensor in rest.items() if name not in kv}


def _is_awq(quantization: Mapping[str, Any]) -> bool:
    return quantization["quant_method"] == "awq" or "awq" in quantization.get("packing_format", "")


def _columns(config: Mapping[str, Any], module: str) -> int:
    if module.endswith("o_proj"):
        return int(config["num_attention_heads"] * config["head_dim"])
    return int(config["intermediate_size" if module.endswith("down_proj") else "hidden_size"])


def _group(columns: int, groups: int) -> int:
    """The only size of ours that cuts so many columns into so many groups."""
    return columns if groups == 1 else next(size for size in (32, 64, 128) if -(-columns // size) == groups)


def unpack(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """int32 [..., W] read as one run of bits, lowest first: int64 [..., count]."""
    run = (words.long()[..., None] >> torch.arange(32)) & 1
    values = run.flatten(-2)[..., : count * bits].unflatten(-1, (count, bits))
    whole: torch.Tensor = (values << torch.arange(bits)).sum(-1)
    return whole


def _gptq(quantization: Mapping[str, Any], own: Mapping[str, torch.Tensor], columns: int) -> torch.Tensor:
    bits = own["qweight"].shape[0] * 32 // columns
    scales = own["scales"].float()
    groups, rows = scales.shape
    first = quantization.get("checkpoint_format") != "gptq_v2"
    words = own["qzeros"].long() + (ONES.get(bits, 0) if first else 0)
    codes = unpack(own["qweight"].T, bits, columns)
    zeros = unpack(words & 0xFFFFFFFF, bits, rows).T  # [N, G]
    if first and bits == 3:
        zeros = (zeros + 1) & 7
    index = own["g_idx"].long() if "g_idx" in own else torch.arange(columns) // _group(columns, groups)
    return (codes - zeros[:, index]).float() * scales.T[:, index]


def _awq(quantization: Mapping[str, Any], own: Mapping[str, torch.Tensor], columns: int) -> torch.Tensor:
    def unpacked(words: torch.Tensor) -> torch.Tensor:
        """int32 [A, N / 8] to int64 [N, A]."""
        nibbles = (words.long()[..., None] >> (4 * torch.tensor(AWQ))) & 15
        return nibbles.flatten(-2).T

    scales = own["scales"].float()
    index = torch.arange(columns) // _group(columns, scales.shape[0])
    return (unpacked(own["qweight"]) - unpacked(own["qzeros"])[:, index]).float() * scales.T[:, index]


def _packed(own: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """compressed-tensors' pack-quantized: codes and zero points are both stored with half their range added."""
    rows, columns = own["weight_shape"].tolist()
    scales = own["weight_scale"].float()
    bits = own["weight_packed"].shape[1] * 32 // columns
    codes = unpack(own["weight_packed"], bits, columns)
    index = torch.arange(columns) // _group(columns, scales.shape[1])
    if "weight_g_idx" in own:
        index = own["weight_g_idx"].long()
    zeros = torch.full((rows, scales.shape[1]), 1 << (bits - 1))
    if "weight_zero_point" in own:
        zeros = unpack(own["weight_zero_point"].T, bits, rows).T
    return (codes - zeros[:, index]).float() * scales[:, index]


def _scaled(own: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """int8 or e4m3, one value a weight: the scale is of the tensor, of a row, or of a block of 128 by 128."""
    codes = own["weight"].float()
    scales = own.get("weight_scale", own.get("weight_scale_inv", torch.empty(0))).float()
    rows, columns = codes.shape
    if scales.numel() == 1:
        return codes * scales.reshape(())
    if scales.shape == (rows, 1):
        return codes * scales
    if scales.shape != (-(-rows // 128), -(-columns // 128)):
        raise ValueError(f"scales {list(scales.shape)} of weights {list(codes.shape)}")
    return codes * scales[torch.arange(rows) // 128][:, torch.arange(columns) // 128]


def _nf4(words: torch.Tensor, own: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """bitsandbytes: two values a byte, the higher bits first; the largest of each block is itself a code of 8 bits."""
    state = next(tensor for key, tensor in own.items() if key.startswith("quant_state."))
    told = json.loads(bytes(state.tolist()))
    values = own["quant_map"][torch.stack((words.long() >> 4, words.long() & 15), -1).flatten()]
    largest = own["absmax"]
    if "nested_absmax" in own:
        nested = own["nested_absmax"].repeat_interleave(told["nested_blocksize"])[: len(largest)]
        largest = own["nested_quant_map"][largest.long()] * nested + told["nested_offset"]
    return (values * largest.repeat_interleave(told["blocksize"])[: len(values)]).reshape(told["shape"])

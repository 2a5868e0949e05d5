"""The places where readers of these formats are known to have gone wrong, one test each (docs/quantization.md)."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kernels.gpu.scaled_linear import as_fnuz
from tests.models.cpu_stepping import Runner, packed
from tests.models.stepping import Sequence
from tests.quantized import packers
from tests.quantized.packers import Matrix, random_matrix
from tests.quantized.stored import stored
from tests.quantized.test_fixtures import FOLDER, OURS, error, expected, float32_logits
from worker_svc.models.checkpoint import CheckpointError
from worker_svc.models.loader import open_model
from worker_svc.models.raw_tensor import RawTensor, to_bfloat16
from worker_svc.quant.choice import choose
from worker_svc.quant.form import QuantizedTensor
from worker_svc.quant.formats.auto_round import AutoRound
from worker_svc.quant.formats.compressed_tensors import CompressedTensors
from worker_svc.quant.formats.gptq import Gptq
from worker_svc.quant.formats.module import Module

V1 = {"bits": 4, "group_size": 32, "sym": False}


def same(tensor: QuantizedTensor, matrix: Matrix) -> None:
    np.testing.assert_array_equal(tensor.float32(), matrix.weights().astype(np.float32))


def test_1_a_zero_point_of_0_borrows_from_its_neighbours() -> None:
    matrix = random_matrix(1, 4, 32, 64, 32)
    matrix.zeros[:] = 0
    tensors = packers.gptq(matrix)
    assert (tensors["qzeros"].view(np.uint32) == 0xEEEEEEEF).all()
    same(Gptq(V1).read(packers.module(**tensors)), matrix)


def test_1_v2_read_as_v1_is_told() -> None:
    """Where the config says symmetric, zero points tell."""
    matrix = random_matrix(1, 4, 32, 64, 32, symmetric=True)
    module = packers.module(**packers.gptq(matrix, v2=True))
    same(Gptq(V1 | {"sym": True, "checkpoint_format": "gptq_v2"}).read(module), matrix)
    with pytest.raises(CheckpointError, match="is checkpoint_format gptq right"):
        Gptq(V1 | {"sym": True}).read(module)


def test_2_auto_round_packs_as_packing_format_says_symmetric_or_not() -> None:
    matrix, symmetric = random_matrix(2, 4, 32, 64, 32), random_matrix(2, 4, 32, 64, 32, symmetric=True)
    cases: list[tuple[str, Matrix, Callable[[Matrix], dict[str, Any]]]] = [
        ("auto_round:auto_awq", matrix, packers.awq_gemm),
        ("auto_round:auto_awq", symmetric, packers.awq_gemm),
        ("auto_round:auto_gptq", matrix, packers.gptq),
        ("auto_round:auto_gptq", symmetric, packers.gptq),
        ("auto_round", matrix, lambda matrix: packers.gptq(matrix, v2=True)),
    ]
    for packing, each, pack in cases:
        config = {"bits": 4, "group_size": 32, "sym": each is symmetric, "packing_format": packing}
        same(AutoRound(config).read(packers.module(**pack(each))), each)


def test_3_16_bits_are_a_plain_weight_and_products_of_several_kinds_are_not_one() -> None:
    model = open_model(FOLDER / "auto_round_own_mixed")
    assert model is not None

    def parts(layer: int, *roles: str) -> list[Any]:
        return [model.checkpoint.tensor(model.layer(layer, role)) for role in roles]

    assert isinstance(parts(1, "up")[0], RawTensor)
    assert choose(parts(1, "gate")).kind == "w4a16"
    assert choose(parts(1, "gate", "up")).kind == "bf16"
    assert choose(parts(0, "k", "v")).kind == "w4a16"
    assert choose(parts(0, "q", "k", "v")).kind == "w8a16"  # whose bytes hold four bits as well


def test_4_tensors_tell_what_is_quantized_and_not_the_list_of_what_is_ignored(tmp_path: Path) -> None:
    whole = stored(FOLDER / "auto_round_ct_fp8_static")
    assert whole.quantization["ignore"] == []
    model = open_model(whole.write(tmp_path))
    assert model is not None
    assert isinstance(model.checkpoint.tensor("lm_head.weight"), RawTensor)


@pytest.mark.parametrize("name", ["auto_round_gptq_w4_g64_short", "auto_round_fp8_block_short"])
def test_5_the_last_group_and_the_last_block_may_be_short(name: str) -> None:
    """K = 96 of groups of 64, N = 96 and 160 of blocks of 128."""
    model = open_model(FOLDER / name)
    assert model is not None
    for key, theirs in expected(name).items():
        if key.endswith(".weight"):
            np.testing.assert_array_equal(model.checkpoint.tensor(key).float32(), theirs.float().numpy())


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_6_scales_of_every_float(dtype: str) -> None:
    matrix = random_matrix(6, 4, 32, 64, 32)
    tensors = packers.module(**packers.gptq(matrix)).tensors
    scales = (np.random.default_rng(6).random((2, 32)) + 0.5).astype(np.float16).astype(np.float32)
    stored_as: Any = {
        "F16": scales.astype(np.float16),
        "BF16": to_bfloat16(scales),
        "F32": scales,
    }[dtype]
    raw = RawTensor("scales", dtype, (2, 32), stored_as)
    read = Gptq(V1).read(Module(packers.NAME, {**tensors, "scales": raw}))
    as_stored = raw.float32()
    weights = (matrix.codes - matrix.zeros[:, matrix.groups]) * as_stored.T[:, matrix.groups]
    np.testing.assert_array_equal(read.float32(), weights.astype(np.float32))


def test_7_columns_in_an_order_of_their_own_are_multiplied_in_it(tmp_path: Path) -> None:
    """desc_act: columns are sorted by group, and what they are multiplied by is put in that order; but for down, whose
    order gate's and up's rows have.
    """
    name = "gptqmodel_w4_g32_desc_act"
    shutil.copytree(FOLDER / name, tmp_path / name)
    model = packed(tmp_path / name, "", tmp_path)
    ordered = {role.partition(".")[2] for role, matrix in model.layout.matrices.items() if matrix.ordered}
    assert ordered == {"qkv", "o", "gate_up"}
    assert all(matrix.kind == "w4a16" for role, matrix in model.layout.matrices.items() if role != "lm_head")
    tokens = list(range(1, 30))
    (ours,) = Runner(model, max_model_len=64).run([Sequence(tokens, [3, 29])])
    assert error(ours, float32_logits(name, tokens)) < OURS


def test_8_compressed_tensors_have_such_an_order_too() -> None:
    matrix = random_matrix(8, 4, 30, 96, 32, permuted=True)
    weights = {"num_bits": 4, "group_size": 32, "strategy": "group", "symmetric": False, "actorder": "group"}
    config = {"format": "pack-quantized", "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}
    tensor = CompressedTensors(config).read(packers.module(**packers.pack_quantized(matrix, g_idx=True)))
    assert tensor.scheme.permuted
    same(tensor, matrix)


def test_9_float8_of_an_mi300_has_half_the_values_in_the_same_bits() -> None:
    """And no −0, whose bits are its NaN."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F]
    weight, scales = as_fnuz(codes.view(torch.float8_e4m3fn).view(1, -1), torch.tensor([[0.75]]))
    theirs = codes.view(torch.float8_e4m3fn).float() * 0.75
    assert torch.equal(weight.float()[0] * scales[0], theirs)

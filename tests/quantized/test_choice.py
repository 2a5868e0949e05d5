"""What a kernel is not given: matrices whose columns it would count wrongly. And configs that lie beside the config."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from tests.quantized import packers
from tests.quantized.packers import Matrix, random_matrix
from tests.quantized.stored import stored
from tests.quantized.test_fixtures import FOLDER, opened
from worker_svc.models.loader import open_model, weights_digest
from worker_svc.quant import gpu_choice
from worker_svc.quant.choice import choose
from worker_svc.quant.form import QuantizedTensor
from worker_svc.quant.formats.gptq import Gptq


def read(matrix: Matrix) -> QuantizedTensor:
    config = {"bits": 4, "group_size": 32, "sym": False}
    return Gptq(config).read(packers.module(**packers.gptq(matrix, g_idx=True)))


def test_groups_of_different_sizes_are_multiplied_by_no_kernel() -> None:
    even = random_matrix(1, 4, 32, 96, 32, permuted=True)
    moved = np.where(np.arange(96) == np.flatnonzero(even.groups == 0)[0], 1, even.groups)  # 31, 33, 32 of them
    tensor = read(replace(even, groups=moved))
    assert choose([read(even)]).kind == "w4a16"
    assert (choose([tensor]).kind, choose([tensor]).why) == ("bf16", "its groups are of different sizes")
    assert gpu_choice.choose(read(even), float8=True).kernel == "w4a16"
    assert gpu_choice.choose(tensor, float8=True) == ("float", "its groups are of different sizes")


def test_matrices_in_different_orders_are_not_one() -> None:
    one, other = (read(random_matrix(seed, 4, 32, 96, 32, permuted=True)) for seed in (1, 2))
    assert one.scheme == other.scheme
    assert gpu_choice.joined([one, one])
    assert not gpu_choice.joined([one, other])
    assert choose([one, one]).kind == "w4a16"
    assert choose([one, other]).why == "its parts have their columns in different orders"


def test_a_config_beside_the_config(tmp_path: Path) -> None:
    """As early producers wrote it: it is read, and decides about the weights as they do."""
    name = "auto_round_gptq_w4_g32"
    whole = stored(FOLDER / name)
    said = whole.config.pop("quantization_config")
    whole.write(tmp_path)
    (tmp_path / "quantize_config.json").write_text(json.dumps(said))
    model, weight = open_model(tmp_path), "model.layers.0.mlp.down_proj.weight"
    assert model is not None
    assert model.quantization == "gptq"
    theirs = opened(name).checkpoint.tensor(weight).float32()
    np.testing.assert_array_equal(model.checkpoint.tensor(weight).float32(), theirs)
    before = weights_digest(tmp_path)
    (tmp_path / "quantize_config.json").write_text(json.dumps(said | {"checkpoint_format": "gptq_v2"}))
    assert weights_digest(tmp_path) != before

"""Float weights brought to codes: the nearest ones, against torch's and against a search."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from worker_svc.models.checkpoint import CheckpointError
from worker_svc.models.raw_tensor import RawTensor
from worker_svc.quant.form import E4M3
from worker_svc.quant.on_load import MODES, on_load, to_e4m3


def test_e4m3_is_torchs() -> None:
    rng = np.random.default_rng(0)
    borders = (E4M3[:126] + E4M3[1:127]) / 2
    values = np.concatenate([E4M3[:127], borders, np.nextafter(borders, 0), np.nextafter(borders, 500)])
    values = np.concatenate([values, rng.standard_normal(5000) * 10, rng.uniform(-448, 448, 5000)]).astype(np.float32)
    values = np.concatenate([values, -values])
    theirs = torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(to_e4m3(values), theirs)
    assert E4M3[to_e4m3(np.array([1e9, -1e9], np.float32))].tolist() == [448, -448]


@given(st.integers(0, 2**32 - 1), st.sampled_from(MODES), st.integers(1, 5), st.integers(1, 100), st.floats(-30, 30))
def test_no_code_is_nearer(seed: int, mode: str, rows: int, columns: int, exponent: float) -> None:
    weights = (np.random.default_rng(seed).standard_normal((rows, columns)) * 10.0**exponent).astype(np.float32)
    form = on_load(RawTensor("w", "F32", weights.shape, weights), mode).form()
    error = np.abs(form.float32() - weights)
    if mode == "fp8":
        bound = np.maximum(np.abs(weights) / 16, form.scales * 2.0**-10)
    else:
        bound = form.scales[:, form.groups] / 2
        if mode == "int4":
            bound = bound * 2  # of the zero point's rounding
    assert (error <= bound * 1.001).all()


@pytest.mark.parametrize("mode", MODES)
def test_zeros_stay_zeros_and_what_is_no_number_is_refused(mode: str) -> None:
    zeros = np.zeros((2, 40), np.float32)
    assert not on_load(RawTensor("w", "F32", (2, 40), zeros), mode).float32().any()
    zeros[1, 3] = np.nan
    with pytest.raises(CheckpointError, match="'w' has weights that are not finite"):
        on_load(RawTensor("w", "F32", (2, 40), zeros), mode)

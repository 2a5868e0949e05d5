"""SmolLM2-135M-Instruct in float32 against transformers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models.compare_transformers import compare, oracle, spread, weight_differences
from worker_svc.models.loader import open_model


def test_weights_equal_transformers_own_dequantization(model_path: Path) -> None:
    ours = open_model(model_path)
    assert ours is not None
    differences = list(weight_differences(ours, oracle(model_path)))
    assert len(differences) == 2 + 30 * 9
    assert [name for name, difference in differences if difference > 0] == []


def test_greedy_tokens_equal_those_of_transformers(model_path: Path) -> None:
    compared, differences = compare(model_path, [1, 37, 140], count=12)
    assert compared == 36
    assert [difference for difference in differences if not difference.allowed] == []


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_greedy_tokens_equal_those_of_transformers_up_to_2000_tokens(model_path: Path) -> None:
    compared, differences = compare(model_path, spread(40, 2000), count=48)
    assert compared > 1500
    assert [difference for difference in differences if not difference.allowed] == []

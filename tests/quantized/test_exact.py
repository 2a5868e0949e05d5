"""A token's bits, of every kernel for codes, do not depend on chunks, neighbours, blocks or threads (R2)."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.models.cpu_stepping import Runner, packed
from tests.models.stepping import Sequence
from tests.quantized.test_fixtures import FOLDER

KINDS = [
    ("gptqmodel_w4_g32_desc_act", ""),  # gathered, and sorted
    ("llm_compressor_w4a16_g128", ""),  # long chains
    ("auto_round_own_mixed", ""),
    ("llm_compressor_w8a16_channel", ""),
    ("llm_compressor_w8a8", ""),
    ("llm_compressor_fp8_dynamic", ""),
    ("gptqmodel_w4_g32_desc_act", "a8"),
]


@pytest.mark.parametrize(("name", "mode"), KINDS)
def test_bits_are_a_tokens_own(name: str, mode: str, tmp_path: Path) -> None:
    shutil.copytree(FOLDER / name, tmp_path / name)
    model, tokens = packed(tmp_path / name, mode, tmp_path), [1 + (7 * i) % 60 for i in range(40)]
    (alone,) = Runner(model, max_model_len=64).run([Sequence(tokens, [len(tokens)])])
    others = [Sequence([2 + (5 * i + j) % 60 for i in range(30)], [3 * j + 1, 30]) for j in range(9)]
    for threads, cuts in ((1, list(range(1, 41))), (2, [1, 2, 7, 24, 40]), (3, [33, 34, 40])):
        runner = Runner(model, threads=threads, max_model_len=64)
        ours = runner.run([*others[:4], Sequence(tokens, cuts), *others[4:]], seed=threads)[4]
        assert np.array_equal(ours.view(np.uint32), alone.view(np.uint32))

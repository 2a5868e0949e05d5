"""Triton kernels beside their oracles: interpreted here (tests/interpreted.py), or on a GPU:

TRITON_INTERPRET=0 pytest -m gpu tests/kernels_triton
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kernels_triton import compare


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not compare.INTERPRETED:
        for item in items:
            if item.path.is_relative_to(Path(__file__).parent):
                item.add_marker("gpu")

"""What every test may share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from client import store


@pytest.fixture(scope="session")
def model_path() -> Path:
    """The real model's GGUF: `PAGEWIRE_TEST_MODEL`, or from the store, which pulls it when it is missing."""
    if given := os.environ.get("PAGEWIRE_TEST_MODEL"):
        return Path(given)
    return store.pull(store.DEFAULT)

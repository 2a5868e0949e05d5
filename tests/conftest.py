"""What every test may share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

from client import store

# No deadline: a loaded machine is slow, and that is no error.
settings.register_profile("pagewire", deadline=None, print_blob=True)
settings.load_profile("pagewire")


@pytest.fixture(scope="session")
def model_path() -> Path:
    """The real model's GGUF: `PAGEWIRE_TEST_MODEL`, or from the store, which pulls it when it is missing."""
    if given := os.environ.get("PAGEWIRE_TEST_MODEL"):
        return Path(given)
    return store.pull(store.DEFAULT)

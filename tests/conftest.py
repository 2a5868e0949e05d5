"""What every test may share."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

import tests.interpreted  # noqa: F401, before whatever imports Triton
from client import store

# No deadline: a loaded machine is slow, and that is no error.
settings.register_profile("pagewire", deadline=None, print_blob=True)
settings.load_profile("pagewire")

# A shell that starts its jobs in the background has them ignore SIGINT, and their children would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def logging_restored() -> Iterator[None]:
    """For tests that configure the log of this process."""
    loggers = [logging.getLogger(), logging.getLogger("scheduler_svc")]
    before = [(one, one.level, one.handlers[:]) for one in loggers]
    yield
    for one, level, handlers in before:
        one.setLevel(level)
        one.handlers[:] = handlers


@pytest.fixture(scope="session")
def model_path() -> Path:
    """The real model's GGUF: `PAGEWIRE_TEST_MODEL`, or from the store, which pulls it when it is missing."""
    if given := os.environ.get("PAGEWIRE_TEST_MODEL"):
        return Path(given)
    return store.pull(store.DEFAULT)

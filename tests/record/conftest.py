from __future__ import annotations

import pytest

from scheduler_svc import logs


@pytest.fixture(autouse=True)
def as_served(logging_restored: None) -> None:
    """What the recorder says goes to stderr, as in a service."""
    logs.configure("text", "info")

"""compose.yaml, where there is an engine to run it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.e2e import compose


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.skipif(compose.engine() is None, reason="no container engine here: compose.yaml is not run")
def test_compose_up_a_worker_killed_and_down() -> None:
    done = subprocess.run([sys.executable, "-m", "tests.e2e.compose"], cwd=compose.ROOT, text=True, check=False)
    assert done.returncode == 0

"""The library of the tests: the product's, with the functions of csrc/test_*.cpp. PAGEWIRE_TEST_SANITIZE=1 takes the
sanitizer build, which runs where libasan is preloaded (`python -m kernels.cpu.build --sanitize` says how).
"""

from __future__ import annotations

import ctypes
import os

import pytest

from kernels.cpu import build


@pytest.fixture(scope="session")
def cdll() -> ctypes.CDLL:
    """Bare: whoever calls a function sets its types."""
    return ctypes.CDLL(str(build.library(testing=True, sanitize=bool(os.environ.get("PAGEWIRE_TEST_SANITIZE")))))


@pytest.fixture(scope="session", params=["avx512_bf16", "avx512_vnni", "avx2", "generic"])
def isa(request: pytest.FixtureRequest, cdll: ctypes.CDLL) -> str:
    """Each instruction set that this host can run."""
    name: str = request.param
    cdll.pw_isas.restype = ctypes.c_char_p
    if name not in cdll.pw_isas().decode().split():
        pytest.skip(f"this host has no {name}")
    return name

"""That these tests interpret, and nothing that they start does."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import triton
from triton.runtime import JITFunction

from kernels.gpu.norm import rms_norm_kernel
from tests.kernels_triton import compare


@pytest.mark.skipif(not compare.INTERPRETED, reason="on a GPU")
def test_kernels_are_interpreted_here_and_compiled_elsewhere() -> None:
    assert not isinstance(rms_norm_kernel, JITFunction)
    assert not isinstance(triton.language.sum, JITFunction)
    assert "TRITON_INTERPRET" not in os.environ
    script = "import triton, kernels.gpu.norm as n; assert type(n.rms_norm_kernel) is triton.runtime.JITFunction"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)

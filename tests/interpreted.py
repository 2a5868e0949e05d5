"""Importing this has Triton interpret its kernels in this process, on the CPU: TRITON_INTERPRET=0 leaves it alone.

Triton decides when a kernel is decorated, and its own library is decorated when it is imported, which transformers does
as well: so tests/conftest.py imports this before anything else. Processes that tests start do not inherit it.
"""

from __future__ import annotations

import os

KEY = "TRITON_INTERPRET"

if KEY not in os.environ:
    os.environ[KEY] = "1"
    import triton

    del os.environ[KEY]
    # For the kernels that are decorated later; setting a knob would set the environment as well.
    propagates, triton.knobs.propagate_env = triton.knobs.propagate_env, False
    triton.knobs.runtime.interpret = True
    triton.knobs.propagate_env = propagates

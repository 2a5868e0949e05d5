"""What Triton's interpreter gets wrong of products and of bfloat16, put right.

It multiplies the codes of bfloat16 as if they were numbers, and float8 without its subnormals; it does not know AMD's
float8, and it rounds float32 to bfloat16 towards zero. And it leaves products to BLAS, where the bits of a row depend
on the row's place in the matrix, as they do on no GPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import interpreter

FLOAT8 = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e4b8: torch.float8_e4m3fnuz}


def repair() -> None:
    """Products in float32 or int32, summed in the order of k; bfloat16 rounded to the nearest. Again: no change."""
    if getattr(interpreter, "_is_repaired", False):
        return
    convert = interpreter._convert_float

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        if d.dtype.scalar == tl.int32:
            product = a.data.astype(np.int32) @ b.data.astype(np.int32)
            return interpreter.TensorHandle(product + d.data, tl.int32)
        left, right = _float32(a), _float32(b)
        total = np.zeros_like(d.data)
        for k in range(left.shape[1]):
            total += left[:, k, None] * right[k]
        return interpreter.TensorHandle(total + d.data, d.dtype.scalar)

    def convert_float(x: NDArray[Any], source: Any, target: Any, rounding: Any) -> NDArray[Any]:
        if (source, target) == (tl.float32, tl.bfloat16):
            nearest = torch.from_numpy(np.ascontiguousarray(x.view(np.float32))).bfloat16()
            return nearest.view(torch.int16).numpy().view(np.uint16)
        return convert(x, source, target, rounding)  # type: ignore[no-any-return]

    patch_lang_core = interpreter._patch_lang_core

    def patch_lang_core_and_fnuz(lang: Any, scope: Any) -> None:
        patch_lang_core(lang, scope)
        to_ir = lang.dtype.to_ir
        scope.set_attr(lang.dtype, "to_ir", lambda self, builder: self if self in FLOAT8 else to_ir(self, builder))

    interpreter._patch_lang_core = patch_lang_core_and_fnuz
    interpreter.InterpreterBuilder.create_dot = create_dot
    interpreter._convert_float = convert_float
    interpreter._is_repaired = True


def _float32(x: Any) -> NDArray[np.float32]:
    if x.dtype.scalar == tl.bfloat16:
        widened: NDArray[np.float32] = (x.data.astype(np.uint32) << 16).view(np.float32)
        return widened
    if x.dtype.scalar in FLOAT8:
        codes = torch.from_numpy(np.ascontiguousarray(x.data))
        return codes.view(FLOAT8[x.dtype.scalar]).float().numpy()
    return x.data.astype(np.float32)  # type: ignore[no-any-return]

"""Every bfloat16 there is, and the float32 beside every border of float8 e4m3, against torch's conversion."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference
from kernels.gpu.fp8 import to_e4m3
from tests.kernels_triton.compare import DEVICE

ONE = torch.ones(())


@triton.jit
def convert_kernel(x, out, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, to_e4m3(tl.load(x + at, mask=at < size)), mask=at < size)


def converted(x: Tensor) -> Tensor:
    out = torch.empty(x.shape, dtype=torch.uint8, device=DEVICE)
    convert_kernel[(triton.cdiv(x.numel(), 4096),)](x.to(DEVICE), out, x.numel(), BLOCK=4096)
    return out.cpu()


def agree(x: Tensor) -> None:
    expected = reference.float8(x, ONE).view(torch.uint8)
    nans = x.isnan()
    actual = converted(x)
    assert torch.equal(actual[~nans], expected[~nans])
    assert ((actual[nans] & 0x7F) == 0x7F).all()


def test_every_bfloat16() -> None:
    agree(torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).float())


def test_beside_every_border() -> None:
    """All 8-bit numbers, the middle between neighbours, and the float32 just above and below each of those."""
    numbers = torch.arange(0x7F).to(torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (numbers[1:] + numbers[:-1]) / 2
    points = torch.cat([numbers, middles, torch.tensor([464.0, 480.0, 1e38, torch.inf, 2.0**-149, 2.0**-126])])
    inf = torch.tensor(torch.inf)
    around = torch.cat([points, torch.nextafter(points, inf), torch.nextafter(points, -inf)])
    agree(torch.cat([around, -around]))


def test_random_float32() -> None:
    agree(
        torch.randint(-(2**31), 2**31, (100_000,), generator=torch.Generator().manual_seed(0)).int().view(torch.float32)
    )

"""Which library computes the attention of a model on a GPU: asked for by name, or the first that can."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from kernels.gpu.attention_plan import AttentionShape
from kernels.gpu.attention_tuning import Device as Kind
from worker_svc.attention.flash_attn import FlashAttention
from worker_svc.attention.flashinfer import FlashInferAttention
from worker_svc.attention.paged import PagedAttention, UnsuitedAttention
from worker_svc.attention.reference import TorchAttention
from worker_svc.attention.triton import TritonAttention

# In the order of figures that others have published for one H100 (decision 0037). FlashInfer and torch are only taken
# when asked for: the one compiles where it has no module yet, the other is what all are compared with.
BY_ITSELF = ("flash_attn", "triton")


@dataclass(frozen=True)
class Where:
    """`capability`: NVIDIA's, (0, 0) for a device that is none; `flights`: steps in flight; `rows`: of a step;
    `num_drafts`: of a row, each of which may be verified before the host knows of it.
    """

    kind: Kind
    device: torch.device
    capability: tuple[int, int]
    flights: int
    rows: int
    num_drafts: int = 0


@dataclass(frozen=True)
class Choice:
    name: str
    reason: str
    attention: Mapping[int, PagedAttention]  # by window


def choose(asked: str, shapes: Sequence[AttentionShape], where: Where) -> Choice:
    """For layers of `shapes`, one of each window. `asked` is "auto" or a name.

    Raises UnsuitedAttention, which says it whole, where what was asked for cannot serve.
    """
    refusals = []
    for name in BY_ITSELF if asked == "auto" else (asked,):
        try:
            attention = {shape.window: _made(name, shape, where) for shape in shapes}
        except UnsuitedAttention as error:
            refusals.append(f"{name} {error}")
        else:
            reason = "; ".join(refusals) or ("the first choice" if asked == "auto" else "asked for")
            return Choice(name, reason, attention)
    raise UnsuitedAttention("; ".join(refusals))


def _made(name: str, shape: AttentionShape, where: Where) -> PagedAttention:
    match name:
        case "flash_attn":
            return FlashAttention(shape, where.capability)
        case "flashinfer":
            if where.num_drafts:
                raise UnsuitedAttention("plans from lengths that no host knows with drafts in flight")
            return FlashInferAttention(shape, where.capability, where.device, where.flights, where.rows)
        case "triton":
            return TritonAttention(shape, where.kind, where.device)
        case _:
            return TorchAttention(shape)

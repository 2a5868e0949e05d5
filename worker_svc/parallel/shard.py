"""Which part of each weight a rank holds: Megatron's split (Shoeybi et al., 1909.08053). No torch here.

embedding  rows    a run of the vocabulary; other tokens' embeddings come from other ranks
qkv        rows    whole KV heads, and the q heads that read them
o          columns those of its heads                   ┐ each rank has a part of every sum:
gate_up    rows    a run of gate, and the same of up    │ they are added over all ranks
down       columns that run                             ┘
lm_head    rows    a run of the vocabulary; the logits of all ranks stand side by side
experts    as gate_up and down, in each; router and norms are whole everywhere
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from worker_svc.models.raw_tensor import Cut
from worker_svc.models.spec import ModelSpec, SpecError

_BY_ROWS = ("qkv", "gate_up", "expert_gate_up")
_BY_COLUMNS = ("o", "down", "expert_down")


class Piece(NamedTuple):
    """What a rank reads of a tensor."""

    role: str
    shape: tuple[int, ...]  # of the tensor
    cut: Cut
    heads: int  # of q or k, in the rows of the cut; 0: the order of rows is as it is


@dataclass(frozen=True)
class Shard:
    """Rank `rank` of `size`. Raises SpecError where the model cannot be split into so many equal parts."""

    whole: ModelSpec
    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        spec, size = self.whole, self.size
        numbers = [("attention heads", spec.num_heads), ("KV heads", spec.num_kv_heads)]
        if not all(map(spec.sparse, range(spec.num_layers))):
            numbers.append(("rows of an MLP", spec.intermediate_size))
        if spec.experts:
            numbers.append(("rows of an expert", spec.experts.intermediate_size))
        for what, number in numbers:
            if number % size:
                raise SpecError(f"tp_size {size} does not divide the model's {number} {what}")
        if (size - 1) * self.vocab_share >= spec.vocab_size:
            raise SpecError(f"tp_size {size} leaves a rank nothing of a vocabulary of {spec.vocab_size}")

    @cached_property
    def spec(self) -> ModelSpec:
        """The model as this rank computes it: fewer heads, narrower MLPs; its vocabulary is the whole one."""
        spec, size, experts = self.whole, self.size, self.whole.experts
        return replace(
            spec,
            num_heads=spec.num_heads // size,
            num_kv_heads=spec.num_kv_heads // size,
            intermediate_size=spec.intermediate_size // size,
            experts=experts and replace(experts, intermediate_size=experts.intermediate_size // size),
        )

    @property
    def vocab_share(self) -> int:
        """Rows of each rank; the last one has what is left."""
        return -(-self.whole.vocab_size // self.size)

    @property
    def vocab(self) -> Piece:
        """Of the embedding, and of lm_head."""
        rows, columns = self.whole.vocab_size, self.whole.hidden_size
        begin = self.rank * self.vocab_share
        return Piece("", (rows, columns), Cut(begin, min(begin + self.vocab_share, rows), 0, columns), 0)

    def pieces(self, product: str) -> tuple[Piece, ...]:
        """Of a product of ModelSpec's; one below the other they are its rows here."""
        sections, stacked = self.whole.sections(product), product in self.whole.names.layer
        columns = self._columns(product)
        left = self.rank * (columns // self.size) if product in _BY_COLUMNS else 0
        right = left + columns // self.size if product in _BY_COLUMNS else columns
        pieces, above = [], 0
        for section in sections:
            rows = section.rows // self.size if product in _BY_ROWS else section.rows
            top = (above if stacked else 0) + (self.rank * rows if product in _BY_ROWS else 0)
            of = (product, sum(each.rows for each in sections)) if stacked else (section.role, section.rows)
            heads = 0 if stacked else section.heads // self.size
            pieces.append(Piece(of[0], (of[1], columns), Cut(top, top + rows, left, right), heads))
            above += section.rows
        return tuple(pieces)

    def adds_bias(self, product: str) -> bool:
        """To a sum over all ranks one of them adds it."""
        return product not in _BY_COLUMNS or self.rank == 0

    def _columns(self, product: str) -> int:
        spec = self.whole
        match product:
            case "o":
                return spec.num_heads * spec.head_dim
            case "down":
                return spec.intermediate_size
            case "expert_down" if spec.experts:
                return spec.experts.intermediate_size
        return spec.hidden_size

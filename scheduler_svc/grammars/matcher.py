"""What one stream may say next: a grammar, and how far the stream is in it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final

import numpy as np
from llguidance import LLMatcher
from numpy.typing import NDArray

from protos.engine_wire import FinishReason
from scheduler_svc.grammars.errors import one_line

MAX_FORCED: Final = 4096  # tokens that a grammar may force at once: to find them takes 15 µs each

MaskRow = NDArray[np.uint32]


class Matcher:
    """A function of the tokens that it was given, one by one, and of nothing else.

    Where the grammar leaves no choice of bytes, their canonical tokens are the only ones allowed, to the end of that
    run. So they are the same whether they are sampled, under a mask of one bit, or known without. `is_told`: whether
    the engine may know them without.

    tokens   | consumed … | forced … |
    grammar  |======================>  always ahead of the stream, by what is forced
    """

    def __init__(self, compiled: LLMatcher, *, is_told: bool) -> None:
        self._grammar: LLMatcher = compiled.deep_copy()
        self._is_told = is_told
        self._forced: deque[int] = deque()
        self._count = 0
        self._trouble = ""
        self._look_ahead()

    def consume(self, token_ids: Sequence[int]) -> int:
        """How many of them the grammar takes; where it is not all, `ends` is GRAMMAR."""
        for taken, token_id in enumerate(token_ids):
            if self._forced:
                if self._forced[0] != token_id:
                    self._trouble = f"token {token_id} came where {self._forced[0]} is forced"
                    self._forced.clear()
                    return taken
                self._forced.popleft()
                self._count += 1
                continue
            if not self._trouble and not self._grammar.consume_token(token_id):
                self._see(f"token {token_id} is not allowed")
            if self._trouble:
                return taken
            self._count += 1
            self._look_ahead()
        return len(token_ids)

    def _look_ahead(self) -> None:
        grammar = self._grammar
        while not grammar.is_stopped() and (forced := grammar.compute_ff_tokens()):
            if len(self._forced) + len(forced) > MAX_FORCED:
                self._see(f"more than {MAX_FORCED} tokens are forced at once")
                return
            self._forced.extend(forced)
            if grammar.try_consume_tokens(forced) != len(forced):
                self._see("its forced tokens are not allowed")
        if grammar.is_error():
            self._see("")

    def _see(self, otherwise: str) -> None:
        self._trouble = self._grammar.get_error() or otherwise or "it has failed"

    @property
    def forced(self) -> list[int]:
        """What the engine is told to follow, if anything."""
        return list(self._forced) if self._is_told else []

    @property
    def ends(self) -> FinishReason | None:
        """Why the stream ends behind `forced`."""
        if self._forced and not self._is_told:
            return None
        if self._trouble:
            return FinishReason.GRAMMAR
        return FinishReason.STOP if self._grammar.is_stopped() else None

    @property
    def detail(self) -> str:
        words = one_line(self._trouble)
        return f"cannot be followed behind output token {self._count}: {words}" if words else ""

    def fill(self, row: MaskRow, address: int) -> bool:
        """Writes the next token's mask into a row, which lies at `address`. False where it has none to write."""
        if self._forced:
            token_id = self._forced[0]
            row[:] = 0
            row[token_id >> 5] = 1 << (token_id & 31)
            return True
        if self._trouble or self._grammar.is_stopped():
            return False
        self._grammar.unsafe_compute_mask_ptr(address, row.nbytes)
        if self._grammar.is_error():
            self._see("")
        return not self._trouble

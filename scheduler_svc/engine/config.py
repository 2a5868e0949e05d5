"""What the engine is told once. Every number here is a limit that a refused request can be told by name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Raises ValueError, naming the field, where the numbers could not serve anybody."""

    block_size: int = 32  # tokens
    max_num_seqs: int = 64  # sequences running at once
    max_step_tokens: int = 512  # positions computed in one step, drafts included
    depth: int = 1  # plans in flight
    long_step: int = 0  # positions; behind a plan with more of them nothing is sent until it has landed; 0: no limit
    short_step: int = 0  # positions; behind a plan with no more of them there may be
    short_depth: int = 1  # … so many in flight, where that is more than `depth`
    num_drafts: int = 0  # drafts a decoding row may verify
    max_model_len: int = 0  # 0: the worker's own
    max_waiting: int = 1024  # requests in the queue
    max_waiting_tokens: int = 4_194_304  # and their tokens
    prefix_caching: bool = True

    def __post_init__(self) -> None:
        for field, least in _LEAST.items():
            if getattr(self, field) < least:
                raise ValueError(f"{field} is {getattr(self, field)}: must be at least {least}")
        if self.max_step_tokens < self.max_num_seqs * (1 + self.num_drafts):
            raise ValueError(
                f"max_step_tokens is {self.max_step_tokens}: must be at least max_num_seqs * (1 + num_drafts) = "
                f"{self.max_num_seqs * (1 + self.num_drafts)}, so that every running sequence can decode in one step"
            )

    @property
    def max_slots(self) -> int:
        """For Setup: the running maximum and, for those that the fence still holds, one step's slots (R4)."""
        return 2 * self.max_num_seqs


_LEAST = {
    "block_size": 1,
    "max_num_seqs": 1,
    "max_step_tokens": 1,
    "depth": 1,
    "long_step": 0,
    "short_step": 0,
    "short_depth": 1,
    "num_drafts": 0,
    "max_model_len": 0,
    "max_waiting": 1,
    "max_waiting_tokens": 1,
}

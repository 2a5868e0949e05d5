"""What the engine is told once. Every number here is a limit that a refused request can be told by name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tenant:
    """One who shares the service with others. Raises ValueError, naming tenant and field, for what nobody can have."""

    name: str = ""  # of callers that name none
    weight: float = 1.0  # share of the tokens, beside the others' weights
    tokens_per_second: float = 0.0  # quota of prompt and output tokens; 0: none
    burst: float = 0.0  # tokens at once, after a pause; a longer prompt is refused
    best_priority: float = -100.0  # the smallest that it may ask for

    def __post_init__(self) -> None:
        for field in ("tokens_per_second", "burst"):
            if not 0 <= getattr(self, field) <= 1e12:
                raise ValueError(f"{field} of tenant {self.name!r} is {getattr(self, field):g}: must be in 0..1e12")
        if (self.tokens_per_second > 0) != (self.burst >= 1):
            raise ValueError(
                f"tenant {self.name!r} has tokens_per_second {self.tokens_per_second:g} and burst {self.burst:g}: "
                "a quota is both, a burst of at least 1"
            )
        if not 0.001 <= self.weight <= 1000:
            raise ValueError(f"weight of tenant {self.name!r} is {self.weight:g}: must be in 0.001..1000")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Raises ValueError, naming the field, where the numbers could not serve anybody."""

    block_size: int = 32  # tokens
    max_num_seqs: int = 64  # sequences running at once in each worker group
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
    tenants: tuple[Tenant, ...] = ()
    default_tenant: Tenant = Tenant()  # what holds for each that is not in `tenants`
    prompt_cost: float = 1.0  # of a computed prompt token, on a tenant's counter
    output_cost: float = 2.0  # of an output token: it takes a step of its own

    def __post_init__(self) -> None:
        for field, least in _LEAST.items():
            if getattr(self, field) < least:
                raise ValueError(f"{field} is {getattr(self, field)}: must be at least {least}")
        for field in ("prompt_cost", "output_cost"):
            if not 0 < getattr(self, field) <= 1000:
                raise ValueError(f"{field} is {getattr(self, field):g}: must be over 0 and at most 1000")
        names = [tenant.name for tenant in self.tenants]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"tenants holds {twice!r} twice")
        if self.max_step_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_step_tokens is {self.max_step_tokens}: must be at least max_num_seqs = {self.max_num_seqs}, "
                "so that every running sequence can decode in one step"
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

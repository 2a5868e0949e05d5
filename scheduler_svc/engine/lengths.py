"""How long a sequence may become, and who says so: the configuration, or a worker group."""

from __future__ import annotations

from scheduler_svc.engine.config import EngineConfig
from scheduler_svc.engine.events import WorkerReady
from scheduler_svc.engine.sequence import Sequence


class Lengths:
    """A sequence may come into any group, so none becomes longer than the smallest holds."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._most = config.max_model_len  # 0 until a worker or the configuration has said
        self._reason = f"max_model_len {config.max_model_len}"
        self._limits: dict[int, tuple[int, str]] = {}  # of each group that ever was ready, and where it comes from

    def learn(self, ready: WorkerReady) -> bool:
        """Whether that changes anything."""
        config, blocks, before = self._config, ready.num_blocks - 1, self._most
        limits = [
            (config.max_model_len, f"max_model_len {config.max_model_len}"),
            (ready.max_model_len, f"max_model_len {ready.max_model_len}"),
            (blocks * config.block_size, f"the {blocks} KV blocks of {config.block_size} tokens"),
        ]
        self._limits[ready.group] = min(limit for limit in limits if limit[0])
        self._most, self._reason = min(self._limits.values())
        return self._most != before

    def of(self, sequence: Sequence) -> int:
        """Tokens in all, prompt and output."""
        limit = sequence.prompt_len + sequence.sampling.max_tokens
        return min(limit, self._most) if self._most else limit

    def refusal(self, sequence: Sequence) -> str:
        """Why there is no room for what it has to become; empty if there is."""
        if not self._most or sequence.prompt_len + sequence.samples <= self._most:
            return ""
        more = " and one more exceed" if sequence.samples else " exceeds"
        return f"the prompt of {sequence.prompt_len} tokens{more} {self._reason}"

"""Random plans as a scheduler could make them, of sequences that come, grow and go."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from protos.wire import Admit, Epoch, Row, Sampling, StepPlan
from tests.models.stepping import tokens

EPOCH = Epoch(1, 1)


@dataclass
class Stream:
    """A sequence while it has a slot. `known` counts tokens, those included that steps in flight are sampling."""

    slot: int
    prompt: list[int]
    output: int
    forced: bool
    sampling: Sampling
    masked: bool = False
    computed: int = 0
    known: int = 0
    blocks: list[int] = field(default_factory=list)


class Plans:
    """At most `slots` streams at a time, whose rows have at most `chunk` positions. `eager`: how likely one comes."""

    def __init__(
        self, rng: random.Random, *, vocab: int, slots: int = 4, block_size: int = 8, blocks: int = 64, chunk: int = 12,
        eager: float = 0.6, outputs: tuple[int, int] = (1, 8),
    ) -> None:  # fmt: skip
        self._rng, self._vocab, self._block_size, self._chunk = rng, vocab, block_size, chunk
        self._eager, self._outputs = eager, outputs
        self._slots = list(range(1, slots + 1))
        self._blocks = list(range(1, blocks))
        rng.shuffle(self._blocks)
        self._running: list[Stream] = []

    def take(
        self, count: int, streams: int, wishes: Sequence[dict[str, Any]] = (), masked: float = 0.0, **sampling: Any
    ) -> Iterator[StepPlan]:
        """`masked`: how many of the streams are structured. `wishes`: sampling parameters that one of them has."""
        rng, self._masked = self._rng, masked
        for step in range(1, count + 1):
            release = [self._leave(s) for s in list(self._running) if s.known >= len(s.prompt) + s.output]
            admit = []
            while streams and self._slots and rng.random() < self._eager:
                streams -= 1
                admit.append(self._enter({**sampling, **(rng.choice(wishes) if wishes else {})}))
            rows = [self._row(s) for s in self._running if s.known > s.computed and rng.random() < 0.9]
            rng.shuffle(rows)
            yield StepPlan(EPOCH, step, release, admit, [], rows)

    def _enter(self, sampling: dict[str, Any]) -> Admit:
        rng = self._rng
        output = rng.randint(*self._outputs)
        prompt = tokens(rng.randint(1, 25), self._vocab, seed=rng.getrandbits(30))
        fields = {"max_tokens": 99, "seed": rng.getrandbits(64), **sampling}
        stream = Stream(self._slots.pop(0), prompt, output, rng.random() < 0.3, Sampling(**fields))
        stream.masked = rng.random() < self._masked
        stream.known = len(prompt)
        self._running.append(stream)
        blocks = self._grown(stream, rng.randint(0, len(prompt)))
        return Admit(stream.slot, prompt, len(prompt), [blocks], stream.sampling)

    def _leave(self, stream: Stream) -> int:
        self._running.remove(stream)
        self._blocks += stream.blocks
        self._slots.append(stream.slot)
        return stream.slot

    def _row(self, stream: Stream) -> Row:
        rng, force = self._rng, []
        in_prompt = stream.computed < len(stream.prompt)
        if stream.forced and not in_prompt and rng.random() < 0.4:
            force = tokens(rng.randint(1, 3), self._vocab, seed=rng.getrandbits(30))
            stream.known += len(force)
        left = stream.known - stream.computed
        count = min(left, rng.randint(1, self._chunk)) if in_prompt else left
        start = stream.computed if in_prompt else -1
        new = self._grown(stream, stream.computed + count)
        samples = count == left
        stream.computed += count
        stream.known += samples
        return Row(
            stream.slot,
            start,
            count,
            0,
            [new] if new else [],
            sample=samples,
            masked=samples and stream.masked,
            append_token_ids=force,
        )

    def _grown(self, stream: Stream, length: int) -> list[int]:
        need = -(-length // self._block_size) - len(stream.blocks)
        new = [self._blocks.pop(0) for _ in range(max(0, need))]
        stream.blocks += new
        return new

"""A worker and a clock without a device or time: pure python, deterministic, strict about what a real worker may do.

FakeWorker models the content of every KV position: which token stood there, after which prefix. A plan that reads a
position whose content is not the reader's own prefix, or writes where it must not, is an error, so that a scheduler's
mistake shows as one, and not only as a different token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

from protos.engine_wire import FinishReason, Submit
from protos.wire import Admit, Copy, Direction, Epoch, Row, RowResult, Sampling, StepPlan, StepResult, TokenLogprobs
from scheduler_svc.engine.events import Verdict

_MASK = (1 << 64) - 1


class FakeWorkerError(AssertionError):
    """A plan that no worker could follow."""


class FakeClock:
    """Time that passes when it is told to."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> float:
        self.now += seconds
        return self.now


def mix(*values: int) -> int:
    """64 bits that depend on all values (splitmix64's finalizer, chained)."""
    state = 0x9E3779B97F4A7C15
    for value in values:
        state = ((state ^ (value & _MASK)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def sample(sampling: Sampling, vocab_size: int, prefix: int, position: int, num_generated: int) -> int:
    """The token at `position` after a prefix of that digest: f(seed, position, prefix)."""
    token = mix(sampling.seed, position, prefix) % vocab_size
    ends = sampling.eos_token_ids + sampling.stop_token_ids
    while num_generated < sampling.min_tokens and token in ends:
        token = (token + 1) % vocab_size
    return token


@dataclass(frozen=True)
class FakeGrammar:
    """Allows and forces by position alone, and ends after some tokens: all of it by its seed."""

    seed: int

    @property
    def length(self) -> int:
        return mix(self.seed) % 16

    @cache  # noqa: B019 (there are a few dozen)
    def forced(self, count: int, vocab_size: int) -> list[int]:
        """What has to follow `count` output tokens."""
        run: list[int] = []
        while count + len(run) < self.length and mix(self.seed, (count + len(run)) // 4) % 3 == 0:
            run.append(mix(self.seed, count + len(run), 1) % vocab_size)
        return run

    def choose(self, token: int, count: int, vocab_size: int) -> int:
        """The first allowed one from `token` on."""
        if forced := self.forced(count, vocab_size):
            return forced[0]
        return next(
            t % vocab_size for t in range(token, token + 2 * vocab_size) if t % vocab_size in self._allowed(count)
        )

    @cache  # noqa: B019
    def _allowed(self, count: int) -> frozenset[int]:
        return frozenset(t for t in range(64) if mix(self.seed, count, t, 2) % 3 == 0) | {0}

    def verdict(self, submit: Submit, count: int, vocab_size: int) -> Verdict:
        """Behind `count` output tokens, as the loop says it."""
        sampling = submit.sampling
        is_told = sampling.logprobs < 0 and sampling.prompt_logprobs < 0
        run = self.forced(count, vocab_size) if is_told else []
        ends = FinishReason.STOP if count + len(run) >= self.length else None
        return Verdict(submit.request_id, submit.index, run, ends)


def fake_grammar(submit: Submit) -> FakeGrammar | None:
    return FakeGrammar(int(submit.grammar.text)) if submit.grammar else None


def root(domain: bytes, adapter: str) -> int:
    """`adapter`: its digest."""
    return mix(int.from_bytes(domain, "little"), int.from_bytes(adapter.encode(), "little"))


def expected(submit: Submit, vocab_size: int, max_model_len: int, domain: bytes) -> tuple[list[int], FinishReason]:
    """The oracle, one token after the other: the stream's new tokens, and why it ends."""
    tokens, prefix = list(submit.token_ids), root(domain, submit.adapter_digest)
    limit = min(submit.prompt_len + submit.sampling.max_tokens, max_model_len)
    grammar = fake_grammar(submit)
    for token in tokens:
        prefix = mix(prefix, token)
    if not submit.sampling.max_tokens:
        return [], FinishReason.STOP
    while len(tokens) < limit:
        count = len(tokens) - submit.prompt_len
        if grammar and count >= grammar.length:
            return tokens[len(submit.token_ids) :], FinishReason.STOP
        token = sample(submit.sampling, vocab_size, prefix, len(tokens), count)
        if grammar:
            token = grammar.choose(token, count, vocab_size)
        tokens.append(token)
        prefix = mix(prefix, token)
        if token in submit.sampling.eos_token_ids + submit.sampling.stop_token_ids:
            return tokens[len(submit.token_ids) :], FinishReason.STOP
    return tokens[len(submit.token_ids) :], FinishReason.LENGTH


def pooled(pooling: str, prefix: int) -> bytes:
    """Of a prompt of that digest: two floats' worth of bytes."""
    return mix(*pooling.encode(), prefix).to_bytes(8, "little")


def expected_pooled(submit: Submit, domain: bytes) -> bytes:
    prefix = root(domain, submit.adapter_digest)
    for token in submit.token_ids:
        prefix = mix(prefix, token)
    return pooled(submit.pooling, prefix) if submit.pooling else b""


@dataclass
class FakeSlot:
    """What a worker holds of one sequence."""

    admit: Admit
    tokens: list[int]
    prefixes: list[int]  # prefixes[i] is the digest of tokens[:i]; one more than tokens
    blocks: list[int]
    computed: int = 0
    sampled: bool = False  # since the Admit
    drafts: list[int] = field(default_factory=list)  # proposed after the last sample, for the next row

    def append(self, token: int) -> None:
        self.tokens.append(token)
        self.prefixes.append(mix(self.prefixes[-1], token))


class FakeWorker:
    """Runs plans in order. Raises FakeWorkerError where a plan breaks R1, R2's alignment or the worker's memory."""

    def __init__(
        self,
        epoch: Epoch,
        *,
        num_blocks: int,
        block_size: int,
        max_slots: int,
        align: int = 1,
        vocab_size: int = 32,
        max_model_len: int = 1 << 30,
        draft_quality: float = 0.6,
        num_host_blocks: int = 0,
    ) -> None:
        self.epoch = epoch
        self.num_blocks, self.block_size, self.max_slots, self.align = num_blocks, block_size, max_slots, align
        self.vocab_size, self.max_model_len = vocab_size, max_model_len
        self.draft_quality = draft_quality  # share of drafts that are right
        self.step = 0
        self.adapters: dict[str, str] = {}  # digests of those that are loaded, by name
        self.grammars: Mapping[int, FakeGrammar] = {}  # of this step
        self.slots: dict[int, FakeSlot] = {}
        self.kv: list[list[int]] = [[0] * block_size for _ in range(num_blocks)]  # prefix digest, its token included
        self.written: list[list[int]] = [[0] * block_size for _ in range(num_blocks)]  # in which step
        self.host: list[list[int]] = [[] for _ in range(num_host_blocks)]  # as kv; empty: never filled
        self.host_written = [0] * num_host_blocks  # in which step
        self.loaded: dict[int, int] = {}  # blocks that this step copies from the host, and the slot that reads each

    def run(self, plan: StepPlan, grammars: Mapping[int, FakeGrammar] | None = None) -> StepResult:
        """`grammars`: by slot, of the rows that have a mask."""
        self.grammars = grammars or {}
        _demand(plan.epoch == self.epoch and plan.step == self.step + 1, f"step {plan.step} after {self.step}")
        self.step = plan.step
        for slot in plan.release:
            _demand(slot in self.slots, f"release of slot {slot}, which holds nothing")
            del self.slots[slot]
        for admit in plan.admit:
            self._admit(admit)
        self.loaded = {}
        for copy in plan.copies:
            self._copy(copy)
        _demand(len({row.slot for row in plan.rows}) == len(plan.rows) > 0, "a slot has two rows, or none has one")
        rows = [self._row(row, plan.num_propose) for row in plan.rows]
        _demand(all(self.loaded.values()), f"blocks were copied from the host for nobody: {self.loaded}")
        return StepResult(plan.epoch, plan.step, rows, [host_block for _, _, host_block in plan.copies])

    def _copy(self, copy: Copy) -> None:
        direction, block, host_block = copy
        _demand(0 < block < self.num_blocks, f"no block {block}")
        _demand(0 <= host_block < len(self.host), f"no host block {host_block}")
        if direction is Direction.TO_HOST:
            _demand(0 not in self.kv[block] and block not in self.loaded, f"block {block} is copied before it is full")
            self.host[host_block] = list(self.kv[block])
            self.host_written[host_block] = self.step
        else:
            _demand(bool(self.host[host_block]), f"host block {host_block} was never filled")
            _demand(self.host_written[host_block] < self.step, f"host block {host_block}: the same step fills it")
            self.kv[block] = list(self.host[host_block])
            self.written[block] = [self.step] * self.block_size
            self.loaded[block] = 0

    def load_adapter(self, name: str, digest: str) -> None:
        _demand(name not in self.adapters, f"adapter {name!r} is loaded already")
        self.adapters[name] = digest

    def unload_adapter(self, name: str) -> None:
        _demand(name in self.adapters, f"adapter {name!r} is not loaded")
        del self.adapters[name]

    def _admit(self, admit: Admit) -> None:
        _demand(0 < admit.slot <= self.max_slots, f"no slot {admit.slot}")
        _demand(admit.slot not in self.slots, f"slot {admit.slot} is taken")
        _demand(not admit.adapter or admit.adapter in self.adapters, f"adapter {admit.adapter!r} is not loaded")
        slot = FakeSlot(admit, [], [root(admit.domain, self.adapters.get(admit.adapter, ""))], [])
        for token in admit.token_ids:
            slot.append(token)
        self._extend(slot, admit.block_ids)
        self.slots[admit.slot] = slot

    def _extend(self, slot: FakeSlot, block_ids: list[list[int]]) -> None:
        for block in block_ids[0] if block_ids else ():
            _demand(0 < block < self.num_blocks, f"no block {block}")
            _demand(block not in slot.blocks, f"block {block} is twice in one table")
            slot.blocks.append(block)

    def _row(self, row: Row, num_propose: int) -> RowResult:
        _demand(row.slot in self.slots, f"a row for slot {row.slot}, which holds nothing")
        slot = self.slots[row.slot]
        self._extend(slot, row.new_block_ids)
        _demand(row.masked == (row.slot in self.grammars), f"slot {row.slot}: masked is {row.masked}")
        _demand(not (row.masked and row.num_drafts) and row.masked <= row.sample, "a masked row only samples")
        for token in row.append_token_ids:
            slot.append(token)
        known, start = len(slot.tokens), slot.computed
        if row.start >= 0:
            if not slot.sampled and not slot.computed:
                slot.computed = start = row.start  # the first row says how much the cache holds
            _demand(row.start == start, f"slot {row.slot} starts at {row.start}, has computed {start}")
            _demand(row.start + row.num_tokens <= known, f"slot {row.slot}: the scheduler cannot know so many tokens")
        count = min(row.num_tokens, known - start)
        _demand(count > 0, f"slot {row.slot} has nothing to compute")
        _demand(slot.sampled or start % self.align == 0, f"slot {row.slot} starts at {start}, align is {self.align}")
        samples = slot.admit.sampling.max_tokens > 0
        _demand(row.sample == (samples and start + count == known), f"slot {row.slot} samples where it should not")
        if not slot.computed and slot.admit.pooling in ("mean", "cls"):
            _demand(start == 0, f"slot {row.slot} pools by {slot.admit.pooling}, and begins at {start}")
        self._read(slot, start)
        self._write(slot, start, slot.prefixes[start + 1 : start + count + 1])
        slot.computed = start + count
        prompt_logprobs = self._prompt_logprobs(slot, row, start, count)
        if not row.sample:
            pools = slot.admit.pooling and slot.computed == known
            state = pooled(slot.admit.pooling, slot.prefixes[-1]) if pools else b""
            return RowResult(row.slot, known, [], prompt_logprobs=prompt_logprobs, pooled=state)
        drafts = slot.drafts[: row.num_drafts]
        token_ids = self._verify(slot, drafts)
        slot.computed, slot.sampled = len(slot.tokens) - 1, True
        slot.drafts = self._propose(slot, num_propose)
        logprobs = (
            [_logprob(t, known + i) for i, t in enumerate(token_ids)] if slot.admit.sampling.logprobs >= 0 else []
        )
        return RowResult(row.slot, known, token_ids, logprobs, len(drafts), prompt_logprobs)

    def _verify(self, slot: FakeSlot, drafts: list[int]) -> list[int]:
        """Writes the drafts' KV, accepts those that equal the target's own samples, and adds the bonus token."""
        prefix, digests = slot.prefixes[-1], []
        for draft in drafts:
            prefix = mix(prefix, draft)
            digests.append(prefix)
        self._write(slot, len(slot.tokens), digests)
        accepted: list[int] = []
        for draft in [*drafts, -1]:
            token = self._sample(slot, slot.prefixes[-1], len(slot.tokens))
            slot.append(token)
            accepted.append(token)
            if token != draft:
                break
        return accepted

    def _propose(self, slot: FakeSlot, count: int) -> list[int]:
        prefix, position, drafts = slot.prefixes[-1], len(slot.tokens), []
        for i in range(count):
            token = self._sample(slot, prefix, position + i)
            if mix(prefix, 7) % 1000 >= self.draft_quality * 1000:
                token = (token + 1) % self.vocab_size
            drafts.append(token)
            prefix = mix(prefix, token)
        return drafts

    def _sample(self, slot: FakeSlot, prefix: int, position: int) -> int:
        admit, count = slot.admit, position - slot.admit.prompt_len
        token = sample(admit.sampling, self.vocab_size, prefix, position, count)
        grammar = self.grammars.get(admit.slot)
        return grammar.choose(token, count, self.vocab_size) if grammar else token

    def _read(self, slot: FakeSlot, end: int) -> None:
        for start in range(0, end, self.block_size):
            block, count = slot.blocks[start // self.block_size], min(self.block_size, end - start)
            where = f"slot {slot.admit.slot} reads positions from {start} on in block {block}"
            digests = slot.prefixes[start + 1 : start + 1 + count]
            _demand(self.kv[block][:count] == digests, f"{where}, which holds something else")
            if block in self.loaded:
                reader = self.loaded[block] = self.loaded[block] or slot.admit.slot
                _demand(reader == slot.admit.slot, f"{where}, which the same step copies there for slot {reader}")
                continue
            _demand(max(self.written[block][:count]) < self.step, f"{where}, which the same step fills")

    def _write(self, slot: FakeSlot, start: int, digests: list[int]) -> None:
        limit = min(slot.admit.prompt_len + slot.admit.sampling.max_tokens, self.max_model_len)
        for position, digest in enumerate(digests, start):
            # The last token of a stream that samples is never fed, so its position is not written (R1).
            _demand(
                position < limit - (slot.admit.sampling.max_tokens > 0),
                f"slot {slot.admit.slot} writes position {position}, its limit is {limit}",
            )
            _demand(
                position // self.block_size < len(slot.blocks),
                f"slot {slot.admit.slot} writes position {position} beyond its {len(slot.blocks)} blocks",
            )
            block = slot.blocks[position // self.block_size]
            self.kv[block][position % self.block_size] = digest
            self.written[block][position % self.block_size] = self.step

    def _prompt_logprobs(self, slot: FakeSlot, row: Row, start: int, count: int) -> list[TokenLogprobs]:
        if slot.admit.sampling.prompt_logprobs < 0:
            return []
        first = max(start + 1, slot.admit.sampling.prompt_logprobs_from)
        last = min(start + count, slot.admit.prompt_len - 1)
        return [_logprob(slot.tokens[position], position) for position in range(first, last + 1)]


def _logprob(token: int, position: int) -> TokenLogprobs:
    return TokenLogprobs(token, -float(position), 1)


def _demand(holds: bool, complaint: str) -> None:
    if not holds:
        raise FakeWorkerError(complaint)

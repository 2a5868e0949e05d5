"""A backend without a model: the next token is a hash of seed, position and prefix, so any stream can be checked.

It keeps slots, block tables and KV as a real one does, with one word for a token's K and V: the hash of the prefix that
ends there. A plan that reads a position that nobody filled, or that somebody else overwrote, is an error, not a guess.
Of several ranks each does all of it. Options come with the model's name: `fake:vocab=512,delay_ms=20,poison=7`.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields

from protos.wire import Admit, Copy, Direction, Mask, Phase, Row, RowResult, Sampling, Setup, StepPlan, TokenLogprobs
from worker_svc.backends.base import BackendError, Capacity, Landing, Progress

PREFIX = "fake:"
_WORD = (1 << 64) - 1
HIDDEN_SIZE = 8  # floats of a pooled output
_BYTES_PER_TOKEN = 1024  # what a token's KV pretends to weigh when `Setup.kv_bytes` sizes the pool


@dataclass(frozen=True)
class Options:
    """Whole numbers; −1 is off."""

    vocab: int = 512
    blocks: int = 1024  # null block included; `Setup.kv_bytes` goes first
    context: int = 8192
    align: int = 1
    delay_ms: int = 0  # a step takes at least this long
    overlap: int = 0  # 1: as a device that computes beside its caller; a step begins when the one before has ended
    load_ms: int = 0
    load_fails: int = -1  # 0: a BackendError; 1: an exception that another try might survive; 2: death
    poison: int = -1  # a step over a prompt with this token kills the process …
    fault: int = -1  # … or raises …
    exact: int = 1  # 0: it says that it is not
    hang: int = -1  # … or never ends

    @classmethod
    def parse(cls, model: str) -> Options:
        """Raises BackendError for an unknown option or a value that is no number."""
        if not model.startswith(PREFIX):
            return cls()  # a real model's path with `--backend fake`
        known = {f.name for f in fields(cls)}
        values = {}
        for item in filter(None, model.removeprefix(PREFIX).split(",")):
            name, _, value = item.partition("=")
            if name not in known or not value.lstrip("-").isdecimal():
                raise BackendError(f"model {model!r}: {item!r} is not one of {', '.join(sorted(known))} with a number")
            values[name] = int(value)
        return cls(**values)


def extend(prefix_hash: int, token: int) -> int:
    return ((prefix_hash ^ (token + 1)) * 0x9E3779B97F4A7C15 + 1) & _WORD


def draw(seed: int, position: int, prefix_hash: int, vocab: int) -> int:
    """splitmix64's finalizer over all that a token may depend on."""
    z = (prefix_hash + seed * 0xBF58476D1CE4E5B9 + position * 0x94D049BB133111EB) & _WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _WORD
    return (z ^ (z >> 31)) % vocab


def expected(token_ids: list[int], sampling: Sampling, vocab: int = Options.vocab) -> list[int]:
    """The output that an undisturbed run gives: the oracle of every test with this backend."""
    slot = _Slot(list(token_ids), len(token_ids), sampling, [])
    ends = {*sampling.stop_token_ids, *sampling.eos_token_ids}
    while slot.num_output < sampling.max_tokens:
        token = slot.next_token(vocab, None)
        slot.append(token)
        if token in ends:
            break
    return slot.token_ids[slot.prompt_len :]


def pooled(token_ids: list[int], pooling: str) -> bytes:
    """Of states that are hashes of the prefix that ends there: what a prompt is pooled to."""
    prefix, states = 0, []
    for token in token_ids:
        prefix = extend(prefix, token)
        states.append([draw(i, 0, prefix, 2001) / 1000 - 1 for i in range(HIDDEN_SIZE)])
    if pooling == "mean":
        return struct.pack(
            f"<{HIDDEN_SIZE}f", *(math.fsum(values) / len(states) for values in zip(*states, strict=True))
        )
    return struct.pack(f"<{HIDDEN_SIZE}f", *states[-1 if pooling == "last" else 0])


@dataclass
class _Slot:
    token_ids: list[int]
    prompt_len: int
    sampling: Sampling
    table: list[int]  # block ids in position order
    pooling: str = ""
    computed: int = -1  # positions whose KV is written; −1: not begun, the first row says where
    hashes: list[int] = field(default_factory=list)  # of the prefix that ends at each position
    drafts: list[int] = field(default_factory=list)  # proposed behind the tokens
    computing: list[int] = field(default_factory=list)  # those of them that the step computes

    def __post_init__(self) -> None:
        tokens, self.token_ids = self.token_ids, []
        for token in tokens:
            self.append(token)

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.prompt_len

    def append(self, token: int) -> None:
        self.token_ids.append(token)
        self.hashes.append(extend(self.hashes[-1] if self.hashes else 0, token))

    def next_token(self, vocab: int, allowed: memoryview | None) -> int:
        sampling = self.sampling
        seed = sampling.seed if sampling.temperature > 0 else 0
        token = draw(seed, len(self.token_ids), self.hashes[-1], vocab)
        early = self.num_output < sampling.min_tokens
        banned = {*sampling.stop_token_ids, *sampling.eos_token_ids} if early else set()
        for step in range(vocab):
            candidate = (token + step) % vocab
            if candidate not in banned and (allowed is None or allowed[candidate // 8] >> (candidate % 8) & 1):
                return candidate
        raise ValueError("a mask allows no token")

    def verified(self, vocab: int) -> list[int]:
        """Appends what follows while it is what the drafts say, and the first token that is not."""
        start = len(self.token_ids)
        for draft in [*self.computing, -1]:
            self.append(self.next_token(vocab, None))
            if self.token_ids[-1] != draft:
                break
        self.computed = len(self.token_ids) - 1
        return self.token_ids[start:]

    def propose(self, count: int, vocab: int) -> None:
        """Tokens that will follow, of which one in three is wrong."""
        length = len(self.token_ids)
        for _ in range(count):
            wrong = self.hashes[-1] % 3 == 0
            self.append((self.next_token(vocab, None) + wrong) % vocab)
        self.drafts = self.token_ids[length:]
        del self.token_ids[length:], self.hashes[length:]


@dataclass(frozen=True)
class _Landing:
    results: list[RowResult]
    due: float

    def has_come(self) -> bool:
        return time.monotonic() >= self.due

    def rows(self) -> list[RowResult]:
        time.sleep(max(0.0, self.due - time.monotonic()))
        return self.results


class FakeBackend:
    """Raises ValueError for a plan that breaks a rule of the wire."""

    def __init__(self, land: Callable[[], None] = lambda: None) -> None:
        self._land = land
        self._busy_until = 0.0  # with steps in flight
        self._options = Options()
        self._block_size = self._max_slots = 0
        self._kv: list[list[int]] = []  # [block][offset] prefix hash, 0 where nothing was written
        self._host: list[list[int]] = []  # as _kv; empty where nothing was copied to
        self._slots: dict[int, _Slot] = {}
        self._rows: list[Row] = []
        self._num_propose = 0
        self._starts: list[int] = []  # of the last forward's rows

    def load(self, setup: Setup, progress: Progress) -> Capacity:
        options = self._options = Options.parse(setup.model)
        if setup.max_model_len > options.context:
            raise BackendError(f"max_model_len {setup.max_model_len} is beyond the model's {options.context}")
        if setup.quantization:
            raise BackendError("the fake backend has no quantization")
        if options.load_fails == 0:
            raise BackendError(f"model {setup.model!r} cannot be read, as asked")
        if options.load_fails == 1:
            raise RuntimeError("loading failed, as asked")
        if options.load_fails == 2:
            os._exit(3)
        for part in range(4):
            progress(Phase.LOADING, part / 4)
            time.sleep(options.load_ms / 4000)
        self._block_size, self._max_slots = setup.block_size, setup.max_slots
        num_blocks = setup.kv_bytes // (setup.block_size * _BYTES_PER_TOKEN) if setup.kv_bytes else options.blocks
        if num_blocks < 2:
            raise BackendError(f"{setup.kv_bytes} bytes of KV hold no block of {setup.block_size} tokens")
        if 0 < setup.kv_host_bytes < setup.block_size * _BYTES_PER_TOKEN:
            raise BackendError(f"{setup.kv_host_bytes} bytes of the host hold no block of {setup.block_size} tokens")
        self._kv = [[0] * setup.block_size for _ in range(num_blocks)]
        self._host = [[] for _ in range(setup.kv_host_bytes // (setup.block_size * _BYTES_PER_TOKEN))]
        return Capacity(
            num_blocks=num_blocks,
            num_host_blocks=len(self._host),
            align=options.align,
            exact=bool(options.exact),
            device="cpu",
            dtype="float32" if setup.dtype == "auto" else setup.dtype,
            backend="fake",
            max_model_len=setup.max_model_len or options.context,
            vocab_size=options.vocab,
            hidden_size=HIDDEN_SIZE,
            fingerprint=hashlib.blake2b(f"fake {options.vocab}".encode(), digest_size=8).hexdigest(),
        )

    def reset(self, setup: Setup) -> None:
        self._slots.clear()
        self._kv = [[0] * self._block_size for _ in self._kv]
        self._host = [[] for _ in self._host]

    def forward(self, plan: StepPlan) -> None:
        for slot in plan.release:
            if self._slots.pop(slot, None) is None:
                raise ValueError(f"release of slot {slot}, which holds nothing")
        for admit in plan.admit:
            self._admit(admit)
        for copy in plan.copies:
            self._copy(copy)
        self._rows, self._starts, self._num_propose = plan.rows, [], plan.num_propose
        if len({row.slot for row in plan.rows}) != len(plan.rows):
            raise ValueError("two rows name one slot")
        if not self._options.overlap:
            time.sleep(self._options.delay_ms / 1000)
        for row in plan.rows:
            self._starts.append(self._compute(row))

    def sample(self, mask: Mask | None) -> list[RowResult] | Landing:
        results = self._sample(mask)
        if not self._options.overlap:
            return results
        now = time.monotonic()
        self._busy_until = max(now, self._busy_until) + self._options.delay_ms / 1000
        timer = threading.Timer(self._busy_until - now, self._land)
        timer.daemon = True
        timer.start()
        return _Landing(results, self._busy_until)

    def _sample(self, mask: Mask | None) -> list[RowResult]:
        results = []
        for i, (row, computed_from) in enumerate(zip(self._rows, self._starts, strict=True)):
            slot = self._slots[row.slot]
            start = len(slot.token_ids)
            prompt_logprobs = []
            if slot.sampling.prompt_logprobs >= 0:
                first = max(computed_from + 1, slot.sampling.prompt_logprobs_from)
                scored = slot.token_ids[first : min(slot.computed + 1, slot.prompt_len)]
                prompt_logprobs = [self._logprobs(token, slot.sampling.prompt_logprobs) for token in scored]
            tokens: list[int] = []
            if row.sample and row.masked:
                tokens = [slot.next_token(self._options.vocab, self._allowed(mask, i))]
                slot.append(tokens[0])
                slot.drafts = []
            elif row.sample:
                tokens = slot.verified(self._options.vocab)
                slot.propose(self._num_propose, self._options.vocab)
            wanted = slot.sampling.logprobs
            logprobs = [self._logprobs(token, wanted) for token in tokens] if wanted >= 0 else []
            pools = slot.pooling and slot.computed == slot.prompt_len
            state = pooled(slot.token_ids, slot.pooling) if pools else b""
            results.append(RowResult(row.slot, start, tokens, logprobs, len(slot.computing), prompt_logprobs, state))
        return results

    def close(self) -> None:
        self._slots.clear()
        self._kv.clear()
        self._host.clear()

    def _admit(self, admit: Admit) -> None:
        if not 1 <= admit.slot <= self._max_slots or admit.slot in self._slots:
            raise ValueError(f"admit to slot {admit.slot}, which is taken or not in 1..{self._max_slots}")
        if not 1 <= admit.prompt_len <= len(admit.token_ids):
            raise ValueError(f"admit with prompt_len {admit.prompt_len} of {len(admit.token_ids)} tokens")
        slot = _Slot(admit.token_ids, admit.prompt_len, admit.sampling, [], admit.pooling)
        self._slots[admit.slot] = slot
        self._add_blocks(slot, admit.block_ids)

    def _copy(self, copy: Copy) -> None:
        direction, block, host_block = copy
        if not (1 <= block < len(self._kv) and 0 <= host_block < len(self._host)):
            raise ValueError(f"a copy names block {block} and host block {host_block}, which are not both there")
        if direction is Direction.TO_HOST:
            self._host[host_block] = list(self._kv[block])
        elif self._host[host_block]:
            self._kv[block] = list(self._host[host_block])
        else:
            raise ValueError(f"host block {host_block} is read, and nothing was copied there")

    def _add_blocks(self, slot: _Slot, block_ids: list[list[int]]) -> None:
        for block in block_ids[0] if block_ids else []:
            if not 1 <= block < len(self._kv) or block in slot.table:
                raise ValueError(f"block {block} is in the table already or not in 1..{len(self._kv) - 1}")
            slot.table.append(block)

    def _compute(self, row: Row) -> int:
        """Writes the row's KV; returns its first position."""
        slot = self._slots.get(row.slot)
        if slot is None:
            raise ValueError(f"a row names slot {row.slot}, which holds nothing")
        self._suffer(slot.token_ids[: slot.prompt_len])
        self._add_blocks(slot, row.new_block_ids)
        for token in row.append_token_ids:
            slot.append(token)
            slot.drafts = []
        if row.num_tokens < 1 or (row.num_drafts and (row.masked or not row.sample)):
            raise ValueError(f"slot {row.slot}: a row of {row.num_tokens} tokens and {row.num_drafts} drafts")
        slot.computing = slot.drafts[: row.num_drafts]
        start = slot.computed if row.start < 0 else row.start
        if start < 0 or slot.computed not in (-1, start):
            raise ValueError(f"slot {row.slot}: start {row.start}, but {slot.computed} positions are computed")
        end = start + row.num_tokens
        if row.start < 0:
            end = min(end, len(slot.token_ids))  # num_tokens is a maximum there (R1)
        if end > len(slot.token_ids) or end + len(slot.computing) > len(slot.table) * self._block_size:
            known, blocks = len(slot.token_ids), len(slot.table)
            raise ValueError(f"slot {row.slot}: positions up to {end}, with {known} tokens known and {blocks} blocks")
        if slot.pooling in ("mean", "cls") and slot.computed < 0 and start:
            raise ValueError(f"slot {row.slot} pools by {slot.pooling}, and begins at {start}")
        if row.sample and (end != len(slot.token_ids) or slot.pooling):
            raise ValueError(f"slot {row.slot}: a sample at {end} of {len(slot.token_ids)} known tokens")
        self._check_filled(row.slot, slot, start)
        hashes = slot.hashes[start:end]
        for draft in slot.computing:
            hashes.append(extend(hashes[-1], draft))
        for position, prefix_hash in enumerate(hashes, start):
            block, offset = divmod(position, self._block_size)
            self._kv[slot.table[block]][offset] = prefix_hash
        slot.computed = end
        return start

    def _check_filled(self, number: int, slot: _Slot, start: int) -> None:
        """The last written position of each block tells of its whole prefix, since it is a hash of it."""
        for last in {*range(self._block_size - 1, start, self._block_size), *([start - 1] if start else [])}:
            block, offset = divmod(last, self._block_size)
            if self._kv[slot.table[block]][offset] != slot.hashes[last]:
                raise ValueError(f"slot {number}: block {slot.table[block]} does not hold position {last}")

    def _suffer(self, prompt: list[int]) -> None:
        options = self._options
        if options.poison in prompt:
            os._exit(9)
        if options.fault in prompt:
            raise RuntimeError(f"token {options.fault} in a prompt, as asked")
        if options.hang in prompt:
            print("fake backend: hangs, as asked", file=sys.stderr, flush=True)  # so that a test knows that it does
            threading.Event().wait()

    def _allowed(self, mask: Mask | None, row: int) -> memoryview:
        if mask is None or row not in mask.rows:
            raise ValueError(f"row {row} is masked, and no mask covers it")
        width = -(-self._options.vocab // 32) * 4  # bytes
        first = mask.rows.index(row) * width
        return memoryview(mask.bitmask)[first : first + width]

    def _logprobs(self, token: int, alternatives: int) -> TokenLogprobs:
        """A uniform distribution, in which the alternatives are the ids that follow; at most the whole vocabulary."""
        vocab = self._options.vocab
        logprob, count = -math.log(vocab), min(alternatives, vocab)
        return TokenLogprobs(token, logprob, 1, tuple((token + i) % vocab for i in range(count)), (logprob,) * count)

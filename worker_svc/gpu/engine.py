"""What a step is on the device: slots, inputs, forward pass and sampling, launched one behind the other.

    plan ─► copies, words ─► rows ─► cu, positions, token ids … ─► forward ─► logits ─► sampler ─► tokens, results
            (slot state)     └────────── a graph, or eager ──────────────────┘└ a graph, or eager ┘

All memory between is allocated once and stays where it is. Rows that all sample from one position each, or from one and
its drafts, are replayed as a graph of the next larger number of rows, the rest of them null rows. Behind the sampler it
is verified which drafts stand, and new ones are proposed: all in the same graph.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

import numpy as np
import torch
from torch import Tensor

from kernels.gpu import speculation
from kernels.gpu.attention_plan import MAX_QUERIES
from kernels.gpu.slot_state import SlotState, append_tokens, prepare, scatter_words, token_adapters
from protos.wire import Copy, Direction
from worker_svc.attention.paged import PagedAttention, Rows
from worker_svc.device.base import Buffer, Device, Graph, Stream
from worker_svc.gpu.lora import Staged
from worker_svc.gpu.model import GpuModel, StepTensors
from worker_svc.gpu.pooling import Pools
from worker_svc.gpu.sample_words import SampleShape
from worker_svc.gpu.sampler import Sampler
from worker_svc.gpu.step_words import StepShape
from worker_svc.pipeline import WORD

TIMES: Final = 3  # that a step is measured: the same on every rank, since each needs the others


@dataclass(frozen=True)
class Room:
    """What a step may be at most. `num_drafts`: of a row; 0: nobody speculates."""

    rows: int
    tokens: int
    block_size: int
    num_drafts: int = 0

    @property
    def outputs(self) -> int:
        """That are sampled from."""
        return min(self.rows * (1 + self.num_drafts), self.tokens)

    def verifying(self, captured: Sequence[int]) -> list[int]:
        """Those of the captured numbers of rows that are captured with drafts, too."""
        each = 1 + self.num_drafts
        return [rows for rows in captured if self.num_drafts and each <= MAX_QUERIES and rows * each <= self.outputs]


@dataclass(frozen=True)
class _Memory:
    """Inputs and outputs of the forward pass, int32 but for the logits."""

    rows: Tensor  # [4, rows] slots, starts, most, drafts
    samples: Tensor  # [3, rows] which rows sample, where their outputs end, and how many drafts are proposed behind
    outputs: Tensor  # [2, outputs] of which row, and how many tokens before its last
    outcome: Tensor  # [3, rows] see `verify`
    cu: Tensor  # [rows + 1]
    context_lens: Tensor  # [rows]
    block_tables: Tensor  # [rows, blocks]
    token_ids: Tensor  # [tokens]
    positions: Tensor
    slot_mapping: Tensor
    adapters: Tensor  # [tokens], or of no tokens where there are no adapters
    logits: Tensor  # [outputs, vocab] float32


class GpuEngine:
    """A StepEngine. `expect` is told of each step before the pipeline launches it."""

    def __init__(
        self,
        device: Device,
        model: GpuModel,
        attention: Mapping[int, PagedAttention],
        pages: Tensor,
        state: SlotState,
        room: Room,
        captured: Sequence[int] = (),
        host: Tensor | None = None,
        progress: Callable[[float], None] = lambda share: None,
    ) -> None:
        self._model, self._attention, self._pages, self._state = model, attention, pages, state
        self._progress = progress  # of the captures
        self._host = host  # [host blocks, layers, 2, kv heads, block_size, dim], pinned: the second tier of KV
        self._sampler, self._room, self._captured = Sampler(state, room.outputs), room, captured
        self._pools = Pools(room.rows, model.spec.hidden_size, state.words.device)
        self._memory = _memory(room, state, model.spec.vocab_size)
        self._hidden: tuple[Tensor, Tensor] | None = None  # of the last step, if not captured
        self._everything = device.buffer("all that stays on the device", 1, WORD)  # one name: one stream has it
        self._forwards: dict[tuple[int, int], Graph] = {}  # by rows and positions of each
        self._samplers: dict[tuple[int, int], Graph] = {}
        self.step_seconds: list[tuple[int, float]] = []  # where it speculates: rows of one token, their seconds
        self._shape: StepShape | None = None
        self._sampling = SampleShape()

    def expect(self, shape: StepShape) -> None:
        """Of the next step. Raises ValueError where it has no room."""
        room = self._room
        if shape.rows > room.rows or shape.tokens > room.tokens or shape.outputs > room.outputs:
            raise ValueError(f"a step of {shape.rows} rows and {shape.tokens} tokens: there is room for {room}")
        self._shape = shape

    def expect_sampling(self, shape: SampleShape) -> None:
        """Of the step that is sampled next."""
        self._sampling = shape

    def pooled_words(self, shape: SampleShape) -> int:
        """That pooled outputs take back."""
        return shape.pools.ends * self._pools.hidden

    def warm_up(self, stream: Stream) -> None:
        """Largest first: the memory of its graph is enough for all the others."""
        shapes = [(rows, 1) for rows in self._captured]
        shapes += [(rows, 1 + self._room.num_drafts) for rows in self._room.verifying(self._captured)]
        for done, (rows, laid) in enumerate(sorted(shapes, key=lambda s: (s[0] * s[1], s), reverse=True), 1):
            shape = StepShape(0, rows, rows * laid, rows, rows * laid, (0, 0), rows, laid, (), (), adapted=True)
            forward, sample = self._forward(shape), self._sample(shape, SampleShape(), None)
            # Compiles, and lets libraries choose: none of it can be captured.
            for work in (self._null_rows(rows, laid), forward, sample):
                stream.run(work, **self._touches())
            self._forwards[rows, laid] = stream.capture(forward, **self._touches())
            self._samplers[rows, laid] = stream.capture(sample, **self._touches())
            if laid == 1 and self._room.num_drafts:
                self.step_seconds.append((rows, self._seconds(stream, (rows, laid))))
            self._progress(done / len(shapes))

    def _seconds(self, stream: Stream, captured: tuple[int, int]) -> float:
        """Of null rows, so of short sequences: the scheduler learns from real steps by how much others take longer."""
        taken = []
        for _ in range(TIMES):
            stream.record().wait()
            begun = time.perf_counter()
            self._forwards[captured].replay()
            self._samplers[captured].replay()
            stream.record().wait()
            taken.append(time.perf_counter() - begun)
        return median(taken)

    def _null_rows(self, rows: int, laid: int) -> Callable[[], None]:
        def work() -> None:
            memory = self._memory
            at = torch.arange(rows * laid, dtype=torch.int32, device=memory.rows.device)
            memory.rows[:, :rows] = at.new_tensor([[0], [0], [1], [laid - 1]])
            memory.samples[:, :rows] = torch.stack((at[:rows], laid * (at[:rows] + 1), 0 * at[:rows]))
            memory.outputs[:, : len(at)] = torch.stack((at // laid, laid - 1 - at % laid))

        return work

    def prepare(self, stream: Stream, plan: Buffer) -> None:
        shape, memory = self._expected(), self._memory

        def work() -> None:
            self._copy(shape.copies)
            words = _tensor(plan)
            sizes = [shape.pairs, shape.pairs, 4 * shape.rows, 3 * shape.samples, 2 * shape.outputs]
            sizes += _forced_sizes(shape)
            addresses, values, rows, samples, outputs, slots, counts, tokens = words[: sum(sizes)].split(sizes)
            scatter_words(self._state, addresses, values)
            if shape.forced[0]:
                append_tokens(self._state, slots, tokens.view(shape.forced), counts)
            memory.rows[:, : shape.rows].copy_(rows.view(4, -1))
            memory.samples[:, : shape.samples].copy_(samples.view(3, -1))
            memory.outputs[:, : shape.outputs].copy_(outputs.view(2, -1))

        stream.run(work, reads=[plan, self._everything], writes=[self._everything])

    def forward(self, stream: Stream) -> None:
        shape = self._expected()
        if graph := self._forwards.get((shape.captured, shape.laid)):
            stream.run(lambda: self._replan(shape), **self._touches())
            graph.replay()
        elif shape.rows:
            stream.run(self._forward(shape), **self._touches())

    def sample(self, stream: Stream, mask: Buffer | None, results: Buffer) -> None:
        """`mask`: the words of sample_words.py, whatever they are of."""
        shape, sampling = self._expected(), self._sampling
        reads = [self._everything, *([mask] if mask else [])]
        if not sampling.edits and (graph := self._samplers.get((shape.captured, shape.laid))):
            graph.replay()
        elif shape.samples:
            stream.run(self._sample(shape, sampling, mask), reads=reads, writes=[self._everything])

        def take() -> None:
            words = None if mask is None else _tensor(mask)[: sum(sampling.sizes)]
            logits, outcome = self._memory.logits[: shape.outputs], self._memory.outcome[:, : shape.samples]
            self._sampler.take(logits, outcome, sampling, words, self._score, _tensor(results))
            if words is not None and any(sampling.pools.sizes):
                behind = _tensor(results)[2 * shape.outputs + 3 * shape.samples + sampling.extra_results() :]
                self._pools.take(sampling.pools, words.split(sampling.sizes)[-1], self._states, behind)

        stream.run(take, reads=reads, writes=[self._everything, results])

    def put_adapter(self, stream: Stream, index: int, staged: list[Staged | None]) -> None:
        """Steps that were launched before see nothing of it, those after it see all."""
        stream.run(lambda: self._model.adapters.put(index, staged), **self._touches())

    def _copy(self, copies: Sequence[Copy]) -> None:
        """Behind all that was launched before, so that nothing of an earlier step is missing or overwritten."""
        for direction, block, host_block in copies:
            assert self._host is not None, "the packer has refused them"
            here, there = self._pages[:, :, block], self._host[host_block]
            if direction is Direction.TO_HOST:
                there.copy_(here, non_blocking=True)
            else:
                here.copy_(there, non_blocking=True)

    def _score(self, positions: Tensor, out: Tensor) -> None:
        assert self._hidden is not None, "captured steps score no prompts"
        self._model.logits(self._hidden, positions, out)

    def _states(self, positions: Tensor, out: Tensor) -> None:
        assert self._hidden is not None, "captured steps pool nothing"
        self._model.states(self._hidden, positions, out)

    def _forward(self, shape: StepShape) -> Callable[[], None]:
        def work() -> None:
            memory, rows, tokens = self._memory, shape.rows, shape.tokens
            slots, starts, most, drafts = memory.rows[:, :rows]
            step = StepTensors(
                memory.token_ids[:tokens],
                memory.positions[:tokens],
                memory.slot_mapping[:tokens],
                Rows(memory.cu[: rows + 1], memory.context_lens[:rows], memory.block_tables[:rows]),
                {window: self._plan(attention, shape) for window, attention in self._attention.items()},
                memory.adapters[:tokens] if shape.adapted and len(memory.adapters) else None,
            )
            prepare(
                self._state, slots, starts, most, drafts, self._room.block_size, shape.laid if shape.captured else 0,
                cu=step.rows.cu, context_lens=step.rows.context_lens, token_ids=step.token_ids,
                positions=step.positions, slot_mapping=step.slot_mapping,
            )  # fmt: skip
            if step.adapters is not None:
                token_adapters(self._state, slots, step.rows.cu, step.adapters)
            torch.index_select(self._state.block_tables, 0, slots, out=step.rows.block_tables)
            for window, attention in self._attention.items():
                attention.begin(step.plans[window], step.rows)
            hidden = self._model.forward(step, self._pages, self._attention)
            self._hidden = None if shape.captured else hidden
            if shape.outputs:
                of_row, behind = memory.outputs[:, : shape.outputs]
                tokens_at = step.rows.cu[1:].index_select(0, of_row) - 1 - behind
                self._model.logits(hidden, tokens_at, memory.logits[: shape.outputs])

        return work

    def _replan(self, shape: StepShape) -> None:
        for attention in self._attention.values():
            attention.replan(shape.captured, shape.context_lens)

    def _plan(self, attention: PagedAttention, shape: StepShape) -> object:
        if shape.captured:
            return attention.plan_capture(shape.captured, shape.laid)
        return attention.plan(shape.query_lens, shape.context_lens)

    def _sample(self, shape: StepShape, sampling: SampleShape, words: Buffer | None) -> Callable[[], None]:
        def work() -> None:
            memory, room, logits = self._memory, self._room, self._memory.logits[: shape.outputs]
            of_row, behind = memory.outputs[:, : shape.outputs]
            slots = memory.rows[0].index_select(0, of_row)
            positions = memory.context_lens.index_select(0, of_row) - behind
            if sampling.edits:
                assert words is not None
                edits = _tensor(words)[: sum(sampling.sizes)]
                tokens = self._sampler.sample_edited(logits, slots, positions, sampling, edits)
            else:
                tokens = self._sampler.sample(logits, slots, positions)
            rows, ends, wanted = memory.samples[:, : shape.samples]
            (slots, _, _, drafts), outcome = memory.rows, memory.outcome[:, : shape.samples]
            speculation.verify(self._state, slots, drafts, rows, ends, tokens, outcome, room.num_drafts)
            if room.num_drafts:
                speculation.propose(self._state, slots, rows, wanted, room.num_drafts)

        return work

    def _expected(self) -> StepShape:
        assert self._shape is not None, "expect comes first"
        return self._shape

    def _touches(self) -> dict[str, Sequence[Buffer]]:
        return {"reads": [self._everything], "writes": [self._everything]}


def _memory(room: Room, state: SlotState, vocab_size: int) -> _Memory:
    where = state.words.device

    def words(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=where)

    return _Memory(
        words(4, room.rows),
        words(3, room.rows),
        words(2, room.outputs),
        words(3, room.rows),
        words(room.rows + 1),
        words(room.rows),
        words(room.rows, state.block_tables.shape[1]),
        words(room.tokens),
        words(room.tokens),
        words(room.tokens),
        words(room.tokens if len(state.adapters) else 0),
        torch.empty(room.outputs, vocab_size, dtype=torch.float32, device=where),
    )


def _forced_sizes(shape: StepShape) -> tuple[int, int, int]:
    rows, most = shape.forced
    return rows, rows, rows * most


def _tensor(buffer: Buffer) -> Tensor:
    memory = buffer.memory
    return torch.from_numpy(memory) if isinstance(memory, np.ndarray) else memory

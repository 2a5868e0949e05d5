"""A step's inputs made on the device, beside those that the host makes (worker_svc/slots.py and inputs.py)."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.gpu.slot_state import MAX_ROWS, SlotState, append_tokens, prepare, scatter_words, token_adapters
from protos.wire import Admit, Epoch, Row, Sampling, StepPlan
from tests.kernels_triton.compare import DEVICE
from worker_svc.inputs import StepInputs, build_inputs
from worker_svc.slots import SlotTable

BLOCK_SIZE, MAX_LEN, SLOTS, VOCAB = 4, 300, 7, 1000
MAX_BLOCKS = MAX_LEN // BLOCK_SIZE


def ints(values: object) -> Tensor:
    return torch.tensor(np.asarray(values), dtype=torch.int32, device=DEVICE)


class Both:
    """A table of slots on the host and its state on the device: the same plans reach both."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.host = SlotTable(
            max_slots=SLOTS, max_model_len=MAX_LEN, block_size=BLOCK_SIZE, num_blocks=SLOTS * MAX_BLOCKS + 1,
            vocab_size=VOCAB,
        )  # fmt: skip
        self.state = SlotState.empty(SLOTS, MAX_LEN, MAX_BLOCKS, torch.device(DEVICE))
        self.step = 0

    def admit(self, slot: int, tokens: int) -> Admit:
        blocks = list(range(1 + (slot - 1) * MAX_BLOCKS, 1 + slot * MAX_BLOCKS))
        self.rng.shuffle(blocks)
        ids = [self.rng.randrange(VOCAB) for _ in range(tokens)]
        return Admit(slot, ids, tokens, [blocks], Sampling(max_tokens=1))

    def apply(self, admits: list[Admit], rows: list[Row]) -> tuple[StepPlan, StepInputs]:
        self.step += 1
        plan = StepPlan(Epoch(1, 1), self.step, [], admits, [], rows)
        self.host.apply(plan)
        pairs = [pair for admit in admits for pair in self._words(admit)]
        pairs += [(-1, 99)] * 3
        self.rng.shuffle(pairs)
        scatter_words(self.state, ints([a for a, _ in pairs]), ints([w for _, w in pairs]))
        return plan, build_inputs(plan, self.host)

    def _words(self, admit: Admit) -> list[tuple[int, int]]:
        state, slot = self.state, admit.slot
        words = [(state.address(state.token_ids, slot, i), token) for i, token in enumerate(admit.token_ids)]
        words += [(state.address(state.block_tables, slot, i), block) for i, block in enumerate(admit.block_ids[0])]
        words.append((state.address(state.lengths, slot), len(admit.token_ids)))
        return words

    def prepare(self, rows: list[Row], nulls: int, spare: int) -> dict[str, Tensor]:
        """Behind the plan's rows come null rows, and room for more tokens than there are."""
        total = sum(row.num_tokens for row in rows) + nulls + spare
        made: dict[str, Any] = {name: torch.full((total,), 77, dtype=torch.int32, device=DEVICE) for name in
                ("token_ids", "positions", "slot_mapping")}  # fmt: skip
        made["cu"] = torch.full((len(rows) + nulls + 1,), 77, dtype=torch.int32, device=DEVICE)
        made["context_lens"] = torch.full((len(rows) + nulls,), 77, dtype=torch.int32, device=DEVICE)
        prepare(
            self.state,
            ints([row.slot for row in rows] + [0] * nulls),
            ints([row.start for row in rows] + [0] * nulls),
            ints([row.num_tokens for row in rows] + [1] * nulls),
            ints([0] * (len(rows) + nulls)),
            BLOCK_SIZE,
            0,
            **made,
        )
        return made

    def with_drafts(self, rows: list[Row], laid: int) -> dict[str, Tensor]:
        """Of rows that have one token and drafts each, as many positions as `laid` says, or theirs where it is 0."""
        total = sum(laid or 1 + row.num_drafts for row in rows) + 2
        made: dict[str, Any] = {name: torch.full((total,), 77, dtype=torch.int32, device=DEVICE) for name in
                ("token_ids", "positions", "slot_mapping")}  # fmt: skip
        made["cu"] = torch.full((len(rows) + 1,), 77, dtype=torch.int32, device=DEVICE)
        made["context_lens"] = torch.full((len(rows),), 77, dtype=torch.int32, device=DEVICE)
        slots, drafts = ints([row.slot for row in rows]), ints([row.num_drafts for row in rows])
        ones = torch.ones_like(slots)
        prepare(self.state, slots, -ones, ones, drafts, BLOCK_SIZE, laid, **made)
        return made

    def same(self) -> None:
        """What both know of every slot."""
        assert self.state.lengths.tolist() == self.host.lengths.tolist()
        used = self.host.lengths > 0
        assert self.state.computed.cpu().numpy()[used].tolist() == self.host.computed[used].tolist()
        for slot in np.flatnonzero(used):
            length = self.host.lengths[slot]
            assert self.state.token_ids[slot, :length].tolist() == self.host.token_ids[slot, :length].tolist()


def expect_same(made: dict[str, Tensor], inputs: StepInputs, nulls: int) -> None:
    rows, tokens = len(inputs.slots), int(inputs.cu[-1])
    assert made["cu"].tolist() == [*inputs.cu.tolist(), *(tokens + i + 1 for i in range(nulls))]
    assert made["context_lens"].tolist() == [*inputs.context_lens.tolist(), *[1] * nulls]
    for name in ("token_ids", "positions", "slot_mapping"):
        wanted = getattr(inputs, name).tolist()
        null, outside = (0, 0) if name != "slot_mapping" else (0, -1)
        spare = len(made[name]) - tokens - nulls
        assert made[name].tolist() == [*wanted, *[null] * nulls, *[outside] * spare], name
    assert rows + nulls == len(made["context_lens"])


@settings(max_examples=25)
@given(seed=st.integers(0, 1 << 30), nulls=st.integers(0, 3), spare=st.integers(0, 5), drafts=st.integers(0, 3))
def test_steps_as_the_host_makes_them(seed: int, nulls: int, spare: int, drafts: int) -> None:
    """Prompts in chunks, then rows that go on at their slots' own lengths, with as many tokens as were accepted."""
    both = Both(seed)
    rng, chunk = both.rng, both.rng.choice((3, 150))
    lengths = {slot: rng.randrange(1, 200) for slot in rng.sample(range(1, SLOTS + 1), rng.randrange(1, SLOTS + 1))}
    admits = [both.admit(slot, tokens) for slot, tokens in lengths.items()]
    done = dict.fromkeys(lengths, 0)
    for _ in range(4):
        rows = []
        for slot, tokens in lengths.items():
            if done[slot] < tokens:
                count = min(chunk, tokens - done[slot])
                rows.append(Row(slot, done[slot], count, sample=done[slot] + count == tokens))
                done[slot] += count
            else:
                rows.append(Row(slot, -1, 1 + drafts, sample=True))
        _, inputs = both.apply(admits, rows)
        admits = []
        expect_same(both.prepare(rows, nulls, spare), inputs, nulls)
        accepted = [rng.randrange(1, drafts + 2) if row.sample else 0 for row in rows]
        sampled = [[rng.randrange(VOCAB) for _ in range(drafts + 1)] for _ in rows]
        for row, count, ids in zip(rows, accepted, sampled, strict=True):
            both.host.append(row.slot, ids[:count])
        append_tokens(
            both.state, ints([row.slot for row in rows] + [0] * nulls),
            ints(sampled + [[5] * (drafts + 1)] * nulls), ints(accepted + [1] * nulls),
        )  # fmt: skip
        both.same()


@settings(max_examples=15)
@given(seed=st.integers(0, 1 << 30), most=st.integers(0, 4))
def test_rows_with_drafts(seed: int, most: int) -> None:
    """As the host makes them; in a captured shape the positions before them come first, and are written nowhere."""
    both = Both(seed)
    rng = both.rng
    admits = [both.admit(slot, rng.randint(6, 200)) for slot in rng.sample(range(1, SLOTS + 1), 3)]
    done = [Row(admit.slot, 0, len(admit.token_ids)) for admit in admits]
    both.apply(admits, done)
    both.prepare(done, 0, 0)
    rows = []
    for admit in admits:
        slot, length = admit.slot, len(admit.token_ids)
        append_tokens(both.state, ints([slot]), ints([[5]]), ints([1]))
        both.host.append(slot, [5])
        drafts = [rng.randrange(VOCAB) for _ in range(rng.randint(0, most))]
        both.host.propose(slot, drafts)
        both.state.token_ids[slot, length + 1 : length + 1 + len(drafts)] = ints(drafts)
        rows.append(Row(slot, -1, 1, len(drafts), sample=True))
    before = both.state.computed.clone()
    _, inputs = both.apply([], rows)
    expect_same(both.with_drafts(rows, 0), inputs, 0)
    both.same()
    both.state.computed.copy_(before)
    laid = 1 + most
    made = both.with_drafts(rows, laid)
    both.same()
    assert made["cu"].tolist() == [laid * i for i in range(len(rows) + 1)]
    assert made["context_lens"].tolist() == inputs.context_lens.tolist()
    for i, row in enumerate(rows):
        own, again = slice(inputs.cu[i], inputs.cu[i + 1]), laid - 1 - row.num_drafts
        ours = {name: made[name][laid * i : laid * (i + 1)].tolist() for name in made if name != "cu"}
        for name in ("token_ids", "positions", "slot_mapping"):
            assert ours[name][again:] == getattr(inputs, name)[own].tolist(), name
        end = int(inputs.context_lens[i])
        assert ours["positions"] == list(range(end - laid, end))
        assert ours["token_ids"] == both.host.token_ids[row.slot, end - laid : end].tolist()
        assert ours["slot_mapping"][:again] == [-1] * again


def test_words_of_large_states_are_reached() -> None:
    """More than one program's pairs, and the last word."""
    state = SlotState.empty(3, 500, 20, torch.device(DEVICE))
    addresses = torch.randperm(state.words.numel(), generator=torch.Generator().manual_seed(1)).to(DEVICE, torch.int32)
    scatter_words(state, addresses, addresses * 3)
    assert (state.words == torch.arange(state.words.numel(), device=DEVICE) * 3).all()
    assert state.sampling[3, -1] == (state.words.numel() - 1) * 3


def test_no_address_is_nowhere() -> None:
    around = torch.full((12,), 9, dtype=torch.int32, device=DEVICE)
    words = around[1:-1]
    state = SlotState(*[words] * 9)
    scatter_words(state, ints([-1, 3, -1]), ints([5, 6, 7]))
    assert around.tolist() == [9, 9, 9, 9, 6, *[9] * 7]


@pytest.mark.parametrize("spare", [0, 3])
def test_every_token_has_its_slots_adapter(spare: int) -> None:
    """More than one program's tokens; null rows, and what is behind the last row, have none."""
    state = SlotState.empty(3, 8, 2, torch.device(DEVICE), adapts=True)
    scatter_words(state, ints([state.address(state.adapters, slot) for slot in (1, 3)]), ints([5, 2]))
    counts, slots = [130, 1, 3, 1], [3, 2, 1, 0]
    cu = ints([0, *np.cumsum(counts)])
    index = torch.full((sum(counts) + spare,), 77, dtype=torch.int32, device=DEVICE)
    token_adapters(state, ints(slots), cu, index)
    assert index.tolist() == [*[2] * 130, 0, *[5] * 3, *[0] * (1 + spare)]


def test_what_does_not_fit_is_named() -> None:
    state = SlotState.empty(2, 8, 2, torch.device(DEVICE))
    one = ints([0])
    with pytest.raises(ValueError, match="values has shape"):
        scatter_words(state, one, ints([1, 2]))
    with pytest.raises(ValueError, match=r"addresses is torch\.int64"):
        scatter_words(state, one.long(), one)
    with pytest.raises(ValueError, match=r"adapters has shape \[0\], not \[3\]"):
        token_adapters(state, one, ints([0, 1]), one)
    many = torch.zeros(MAX_ROWS + 1, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match=f"from 1 to {MAX_ROWS}"):
        prepare(
            state,
            many,
            many,
            many,
            many,
            4,
            0,
            cu=many,
            context_lens=many,
            token_ids=many,
            positions=many,
            slot_mapping=many,
        )
    with pytest.raises(ValueError, match="cu has shape"):
        prepare(
            state, one, one, one, one, 4, 0, cu=one, context_lens=one, token_ids=one, positions=one, slot_mapping=one
        )
    with pytest.raises(ValueError, match="words; below 2"):
        SlotState.empty(1 << 16, 1 << 16, 1, torch.device("meta"))

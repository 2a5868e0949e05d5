"""What one worker group holds in one epoch, as the engine remembers it. A new epoch is a new Device: nothing is cleared
by hand.
"""

from __future__ import annotations

from collections import deque

from protos.wire import Epoch, StepPlan
from scheduler_svc.engine.config import EngineConfig
from scheduler_svc.engine.events import WorkerReady
from scheduler_svc.engine.kv_journal import KvJournal
from scheduler_svc.engine.kv_manager import KVManager
from scheduler_svc.engine.sequence import Sequence
from scheduler_svc.engine.speculation import Costs, Speculation


class Flight:
    """A sent plan, with whom it named: its result is resolved against this, never against live state."""

    __slots__ = ("fenced", "masked", "num_drafts", "num_tokens", "plan", "sequences")

    def __init__(self, plan: StepPlan, sequences: list[Sequence], num_tokens: int, num_drafts: int = 0) -> None:
        self.plan = plan
        self.masked = [i for i, row in enumerate(plan.rows) if row.masked]
        self.num_tokens = num_tokens  # positions computed at most
        self.num_drafts = num_drafts  # … drafts among them
        self.sequences = sequences  # one for each of plan.rows
        self.fenced: list[tuple[int, list[int]]] = []  # (slot, blocks) that return when it has landed (R4)


class Device:
    """Slots, blocks and plans in flight."""

    def __init__(self, ready: WorkerReady, config: EngineConfig, journal: KvJournal | None = None) -> None:
        self.group = ready.group
        self.epoch: Epoch = ready.epoch
        self.running: list[Sequence] = []  # in order of the key
        self.step = 0
        self.align = ready.align
        self.kv = KVManager(
            ready.num_blocks, config.block_size, ready.align, config.prefix_caching, journal, ready.num_host_blocks
        )
        self.speculation = Speculation(config.num_drafts, Costs(ready.step_seconds, ready.propose_seconds))
        self.num_slots = ready.max_slots
        self.free_slots = list(range(ready.max_slots, 0, -1))  # slot 0 is the null slot
        self.release: list[int] = []  # slots that the next plan tells the worker to forget
        self.sent: deque[Flight] = deque()
        self.unmatched = 0  # the step whose tokens the grammars have not taken in yet

    def may_take_more(self, config: EngineConfig) -> bool:
        """A plan behind another one, to save the worker a wait; not behind a long one: newcomers would wait for two.
        Behind short ones several, so that worker and loop need not wake each other for every single one.
        """
        sent = self.sent
        if self.unmatched:
            return False
        if not sent:
            return True
        newest = sent[-1].num_tokens
        if config.long_step and newest - sent[-1].num_drafts > config.long_step:
            return False
        if len(sent) < config.depth:
            return True
        is_short = newest <= config.short_step and not any(flight.masked for flight in sent)  # R3: plan N+2 is too far
        return is_short and len(sent) < config.short_depth

    def vacate(self, sequence: Sequence) -> None:
        """Takes slot and blocks from a sequence: at once, or when the last plan that names it has landed."""
        if sequence.flying:
            flight = self.sent[sequence.last_step - self.sent[0].plan.step]
            flight.fenced.append((sequence.slot, sequence.block_ids))
        else:
            self.give_back(sequence.slot, sequence.block_ids)

    def give_back(self, slot: int, block_ids: list[int]) -> None:
        self.release.append(slot)
        self.free_slots.append(slot)
        self.kv.pool.drop(block_ids)

    def land(self) -> Flight:
        """The oldest plan has been answered."""
        flight = self.sent.popleft()
        self.kv.host.land(flight.plan.copies)
        for slot, block_ids in flight.fenced:
            self.give_back(slot, block_ids)
        return flight

    def fenced_blocks(self) -> int:
        """Blocks that only plans in flight still refer to."""
        held: dict[int, int] = {}
        for flight in self.sent:
            for _, block_ids in flight.fenced:
                for block in block_ids:
                    held[block] = held.get(block, 0) + 1
        return sum(count == self.kv.pool.refs[block] for block, count in held.items())

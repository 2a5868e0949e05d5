"""Every live sequence, by what it is doing. The only place where a sequence changes its state."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from protos.wire import Copy, Direction
from scheduler_svc.engine.config import EngineConfig
from scheduler_svc.engine.device import Device
from scheduler_svc.engine.fairness import FairQueue, Ledger
from scheduler_svc.engine.measures import Measures
from scheduler_svc.engine.policy import Agenda
from scheduler_svc.engine.sequence import Sequence, State


@dataclass(slots=True)
class Counters:
    """What happened so far."""

    steps: int = 0
    departed: int = 0  # sequences that left the queue for the first time, and the tokens they came with
    departed_tokens: int = 0
    preemptions: int = 0
    recoveries: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    host_cached_tokens: int = 0  # of those, what came from the second tier
    copied_to_host: int = 0  # blocks
    copied_to_device: int = 0
    finished: int = 0
    aborted: int = 0
    rejected: int = 0
    draft_rows: int = 0  # rows that verified any
    draft_tokens: int = 0
    accepted_at: list[int] = field(default_factory=list)  # drafts that were right, by their place in the row

    def count_drafts(self, held: int, accepted: int) -> None:
        self.draft_rows += held > 0
        self.draft_tokens += held
        while len(self.accepted_at) < accepted:
            self.accepted_at.append(0)
        for place in range(accepted):
            self.accepted_at[place] += 1

    def count_copies(self, copies: list[Copy]) -> None:
        to_host = sum(direction is Direction.TO_HOST for direction, _, _ in copies)
        self.copied_to_host += to_host
        self.copied_to_device += len(copies) - to_host


class Roster:
    """
    Submit ──► WAITING ──► RUNNING ──► FINISHED          from any state by an abort, a deadline, a lost frontend
      │        ▲  ▲  │        │ preempted
      │        │  │  └► HOLDING, until its leader has filled the block or has left, or for a group's next plan
      │        │  └─── LEAVING ◄┘  until its last result is in
      │        └────── all of a worker group's, when its epoch ends
      └► COMPILING, until its grammar is ready: then WAITING
    """

    def __init__(self, config: EngineConfig) -> None:
        self.requests: dict[str, dict[int, Sequence]] = {}  # by request id, then index
        self.running: list[Sequence] = []  # in all worker groups, in order of the key
        self.num_groups = 1  # worker groups that live; 1 while none does
        self.waiting = FairQueue()
        self.ledger = Ledger(config)
        self.deadlines: Agenda[tuple[float, int], Sequence] = Agenda()
        self.doubtful: Agenda[tuple[float, int], Sequence] = Agenda()  # those with a deadline that never ran
        self.num_live = 0
        self.adapter_users: dict[str, int] = {}  # sequences that name one, by its name
        self.queued_tokens = 0  # of all that are live and not running
        self.queued_output = 0.0  # tokens that are likely to come of those
        self.counters = Counters()
        self.measures = Measures()

    def __iter__(self) -> Iterator[Sequence]:
        for siblings in self.requests.values():
            yield from siblings.values()

    @property
    def num_queued(self) -> int:
        return self.num_live - len(self.running)

    def find(self, request_id: str, index: int = -1) -> list[Sequence]:
        """The live sequences of a request, or the one with this index."""
        siblings = self.requests.get(request_id, {})
        return list(siblings.values()) if index < 0 else [siblings[index]] if index in siblings else []

    def enlist(self, sequence: Sequence) -> None:
        self.requests.setdefault(sequence.request_id, {})[sequence.index] = sequence
        self.num_live += 1
        if adapter := sequence.submit.adapter:
            self.adapter_users[adapter] = self.adapter_users.get(adapter, 0) + 1
        if deadline := sequence.submit.deadline:
            self.deadlines.add((deadline, sequence.arrival), sequence)
        self.ledger.enter(sequence.account)
        self.expect(sequence, sequence.look_at)
        self._queue(sequence, sequence.state, new=True)

    def expect(self, sequence: Sequence, look_at: float) -> None:
        """When to see whether it can still meet its deadline; 0 for never."""
        self.doubtful.discard((sequence.look_at, sequence.arrival))
        sequence.look_at = look_at
        if look_at:
            self.doubtful.add((look_at, sequence.arrival), sequence)

    def compiled(self, sequence: Sequence) -> None:
        sequence.state = State.WAITING
        self.waiting.join(sequence)

    def start(self, sequence: Sequence, device: Device) -> None:
        self.waiting.discard(sequence)
        self._unqueue(sequence)
        sequence.state, sequence.device = State.RUNNING, device
        sequence.account.running += 1
        for running in (self.running, device.running):
            insort(running, sequence, key=_key)

    def hold(self, sequence: Sequence, device: Device) -> None:
        """Its leader is there, or its next chance."""
        self.waiting.discard(sequence)
        sequence.state, sequence.device = State.HOLDING, device

    def give_up(self, sequence: Sequence) -> None:
        """It is not to run any more, and about to be finished."""
        self.waiting.discard(sequence)
        sequence.state = State.LEAVING

    def wait_again(self, sequences: Iterable[Sequence]) -> None:
        """Followers that were woken, or the preempted whose last result is in. Any worker group may have them now."""
        for sequence in sequences:
            sequence.state, sequence.device = State.WAITING, None
            self.waiting.add(sequence)

    def preempt(self, sequence: Sequence) -> None:
        self.counters.preemptions += 1
        device, flying = sequence.device, sequence.flying
        self._stop(sequence)
        sequence.forget_device()
        sequence.flying = flying  # their results are still delivered
        sequence.device = device if flying else None
        self._queue(sequence, State.LEAVING if flying else State.WAITING)

    def finish(self, sequence: Sequence) -> None:
        match sequence.state:
            case State.WAITING:
                self.waiting.discard(sequence)
            case State.HOLDING:
                assert sequence.device is not None
                sequence.device.kv.cache.let_go(sequence)
            case State.RUNNING:
                self._stop(sequence)
            case State.COMPILING | State.LEAVING | State.FINISHED:
                pass
        if sequence.state is not State.RUNNING:
            self._unqueue(sequence)
        sequence.state = State.FINISHED
        self.num_live -= 1
        if adapter := sequence.submit.adapter:
            self.adapter_users[adapter] -= 1
            if not self.adapter_users[adapter]:
                del self.adapter_users[adapter]
        self.ledger.leave(sequence.account)
        self.deadlines.discard((sequence.submit.deadline, sequence.arrival))
        siblings = self.requests[sequence.request_id]
        del siblings[sequence.index]
        if not siblings:
            del self.requests[sequence.request_id]

    def end_epoch(self, device: Device) -> None:
        """The device is gone: all that it had wait, in their old order, with all their tokens."""
        self.running = [sequence for sequence in self.running if sequence.device is not device]
        for sequence in self:
            if sequence.device is not device:
                continue
            sequence.forget_device()
            if sequence.state is State.RUNNING:
                sequence.account.running -= 1
                self._queue(sequence, State.WAITING)
            else:
                self.wait_again([sequence])

    def _queue(self, sequence: Sequence, state: State, new: bool = False) -> None:
        sequence.state = state
        sequence.queued_tokens = sequence.settled
        self.queued_tokens += sequence.settled
        self.queued_output += sequence.likely_tokens
        sequence.account.queue(sequence)
        if state is State.WAITING:
            (self.waiting.join if new else self.waiting.add)(sequence)

    def _unqueue(self, sequence: Sequence) -> None:
        if sequence.cached_tokens < 0:
            self.counters.departed += 1
            self.counters.departed_tokens += sequence.queued_tokens
        self.expect(sequence, 0.0)
        self.queued_tokens -= sequence.queued_tokens
        self.queued_output = self.queued_output - sequence.likely_tokens if self.queued_tokens else 0.0
        sequence.account.unqueue(sequence)
        sequence.queued_tokens = 0

    def _stop(self, sequence: Sequence) -> None:
        """It runs no more: slot and blocks go back."""
        device = sequence.device
        assert device is not None
        for running in (self.running, device.running):
            running.remove(sequence)
        sequence.account.running -= 1
        woken = device.kv.cache.stop_leading(sequence)
        device.vacate(sequence)
        self.wait_again(woken)


def _key(sequence: Sequence) -> tuple[int, int]:
    return sequence.key

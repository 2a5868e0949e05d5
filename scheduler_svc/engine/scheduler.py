"""Decides. Events in, instructions out; no I/O, no clock, no randomness.

There is no prefill or decode phase, only catching up: a sequence has tokens known and tokens computed, and every step
lets some sequences catch up by some tokens. Chunked prefill, prefix-cache hits, recompute after a preemption or a
crash, and verifying drafts are all this one arithmetic (R1).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import assert_never

from protos.engine_wire import Abort, EngineStats, FinishReason, FrontendLost, Shed, Submit, WatchKv
from protos.wire import Epoch, Row, RowResult, StepPlan, StepResult
from scheduler_svc.engine.adapters import Adapters
from scheduler_svc.engine.config import EngineConfig
from scheduler_svc.engine.device import Device
from scheduler_svc.engine.door import Doorkeeper
from scheduler_svc.engine.events import (
    AdapterClosed,
    AdapterLoaded,
    Drain,
    EndEpoch,
    Event,
    FlushCache,
    Instruction,
    MaskRequest,
    Matched,
    Tick,
    Verdict,
    WorkerLost,
    WorkerReady,
)
from scheduler_svc.engine.forecast import Forecast
from scheduler_svc.engine.integrity import check
from scheduler_svc.engine.kv_journal import KvJournal
from scheduler_svc.engine.lengths import Lengths
from scheduler_svc.engine.outbox import Outbox
from scheduler_svc.engine.placement import Placement
from scheduler_svc.engine.planner import Planner
from scheduler_svc.engine.roster import Roster
from scheduler_svc.engine.sequence import FATAL_DEATHS, Sequence, State
from scheduler_svc.engine.stats import summary
from scheduler_svc.engine.trust import completes, mismatch, misplaced, unusable

SWEEP = 1.0  # seconds between two looks for tenants that can be forgotten
# Of what has waited, and never ran.
_REFUSALS = (FinishReason.REJECTED, FinishReason.DEADLINE, FinishReason.INVALID, FinishReason.GRAMMAR)


class Scheduler:
    """One engine for all worker groups. State changes only in `handle`.

    Queue, tenants and quotas are one; slots, blocks, cache and plans are each group's own, and keyed by its epoch: no
    two groups ever have the same.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.roster = Roster(config)
        self.devices: dict[int, Device] = {}  # of the groups that live, by group
        self._planners: dict[int, Planner] = {}
        self._placement = Placement(config, self.devices)
        self._forecast = Forecast(config, self.roster)
        self._doorkeeper = Doorkeeper(config, self._forecast)
        self._adapters = Adapters()
        self._arrivals = 0
        self._swept = 0.0
        self._lengths = Lengths(config)
        self._last_epochs: dict[int, Epoch] = {}  # by group
        self._instructions: list[Instruction] = []
        self._outbox = Outbox()
        self.journal = KvJournal()

    def handle(self, event: Event) -> list[Instruction]:
        """What follows from `event`: plans first, since a worker may be waiting for them."""
        match event:
            case StepResult():
                self._land(event)
            case Submit():
                self._submit(event)
            case Shed():
                self._shed(event)
            case Abort():
                for sequence in self.roster.find(event.request_id, event.index):
                    if event.frontend in ("", sequence.frontend):
                        self._finish(sequence, event.reason)
            case FrontendLost():
                for sequence in list(self.roster):
                    if sequence.frontend == event.frontend:
                        self._finish(sequence, FinishReason.ABORTED)
                self.journal.unwatch(event.frontend)
            case Verdict():
                self._heed(event)
            case Matched():
                if (device := self._device(event.epoch)) and device.unmatched == event.step:
                    device.unmatched = 0
                for verdict in event.verdicts:
                    self._heed(verdict)
            case WorkerReady():
                self._begin_epoch(event)
            case WorkerLost():
                if device := self._device(event.epoch):
                    self._end_epoch(device, event.blameless)
            case Tick():
                self._tick(event.now)
            case FlushCache():
                for device in self.devices.values():
                    device.kv.pool.flush()
            case Drain():
                self._doorkeeper.draining = True
            case WatchKv():
                self.journal.watch(event)
            case AdapterLoaded():
                self._adapters.open(event.name, event.digest)
            case AdapterClosed():
                self._close_adapter(event)
            case _:
                assert_never(event)
        while plans := list(self._plans()):
            self._instructions += plans
        for planner in self._planners.values():
            for sequence in planner.take_hopeless():
                self._give_up(sequence)
        instructions, self._instructions = self._instructions, []
        instructions += self._adapters.take_free(self.roster, self.devices.values())
        told = self.journal.take() if self.journal.dirty else ()
        return [*instructions, *self._outbox.take(), *told]

    @property
    def idle(self) -> bool:
        """Nobody is served, nobody waits, nothing is in flight."""
        return not self.roster.num_live and not any(device.sent for device in self.devices.values())

    def _device(self, epoch: Epoch) -> Device | None:
        """Whose epoch it is, if it has not ended."""
        return next((device for device in self.devices.values() if device.epoch == epoch), None)

    def _plans(self) -> Iterator[StepPlan | MaskRequest]:
        """One of each group that may and can; who is the least busy has the first choice among those who wait."""
        for planner in sorted(self._planners.values(), key=_business):
            if planner.device.may_take_more(self.config) and (flight := planner.plan()):
                yield flight.plan
                if flight.masked:
                    named = [(i, s.request_id, s.index) for i in flight.masked for s in (flight.sequences[i],)]
                    yield MaskRequest(flight.plan.epoch, flight.plan.step, named)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self.roster.requests

    def has(self, request_id: str, tenant: str | None) -> bool:
        """Whether it is running or waiting, and is of that tenant (None: of any)."""
        return any(tenant in (None, sequence.account.name) for sequence in self.roster.find(request_id))

    # ------------------------------------------------------------ requests

    def _submit(self, submit: Submit) -> None:
        refusal = self._adapters.refusal(submit) or self._doorkeeper.refusal(submit, self.roster, self._free_slots())
        if refusal:
            self._count_refused(submit.tenant, refusal.reason, 1)
            self._outbox.refuse(submit, *refusal)
            return
        for crowding in self._doorkeeper.crowded_out:
            self._outbox.refuse(crowding.submit, *self._doorkeeper.crowding())
            self._leave(crowding, FinishReason.REJECTED)
        self._doorkeeper.crowded_out = []
        self._arrivals += 1
        account = self.roster.ledger.account(submit.tenant)
        if account.bucket:
            account.bucket.level -= len(submit.token_ids)
        account.tally.requests += 1
        sequence = Sequence(submit, self._arrivals, self.config.num_drafts, account)
        sequence.came = self._forecast.now
        sequence.likely_tokens = self._forecast.likely_tokens(submit)
        if submit.deadline:
            sequence.look_at = self._forecast.look_at(sequence)
        self.roster.enlist(sequence)
        self._check_length(sequence)

    def _close_adapter(self, closed: AdapterClosed) -> None:
        self._adapters.close(closed.name)
        for sequence in list(self.roster) if closed.reason else ():
            if sequence.submit.adapter == closed.name:
                self._finish(sequence, FinishReason.ERROR, closed.reason)

    def _shed(self, shed: Shed) -> None:
        if 0 < shed.sequences < 1 << 32:  # what a frontend says is believed, but breaks no counter
            self._doorkeeper.shed(shed.sequences)
            self._count_refused(shed.tenant, FinishReason.REJECTED, shed.sequences)

    def _count_refused(self, tenant: str, reason: FinishReason, sequences: int) -> None:
        self.roster.counters.rejected += sequences
        self.roster.measures.refuse(reason, sequences)
        self.roster.ledger.tallies.of(tenant).refused += sequences

    def _free_slots(self) -> int:
        """How many of the queue the next plan may take, if there are blocks for them: plans in flight delay it."""
        most = self.config.max_num_seqs
        return sum(max(0, min(len(d.free_slots), most - len(d.running))) for d in self.devices.values())

    def _check_length(self, sequence: Sequence) -> None:
        """Sets how long it may become, and ends it if there is no room for what it has to become."""
        sequence.limit = self._lengths.of(sequence)
        if refusal := self._lengths.refusal(sequence):
            self._finish(sequence, FinishReason.INVALID, refusal)
        elif not sequence.samples:
            return
        elif sequence.settled >= sequence.limit:
            self._finish(sequence, FinishReason.LENGTH)
        elif sequence.settled > sequence.prompt_len and sequence.token_ids[-1] in sequence.ends:
            self._finish(sequence, FinishReason.STOP)  # resumed where it had ended

    def _finish(self, sequence: Sequence, reason: FinishReason, detail: str = "") -> None:
        """Ends a sequence between results, wherever it is."""
        self._outbox.end(sequence, reason, detail)
        self._leave(sequence, reason)

    def _leave(self, sequence: Sequence, reason: FinishReason) -> None:
        bucket = sequence.account.bucket
        if bucket and sequence.cached_tokens < 0:  # it never ran: its prompt is given back
            bucket.level = min(bucket.burst, bucket.level + sequence.given)
        self.roster.finish(sequence)
        if sequence.cached_tokens < 0 and reason in _REFUSALS:
            self.roster.measures.refuse(reason)
            sequence.account.tally.refused += 1
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            self.roster.counters.finished += 1
            if sequence.cached_tokens >= 0:
                used = sequence.settled - sequence.prompt_len
                self._forecast.learn_length(sequence.sampling, used)
        elif reason is FinishReason.REJECTED:
            self.roster.counters.rejected += 1
        else:
            self.roster.counters.aborted += 1

    def _tick(self, now: float) -> None:
        self._forecast.now = now
        self._doorkeeper.tick(now, self.roster)
        while (first := self.roster.deadlines.first()) and first[0][0] <= now:
            self._finish(first[1], FinishReason.DEADLINE, "the deadline has passed")
        while (first := self.roster.doubtful.first()) and first[0][0] <= now:
            sequence = first[1]
            if self._forecast.is_hopeless(sequence):
                self._give_up(sequence)
            else:
                self.roster.expect(sequence, self._forecast.look_at(sequence))
        if now - self._swept >= SWEEP:
            self._swept = now
            self.roster.ledger.forget(now)

    def _give_up(self, sequence: Sequence) -> None:
        left = sequence.submit.deadline - self._forecast.now
        needed = sequence.submit.deadline - self._forecast.latest_start(sequence)
        detail = f"given up in the queue: its deadline is in {left:.2f} s, and it takes {needed:.2f} s at least"
        self._finish(sequence, FinishReason.DEADLINE, detail)

    # ------------------------------------------------------------ results

    def _land(self, result: StepResult) -> None:
        """Resolves a result against the plan that it answers, never against who holds the slot now."""
        device = self._device(result.epoch)
        if device is None:
            return None  # from an epoch that has ended
        if reason := misplaced(device, result):
            return self._distrust(device, reason)
        flight = device.sent[0]
        seconds = result.timings.forward + result.timings.sample
        self._forecast.pace.learn(flight.num_tokens, seconds)
        self.roster.measures.step_seconds.add(seconds)
        rows = flight.plan.rows
        for sequence in flight.sequences:
            sequence.flying -= 1
        for row, answer, sequence in zip(rows, result.rows, flight.sequences, strict=True):
            if sequence.state is State.FINISHED:
                continue
            if reason := mismatch(row, answer, sequence):
                return self._distrust(device, f"step {result.step}: {reason}")
            if row.num_drafts:
                self.roster.counters.count_drafts(answer.num_drafted, len(answer.token_ids) - 1)
            if row.sample:
                try:
                    self._settle(sequence, row, answer)
                except OverflowError:
                    what = f"step {result.step}: slot {row.slot} brings {answer.token_ids}, no token ids"
                    return self._distrust(device, what)
            elif completes(sequence, row):
                self._outbox.computed(sequence, row, answer)
                self._leave(sequence, FinishReason.STOP)
            elif answer.prompt_logprobs:
                self._outbox.prompt(sequence, row, answer)
            if sequence.state is State.LEAVING and not sequence.flying:
                self.roster.wait_again([sequence])
        device.speculation.learn(flight, result.rows, seconds)
        if flight.masked:
            device.unmatched = result.step
        device.land()
        return None

    def _settle(self, sequence: Sequence, row: Row, answer: RowResult) -> None:
        """New tokens, up to the first that ends the stream. Raises OverflowError where they can be no tokens."""
        token_ids = answer.token_ids
        count = sequence.first_end(token_ids)
        if count < len(token_ids):
            token_ids = token_ids[:count]
        sequence.append(token_ids)
        sequence.pauses = False
        sequence.deaths = 0
        sequence.account.output_tokens += count
        reason = None
        if token_ids[-1] in sequence.ends:
            reason = FinishReason.STOP
        elif sequence.settled >= sequence.limit:
            reason = FinishReason.LENGTH
        self._outbox.tokens(sequence, token_ids, row, answer, reason)
        if sequence.state is State.RUNNING:
            sequence.ahead -= 1 + row.num_drafts
            sequence.computed = sequence.settled - 1  # the last of them was sampled, and not fed yet
            if sequence.computed >= sequence.publish_at:
                assert sequence.device is not None
                self.roster.wait_again(sequence.device.kv.publish(sequence))
        if reason:
            self._leave(sequence, reason)

    # ------------------------------------------------------------ grammars

    def compiles(self, request_id: str, index: int) -> bool:
        """Whether this stream waits for its grammar."""
        return any(sequence.state is State.COMPILING for sequence in self.roster.find(request_id, index))

    def _heed(self, verdict: Verdict) -> None:
        """Forced tokens are known at once, or, while the first of them is being sampled under a mask that leaves no
        choice, once that one has come. So they depend on the tokens alone, and on no depth and no moment.
        """
        for sequence in self.roster.find(verdict.request_id, verdict.index):
            if sequence.state is State.COMPILING and verdict.ends is None:
                self.roster.compiled(sequence)
            if not sequence.can_jump and len(verdict.token_ids) > 1:
                sequence.pauses = True
            elif sequence.can_jump and verdict.token_ids:
                self._jump(sequence, verdict)
            elif not verdict.token_ids and verdict.ends:
                self._finish(sequence, verdict.ends, verdict.detail)

    def _jump(self, sequence: Sequence, verdict: Verdict) -> None:
        token_ids = verdict.token_ids[: sequence.first_end(verdict.token_ids)]
        sequence.append(token_ids)
        sequence.account.output_tokens += len(token_ids)
        if token_ids[-1] in sequence.ends:
            reason: FinishReason | None = FinishReason.STOP
        elif sequence.settled >= sequence.limit:
            reason = FinishReason.LENGTH  # also where the grammar ends there: a sampled token is told no other
        else:
            reason = verdict.ends
        self._outbox.forced(sequence, token_ids, reason)
        if reason:
            self._leave(sequence, reason)
        elif sequence.state is State.RUNNING:
            sequence.unsent += token_ids

    # ------------------------------------------------------------ epochs

    def _begin_epoch(self, ready: WorkerReady) -> None:
        last = self._last_epochs.get(ready.group)
        if last and ready.epoch <= last:
            return  # an epoch that has ended, or the one that runs
        if before := self.devices.get(ready.group):
            self._end_epoch(before, blameless=False)
        self._last_epochs[ready.group] = ready.epoch
        if reason := unusable(ready, self.config):
            self._instructions.append(EndEpoch(ready.epoch, reason))
            return
        device = self.devices[ready.group] = Device(ready, self.config, self.journal)
        self._planners[ready.group] = Planner(self.config, device, self.roster, self._forecast, self._placement)
        self.roster.num_groups = len(self.devices)
        if self._lengths.learn(ready):
            for sequence in list(self.roster):
                self._check_length(sequence)

    def _distrust(self, device: Device, reason: str) -> None:
        self._instructions.append(EndEpoch(device.epoch, reason))
        self._end_epoch(device, blameless=False)

    def _end_epoch(self, device: Device, blameless: bool) -> None:
        """Everyone there waits again. Whoever was in flight is a suspect: it may have killed the worker (R5)."""
        if not blameless:
            self.roster.counters.recoveries += 1
            suspects = dict.fromkeys(sequence for flight in device.sent for sequence in flight.sequences)
            for sequence in suspects:
                sequence.deaths += 1
        self.roster.end_epoch(device)
        self.journal.lost(device.kv.pool.digests())
        del self.devices[device.group], self._planners[device.group]
        self.roster.num_groups = max(1, len(self.devices))
        for sequence in list(self.roster):
            if sequence.deaths >= FATAL_DEATHS:
                self._finish(
                    sequence, FinishReason.ERROR, f"{sequence.deaths} workers died while they served this request"
                )

    # ------------------------------------------------------------ what others see

    def stats(self) -> EngineStats:
        return summary(self.roster, list(self.devices.values()), self._doorkeeper.draining)

    def check_integrity(self) -> None:
        """Raises IntegrityError where the books do not add up. The loop asks when it has been idle, tests always."""
        check(self.roster, self.devices.values())


def _business(planner: Planner) -> tuple[int, int]:
    return len(planner.device.running), planner.device.group

"""Builds the next step: who catches up by how much, who comes in, who has to leave."""

from __future__ import annotations

from protos.wire import Admit, Row, StepPlan
from scheduler_svc.engine.config import EngineConfig
from scheduler_svc.engine.device import Device, Flight
from scheduler_svc.engine.forecast import Forecast
from scheduler_svc.engine.placement import Placement
from scheduler_svc.engine.policy import displaced, preempted, turn
from scheduler_svc.engine.prefix_cache import domain
from scheduler_svc.engine.roster import Roster
from scheduler_svc.engine.sequence import Sequence, State

MAX_MASKED = 2  # sampling rows in flight of a sequence with a grammar (R3)
MAX_ASIDE = 8192  # blocks of the followers that one step sets aside: to hash and look up so many takes some 10 ms


class Step:
    """A plan in the making."""

    __slots__ = ("admit", "budget", "for_drafts", "for_samples", "preempted", "rows", "sequences")

    def __init__(self, budget: int) -> None:
        self.budget = budget  # positions that may still be computed
        self.for_samples = 0  # … and of those, what next tokens need that have no row yet
        self.for_drafts = 0  # … and what is no sequence's next token
        self.admit: list[Admit] = []
        self.rows: list[Row] = []
        self.sequences: list[Sequence] = []  # one for each row
        self.preempted = False


class Planner:
    """Plans for one epoch of one worker group. Raises nothing: who cannot move in this step waits for a later one."""

    def __init__(
        self,
        config: EngineConfig,
        device: Device,
        roster: Roster,
        forecast: Forecast,
        placement: Placement,
    ) -> None:
        self.config = config
        self.device = device
        self.kv = device.kv
        self.roster = roster
        self.forecast = forecast
        self.placement = placement
        self._hopeless: list[Sequence] = []
        self.aside = 0  # blocks of those that were set aside in this step
        self.lone: Sequence | None = None  # the suspect that runs alone (R5)

    def plan(self) -> Flight | None:
        """The next step, or None if nobody can move.

        There is no prefill and no decode: each sequence catches up from `computed` towards `hi`. Those that are one
        token behind, or that forced tokens have put there, go first, in the order in which they may preempt each other:
        nobody who has a row already. Chunks of those that are further behind, and of newcomers, fill the rest.
        """
        step = Step(self.config.max_step_tokens)
        self.aside = 0
        self.roster.wait_again(self.kv.cache.take_expected())
        if suspect := self._suspect():
            if any(sequence is not suspect for flight in self.device.sent for sequence in flight.sequences):
                return None  # until they have landed
            self._move_alone(step, suspect)
        else:
            if self.roster.ledger.several:
                self._displace(step)
            first: list[Sequence] = []
            further_behind: list[Sequence] = []
            for sequence in self._in_order():
                (first if sequence.unsent or sequence.only_samples else further_behind).append(sequence)
            self._share_out(step, first, further_behind)
            for sequence in first:
                if sequence.unsent:
                    self._jump(step, sequence)
                else:
                    step.for_samples -= 1
                    self._next_token(step, sequence)
            self._catch_up(step, further_behind)
        return self._send(step) if step.rows else None

    def _displace(self, step: Step) -> None:
        """Makes room for a tenant below its share, before any row is made: one sequence leaves at most."""
        first = self.roster.waiting.first()
        if first is None or first.suspect or self._gives_up(first):
            return
        running, pool = self.device.running, self.kv.pool
        slots_are_out = len(running) >= self.config.max_num_seqs
        if not slots_are_out and self.kv.blocks(first.settled) + len(running) <= pool.available:
            return
        if self.placement.has_choice and self.placement.best(first):
            return  # there is room for it, here or elsewhere
        victim = displaced(running, self.roster.ledger, first, len(self.roster.running))
        if victim is None or self.placement.is_fenced:
            return  # nobody has too much, or what was taken already is still behind the fence
        if not slots_are_out:
            hits = self.kv.reusable(first)
            if hits is None:
                self.roster.hold(first, self.device)
                return
            if self.kv.room_for(first, hits, reserve=len(running)):
                return
        step.preempted = True
        self.roster.preempt(victim)

    def _in_order(self) -> tuple[Sequence, ...]:
        """Who runs, first come first; but whoever may be preempted comes last, so that it has no row by then."""
        running = self.device.running
        if self.roster.ledger.several:
            longest = max((len(sequence.unsent) for sequence in running), default=0)
            most = 2 + max(self.config.num_drafts, longest) // self.kv.block_size  # new blocks of a row
            if self.kv.pool.available < most * len(running):
                return tuple(sorted(running, key=turn))
        return tuple(running)

    def _share_out(self, step: Step, first: list[Sequence], further_behind: list[Sequence]) -> None:
        """A position for the next token of each who samples; drafts beside what the others of the step compute, who get
        half the room at least.
        """
        sampling = [sequence for sequence in first if not sequence.unsent]
        step.for_samples = len(sampling)
        if not self.config.num_drafts:
            return
        behind = [sequence for sequence in first if sequence.unsent] + further_behind
        room = step.budget - len(sampling)
        others = room if self.roster.waiting.first() else sum(each.settled - each.computed for each in behind)
        step.for_drafts = max(room // 2, room - others)
        self.device.speculation.choose(sampling, step.for_drafts, min(others, room))

    def _next_token(self, step: Step, sequence: Sequence) -> None:
        """A row that samples, perhaps while the token that it starts from is still being sampled."""
        hi = sequence.hi
        room = sequence.limit - hi - 1
        if room < 0 or not step.budget or sequence.state is not State.RUNNING:
            return  # what is in flight may be all that it wanted; or it was preempted a moment ago
        if sequence.ahead and sequence.masked and (sequence.pauses or sequence.ahead == MAX_MASKED):
            return
        drafts = min(sequence.proposed, room, step.for_drafts, step.budget - step.for_samples - 1)
        new: list[list[int]] = []
        if hi + drafts > len(sequence.block_ids) * self.kv.block_size:
            fitting = self._make_room(step, sequence, hi, drafts)
            if fitting < 0:
                return
            drafts = fitting
            if blocks := self.kv.grow(sequence, hi + drafts):
                new = [blocks]
        start = -1 if sequence.ahead else sequence.computed
        step.rows.append(Row(sequence.slot, start, 1, drafts, new, True, sequence.masked))
        step.sequences.append(sequence)
        step.budget -= 1 + drafts
        step.for_drafts -= drafts
        sequence.ahead += 1 + drafts

    def _jump(self, step: Step, sequence: Sequence) -> None:
        """A row that brings forced tokens to the worker, computes them, and samples where they end."""
        settled = sequence.settled
        if sequence.state is not State.RUNNING:
            return  # preempted a moment ago
        if self._chunk_size(step, sequence.computed, settled - sequence.computed) <= 0:
            return
        new: list[list[int]] = []
        if self.kv.missing(sequence, settled):
            if self._make_room(step, sequence, settled, 0) < 0:
                return
            new = [self.kv.grow(sequence, settled)]
        self._chunk(step, sequence, new)

    def _make_room(self, step: Step, sequence: Sequence, hi: int, drafts: int) -> int:
        """How many drafts the row may verify with the blocks there are, or −1 if it has to wait.

        Out of blocks: wait for the fence, then give up the drafts, then preempt.
        """
        pool = self.kv.pool
        if self.kv.missing(sequence, hi + drafts) <= pool.available:
            return drafts
        if any(flight.fenced for flight in self.device.sent):
            return -1
        while self.kv.missing(sequence, hi) > pool.available:
            victim = preempted(self.device.running, self.roster.ledger.several)
            step.preempted = True
            self.roster.preempt(victim)
            if victim is sequence or victim.flying:
                return -1  # it is gone itself, or the blocks are behind the fence
        return 0

    def _chunk(self, step: Step, sequence: Sequence, new: list[list[int]] | None = None) -> None:
        """A row of known tokens; where they end it samples, if ever. The account pays for those that were given."""
        if sequence.state is not State.RUNNING:
            return  # preempted a moment ago
        missing = sequence.settled - sequence.computed
        count = self._chunk_size(step, sequence.computed, missing)
        if not count:
            return
        sample = count == missing and sequence.samples
        masked = sample and sequence.masked
        row = Row(sequence.slot, sequence.computed, count, 0, new or [], sample, masked, sequence.unsent)
        sequence.unsent = []
        step.rows.append(row)
        step.sequences.append(sequence)
        step.budget -= count
        if sequence.unpaid:
            paid = min(count, sequence.unpaid)
            sequence.unpaid -= paid
            sequence.account.paid += paid * sequence.account.prompt_cost
        if sample:
            sequence.ahead += 1
            sequence.wanted = self.device.speculation.first(sequence)
        else:
            sequence.computed += count

    def _chunk_size(self, step: Step, computed: int, missing: int) -> int:
        """All that is missing, or as much as ends on a multiple of `align`, where the next chunk starts."""
        count = min(missing, step.budget - step.for_samples)
        return count if count == missing else count - (computed + count) % self.device.align

    def _catch_up(self, step: Step, behind: list[Sequence]) -> None:
        """The rest of the budget, to whoever's turn it is: a chunk of one that runs, or a newcomer with its first.

        So the long prompts of one tenant keep nobody else's from being computed.
        """
        is_open = not step.preempted
        while step.budget:
            chunk = min(behind, key=turn) if behind else None
            first = self.roster.waiting.first() if is_open else None
            if first and (chunk is None or turn(first) < turn(chunk)):
                is_open = self._admit_first(step)
            elif chunk:
                behind.remove(chunk)
                self._chunk(step, chunk)
            else:
                return

    def _admit_first(self, step: Step) -> bool:
        """Whether the first who could come in has done so."""
        entrant = self._entrant()
        if entrant is None:
            return False
        sequence, hits = entrant
        computed = len(hits) * self.kv.block_size
        if sequence.suspect or not self._chunk_size(step, computed, sequence.settled - computed):
            return False
        self._admit(step, sequence, hits)
        self._chunk(step, sequence)
        return True

    def _entrant(self) -> tuple[Sequence, list[int]] | None:
        """The first in the queue with its cache hits, if there is room for it. Those that have to hold step aside, and
        so do those that another group is better for.
        """
        roster, device = self.roster, self.device
        if not device.free_slots or len(device.running) >= self.config.max_num_seqs:
            return None
        # The next step goes on behind those that this one has set aside.
        while self.aside < MAX_ASIDE and (sequence := roster.waiting.first()):
            if self._gives_up(sequence):
                continue
            if self.placement.has_choice:
                best = self.placement.best(sequence, device)
                if best is None or (best is not device and not best.sent):
                    return None  # there is no room for it; or an idle group takes it, as soon as its turn comes
                if best is not device:
                    best.kv.cache.expect(sequence)
                    self._set_aside(sequence, best)
                    continue
            hits = self.kv.reusable(sequence)
            if hits is None:
                self._set_aside(sequence, device)
                continue
            # A block to grow for each that runs, or the newcomer would be the next to be preempted.
            return (sequence, hits) if self.kv.room_for(sequence, hits, reserve=len(device.running)) else None
        return None

    def _set_aside(self, sequence: Sequence, device: Device) -> None:
        self.roster.hold(sequence, device)
        self.aside += 1 + len(sequence.hashes)

    def _gives_up(self, sequence: Sequence) -> bool:
        """Nothing is begun that would come too late."""
        if not self.forecast.is_hopeless(sequence):
            return False
        self.roster.give_up(sequence)
        self._hopeless.append(sequence)
        return True

    def take_hopeless(self) -> list[Sequence]:
        """Those that were taken from the queue, to be told that their deadline cannot be met."""
        hopeless, self._hopeless = self._hopeless, []
        return hopeless

    def _admit(self, step: Step, sequence: Sequence, hits: list[int]) -> None:
        from_host = self.kv.admit(sequence, hits)
        sequence.slot = self.device.free_slots.pop()
        self.roster.start(sequence, self.device)
        if sequence.cached_tokens < 0:
            sequence.unpaid -= sequence.computed
            counters = self.roster.counters
            sequence.cached_tokens = min(sequence.computed, sequence.prompt_len)
            counters.prompt_tokens += sequence.prompt_len
            counters.cached_tokens += sequence.cached_tokens
            counters.host_cached_tokens += from_host
            self._observe_wait(sequence)
            self.forecast.learn_hits(sequence.prompt_len, sequence.cached_tokens)
        submit = sequence.submit
        step.admit.append(
            Admit(
                sequence.slot,
                sequence.token_ids.tolist(),
                sequence.prompt_len,
                [list(sequence.block_ids)],
                sequence.sampling,
                submit.adapter,
                domain(submit.tenant, submit.cache_salt),
                submit.pooling,
            )
        )

    def _observe_wait(self, sequence: Sequence) -> None:
        sequence.waited = self.forecast.now - sequence.came
        self.roster.measures.queue_wait.add(sequence.waited)
        sequence.account.tally.prompt_tokens += sequence.prompt_len

    def _suspect(self) -> Sequence | None:
        """Who has to run alone now: until its next token is known, or it has left."""
        if self.lone and self.lone.suspect and self.lone.state is State.RUNNING:
            return self.lone
        self.lone = None
        first = self.roster.waiting.first()
        if first and first.suspect and (entrant := self._entrant()) and entrant[0].suspect:
            return entrant[0]
        return None

    def _move_alone(self, step: Step, suspect: Sequence) -> None:
        if suspect.state is State.WAITING and (entrant := self._entrant()):
            self._admit(step, *entrant)
            self.lone = suspect
        step.for_drafts = step.budget - 1
        if suspect.only_samples:
            self._next_token(step, suspect)
        elif suspect.unsent:
            self._jump(step, suspect)
        else:
            self._chunk(step, suspect)

    def _send(self, step: Step) -> Flight:
        device = self.device
        device.step += 1
        self.roster.counters.steps += 1
        num_propose = self._num_propose(step)
        copies = self.kv.host.take_copies()
        if copies:
            self.roster.counters.count_copies(copies)
        plan = StepPlan(device.epoch, device.step, device.release, step.admit, copies, step.rows, num_propose)
        device.release = []
        num_drafts = sum(row.num_drafts for row in step.rows) if self.config.num_drafts else 0
        flight = Flight(plan, step.sequences, self.config.max_step_tokens - step.budget, num_drafts)
        device.sent.append(flight)
        self.roster.measures.planned(len(step.rows), flight.num_tokens)
        for sequence in step.sequences:
            sequence.flying += 1
            sequence.last_step = plan.step
            if sequence.computed >= sequence.publish_at:
                self.roster.wait_again(self.kv.publish(sequence))
        return flight

    def _num_propose(self, step: Step) -> int:
        """The most that any sequence wants. What the worker proposes beyond that for another is not verified."""
        most = 0
        if self.config.num_drafts:
            for row, sequence in zip(step.rows, step.sequences, strict=True):
                if row.sample:
                    sequence.proposed = sequence.wanted
                    most = max(most, sequence.wanted)
        return most

"""A replay to look at: what happened when, who had which part of it, and one plan with the engine behind it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table
from rich.text import Text

from protos.engine_wire import Abort, EngineStats, FinishReason, FrontendLost, KvEvents, Outputs, Shed, Submit, WatchKv
from protos.wire import StepPlan, StepResult
from scheduler_svc.engine.events import (
    AdapterClosed,
    AdapterLoaded,
    Drain,
    EndEpoch,
    FlushCache,
    Tick,
    WorkerLost,
    WorkerReady,
)
from scheduler_svc.engine.scheduler import Scheduler
from scheduler_svc.engine.sequence import Sequence, State
from scheduler_svc.record_format import LogError
from scheduler_svc.replay import Log, Moment

BAR = 10  # cells of the bar of blocks
_COLUMNS = ("s", "step", "rows", "prefill", "decode", "out", "run", "wait", "blocks in use", "what happened")


@dataclass
class Slice:
    """A second, or a step."""

    at: float  # seconds since the log's beginning
    step: str = ""
    plans: int = 0
    rows: int = 0
    prefill: int = 0  # positions of known tokens
    decode: int = 0  # rows of one position, drafts aside
    out: int = 0  # tokens for frontends
    stats: EngineStats = field(default_factory=EngineStats)
    counts: dict[str, int] = field(default_factory=dict)  # what happened, how often
    notes: list[str] = field(default_factory=list)

    def count(self, what: str, times: int = 1) -> None:
        if times:
            self.counts[what] = self.counts.get(what, 0) + times

    def cells(self) -> list[str | Text]:
        stats = self.stats
        used = stats.owned_blocks + stats.fenced_blocks
        share = used / stats.num_blocks if stats.num_blocks else 0.0
        filled = min(BAR, round(share * BAR))
        happened = [f"{times} {what}" if times > 1 else what for what, times in self.counts.items()]
        return [
            f"{self.at:.3f}" if self.step else f"{self.at:.0f}",
            self.step or str(self.plans),
            f"{self.rows / self.plans:.1f}" if self.plans > 1 else str(self.rows),
            str(self.prefill),
            str(self.decode),
            str(self.out),
            str(stats.running),
            str(stats.waiting),
            f"{'█' * filled}{'·' * (BAR - filled)} {used}/{stats.num_blocks}",
            Text(", ".join(happened + self.notes)),
        ]


class Teller:
    """Turns moments into slices: the present one, until another begins."""

    def __init__(self, by_step: bool) -> None:
        self._by_step = by_step
        self.began = 0.0  # the first Tick's time
        self.now = 0.0  # seconds since then
        self._preemptions = 0
        self._slice = Slice(0.0)

    def tell(self, moment: Moment) -> Iterator[Slice]:
        """The slices that are complete now."""
        event = moment.entry.event
        if isinstance(event, Tick):
            self.began = self.began or event.now
            self.now = event.now - self.began
            if not self._by_step and int(self.now) > self._slice.at:
                yield from self.last()
                self._slice = Slice(float(int(self.now)))
        self._hear(moment)
        for instruction in moment.answer:
            match instruction:
                case StepPlan():
                    self._plan(instruction)
                    if self._by_step:
                        yield self._slice
                        self._slice = Slice(self.now)
                case Outputs():
                    self._outputs(instruction)
                case EndEpoch():
                    self._slice.notes.append(f"the engine ends the epoch: {instruction.reason}")
                case KvEvents():
                    pass

    def last(self) -> Iterator[Slice]:
        """What is not complete, where there is anything in it."""
        if self._slice.plans or self._slice.counts or self._slice.notes or self._slice.out:
            yield self._slice

    def _hear(self, moment: Moment) -> None:
        part, stats = self._slice, moment.engine.stats()
        part.at = max(part.at, self.now) if self._by_step else part.at
        part.stats = stats
        part.count("preempted", stats.preemptions - self._preemptions)
        self._preemptions = stats.preemptions
        match moment.entry.event:
            case Submit():
                part.count("came")
            case Shed(sequences=sequences):
                part.count("shed", sequences)
            case Abort():
                part.count("aborted")
            case WorkerReady() as ready:
                part.notes.append(f"worker ready: epoch {ready.epoch.counter}, {ready.num_blocks} blocks")
            case WorkerLost() as lost:
                part.notes.append(f"WORKER LOST: epoch {lost.epoch.counter}{': ' if lost.reason else ''}{lost.reason}")
            case FrontendLost() as frontend:
                part.notes.append(f"frontend {frontend.frontend!r} lost")
            case FlushCache():
                part.count("cache flushed")
            case Drain():
                part.count("drain")
            case AdapterLoaded(name=name):
                part.notes.append(f"adapter {name!r} loaded")
            case AdapterClosed(name=name, reason=reason):
                part.notes.append(f"adapter {name!r} closed{': ' if reason else ''}{reason}")
            case StepResult() | Tick() | WatchKv():
                pass
        if moment.entry.error:
            part.notes.append(f"RAISES {moment.entry.error}")

    def _plan(self, plan: StepPlan) -> None:
        part = self._slice
        part.step = f"{plan.epoch.counter}:{plan.step}" if self._by_step else ""
        part.plans += 1
        part.rows += len(plan.rows)
        for row in plan.rows:
            if row.sample and row.num_tokens == 1:
                part.decode += 1
            else:
                part.prefill += row.num_tokens
        part.count("admitted", len(plan.admit))

    def _outputs(self, outputs: Outputs) -> None:
        for delta in outputs.items:
            self._slice.out += len(delta.token_ids)
            if delta.finish_reason is not None:
                done = delta.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
                self._slice.count("finished" if done else delta.finish_reason.name)


class Lanes:
    """What the first requests were doing, as a mark at every moment of change."""

    WAITS, PREFILLS, DECODES, PREEMPTED, LOST = "·", "▒", "█", "x", "!"

    def __init__(self, most: int) -> None:
        self._most = most
        self._marks: dict[tuple[str, int], list[tuple[float, str]]] = {}

    def look(self, moment: Moment, now: float) -> None:
        event, roster = moment.entry.event, moment.engine.roster
        if isinstance(event, Submit) and len(self._marks) < self._most:
            self._marks.setdefault((event.request_id, event.index), [])
        for (request_id, index), marks in self._marks.items():
            found = roster.find(request_id, index)
            mark = self._mark(found[0]) if found else " "
            before = marks[-1][1] if marks else " "
            if mark == self.WAITS and before in (self.PREFILLS, self.DECODES):
                marks.append((now, self.LOST if isinstance(event, WorkerLost) else self.PREEMPTED))
            if mark != before:
                marks.append((now, mark))

    def _mark(self, sequence: Sequence) -> str:
        if sequence.state is not State.RUNNING:
            return self.WAITS
        return self.DECODES if sequence.ahead or sequence.computed + 1 >= sequence.settled else self.PREFILLS

    def lines(self, end: float, width: int) -> Iterator[tuple[str, str]]:
        """Request and lane; a cell shows the rarest of what happened in it."""
        order = f" {self.WAITS}{self.DECODES}{self.PREFILLS}{self.PREEMPTED}{self.LOST}"
        for (request_id, index), marks in self._marks.items():
            cells, until = [" "] * width, [*(at for at, _ in marks[1:]), end]
            for (at, mark), stop in zip(marks, until, strict=False):
                first, last = (min(width - 1, int(t / end * width)) if end else 0 for t in (at, stop))
                for cell in range(first, last + 1):
                    cells[cell] = max(cells[cell], mark, key=order.index)
            yield f"{request_id}/{index}", "".join(cells)


def show(console: Console, log: Log, timeline: str | None, lanes: int | None, step: str | None) -> str:
    """Prints what was asked for. Returns the first difference, at which it ends. Raises LogError."""
    teller, tracks = Teller(timeline == "steps"), Lanes(lanes or 0)
    table = Table(*_COLUMNS)
    plans = 0
    difference = ""
    for moment in log:
        for part in teller.tell(moment):
            table.add_row(*part.cells())
        tracks.look(moment, teller.now)
        for plan in moment.plans:
            plans += 1
            if step in (str(plans), f"{plan.epoch.counter}:{plan.step}"):
                _show_plan(console, moment, plan, plans, teller.now)
                return moment.difference
        if difference := moment.difference:
            break
    if step:
        raise LogError(f"{log.path} has no plan {step}: it has {plans}")
    if timeline:
        for part in teller.last():
            table.add_row(*part.cells())
        table.title = _title(log, teller.began)
        console.print(table)
    if lanes:
        _show_lanes(console, tracks, teller.now)
    return difference


def _title(log: Log, began: float) -> str:
    header = log.header
    part = f", part {header.part}" if header.part > 1 else ""
    why = f", before: {header.reason}" if header.reason else ""
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(began + header.clock))
    return f"{header.model}{part}, from {at}{why}"


def _show_lanes(console: Console, lanes: Lanes, end: float) -> None:
    width = max(20, console.width - 34)
    console.print(f"\n{'request':<30} 0 s{f'{end:.1f} s':>{width - 3}}")
    for name, lane in lanes.lines(end, width):
        console.print(Text(f"{name[:30]:<30} {lane}"))
    marks = f"{lanes.WAITS} waits  {lanes.PREFILLS} prefill  {lanes.DECODES} decode  {lanes.PREEMPTED} preempted  "
    console.print(Text(f"{marks}{lanes.LOST} its worker was lost"))


def _show_plan(console: Console, moment: Moment, plan: StepPlan, number: int, now: float) -> None:
    event = type(moment.entry.event).__name__
    console.print(
        f"plan {number}: epoch {plan.epoch.counter}, step {plan.step}, {now:.3f} s after the log's beginning, "
        f"in answer to event {moment.number} ({event})"
    )
    holders = {sequence.slot: sequence for sequence in moment.engine.roster.running}
    admitted = {admit.slot for admit in plan.admit}
    rows = Table("slot", "request", "start", "tokens", "drafts", "samples", "new blocks", "", title="rows")
    for row in plan.rows:
        holder = holders.get(row.slot)
        name = f"{holder.request_id}/{holder.index}" if holder else "?"
        blocks = " ".join(str(block) for group in row.new_block_ids for block in group)
        cells = (row.slot, name, row.start, row.num_tokens, row.num_drafts, "yes" if row.sample else "", blocks)
        rows.add_row(*map(str, cells), "admitted" if row.slot in admitted else "")
    console.print(rows)
    if plan.release:
        console.print(f"released slots: {' '.join(map(str, plan.release))}")
    _show_engine(console, moment.engine)


def _show_engine(console: Console, engine: Scheduler) -> None:
    stats = engine.stats()
    console.print(
        f"running {stats.running}, waiting {stats.waiting} ({stats.waiting_tokens} tokens); "
        f"slots {stats.free_slots} of {stats.num_slots} free; blocks {stats.num_blocks} = {stats.free_blocks} free + "
        f"{stats.cached_blocks} cached + {stats.owned_blocks} owned + {stats.fenced_blocks} fenced"
    )
    live = Table(
        *("request", "state", "tenant", "priority", "slot", "prompt", "settled", "computed", "in flight", "blocks"),
        title="sequences, after the event",
    )
    for sequence in engine.roster:
        submit = sequence.submit
        cells = (
            *(f"{sequence.request_id}/{sequence.index}", sequence.state.name, submit.tenant, submit.priority),
            *(sequence.slot or "", sequence.prompt_len, sequence.settled, sequence.computed, sequence.ahead),
            " ".join(map(str, sequence.block_ids[:12])) + (" …" if len(sequence.block_ids) > 12 else ""),
        )
        live.add_row(*map(str, cells))
    console.print(live)

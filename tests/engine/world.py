"""A scheduler, its workers and its frontends in one place; the invariants are looked at after every event."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from msgspec.structs import replace

from protos.engine_wire import Abort, FinishReason, KvEvents, Outputs, Submit, TokenDelta, WatchKv
from protos.wire import Copy, Direction, Epoch, RowResult, Sampling, StepPlan, StepResult, Timings, TokenLogprobs
from scheduler_svc.engine.config import EngineConfig
from scheduler_svc.engine.events import (
    AdapterClosed,
    AdapterFree,
    AdapterLoaded,
    EndEpoch,
    Event,
    Instruction,
    MaskRequest,
    Matched,
    Tick,
    Verdict,
    WorkerLost,
    WorkerReady,
)
from scheduler_svc.engine.prefix_cache import domain
from scheduler_svc.engine.scheduler import Scheduler
from scheduler_svc.engine.speculation import Costs
from tests.engine.kv_mirror import Mirror
from tests.fakes import FakeWorker, expected, expected_pooled, fake_grammar

VOCAB_SIZE = 32
Table = tuple[tuple[int, float], ...]  # as in WorkerReady


def request(
    request_id: str, prompt: int | list[int] = 8, max_tokens: int = 4, *, seed: int = 0, **fields: Any
) -> Submit:
    """A Submit; `prompt` is a length or the tokens, `fields` are of Submit or of Sampling."""
    tokens = [(5 * i + 1) % VOCAB_SIZE for i in range(prompt)] if isinstance(prompt, int) else prompt
    of_submit = {name: fields.pop(name) for name in list(fields) if name in Submit.__struct_fields__}
    return Submit(request_id, tokens, len(tokens), Sampling(max_tokens, seed, **fields), **of_submit)


@dataclass
class Stream:
    """What a frontend has seen of one sequence."""

    submit: Submit
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    deltas: list[TokenDelta] = field(default_factory=list)
    asked_to_end: list[FinishReason] = field(default_factory=list)

    @property
    def end(self) -> TokenDelta | None:
        return self.deltas[-1] if self.deltas and self.deltas[-1].finish_reason is not None else None

    @property
    def reason(self) -> FinishReason | None:
        return self.end.finish_reason if self.end else None


@dataclass(frozen=True)
class Named:
    """One row of a plan in flight: whom it names, what it may write, what its table holds."""

    owner: int  # one for each Admit
    writes: frozenset[int]
    hits: frozenset[int]
    table: frozenset[int]


@dataclass
class Side:
    """One worker group: its worker, while it lives, and what it has computed and not yet delivered."""

    worker: FakeWorker | None = None
    results: deque[StepResult] = field(default_factory=deque)
    in_flight: deque[dict[int, Named]] = field(default_factory=deque)  # one for each result, by slot
    copying: deque[list[Copy]] = field(default_factory=deque)  # one for each result
    naming: deque[set[str]] = field(default_factory=deque)  # adapters, one for each result
    owners: dict[int, tuple[int, int, list[int]]] = field(default_factory=dict)  # by slot: owner, blocks hit, table

    def forget_flights(self) -> None:
        self.results.clear()
        self.in_flight.clear()
        self.copying.clear()
        self.naming.clear()
        self.owners.clear()


class World:
    """Sends events, runs plans at once and keeps their results until `land`: the workers are ahead of the engine.

    With several groups, what a group is asked or does is the first's where the caller names none.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        num_blocks: int = 64,
        align: int = 1,
        groups: int = 1,
        max_model_len: int = 0,
        quality: float = 0.6,
        seconds: Callable[[int], float] | None = None,
        num_host_blocks: int = 0,
        step_seconds: Table = (),
        propose_seconds: Table = (),
    ) -> None:
        self.config = config
        self.step_seconds, self.propose_seconds = step_seconds, propose_seconds
        self.num_blocks, self.align, self.max_model_len, self.quality = num_blocks, align, max_model_len, quality
        self.num_host_blocks = num_host_blocks
        self.seconds = seconds  # that a step of so many positions takes; None: no time passes, and none is reported
        self.quotas = {tenant.name: tenant for tenant in config.tenants}
        self.scheduler = Scheduler(config)
        self.sides = [Side() for _ in range(groups)]
        self.streams: dict[tuple[str, int], Stream] = {}
        self.log: list[Event] = []
        self.answers: list[list[Instruction]] = []
        self.plans: list[StepPlan] = []
        self.ended: list[EndEpoch] = []
        self.mirrors: list[tuple[str, Mirror]] = []  # by frontend
        self.adapters: dict[str, str] = {}  # digests of what workers have, by name
        self.closed: set[str] = set()  # of those, what requests may name no more
        self.abrupt: set[str] = set()  # digests of what was lost under its users
        self.unknown: set[tuple[str, int]] = set()  # streams that named none that they could
        self.compiling: list[Submit] = []
        self._matching: dict[tuple[str, int], None] = {}  # streams with a grammar that gained tokens
        self.counter = 0  # of epochs
        self.last_epochs: dict[int, Epoch] = {}  # by group
        self.crashes = 0
        self.now = 1000.0
        self._num_owners = self._num_mirrors = 0
        self._oracles: dict[tuple[str, int], tuple[Submit, int, tuple[list[int], FinishReason]]] = {}

    @property
    def worker(self) -> FakeWorker | None:
        return self.sides[0].worker

    @property
    def results(self) -> deque[StepResult]:
        return self.sides[0].results

    # ------------------------------------------------------------ what happens

    @property
    def limit(self) -> int:
        lengths = [self.config.max_model_len, self.max_model_len, (self.num_blocks - 1) * self.config.block_size]
        return min(length for length in lengths if length)

    def ready(self, group: int = 0) -> None:
        self.counter += 1
        epoch = self.last_epochs[group] = Epoch(1, self.counter)
        side = self.sides[group]
        side.worker = FakeWorker(
            epoch,
            num_blocks=self.num_blocks,
            block_size=self.config.block_size,
            max_slots=self.config.max_slots,
            align=self.align,
            vocab_size=VOCAB_SIZE,
            max_model_len=self.limit,
            draft_quality=self.quality,
            num_host_blocks=self.num_host_blocks,
        )
        for name, digest in self.adapters.items():
            side.worker.load_adapter(name, digest)
        side.forget_flights()
        slots, longest = self.config.max_slots, self.max_model_len
        ready = WorkerReady(epoch, self.num_blocks, slots, self.align, 1, longest, group, self.num_host_blocks)
        self.send(replace(ready, step_seconds=self.step_seconds, propose_seconds=self.propose_seconds))

    def ready_all(self) -> None:
        for group, side in enumerate(self.sides):
            if side.worker is None:
                self.ready(group)

    def crash(self, blameless: bool = False, group: int = 0) -> None:
        side = self.sides[group]
        assert side.worker is not None
        epoch, side.worker = side.worker.epoch, None
        self.crashes += not blameless
        side.forget_flights()
        self.send(WorkerLost(epoch, "killed", blameless))

    def load_adapter(self, name: str, digest: str = "") -> None:
        """Into all workers. Not one that they still have."""
        self.adapters[name] = digest or f"digest of {name}"
        for side in self.sides:
            if side.worker:
                side.worker.load_adapter(name, self.adapters[name])
        self.send(AdapterLoaded(name, self.adapters[name]))

    def close_adapter(self, name: str, reason: str = "") -> None:
        self.closed.add(name)
        if reason:
            self.abrupt.add(self.adapters[name])
        self.send(AdapterClosed(name, reason))

    def _free_adapter(self, name: str) -> None:
        assert name in self.closed, f"nobody closed adapter {name!r}"
        for side in self.sides:
            assert not any(name in named for named in side.naming), f"a plan in flight names adapter {name!r}"
            if side.worker:
                side.worker.unload_adapter(name)
        self.closed.discard(name)
        del self.adapters[name]

    def submit(self, submit: Submit) -> None:
        """An adapter that is named without its digest is loaded first, where it is not."""
        key = (submit.request_id, submit.index)
        assert key not in self.streams, "the test repeats an id: send it by hand"
        if submit.adapter and not submit.adapter_digest:
            if submit.adapter not in self.adapters:
                self.load_adapter(submit.adapter)
            submit = replace(submit, adapter_digest=self.adapters[submit.adapter])
        named = self.adapters.get(submit.adapter, "") if submit.adapter not in self.closed else ""
        if named != submit.adapter_digest:
            self.unknown.add(key)
        self.streams[key] = Stream(submit)
        self.send(submit)
        if submit.grammar:
            self.compiling.append(submit)

    def compiled(self, ends: FinishReason | None = None) -> None:
        """The first verdict of the oldest grammar that is being compiled; or why there is none."""
        submit = self.compiling.pop(0)
        grammar = fake_grammar(submit)
        assert grammar
        if ends:
            self.streams[submit.request_id, submit.index].asked_to_end.append(ends)
            self.send(Verdict(submit.request_id, submit.index, [], ends, "no grammar"))
        else:
            self.send(grammar.verdict(submit, len(submit.token_ids) - submit.prompt_len, VOCAB_SIZE))

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORTED, index: int = -1) -> None:
        for (rid, i), stream in self.streams.items():
            if rid == request_id and index in (-1, i):
                stream.asked_to_end.append(reason)
        self.send(Abort(request_id, reason, index))

    def watch(self, frontend: str = "f") -> Mirror:
        """One more watcher of the published blocks."""
        self._num_mirrors += 1
        mirror = Mirror(self._num_mirrors)
        self.mirrors.append((frontend, mirror))
        self.send(WatchKv(mirror.watcher, frontend))
        return mirror

    def unwatch(self, frontend: str) -> None:
        self.mirrors = [(name, mirror) for name, mirror in self.mirrors if name != frontend]
        self.send(WatchKv(0, frontend))

    def tick(self, seconds: float) -> None:
        self.now += seconds
        self.send(Tick(self.now))

    def land(self, count: int = 1, group: int = 0) -> None:
        """Delivers so many results, if there are so many."""
        side = self.sides[group]
        for _ in range(count):
            if not side.results:
                return
            side.in_flight.popleft()
            side.copying.popleft()
            side.naming.popleft()
            result = side.results.popleft()
            if result.timings.forward:
                self.tick(result.timings.forward)
            self.send(result)

    def spoil(self, change: str, group: int = 0) -> None:
        """Delivers the next result with something wrong in it; the engine must not believe it."""
        side = self.sides[group]
        result = side.results.popleft()
        rows, copied = list(result.rows), list(result.copied)
        step = result.step
        match change:
            case "gap":
                step += 1
            case "start":
                rows[0] = RowResult(rows[0].slot, rows[0].start + 1, rows[0].token_ids)
            case "slot":
                rows[0] = RowResult(rows[0].slot + 1, rows[0].start, rows[0].token_ids)
            case "tokens":
                rows[0] = RowResult(rows[0].slot, rows[0].start, [*rows[0].token_ids, *[1] * 9])
            case "range":
                rows[0] = RowResult(rows[0].slot, rows[0].start, [-1] * max(1, len(rows[0].token_ids)))
            case "rows":
                rows.pop()
            case "copied":
                copied.append(0)
            case "pooled":
                rows[0] = replace(rows[0], pooled=b"" if rows[0].pooled else b"1234")
        side.worker = None
        self.crashes += 1
        side.forget_flights()
        ended = len(self.ended)
        self.send(StepResult(result.epoch, step, rows, copied))
        assert len(self.ended) == ended + 1, f"the engine believed a result with a wrong {change}"

    def run(self, max_steps: int = 10_000) -> None:
        """Until nothing is in flight and nothing more is sent."""
        for _ in range(max_steps):
            if not any(side.results for side in self.sides):
                return
            for group in range(len(self.sides)):
                self.land(group=group)
        raise AssertionError(f"not done after {max_steps} steps: {self.scheduler.stats()}")

    # ------------------------------------------------------------ what must hold

    def send(self, event: Event) -> list[Instruction]:
        self.log.append(event)
        instructions = self.scheduler.handle(event)
        self.answers.append(instructions)
        requests = {(i.epoch, i.step): i for i in instructions if isinstance(i, MaskRequest)}
        for instruction in instructions:
            match instruction:
                case StepPlan():
                    self._take_plan(instruction, requests.get((instruction.epoch, instruction.step)))
                case Outputs():
                    for delta in instruction.items:
                        self._take_delta(delta, instruction.frontend)
                case KvEvents():
                    for frontend, mirror in self.mirrors:
                        if frontend == instruction.frontend:
                            mirror.take(instruction)
                case AdapterFree():
                    self._free_adapter(instruction.name)
                case EndEpoch():
                    self.ended.append(instruction)
        self.check()
        for device in list(self.scheduler.devices.values()):
            if device.unmatched:
                matching, self._matching = list(self._matching), {}
                self.send(Matched(device.epoch, device.unmatched, [*map(self._verdict, matching)]))
        return instructions

    def _verdict(self, key: tuple[str, int]) -> Verdict:
        stream = self.streams[key]
        grammar = fake_grammar(stream.submit)
        assert grammar
        count = len(stream.submit.token_ids) - stream.submit.prompt_len + len(stream.token_ids)
        return grammar.verdict(stream.submit, count, VOCAB_SIZE)

    def check(self) -> None:
        self.scheduler.check_integrity()
        self._check_mirrors()
        stats = self.scheduler.stats()
        assert stats.num_blocks == stats.free_blocks + stats.cached_blocks + stats.owned_blocks + stats.fenced_blocks
        assert stats.running == sum(len(device.running) for device in self.scheduler.devices.values())
        for group, device in self.scheduler.devices.items():
            side = self.sides[group]
            assert side.worker is not None
            assert len(device.running) <= self.config.max_num_seqs
            assert len(side.results) <= max(self.config.depth, self.config.short_depth)
            for sequence in device.running:
                slot = side.worker.slots[sequence.slot]
                length = len(slot.tokens) + len(sequence.unsent)
                assert not sequence.masked or sequence.ahead <= 2
                assert sequence.settled <= length <= sequence.hi, (sequence.settled, length, sequence.hi)
                assert slot.blocks == sequence.block_ids

    def _check_mirrors(self) -> None:
        pools = [device.kv.pool for device in self.scheduler.devices.values()]
        published = {digest for pool in pools for digest in (*pool.by_hash, *pool.host.by_hash)}
        assert self.scheduler.journal.blocks.keys() == published
        for _, mirror in self.mirrors:
            assert mirror.blocks.keys() == published

    def check_ends(self) -> None:
        """All are done, nothing stays owned or fenced, and every stream is what the oracle says."""
        stats = self.scheduler.stats()
        assert self.scheduler.idle
        assert (stats.running, stats.waiting, stats.waiting_tokens) == (0, 0, 0), stats
        assert (stats.owned_blocks, stats.fenced_blocks) == (0, 0), stats
        assert stats.free_slots == stats.num_slots
        assert not self.closed, "an adapter was closed, and is not free"
        for stream in self.streams.values():
            self._check_end(stream)

    def oracle(self, submit: Submit) -> tuple[list[int], FinishReason]:
        """Kept, as each delta asks for it; a stream's Submit is the same object as long as it says the same."""
        key = submit.request_id, submit.index
        kept = self._oracles.get(key)
        if kept is None or kept[0] is not submit or kept[1] != self.limit:
            answer = expected(submit, VOCAB_SIZE, self.limit, domain(submit.tenant, submit.cache_salt))
            kept = self._oracles[key] = submit, self.limit, answer
        return kept[2]

    def _check_end(self, stream: Stream) -> None:
        submit, end = stream.submit, stream.end
        assert end is not None, f"{submit.request_id}/{submit.index} never ended"
        tokens, reason = self.oracle(submit)
        assert end.finish_reason is FinishReason.NOT_FOUND or (submit.request_id, submit.index) not in self.unknown
        match end.finish_reason:
            case FinishReason.LENGTH | FinishReason.STOP if not stream.asked_to_end:
                assert (stream.token_ids, end.finish_reason) == (tokens, reason)
                if submit.sampling.prompt_logprobs >= 0 and (stream.token_ids or not submit.sampling.max_tokens):
                    assert len(stream.prompt_logprobs) == max(
                        0, submit.prompt_len - submit.sampling.prompt_logprobs_from
                    )
                assert end.pooled == expected_pooled(submit, domain(submit.tenant, submit.cache_salt))
            case FinishReason.LENGTH | FinishReason.STOP | FinishReason.ABORTED:
                assert stream.asked_to_end or stream.token_ids == tokens
            case FinishReason.DEADLINE:
                late = end.detail.startswith(("the deadline in", "given up in the queue"))
                assert 0 < submit.deadline <= self.now or (late and self.seconds)
                assert not (late and stream.token_ids), "what ran is not given up"
            case FinishReason.INVALID if "over the burst" in end.detail:
                assert submit.num_siblings * len(submit.token_ids) > self.quotas[submit.tenant].burst
            case FinishReason.INVALID:
                if any(name in end.detail for name in ("max_waiting ", "max_waiting_tokens ")):
                    count, config = submit.num_siblings, self.config
                    assert count > config.max_waiting or count * len(submit.token_ids) > config.max_waiting_tokens
                    return
                assert submit.prompt_len + (submit.sampling.max_tokens > 0) > self.limit
                assert str(self.limit) in end.detail or str(self.num_blocks - 1) in end.detail
            case FinishReason.QUOTA:
                quota = self.quotas[submit.tenant]
                assert end.retry_after > 0
                assert end.tenant == submit.tenant
                assert f"{quota.tokens_per_second:g} tokens a second" in end.detail
            case FinishReason.REJECTED:
                assert end.retry_after > 0
            case FinishReason.ERROR if end.detail == "gone":
                assert submit.adapter_digest in self.abrupt
            case FinishReason.ERROR:
                assert self.crashes >= 5
            case FinishReason.NOT_FOUND:
                assert (submit.request_id, submit.index) in self.unknown
            case FinishReason.GRAMMAR:
                assert FinishReason.GRAMMAR in stream.asked_to_end
            case FinishReason.DRAINING | FinishReason.DUPLICATE | None:
                pass

    def _take_delta(self, delta: TokenDelta, frontend: str) -> None:
        stream = self.streams[delta.request_id, delta.index]
        submit = stream.submit
        assert frontend == submit.frontend
        assert stream.end is None, f"{delta} after the end"
        assert delta.token_ids or delta.prompt_logprobs or delta.finish_reason is not None, "a delta that says nothing"
        begin = len(submit.token_ids) + len(stream.token_ids)
        stream.deltas.append(delta)
        stream.token_ids += delta.token_ids
        if submit.grammar and delta.token_ids:
            self._matching[delta.request_id, delta.index] = None
        stream.prompt_logprobs += delta.prompt_logprobs
        known, count = len(stream.token_ids) - len(delta.token_ids), len(stream.token_ids)
        assert delta.token_ids == self.oracle(submit)[0][known:count], "not the oracle's tokens"
        if submit.sampling.logprobs >= 0:
            assert [(t.token_id, -t.logprob) for t in delta.logprobs] == [
                (t, begin + i) for i, t in enumerate(delta.token_ids)
            ]
        first = submit.sampling.prompt_logprobs_from
        assert [-t.logprob for t in stream.prompt_logprobs] == list(range(first, first + len(stream.prompt_logprobs)))
        if delta.finish_reason is FinishReason.STOP and delta.token_ids and not submit.grammar:
            assert delta.stop_token_id == delta.token_ids[-1]
        admitted = [d.cached_tokens for d in stream.deltas if d.token_ids]
        assert admitted == admitted[:1] * len(admitted), "cached_tokens changed"

    def _take_plan(self, plan: StepPlan, request: MaskRequest | None) -> None:
        side = next((side for side in self.sides if side.worker and side.worker.epoch == plan.epoch), None)
        assert side, "a plan without a worker"
        assert side.worker
        self.plans.append(plan)
        drafts = sum(row.num_tokens + row.num_drafts for row in plan.rows)
        assert drafts <= self.config.max_step_tokens
        for admit in plan.admit:
            self._num_owners += 1
            side.owners[admit.slot] = (self._num_owners, 0, list(admit.block_ids[0]))
        named = {}
        for row in plan.rows:
            owner, hits, table = side.owners[row.slot]
            slot = side.worker.slots.get(row.slot)
            if slot is None or any(admit.slot == row.slot for admit in plan.admit):
                start, end = row.start, row.start + row.num_tokens
                hits = row.start // self.config.block_size
                assert row.start % self.config.block_size == 0
            else:
                start, end = slot.computed, min(slot.computed + row.num_tokens, len(slot.tokens)) + row.num_drafts
            for blocks in row.new_block_ids:
                table += blocks
            side.owners[row.slot] = (owner, hits, table)
            size = self.config.block_size
            writes = frozenset(table[start // size : -(-end // size)])
            named[row.slot] = Named(owner, writes, frozenset(table[:hits]), frozenset(table))
        self._check_copies(side, plan)
        self._check_owners(side, named)
        side.in_flight.append(named)
        side.copying.append(plan.copies)
        grammars = {}
        for number, request_id, index in request.rows if request else ():
            named_row = plan.rows[number]
            grammar = fake_grammar(self.streams[request_id, index].submit)
            assert grammar
            assert named_row.masked
            grammars[named_row.slot] = grammar
        result = side.worker.run(plan, grammars)
        side.naming.append({side.worker.slots[row.slot].admit.adapter for row in plan.rows})
        if self.seconds:
            proposing = Costs((), self.propose_seconds).proposing(len(plan.rows), plan.num_propose)
            result = replace(result, timings=Timings(forward=self.seconds(drafts) + proposing))
        side.results.append(result)

    def _check_copies(self, side: Side, plan: StepPlan) -> None:
        """Whatever a plan in flight copies from or to stays as it is until that has landed."""
        read = {host_block for copies in side.copying for _, _, host_block in copies}
        for direction, block, host_block in plan.copies:
            if direction is Direction.TO_HOST:
                assert host_block not in read, f"host block {host_block} is written while it is copied"
                tables = [one.table for flight in side.in_flight for one in flight.values()]
                assert not any(block in table for table in tables), f"block {block} is owned and copied from"
            read.add(host_block)
        targets = [block for direction, block, _ in plan.copies if direction is Direction.TO_DEVICE]
        assert len(set(targets)) == len(targets), "two copies go to one block"

    def _check_owners(self, side: Side, newest: dict[int, Named]) -> None:
        """No slot and no block belongs to two owners across the plans in flight, except published read-only blocks."""
        for earlier in [*side.in_flight, newest]:
            for slot, one in earlier.items():
                assert slot not in newest or newest[slot].owner == one.owner, f"slot {slot} is named for two owners"
                for other in newest.values():
                    if other.owner != one.owner:
                        assert not other.writes & one.table, "a row writes where another in flight reads or writes"
                        assert one.writes & other.table <= other.hits, "a row owns what another in flight writes"

"""Random requests, crashes, aborts, preemptions and pools, against the ten invariants of architecture.md.

Invariants 1, 2 and 8 are looked at after every event (World.check), 3 and 4 by the FakeWorker in every row, 5 and 6
with every delta (and with them 7: the oracle follows a stream's grammar), 9 when a run ends; 10 has a test of its own
(test_replay.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from msgspec.structs import replace

from protos.engine_wire import FinishReason, FrontendLost, Grammar, Submit
from protos.wire import Epoch, Sampling, StepResult
from scheduler_svc.engine.config import EngineConfig, Tenant
from scheduler_svc.engine.events import Drain, Event, FlushCache, WorkerLost, WorkerReady
from tests.engine.world import Side, World

PREFIXES = [[(7 * i + 3 * f) % 31 for i in range(40)] for f in range(3)]
events = 0  # over all runs of this process
copies = [0, 0]  # to the host, and back


@st.composite
def samplings(draw: st.DrawFn) -> Sampling:
    return Sampling(
        max_tokens=draw(st.integers(1, 20)),
        seed=draw(st.integers(0, 3)),
        min_tokens=draw(st.sampled_from([0, 0, 0, 4])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.0, 1.1])),
        stop_token_ids=draw(st.sampled_from([(), (5,), (5, 9, 11)])),
        eos_token_ids=draw(st.sampled_from([(), (2,), (2, 17)])),
        logprobs=draw(st.sampled_from([-1, -1, 0])),
        prompt_logprobs=draw(st.sampled_from([-1, -1, -1, -1, 0])),
        prompt_logprobs_from=draw(st.sampled_from([1, 1, 6, 20])),
    )


class Engine(RuleBasedStateMachine):
    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        self.requests = 0
        block_size = data.draw(st.sampled_from([4, 8]), "block_size")
        num_drafts = data.draw(st.sampled_from([0, 0, 1, 3]), "num_drafts")
        self.groups = data.draw(st.sampled_from([1, 1, 2, 3]), "groups")
        max_num_seqs = data.draw(st.sampled_from([1, 3, 6]), "max_num_seqs")
        least = max_num_seqs * data.draw(st.sampled_from([1, 1 + num_drafts]), "room for drafts")
        self.world = World(
            EngineConfig(
                block_size=block_size,
                max_num_seqs=max_num_seqs,
                max_step_tokens=data.draw(st.sampled_from([max(least, 8), max(least, 8) + 9, 64]), "max_step_tokens"),
                depth=data.draw(st.integers(1, 3), "depth"),
                long_step=data.draw(st.sampled_from([0, 0, max_num_seqs]), "long_step"),
                short_step=data.draw(st.sampled_from([0, 0, 2]), "short_step"),
                short_depth=data.draw(st.sampled_from([1, 3, 5]), "short_depth"),
                num_drafts=num_drafts,
                max_waiting=data.draw(st.sampled_from([6, 50]), "max_waiting"),
                max_waiting_tokens=data.draw(st.sampled_from([100, 5000]), "max_waiting_tokens"),
                prefix_caching=data.draw(st.sampled_from([True, True, True, False]), "prefix_caching"),
                tenants=data.draw(st.sampled_from([(), (Tenant("a", 3.0, 20.0, 60.0), Tenant("b", 0.5))]), "tenants"),
            ),
            num_blocks=data.draw(st.sampled_from([6, 10, 16, 40]), "num_blocks"),
            num_host_blocks=data.draw(st.sampled_from([0, 1, 4, 12, 60]), "num_host_blocks"),
            groups=self.groups,
            align=data.draw(st.sampled_from([1, 4, 8]), "align"),
            max_model_len=data.draw(st.sampled_from([0, 30, 48]), "max_model_len"),
            quality=data.draw(st.sampled_from([0.0, 0.6, 1.0]), "draft quality"),
            seconds=data.draw(st.sampled_from([None, lambda positions: 0.05 + 0.01 * positions]), "seconds"),
            step_seconds=data.draw(st.sampled_from([(), ((1, 0.06), (8, 0.13)), ((1, 0.05), (64, 0.06))]), "table"),
            propose_seconds=data.draw(st.sampled_from([(), ((1, 0.001), (4, 0.02))]), "proposing"),
        )
        if data.draw(st.booleans(), "ready at once"):
            self.world.ready_all()

    def _draw_group(self, data: st.DataObject, wanted: Callable[[Side], object]) -> int:
        """One of which that holds; the preconditions say that there is one."""
        return data.draw(st.sampled_from([i for i, side in enumerate(self.world.sides) if wanted(side)]), "group")

    @rule(
        family=st.integers(0, 2),
        shared=st.integers(0, 40),
        tail=st.lists(st.integers(0, 31), max_size=6),
        resumed=st.sampled_from([0, 0, 0, 2]),
        computes=st.sampled_from([None, None, None, "", "last", "mean", "cls"]),
        sampling=samplings(),
        n=st.sampled_from([1, 1, 1, 2, 4]),
        priority=st.sampled_from([0, 0, 1]),
        lifetime=st.sampled_from([0.0, 0.0, 0.0, 3.0]),
        salt=st.sampled_from(["", "", "s"]),
        adapter=st.sampled_from(["", "", "", "a", "b"]),
        stale=st.sampled_from([False, False, False, False, True]),
        frontend=st.sampled_from(["f", "f", "f", "g"]),
        skip_cache=st.sampled_from([False, False, False, True]),
        tenant=st.sampled_from(["", "", "a", "b", "c"]),
        grammar=st.none() | st.integers(0, 40),
    )
    def submit(
        self,
        family: int,
        shared: int,
        tail: list[int],
        resumed: int,
        computes: str | None,
        sampling: Sampling,
        n: int,
        priority: int,
        lifetime: float,
        salt: str,
        adapter: str,
        stale: bool,
        frontend: str,
        skip_cache: bool,
        tenant: str,
        grammar: int | None,
    ) -> None:
        """`computes`: nothing is sampled, and so it is pooled, or not at all."""
        prompt = (PREFIXES[family][:shared] + tail) or [1]
        if computes is not None:
            resumed, sampling, grammar = 0, replace(sampling, max_tokens=0), None
        if grammar is not None:  # the frontend refuses both
            sampling = replace(sampling, min_tokens=0)
        self.requests += 1
        for index in range(n):
            self.world.submit(
                Submit(
                    f"r{self.requests}",
                    prompt + [3] * resumed,
                    len(prompt),
                    sampling if index == 0 else _reseeded(sampling, index),
                    index,
                    n,
                    priority,
                    tenant,
                    self.world.now + lifetime if lifetime else 0.0,
                    salt,
                    adapter,
                    frontend,
                    skip_cache,
                    grammar=None if grammar is None else Grammar("regex", str(grammar + index)),
                    pooling=computes or "",
                    adapter_digest="of other files" if adapter and stale else "",
                )
            )

    @rule(name=st.sampled_from(["a", "b"]), digest=st.sampled_from(["one", "other"]))
    def load_adapter(self, name: str, digest: str) -> None:
        if name not in self.world.adapters:
            self.world.load_adapter(name, digest)

    @rule(name=st.sampled_from(["a", "b"]), reason=st.sampled_from(["", "", "", "gone"]))
    def close_adapter(self, name: str, reason: str) -> None:
        if name in self.world.adapters.keys() - self.world.closed:
            self.world.close_adapter(name, reason)

    @precondition(lambda self: self.world.compiling)
    @rule(ends=st.sampled_from([None] * 9 + [FinishReason.GRAMMAR]))
    def compiled(self, ends: FinishReason | None) -> None:
        self.world.compiled(ends)

    @rule(count=st.integers(1, 6), data=st.data())
    def land(self, count: int, data: st.DataObject) -> None:
        self.world.land(count, self._draw_group(data, lambda side: True))

    @rule(data=st.data(), reason=st.sampled_from([FinishReason.ABORTED, FinishReason.STOP]))
    def abort(self, data: st.DataObject, reason: FinishReason) -> None:
        if self.requests:
            number = data.draw(st.integers(max(1, self.requests - 6), self.requests), "request")
            self.world.abort(f"r{number}", reason, data.draw(st.sampled_from([-1, -1, 0, 1]), "index"))

    @precondition(lambda self: any(side.worker for side in self.world.sides))
    @rule(blameless=st.booleans(), data=st.data())
    def crash(self, blameless: bool, data: st.DataObject) -> None:
        self.world.crash(blameless, self._draw_group(data, lambda side: side.worker))

    @precondition(lambda self: not all(side.worker for side in self.world.sides))
    @rule(data=st.data())
    def ready(self, data: st.DataObject) -> None:
        self.world.ready(self._draw_group(data, lambda side: not side.worker))

    @precondition(lambda self: any(side.worker for side in self.world.sides))
    @rule(data=st.data())
    def ready_again(self, data: st.DataObject) -> None:
        """A new epoch without word of the old one's end."""
        self.world.crashes += 1
        self.world.ready(self._draw_group(data, lambda side: side.worker))

    @precondition(lambda self: any(side.results for side in self.world.sides))
    @rule(
        change=st.sampled_from(["gap", "start", "slot", "tokens", "range", "rows", "copied", "pooled"]), data=st.data()
    )
    def spoil(self, change: str, data: st.DataObject) -> None:
        group = self._draw_group(data, lambda side: side.results)
        if self._first_row_counts(group):
            self.world.spoil(change, group)

    def _first_row_counts(self, group: int) -> bool:
        """Whether the next result's first row names a sequence that is still alive: otherwise nobody reads it."""
        return self.world.scheduler.devices[group].sent[0].sequences[0].state.name != "FINISHED"

    @precondition(lambda self: self.world.counter)
    @rule()
    def stale(self) -> None:
        """Words of an epoch that has ended change nothing."""
        old = Epoch(1, 0)
        events: list[Event] = [StepResult(old, 1, []), WorkerLost(old, "late")]
        for group, was in self.world.last_epochs.items():
            alive = self.world.sides[group].worker
            old = Epoch(1, was.counter - 1)
            events.append(WorkerReady(old if alive else was, 99, 99, group=group))
            if not alive:
                events += [StepResult(was, 1, []), WorkerLost(was, "late")]
        for event in events:
            assert self.world.send(event) == []

    @rule(seconds=st.sampled_from([0.01, 0.5, 2.0]))
    def tick(self, seconds: float) -> None:
        self.world.tick(seconds)

    @rule()
    def flush(self) -> None:
        self.world.send(FlushCache())
        stats = self.world.scheduler.stats()
        assert stats.cached_blocks == 0 or any(side.results for side in self.world.sides)
        assert stats.cached_host_blocks == 0 or any(side.results for side in self.world.sides)

    @rule(frontend=st.sampled_from(["f", "f", "g"]), watches=st.sampled_from([True, True, True, False]))
    def watch(self, frontend: str, watches: bool) -> None:
        """World.check compares what watchers know with what is published."""
        if watches and len(self.world.mirrors) < 4:
            self.world.watch(frontend)
        elif not watches:
            self.world.unwatch(frontend)

    @rule()
    def lose_frontend(self) -> None:
        for stream in self.world.streams.values():
            if stream.submit.frontend == "g":
                stream.asked_to_end.append(FinishReason.ABORTED)
        self.world.mirrors = [(name, mirror) for name, mirror in self.world.mirrors if name != "g"]
        self.world.send(FrontendLost("g"))

    def teardown(self) -> None:
        global events
        if not hasattr(self, "world"):
            return
        world = self.world
        world.send(Drain())
        world.ready_all()
        while world.compiling:
            world.compiled()
        bound = 200 + 12 * world.config.depth * sum(s.limit for s in world.scheduler.roster)
        world.run(bound)
        world.check_ends()
        events += len(world.log)
        stats = world.scheduler.stats()
        copies[0] += stats.copied_to_host
        copies[1] += stats.copied_to_device


def _reseeded(sampling: Sampling, index: int) -> Sampling:
    return replace(sampling, seed=100 * index + sampling.seed)


PROFILE = os.environ.get("PAGEWIRE_HYPOTHESIS_PROFILE", "ci")


def test_invariants() -> None:
    run_state_machine_as_test(Engine, settings=settings.get_profile(f"engine-{PROFILE}"))
    print(f"\nstate machine, {PROFILE}: {events} events; {copies[0]} blocks to the host, {copies[1]} back")


@pytest.mark.nightly
@pytest.mark.timeout(7200)
def test_invariants_for_long() -> None:
    """At least 100,000 events, in rounds of the nightly profile."""
    while events < 100_000:
        run_state_machine_as_test(Engine, settings=settings.get_profile("engine-nightly"))
    print(f"\nstate machine, nightly: {events} events")

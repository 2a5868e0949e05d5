"""Whose turn it is: a virtual counter a tenant, and the queue in its order.

After Sheng et al., "Fairness in Serving Large Language Models" (OSDI '24): a tenant's counter grows with the service
that it got, over its weight, and who has the least is served next. Whoever comes to wait where it had nothing waiting
starts no lower than those who wait there: nobody saves up by asking for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from protos.engine_wire import TenantFigures
from scheduler_svc.engine.config import EngineConfig, Tenant
from scheduler_svc.engine.measures import Tallies, Tally
from scheduler_svc.engine.policy import Agenda
from scheduler_svc.engine.quota import Bucket
from scheduler_svc.engine.sequence import Sequence


@dataclass(slots=True)
class Work:
    """What is queued, and how much of it there is to do."""

    sequences: int = 0
    prompt_tokens: int = 0
    output_tokens: float = 0.0  # as was likely when they came

    def add(self, sequence: Sequence, sign: int = 1) -> None:
        self.sequences += sign
        self.prompt_tokens += sign * sequence.queued_tokens
        self.output_tokens += sign * sequence.likely_tokens


class Account:
    """One tenant's."""

    __slots__ = (
        "backlog",
        "best_priority",
        "bucket",
        "lines",
        "live",
        "name",
        "output_cost",
        "output_tokens",
        "paid",
        "prompt_cost",
        "running",
        "tally",
        "weight",
    )

    def __init__(self, tenant: Tenant, name: str, config: EngineConfig, tally: Tally) -> None:
        self.name = name
        self.tally = tally  # what the service says of it: nothing is decided by that
        self.weight = tenant.weight
        self.best_priority = tenant.best_priority
        self.bucket = Bucket(tenant.tokens_per_second, tenant.burst) if tenant.burst else None
        self.prompt_cost = config.prompt_cost / tenant.weight  # of a token, on the counter
        self.output_cost = config.output_cost / tenant.weight
        self.paid = 0.0  # on the counter, besides output tokens
        self.output_tokens = 0  # counted with every token of every step, and nothing else is
        self.live = 0  # sequences
        self.running = 0
        self.backlog: dict[int, Work] = {}  # by priority: of all that are live and not running; none is empty
        self.lines: dict[int, Line] = {}  # by priority; none is empty

    @property
    def counter(self) -> float:
        """Virtual time. It only grows."""
        return self.paid + self.output_tokens * self.output_cost

    @property
    def queued(self) -> int:
        """Its sequences that are live and do not run."""
        return self.live - self.running

    def newest(self) -> Iterator[Sequence]:
        """Who waits, worst priority first, then last come first."""
        for priority in sorted(self.lines, reverse=True):
            yield from self.lines[priority].sequences.newest()

    def queue(self, sequence: Sequence) -> None:
        self.backlog.setdefault(sequence.submit.priority, Work()).add(sequence)

    def unqueue(self, sequence: Sequence) -> None:
        work = self.backlog[sequence.submit.priority]
        work.add(sequence, -1)
        if not work.sequences:
            del self.backlog[sequence.submit.priority]

    def lift(self, floor: float) -> None:
        self.paid += max(0.0, floor - self.counter)


class Line:
    """What one tenant has waiting at one priority, first come first. `key` is where it stands in the queue."""

    __slots__ = ("account", "key", "priority", "sequences")

    def __init__(self, account: Account, priority: int) -> None:
        self.account, self.priority = account, priority
        self.sequences: Agenda[tuple[int], Sequence] = Agenda()
        self.key: tuple[int, float, int] = (priority, 0.0, 0)

    def first(self) -> Sequence:
        first = self.sequences.first()
        assert first is not None, "an empty line"
        return first[1]


class FairQueue:
    """Who waits, by priority, then counter, then arrival.

    Counters rise with every token, so lines are found at keys that are too low, never too high, and put right when
    they come first.
    """

    def __init__(self) -> None:
        self._lines: Agenda[tuple[int, float, int], Line] = Agenda()
        self._passed = 0.0  # the highest counter with which anybody has left the queue
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def join(self, sequence: Sequence) -> None:
        """A new request: its tenant is lifted to those who wait already, or to where the last of them left."""
        account, priority = sequence.account, sequence.submit.priority
        if priority not in account.lines:
            counters = [line.account.counter for line in self._lines.values() if line.priority == priority]
            account.lift(min(counters, default=self._passed))
        self.add(sequence)

    def add(self, sequence: Sequence) -> None:
        account, priority = sequence.account, sequence.submit.priority
        line = account.lines.get(priority)
        if line is None:
            line = account.lines[priority] = Line(account, priority)
        before = len(line.sequences)
        line.sequences.add((sequence.arrival,), sequence)
        self._size += len(line.sequences) - before
        self._place(line, (priority, account.counter, line.first().arrival))

    def discard(self, sequence: Sequence) -> None:
        account, priority = sequence.account, sequence.submit.priority
        line = account.lines[priority]
        before = len(line.sequences)
        line.sequences.discard((sequence.arrival,))
        self._size += len(line.sequences) - before
        self._passed = max(self._passed, account.counter)
        if not line.sequences:
            self._lines.discard(line.key)
            del account.lines[priority]

    def first(self) -> Sequence | None:
        while item := self._lines.first():
            found, line = item
            sequence = line.first()
            key = (line.priority, line.account.counter, sequence.arrival)
            if key == found:
                return sequence
            self._place(line, key)
        return None

    def _place(self, line: Line, key: tuple[int, float, int]) -> None:
        if key != line.key:
            self._lines.discard(line.key)
            line.key = key
        self._lines.add(key, line)


class Ledger:
    """Every tenant with something to remember: live sequences, or a counter that a newcomer's would be below."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._named = {tenant.name: tenant for tenant in config.tenants}
        self._accounts: dict[str, Account] = {}
        self.tallies = Tallies(config)
        self.num_live = 0  # tenants with a live sequence
        self._forgotten_tokens = 0

    def __iter__(self) -> Iterator[Account]:
        return iter(self._accounts.values())

    @property
    def several(self) -> bool:
        return self.num_live > 1

    @property
    def output_tokens(self) -> int:
        """Of all tenants, ever."""
        return self._forgotten_tokens + sum(account.output_tokens for account in self)

    def account(self, name: str) -> Account:
        account = self._accounts.get(name)
        if account is None:
            tenant = self._named.get(name, self._config.default_tenant)
            account = self._accounts[name] = Account(tenant, name, self._config, self.tallies.of(name))
        return account

    def enter(self, account: Account) -> None:
        self.num_live += not account.live
        account.live += 1

    def leave(self, account: Account) -> None:
        account.live -= 1
        self.num_live -= not account.live

    def forget(self, now: float) -> None:
        """Drops the accounts that a new one would not differ from."""
        floor = min((account.counter for account in self if account.live), default=None)
        idle = [a for a in self if not a.live and (floor is None or a.counter <= floor)]
        gone = [a.name for a in idle if a.bucket is None or a.bucket.is_full(now, a.output_tokens)]
        for name in gone:
            account = self._accounts.pop(name)
            self._forgotten_tokens += account.output_tokens
            account.tally.forgotten_output_tokens += account.output_tokens

    def figures(self) -> list[TenantFigures]:
        return self.tallies.figures((a.tally, a.running, a.queued, a.output_tokens) for a in self)

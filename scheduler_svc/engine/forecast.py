"""How long a request will take, from what others took. Without anything to go by, nothing is said."""

from __future__ import annotations

from dataclasses import dataclass

from protos.engine_wire import Submit
from protos.wire import Sampling
from scheduler_svc.engine.config import EngineConfig
from scheduler_svc.engine.fairness import Work
from scheduler_svc.engine.roster import Roster
from scheduler_svc.engine.sequence import Sequence

FADE = 0.999  # weight of what was learned before, at each step: it fades within a thousand
RECENT = 64  # steps
FIRST = 8  # steps before which nothing is said: one that stalls while a service starts is no pace
SOON = 0.2  # seconds
OUTLIER = 8.0  # times the usual: a step that took longer counts as if it had taken so long
STEADY = 16  # requests over which lengths and cache hits are averaged


class Pace:
    """Seconds of a step as base + each · positions: least squares over the steps, old ones fading."""

    __slots__ = ("_n", "_t", "_x", "_xt", "_xx", "recent")

    def __init__(self) -> None:
        self._n = self._x = self._t = self._xx = self._xt = 0.0
        self.recent = 0.0  # seconds of a step, mean of the newest

    def learn(self, positions: int, seconds: float) -> None:
        """A step that says no time (a worker that measures none) teaches nothing."""
        if seconds <= 0.0:
            return
        if self._n:
            usual = self._t / self._n * max(1.0, positions * self._n / self._x)
            seconds = min(seconds, OUTLIER * usual)
        self.recent += (seconds - self.recent) / min(RECENT, self._n + 1.0)
        self._n = FADE * self._n + 1.0
        self._x = FADE * self._x + positions
        self._t = FADE * self._t + seconds
        self._xx = FADE * self._xx + positions * positions
        self._xt = FADE * self._xt + positions * seconds

    @property
    def known(self) -> bool:
        return self._n > FIRST - 1

    def fit(self) -> tuple[float, float]:
        """(base, each), neither below 0. Where all steps had one length, all is base: the unknown costs nothing."""
        if not self._n:
            return 0.0, 0.0
        x, t = self._x / self._n, self._t / self._n
        spread = self._xx / self._n - x * x
        each = (self._xt / self._n - x * t) / spread if spread > 0.01 * x * x else 0.0
        each = min(max(0.0, each), t / x)
        return t - each * x, each


@dataclass(slots=True)
class Habit:
    """A mean and how far from it things are, of the newest STEADY or so."""

    count: int = 0
    mean: float = 0.0
    spread: float = 0.0

    def learn(self, value: float) -> None:
        self.count = min(self.count + 1, STEADY)
        distance = value - self.mean if self.count > 1 else 0.0
        self.mean += (value - self.mean) / self.count
        self.spread += (abs(distance) - self.spread) / self.count

    @property
    def least(self) -> float:
        """What hardly any falls below."""
        return self.mean - 2 * self.spread


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds: `wait` until it runs, `service` from then to its likely end, at the least."""

    wait: float
    service: float
    output_tokens: int  # that `service` counts with

    @property
    def total(self) -> float:
        return self.wait + self.service


class Forecast:
    def __init__(self, config: EngineConfig, roster: Roster) -> None:
        self.pace = Pace()
        self.now = 0.0  # as the last Tick said
        self._config = config
        self._roster = roster
        self._used: dict[int, Habit] = {}  # share of max_tokens that was used, by the number of its bits
        self._missed = Habit(1, 1.0)  # share of a prompt that was not in the cache

    def learn_length(self, sampling: Sampling, used: int) -> None:
        if _can_end(sampling):
            self._used.setdefault(sampling.max_tokens.bit_length(), Habit()).learn(used / sampling.max_tokens)

    def learn_hits(self, prompt_len: int, cached: int) -> None:
        self._missed.learn(1 - cached / prompt_len)

    def likely_tokens(self, submit: Submit) -> float:
        """Of output: all that it may have where nothing else ends it, else what others used; 1 while none has.

        Those that a resumed stream brings are not to be made again.
        """
        sampling, brought = submit.sampling, len(submit.token_ids) - submit.prompt_len
        if not sampling.max_tokens:
            return 0.0
        if not _can_end(sampling):
            return float(max(1, sampling.max_tokens - brought))
        habit = self._used.get(sampling.max_tokens.bit_length())
        return max(1.0, habit.mean * sampling.max_tokens - brought) if habit else 1.0

    def least_tokens(self, sampling: Sampling, brought: int = 0) -> int:
        """Of output, that hardly any stays below; without what a resumed stream brings."""
        if not sampling.max_tokens:
            return 0
        if not _can_end(sampling):
            return max(1, sampling.max_tokens - brought)
        habit = self._used.get(sampling.max_tokens.bit_length())
        return max(1, int(habit.least * sampling.max_tokens) - brought) if habit else 1

    def service(self, given: int, prompt_len: int, sampling: Sampling, queued: int) -> float:
        """Seconds that it takes at least, beside those who run now; while others queue, steps stay full.

        `given` tokens come with it: the prompt and, where it is resumed, some of the output.
        """
        if not self.pace.known:
            return 0.0
        base, each = self.pace.fit()
        prompt = given * self._missed.mean
        steps = -(-prompt // self._config.max_step_tokens)
        running = len(self._roster.running) / self._roster.num_groups
        is_full = queued or running >= self._config.max_num_seqs
        tokens = max(0, self.least_tokens(sampling, given - prompt_len) - 1)
        beside = self._prompts_beside(tokens, running) if queued else 0.0
        decode = tokens * (base + each * (running + 1)) + beside * each
        return steps * base + prompt * each + max(decode, tokens * self.pace.recent if is_full else 0.0)

    def _prompts_beside(self, tokens: int, running: float) -> float:
        """Prompt tokens of those who follow others out of the queue, in the steps in which one makes `tokens`.

        Work is as it is in the queue: for each token that all make, so many are read.
        """
        roster = self._roster
        if roster.queued_output <= 0.0:
            return 0.0
        made = tokens * min(running, self._config.max_num_seqs - 1)
        share = min(1 / roster.num_groups, made / roster.queued_output)
        return share * roster.queued_tokens * self._missed.mean

    def latest_start(self, sequence: Sequence) -> float:
        """When a sequence with a deadline, already in the queue, has to run at the latest, in order to meet it."""
        others = max(0, self._roster.num_queued - 1)
        service = self.service(sequence.given, sequence.prompt_len, sequence.sampling, others)
        return sequence.submit.deadline - service

    def look_at(self, sequence: Sequence) -> float:
        """When to see again whether it is hopeless: half-way, since steps may become slower meanwhile."""
        return self.now + max(SOON, (self.latest_start(sequence) - self.now) / 2)

    def is_hopeless(self, sequence: Sequence) -> bool:
        """Whether one that never ran would miss its deadline if it ran now."""
        return bool(sequence.look_at) and self.latest_start(sequence) < self.now

    def estimate(self, submit: Submit) -> Estimate:
        """For a request that would come now.

        Of equal priority all of its own tenant's stands before it, and of each other tenant's as much as that one gets
        meanwhile, for its weight; of better priority, everything.
        """
        roster, wait = self._roster, 0.0
        if len(roster.running) >= self._config.max_num_seqs * roster.num_groups or roster.num_queued:
            own = roster.ledger.account(submit.tenant)
            mine = own.backlog.get(submit.priority)
            own_turn = self._seconds(mine) if mine else 0.0
            for account in roster.ledger:
                for priority, work in account.backlog.items():
                    if priority < submit.priority:
                        wait += self._seconds(work)
                    elif priority == submit.priority:
                        wait += min(self._seconds(work), own_turn * account.weight / own.weight)
            if roster.running and all(sequence.account is own for sequence in roster.running):
                wait = max(wait, self._first_to_end())
        given, prompt_len = len(submit.token_ids), submit.prompt_len
        service = self.service(given, prompt_len, submit.sampling, roster.num_queued)
        return Estimate(wait, service, self.least_tokens(submit.sampling, given - prompt_len))

    def _first_to_end(self) -> float:
        """Seconds until one of those who run may have ended, if none is displaced."""
        base, each = self.pace.fit()
        running = self._roster.running
        tokens = min(s.prompt_len + self.least_tokens(s.sampling) - s.settled for s in running)
        return max(0, tokens - 1) * (base + each * len(running) / self._roster.num_groups)

    def _seconds(self, work: Work) -> float:
        """That `work` takes where as many as may run share each step's base, and the groups share the work."""
        base, each = self.pace.fit()
        groups = self._roster.num_groups
        shared = base / max(1, min(self._config.max_num_seqs, self._roster.num_live / groups))
        return (work.prompt_tokens * self._missed.mean * each + work.output_tokens * (each + shared)) / groups


def _can_end(sampling: Sampling) -> bool:
    """Whether it may end before max_tokens (a stop string of the frontend's aside)."""
    return bool(sampling.max_tokens and (sampling.eos_token_ids or sampling.stop_token_ids))

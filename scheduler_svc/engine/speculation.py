"""How many drafts each sequence verifies in a step: as many as make the most tokens a second, and often that is none.

A step of n positions takes seconds(n), as the worker measured at its start. A sequence whose drafts are right with
probability p each gains p + p² + … + p^k tokens by k of them, for k more positions. So each step weighs

    (prompts + Σ (1 + q (p + … + p^k))) / (seconds(prompts + Σ (1 + q k)) + what proposing takes)

where q is the share of the drafts asked for that the proposer had: those that it had not cost nothing. Positions of
prompts are tokens as well: drafts that keep them waiting have to bring more than they would. Both p and q are learned
from each result, the new weighing more than the old. Where no k beats none, nobody speculates, but for a look now and
then, since text changes. Verification makes the streams the same whatever is chosen here (R2).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from itertools import accumulate
from math import log, sqrt
from typing import TYPE_CHECKING

from protos.wire import RowResult

if TYPE_CHECKING:
    from scheduler_svc.engine.device import Flight
    from scheduler_svc.engine.sequence import Sequence

FADE = 0.9  # weight of what was learned of a sequence, at each of its verifications
SLOW_FADE = 0.99  # … of all together
FIRM = 3.0  # drafts whose outcome weighs as much as what is usual here
DOUBT = 0.5  # standard errors that a chance is taken to be worse than it was seen to be
LEAST_VALUES = (0.9, 0.75, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)  # of a sequence's last draft: the chances to weigh
MARGIN = 1.04  # how much faster it has to be than none
REVIEW = 4  # steps for which a choice holds among the same sequences
LOOK = 2  # drafts of a look, of one sequence in a step
SHARE = 0.01  # of the time that steps take, for looks
PROBES = 8  # steps from one look at a sequence to the next, after one that was in vain
LONGEST_PAUSE = 64  # steps
STEADY = 1 / 32  # of each step in the mean of how long steps really take


class Record:
    """What became of one sequence's drafts."""

    __slots__ = ("_fade", "accepted", "asked", "held", "pause", "tried", "wait")

    def __init__(self, fade: float = FADE) -> None:
        self._fade = fade
        self.tried = self.accepted = 0.0  # drafts that decided something: those accepted, and the first that was not
        self.asked = self.held = 0.0  # drafts that a row might have verified, and did
        self.pause = 1  # steps to the next look while it has none
        self.wait = 0

    def learn(self, asked: int, held: int, accepted: int) -> None:
        fade = self._fade
        self.tried = fade * self.tried + accepted + (accepted < held)
        self.accepted = fade * self.accepted + accepted
        self.asked = fade * self.asked + asked
        self.held = fade * self.held + held
        self.pause = 1 if held and accepted == held else min(LONGEST_PAUSE, max(PROBES, 2 * self.pause))
        self.wait = self.pause


class Costs:
    """Seconds of a step by its positions: the worker's table, lines between its entries."""

    def __init__(self, steps: Iterable[tuple[int, float]], drafts: Iterable[tuple[int, float]]) -> None:
        self._steps, self._drafts = _rising(steps), _rising(drafts)

    def __bool__(self) -> bool:
        return bool(self._steps)

    def step(self, positions: float) -> float:
        return _on_line(self._steps, positions)

    def proposing(self, slots: int, drafts: int) -> float:
        return drafts * _on_line(self._drafts, slots) if self._drafts else 0.0


class Speculation:
    """Of one worker group in one epoch."""

    def __init__(self, num_drafts: int, costs: Costs) -> None:
        self.num_drafts = num_drafts  # 0: nobody speculates
        self._costs = costs
        self._usual = Record(SLOW_FADE)  # of all sequences
        self._scales = [1.0, 1.0]  # real seconds to the table's, of steps without and with drafts
        self._steps = self._reviewed = 0
        self._of: tuple[int, int] = (0, 0)  # sequences and other positions of the last choice
        self._least_value = LEAST_VALUES[0]  # of that choice: 1 is none
        self._saved = 0.0  # seconds that looks may take

    def choose(self, sequences: list[Sequence], room: int, others: int) -> None:
        """Sets `wanted` of each of these, who sample in the next step: the drafts that are proposed there, and verified
        in the step behind it, `room` in all at most. `others`: positions beside theirs, drafts aside.
        """
        if not self.num_drafts:
            return
        self._steps += 1
        if not self._costs:
            self._share_alike(sequences, room)
            return
        of = (len(sequences), others)
        if of != self._of or self._steps >= self._reviewed + REVIEW:
            self._of, self._reviewed = of, self._steps
            self._least_value = self._weigh(sequences, room, others)
        curious = None
        for sequence in sequences:
            sequence.wanted = min(self._worth(sequence, self._least_value), room)
            room -= sequence.wanted
            if not sequence.wanted and sequence.max_drafts and self._is_due(sequence) and curious is None:
                curious = sequence
        if self._can_afford_a_look(sequences, others) and curious and room:
            self._saved = 0.0
            curious.wanted = min(LOOK, curious.max_drafts, room)

    def _can_afford_a_look(self, sequences: list[Sequence], others: int) -> bool:
        """Whether what looks take, next to steps without, has been put aside since the last one. Whoever proposes does
        it for all who sample.
        """
        positions, costs = len(sequences) + others, self._costs
        plain = self._scales[0] * costs.step(positions)
        self._saved += SHARE * plain
        proposing = 0.0 if any(each.wanted for each in sequences) else costs.proposing(len(sequences), LOOK)
        return self._saved >= self._scales[1] * (costs.step(positions + LOOK) + proposing) - plain

    def first(self, sequence: Sequence) -> int:
        """Drafts that are worth proposing behind a sequence's first sample."""
        value = self._least_value if self._costs else 0.0
        return self._worth(sequence, value) if value else sequence.max_drafts

    def learn(self, flight: Flight, answers: list[RowResult], seconds: float) -> None:
        """What became of a step's drafts, and how long it took."""
        if not self.num_drafts:
            return
        rows = flight.plan.rows
        for row, answer, sequence in zip(rows, answers, flight.sequences, strict=True):
            if row.num_drafts and answer.token_ids:
                outcome = row.num_drafts, answer.num_drafted, len(answer.token_ids) - 1
                sequence.record.learn(*outcome)
                self._usual.learn(*outcome)
        if self._costs and seconds > 0.0 and all(row.sample and row.num_tokens == 1 for row in rows):
            positions = sum(1 + answer.num_drafted for answer in answers)
            self._learn_pace(positions, len(rows), flight.plan.num_propose, bool(flight.num_drafts), seconds)

    def _learn_pace(self, positions: int, slots: int, proposed: int, has_drafts: bool, seconds: float) -> None:
        table = self._costs.step(positions) + self._costs.proposing(slots, proposed)
        kind = int(has_drafts or proposed > 0)
        ratio = min(seconds / table, 2 * self._scales[kind])  # one that stalls is no measure
        self._scales[kind] += (ratio - self._scales[kind]) * STEADY

    def _share_alike(self, sequences: list[Sequence], room: int) -> None:
        """Where nobody has said what a step costs."""
        speculating = sum(1 for sequence in sequences if sequence.max_drafts)
        share = min(self.num_drafts, room // speculating) if speculating else 0
        for sequence in sequences:
            sequence.wanted = min(sequence.max_drafts, share)

    def _weigh(self, sequences: list[Sequence], room: int, others: int) -> float:
        """The least value of a draft with which the most tokens are made in a second; 1 where drafts do not pay."""
        count = len(sequences)
        plain = float(count + others)
        best = MARGIN * plain / (self._scales[0] * self._costs.step(plain))
        choice = 1.0
        for least_value in LEAST_VALUES:
            tokens, positions, most, total = plain, plain, 0, 0
            for sequence in sequences:
                if k := self._worth(sequence, least_value):
                    p, q = self._chance(sequence), self._supply(sequence)
                    tokens += q * p * (1 - p**k) / (1 - p)
                    positions += q * k
                    most, total = max(most, k), total + k
            if total > room:
                break  # a lesser value would only take more
            seconds = self._costs.step(positions) + self._costs.proposing(count, most)
            if (rate := tokens / (self._scales[1] * seconds)) > best:
                best, choice = rate, least_value
        return choice

    def _worth(self, sequence: Sequence, least_value: float) -> int:
        """How many drafts until one is right with less than that probability, all before it being right."""
        if least_value >= 1.0 or not sequence.max_drafts:
            return 0
        return min(sequence.max_drafts, int(log(least_value) / log(self._chance(sequence))))

    def _is_due(self, sequence: Sequence) -> bool:
        """For a look whether drafts have become worth it."""
        sequence.record.wait -= 1
        return sequence.record.wait <= 0

    def _chance(self, sequence: Sequence) -> float:
        """That one draft is right; newcomers are taken to be like the others, and a run of luck not to be all that it
        seems: what is spent on drafts is lost at once, what they bring is seen again.
        """
        usual = (self._usual.accepted + 1.0) / (self._usual.tried + 2.0)
        record = sequence.record
        weight = record.tried + FIRM
        chance = (record.accepted + FIRM * usual) / weight
        doubt = DOUBT * sqrt(chance * (1 - chance) * record.tried) / weight
        return min(0.98, max(0.02, chance - doubt))

    def _supply(self, sequence: Sequence) -> float:
        """Share of the drafts asked for that there are."""
        usual = (self._usual.held + 4.0) / (self._usual.asked + 4.0)
        record = sequence.record
        return (record.held + FIRM * usual) / (record.asked + FIRM)


def _rising(table: Iterable[tuple[int, float]]) -> list[tuple[int, float]]:
    """In order, and more never takes less: measures have noise."""
    places = sorted(table)
    return list(zip((x for x, _ in places), accumulate((y for _, y in places), max), strict=True))


def _on_line(table: list[tuple[int, float]], at: float) -> float:
    """Between two entries on a line; beyond the last one on the same line as before it."""
    if at <= table[0][0] or len(table) == 1:
        return table[0][1]
    place = min(bisect_left(table, (at, 0.0)), len(table) - 1)
    (x0, y0), (x1, y1) = table[place - 1], table[place]
    return y0 + (y1 - y0) * (at - x0) / (x1 - x0)

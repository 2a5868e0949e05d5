"""Who is let into the queue, who is told to come back later, and whose deadline or quota does not allow it."""

from __future__ import annotations

from typing import NamedTuple

from protos.engine_wire import FinishReason, Submit
from scheduler_svc.engine.config import EngineConfig
from scheduler_svc.engine.forecast import Forecast
from scheduler_svc.engine.roster import Roster
from scheduler_svc.engine.sequence import Sequence

MIN_RETRY, MAX_RETRY = 0.05, 60.0  # seconds
UNKNOWN_RETRY = 1.0  # seconds, before any departure from the queue was seen
MAX_SHED = 0.1  # seconds for which a refusal may be said again unasked; places that come free wait so long
SHED_SHARE = 0.1  # … of the time in which the queue would empty, at most
HALF_LIFE = 5.0  # seconds in which an old rate loses half of its weight


class Refusal(NamedTuple):
    reason: FinishReason
    detail: str
    retry_after: float = 0.0
    shed_for: float = 0.0


class Outflow:
    """What leaves the queue, in sequences or in tokens, and when there should be room for those who were refused.

    They stand in a line of their own: each new one is told the time after all earlier ones.
    """

    def __init__(self) -> None:
        self._since = 0.0  # time of the last measurement
        self._departed = 0  # what had left the queue by then
        self._rate = 0.0  # a second
        self._refused = 0.0  # and not yet made room for

    def refuse(self, amount: int) -> None:
        self._refused += amount

    @property
    def retry_after(self) -> float:
        if self._rate <= 0.0:
            return UNKNOWN_RETRY
        return min(MAX_RETRY, max(MIN_RETRY, self._refused / self._rate))

    def shed_for(self, waiting: int) -> float:
        return min(MAX_SHED, SHED_SHARE * waiting / self._rate) if self._rate > 0 else 0.0

    def tick(self, now: float, departed: int, waiting: bool) -> None:
        """Measures the rate, `departed` in all so far. Time in which nobody waited says nothing."""
        elapsed = now - self._since
        if elapsed < 0.1:
            return
        count = departed - self._departed
        if self._since and (waiting or count):
            keep = 0.5 ** (elapsed / HALF_LIFE) if self._rate else 0.0
            self._rate = keep * self._rate + (1 - keep) * count / elapsed
        self._refused = max(0.0, self._refused - count) if waiting else 0.0
        self._departed, self._since = departed, now


class Doorkeeper:
    """Bounds the queue in sequences and tokens, and lets nobody in whose deadline could not be met."""

    def __init__(self, config: EngineConfig, forecast: Forecast) -> None:
        self.draining = False
        self._config = config
        self._forecast = forecast
        self._sequences, self._tokens = Outflow(), Outflow()
        self.crowded_out: list[Sequence] = []  # who has to leave the queue if the last who asked is let in

    def refusal(self, submit: Submit, roster: Roster, free: int) -> Refusal | None:
        """Why this sequence cannot be taken; None if it can, see `crowded_out`. Siblings come in with the first.

        `free`: how many of the queue the next plan has slots for. Until then they stand in it, and take nobody's place.
        """
        self.crowded_out = []
        if detail := _malformed(submit):
            return Refusal(FinishReason.INVALID, detail)
        siblings = roster.requests.get(submit.request_id, {})
        if submit.index in siblings or any(not _are_siblings(submit, other.submit) for other in siblings.values()):
            detail = f"request_id {submit.request_id!r} index {submit.index} is running already"
            return Refusal(FinishReason.DUPLICATE, detail)
        if siblings:
            return None
        if self.draining:
            return Refusal(FinishReason.DRAINING, "the service is draining")
        if submit.priority < (best := roster.ledger.account(submit.tenant).best_priority):
            detail = f"priority is {submit.priority}: tenant {submit.tenant!r} may ask for {best:g} and more"
            return Refusal(FinishReason.INVALID, detail)
        refusal = self._overload(submit, roster, free)
        if refusal and refusal.reason is FinishReason.REJECTED:
            self.crowded_out = self._crowd(submit, roster, free)
        if refusal and not self.crowded_out:
            return refusal
        return self._too_late(submit) or self._over_quota(submit, roster)

    def shed(self, sequences: int) -> None:
        """So many were told the same as the last who was refused for a full queue."""
        self._sequences.refuse(sequences)

    def crowding(self) -> Refusal:
        """What those are told who are crowded out."""
        detail = "the queue is full: this was the newest of the tenant with the most in it, and made room for another"
        return Refusal(FinishReason.REJECTED, detail, self._sequences.retry_after)

    def _crowd(self, submit: Submit, roster: Roster, free: int) -> list[Sequence]:
        """Whose places in a full queue a tenant gets that has less in it: the newest of the tenant with the most.

        For their weights, and so that it has no more afterwards. None of them has begun, nor is of better priority.
        """
        own = roster.ledger.account(submit.tenant)
        crowd = max(roster.ledger, key=lambda account: (account.queued / account.weight, account.name))
        if crowd is own:
            return []
        places = roster.num_queued + submit.num_siblings - self._config.max_waiting - free
        tokens = roster.queued_tokens + _request_tokens(submit) - self._config.max_waiting_tokens
        leaving: list[Sequence] = []
        for sequence in crowd.newest():
            if max(places - len(leaving), tokens) <= 0 or sequence.submit.priority < submit.priority:
                break
            if sequence.cached_tokens < 0:
                leaving.append(sequence)
                tokens -= sequence.queued_tokens
        has_room = max(places - len(leaving), tokens) <= 0
        left, come = crowd.queued - len(leaving), own.queued + submit.num_siblings
        return leaving if has_room and come * crowd.weight <= left * own.weight else []

    def _overload(self, submit: Submit, roster: Roster, free: int) -> Refusal | None:
        count, more = submit.num_siblings, _request_tokens(submit)
        max_waiting, max_tokens = self._config.max_waiting, self._config.max_waiting_tokens
        if count > max_waiting:
            detail = f"{count} sequences are over max_waiting {max_waiting}, even of an empty queue"
            return Refusal(FinishReason.INVALID, detail)
        if more > max_tokens:
            detail = f"{more} tokens are over max_waiting_tokens {max_tokens}, even of an empty queue"
            return Refusal(FinishReason.INVALID, detail)
        waiting, tokens = roster.num_queued, roster.queued_tokens
        if waiting + count > max_waiting + free:
            beside = f" beside {free} free slots" if free else ""
            detail = f"{waiting} sequences wait, {count} more are over max_waiting {max_waiting}{beside}"
            outflow, amount = self._sequences, count
            shed_for = outflow.shed_for(waiting)
        elif tokens + more > max_tokens:
            detail = f"{tokens} tokens wait, {more} more are over max_waiting_tokens {max_tokens}"
            outflow, amount = self._tokens, more
            shed_for = 0.0  # a shorter prompt may fit
        else:
            return None
        if submit.index == 0:
            outflow.refuse(amount)  # once for all siblings, each of which comes here
        return Refusal(FinishReason.REJECTED, f"the queue is full: {detail}", outflow.retry_after, shed_for)

    def _too_late(self, submit: Submit) -> Refusal | None:
        if not submit.deadline:
            return None
        left = submit.deadline - self._forecast.now
        if left <= 0:
            return Refusal(FinishReason.DEADLINE, "the deadline has passed")
        if not self._forecast.pace.known:
            return None
        estimate = self._forecast.estimate(submit)
        if estimate.total <= left:
            return None
        detail = (
            f"the deadline in {left:.2f} s cannot be met: estimated are {estimate.wait:.2f} s until it runs, then at "
            f"least {estimate.service:.2f} s for {submit.prompt_len} prompt and {estimate.output_tokens} output tokens"
        )
        return Refusal(FinishReason.DEADLINE, detail)

    def _over_quota(self, submit: Submit, roster: Roster) -> Refusal | None:
        account, tokens = roster.ledger.account(submit.tenant), _request_tokens(submit)
        bucket, name = account.bucket, f"tenant {submit.tenant!r}"
        if bucket is None:
            return None
        if tokens > bucket.burst:
            detail = f"{tokens} prompt tokens are over the burst of {name}, {bucket.burst:g}, even after a pause"
            return Refusal(FinishReason.INVALID, detail)
        bucket.settle(self._forecast.now, account.output_tokens)
        if not (wait := bucket.missing(tokens)):
            return None
        detail = (
            f"{name} has {max(0, int(bucket.level))} tokens left, the prompt needs {tokens}; "
            f"its quota is {bucket.rate:g} tokens a second, {bucket.burst:g} at once"
        )
        return Refusal(FinishReason.QUOTA, detail, max(MIN_RETRY, wait))

    def tick(self, now: float, roster: Roster) -> None:
        waiting, counters = bool(roster.num_queued), roster.counters
        self._sequences.tick(now, counters.departed, waiting)
        self._tokens.tick(now, counters.departed_tokens, waiting)


def _malformed(submit: Submit) -> str:
    """Why no sequence can be made of it; empty if one can."""
    count, sampling = len(submit.token_ids), submit.sampling
    if not 0 < submit.prompt_len <= count:
        return f"prompt_len is {submit.prompt_len}: must be from 1 to the {count} token_ids"
    if not (min(submit.token_ids) >= 0 and max(submit.token_ids) < 1 << 32):
        return "token_ids must be unsigned numbers of 32 bits"
    if submit.pooling not in ("", "last", "mean", "cls"):
        return f"pooling is {submit.pooling!r}: must be last, mean, cls or empty"
    if submit.pooling and sampling.max_tokens:
        return f"max_tokens is {sampling.max_tokens}: must be 0 with pooling"
    if not sampling.max_tokens and submit.prompt_len < count:
        return f"prompt_len is {submit.prompt_len}: must be that of the {count} token_ids where max_tokens is 0"
    if sampling.prompt_logprobs_from < 1:
        return f"prompt_logprobs_from is {sampling.prompt_logprobs_from}: must be at least 1"
    return ""


def _request_tokens(submit: Submit) -> int:
    """That come with it and its siblings."""
    return submit.request_tokens or submit.num_siblings * len(submit.token_ids)


def _are_siblings(one: Submit, other: Submit) -> bool:
    return one.frontend == other.frontend and one.num_siblings == other.num_siblings

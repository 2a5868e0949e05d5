"""One token stream, and the three numbers that say how far it is."""

from __future__ import annotations

from array import array
from enum import Enum, auto
from functools import lru_cache
from typing import TYPE_CHECKING

from msgspec.structs import replace

from protos.engine_wire import Submit
from protos.wire import TokenLogprobs
from scheduler_svc.engine.speculation import Record

if TYPE_CHECKING:
    from scheduler_svc.engine.device import Device
    from scheduler_svc.engine.fairness import Account

SUSPECT_DEATHS = 2  # worker deaths in flight after which a sequence runs alone (R5)
FATAL_DEATHS = SUSPECT_DEATHS + 3  # the last three of them alone: nobody else can have killed the worker


class State(Enum):
    COMPILING = auto()  # its grammar is not ready yet
    WAITING = auto()  # in the queue
    HOLDING = auto()  # waits for the leader that fills its next block (R4), or for a worker group's next plan
    RUNNING = auto()  # has a slot and blocks
    LEAVING = auto()  # preempted; waits again when its last result is in
    FINISHED = auto()


class Sequence:
    """A stream's tokens, and what the worker holds of them.

    token_ids  |t0 t1 … prompt … | generated …          |
    computed   |===============>                          KV written by sent plans; sampling rows: with their result
    settled    |=======================================>  tokens known: Submit's, then results
    hi         |=============================================>  settled + Σ in flight (1 + num_drafts)
    block_ids  |  b0  |  b1  |  b2  |  b3  |  b4  |  b5  |  b6  |   cover hi + the next row's drafts
    hashes     |  h0  |  h1  |  h2  |  h3  |               full blocks of settled tokens, chained
                          ^ published: blocks before it may be hit by others
    """

    __slots__ = (
        "account",
        "ahead",
        "arrival",
        "block_ids",
        "cached_tokens",
        "came",
        "computed",
        "deaths",
        "device",
        "ends",
        "flying",
        "frontend",
        "given",
        "hashes",
        "holds_on",
        "index",
        "last_step",
        "likely_tokens",
        "limit",
        "look_at",
        "masked",
        "max_drafts",
        "pauses",
        "prompt_len",
        "prompt_logprobs_from",
        "proposed",
        "publish_at",
        "published",
        "queued_tokens",
        "record",
        "request_id",
        "reusable",
        "root",
        "samples",
        "sampling",
        "settled",
        "slot",
        "state",
        "submit",
        "token_ids",
        "unpaid",
        "unsaid",
        "unsent",
        "waited",
        "wanted",
    )

    def __init__(self, submit: Submit, arrival: int, num_drafts: int, account: Account) -> None:
        """Raises OverflowError for a token id that is not an unsigned number of 32 bits."""
        sampling = submit.sampling
        self.submit = replace(submit, token_ids=_ELSEWHERE)  # its tokens are kept once, below
        self.request_id = submit.request_id
        self.index = submit.index
        self.frontend = submit.frontend
        self.sampling = sampling
        self.account = account
        self.arrival = arrival
        self.prompt_len = submit.prompt_len
        self.token_ids = array("I", submit.token_ids)  # no list: the collector would walk every queued prompt
        self.settled = self.given = len(self.token_ids)
        self.limit = submit.prompt_len + sampling.max_tokens  # length that it may reach
        self.samples = sampling.max_tokens > 0  # else it ends with its prompt
        self.ends = _ends(sampling.eos_token_ids, sampling.stop_token_ids)
        self.masked = submit.grammar is not None
        self.max_drafts = 0 if self.masked else num_drafts
        self.record = Record()
        self.reusable = _reusable(submit)  # positions of the prompt that may come from the cache
        self.prompt_logprobs_from = sampling.prompt_logprobs_from  # the first whose logprobs were not delivered yet
        self.cached_tokens = -1  # until the first admission
        self.came = self.waited = 0.0  # when it was let in, and the seconds from there to its first admission
        self.deaths = 0
        self.queued_tokens = 0
        self.likely_tokens = 1.0  # of output, as far as was known when it came
        self.look_at = 0.0  # when to see whether it can still meet its deadline; 0: it has none, or has run
        self.unpaid = self.settled  # given tokens that the account was not charged for: each is, once at most
        self.hashes: list[bytes] = []
        self.root = b""  # the parent of the first; set with it
        self.holds_on = b""
        self.unsaid: list[int] = []  # forced before it ever ran: its first delta brings them
        self.state = State.COMPILING if self.masked else State.WAITING
        self.forget_device()

    def forget_device(self) -> None:
        """What a preemption or a dead worker takes away. The tokens stay: they are all that a worker needs."""
        self.device: Device | None = None  # while it runs, holds or leaves there
        self.computed = 0
        self.wanted = 0  # drafts that its next sampling row has proposed, and those that the last one had
        self.proposed = 0
        self.ahead = 0  # Σ (1 + num_drafts) over sampling rows in flight
        self.flying = 0  # plans in flight that name it
        self.pauses = False  # no row behind the one in flight: forced tokens are known once that has landed
        self.unsent: list[int] = []  # the last tokens known, which its next row brings to the worker
        self.last_step = 0  # of the newest plan that names it
        self.slot = 0
        self.block_ids: list[int] = []
        self.published = 0  # blocks
        self.publish_at = 0  # `computed` at which the next block is full

    @property
    def key(self) -> tuple[int, int]:
        """The order among those of one tenant."""
        return (self.submit.priority, self.arrival)

    @property
    def hi(self) -> int:
        return self.settled + self.ahead

    @property
    def only_samples(self) -> bool:
        """Its next row computes the token that the one before sampled, or is about to sample."""
        return self.samples and (self.ahead > 0 or self.computed + 1 == self.settled)

    @property
    def suspect(self) -> bool:
        return self.deaths >= SUSPECT_DEATHS

    @property
    def can_jump(self) -> bool:
        """Nothing of it is being sampled: tokens that follow without being sampled can be known now."""
        return not self.ahead and self.state is not State.LEAVING

    def append(self, token_ids: list[int]) -> None:
        """Raises OverflowError, and changes nothing, where one is not an unsigned number of 32 bits."""
        self.token_ids.fromlist(token_ids)
        self.settled += len(token_ids)

    def first_end(self, token_ids: list[int]) -> int:
        """How many of these new tokens belong to the stream: up to the first end token or the limit."""
        room = self.limit - self.settled
        for count, token_id in enumerate(token_ids, 1):
            if count == room or token_id in self.ends:
                return count
        return len(token_ids)

    def new_prompt_logprobs(self, start: int, logprobs: list[TokenLogprobs]) -> list[TokenLogprobs]:
        """Those of a row from `start` that were not delivered yet: a recomputed prompt brings earlier ones again."""
        first = max(start + 1, self.sampling.prompt_logprobs_from)  # position of the first of them
        new = logprobs[max(0, self.prompt_logprobs_from - first) :]
        self.prompt_logprobs_from += len(new)
        return new


_ELSEWHERE: list[int] = []


@lru_cache(maxsize=256)
def _ends(eos_token_ids: tuple[int, ...], stop_token_ids: tuple[int, ...]) -> frozenset[int]:
    """One set for all who asked for the same: a long queue is mostly the same few."""
    return frozenset(eos_token_ids + stop_token_ids)


def _reusable(submit: Submit) -> int:
    """How many positions may come from the cache: of a cached one nobody sees logits or states."""
    sampling = submit.sampling
    if submit.skip_cache or submit.pooling in ("mean", "cls"):
        return 0
    return (
        sampling.prompt_logprobs_from - 1 if sampling.prompt_logprobs >= 0 else submit.prompt_len + sampling.max_tokens
    )

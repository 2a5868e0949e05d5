"""What a frontend counts, and that the sums of several are what one would have counted."""

from __future__ import annotations

from math import nan
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace
from pagewire.v1 import inference_pb2 as pb

from protos.engine_wire import FinishReason, FrontendStats, Histogram, Observed, Outputs, Question, Submit, TokenDelta
from protos.wire import Sampling
from scheduler_svc.frontend.call import Call, open_streams
from scheduler_svc.frontend.engine_link import EngineLink
from scheduler_svc.frontend.resume import Resumed
from scheduler_svc.frontend.tokenizer import byte_tokenizer
from scheduler_svc.frontend.validation import Prepared, TextRules
from scheduler_svc.metrics import Frontends, Observer, StreamFacts, check, merged, merged_histogram
from tests.frontend.conftest import Service
from tests.frontend.scripted import ScriptedEngine
from tests.frontend.test_generate import ask, fails, run


def count(histogram: Histogram) -> int:
    return sum(histogram.counts)


def spread(histogram: Histogram) -> tuple[float, float]:
    return count(histogram), histogram.total


class Bench:
    """A call on a clock of the test's."""

    def __init__(self, n: int = 1, stop: tuple[str, ...] = (), had: Resumed | None = None) -> None:
        self.now = 100.0
        self.link, self.observer = EngineLink(), Observer()
        ScriptedEngine(self.link).held = True
        submits = [Submit("r", [1, 2, 3], 3, Sampling(max_tokens=99), index=i, num_siblings=n) for i in range(n)]
        prepared = Prepared("r", 0, 3, submits, TextRules(stop=stop), {0: had} if had else {})
        streams = open_streams(prepared, byte_tokenizer(256), self.now, with_text=True)
        self.call = Call.open(prepared, self.link, streams, lambda: self.now, self.observer)

    def bring(self, after: float, *counts: int, finish: FinishReason | None = None, **fields: Any) -> None:
        """One message, `after` seconds later: a delta of so many tokens for each of `counts`."""
        self.now += after
        deltas = [
            TokenDelta("r", 0, [97] * n, finish_reason=finish if i == len(counts) - 1 else None, **fields)
            for i, n in enumerate(counts)
        ]
        self.hand_over(*deltas)

    def hand_over(self, *deltas: TokenDelta) -> None:
        route = self.call._route
        assert route is not None
        route.gathered += deltas
        route.hand_over()

    @property
    def seen(self) -> FrontendStats:
        return self.observer.snapshot(0)


def test_tokens_of_one_message_share_its_wait() -> None:
    bench = Bench()
    bench.bring(0.5, 1, queued=0.2, cached_tokens=2)
    bench.bring(0.4, 1, 2, 1)
    bench.bring(0.1, 1)
    bench.bring(0.3, 1, finish=FinishReason.LENGTH)
    seen = bench.seen
    assert spread(seen.first_token) == pytest.approx((1, 0.5))
    assert spread(seen.between_tokens) == pytest.approx((6, 0.8))
    below = seen.between_tokens.bounds.index(0.15)
    assert sum(seen.between_tokens.counts[: below + 1]) == 5, "four of 0.1 each, and one"
    assert seen.whole.total == pytest.approx(1.3)
    assert [h.total for h in (seen.queue, seen.prefill, seen.decode)] == [pytest.approx(x) for x in (0.2, 0.3, 0.8)]
    assert (seen.prompt_tokens.total, seen.output_tokens.total) == (3, 7)
    assert seen.finished == (("length", 1),)


async def test_each_stream_of_a_call_is_one() -> None:
    bench = Bench(n=2)
    for index in (0, 1, 0, 1):
        bench.now += 0.1
        bench.hand_over(TokenDelta("r", index, [97]))
    seen = bench.seen
    assert spread(seen.first_token) == pytest.approx((2, 0.3))
    assert spread(seen.between_tokens) == pytest.approx((2, 0.4))
    bench.call.close()
    assert bench.seen.finished == (("abort", 2),)
    assert count(bench.seen.whole) == 0, "what was broken off says nothing of how long things take"


def test_a_resumed_stream_begins_with_what_is_new() -> None:
    bench = Bench(had=Resumed("resume", [97] * 4))
    bench.bring(0.5, 1)
    bench.bring(0.1, 2, finish=FinishReason.LENGTH)
    seen = bench.seen
    assert spread(seen.first_token) == pytest.approx((1, 0.5))
    assert spread(seen.between_tokens) == pytest.approx((2, 0.1))
    assert seen.output_tokens.total == 3


def test_a_stream_that_was_resumed_at_its_end_has_ended() -> None:
    bench = Bench(had=Resumed("resume", [97] * 4, FinishReason.LENGTH))
    bench.call.close()
    assert bench.seen.finished == (("length", 1),)
    assert spread(bench.seen.first_token) == (0, 0)


async def test_a_stop_string_ends_a_stream_once() -> None:
    bench = Bench(stop=("aaa",))
    bench.bring(0.1, 1)
    bench.bring(0.1, 4)
    bench.bring(0.1, 1, finish=FinishReason.STOP)
    bench.call.close()
    seen = bench.seen
    assert seen.finished == (("stop", 1),)
    assert seen.output_tokens.total == 3


@pytest.mark.parametrize(
    ("reason", "finished"),
    [(FinishReason.ERROR, (("error", 1),)), (FinishReason.ABORTED, (("abort", 1),)), (FinishReason.REJECTED, ())],
)
def test_a_failure_is_an_error_an_abort_or_none_of_these(reason: FinishReason, finished: object) -> None:
    bench = Bench()
    bench.link.deliver(Outputs([TokenDelta("r", 0, [], finish_reason=reason)]))
    bench.call.close()
    assert bench.seen.finished == finished


def test_the_sum_of_two_is_what_one_would_have_seen() -> None:
    one, two, both = Observer(), Observer(), Observer()
    facts = StreamFacts(0, "stop", 0.1, 0.3, 2.0, 0, 20)
    for observers, seconds in (((one, both), 0.02), ((two, both), 3.0), ((two, both), 0.5)):
        for observer in observers:
            observer.first_token(seconds)
            observer.more_tokens(seconds, 4)
            observer.stream_ended(facts, 7)
            observer.call_ended("/a.B/C", "OK" if seconds < 1 else "INTERNAL")
    assert merged([one.snapshot(1), two.snapshot(2)]) == both.snapshot(3)
    assert merged([FrontendStats(), one.snapshot(1)]) == one.snapshot(1)


def test_histograms_of_other_bounds_are_not_added_up() -> None:
    with pytest.raises(ValueError, match="different bounds"):
        merged_histogram([Histogram((1.0,), (1, 2), 3.0), Histogram((2.0,), (1, 2), 3.0)])


WELL = Observer().snapshot(1)
FITTING = WELL.first_token


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("first_token", Histogram((1.0,), (1, 2), 3.0), "`first_token` has not"),
        ("queue", replace(FITTING, counts=FITTING.counts[1:]), "`queue` has not"),
        ("whole", replace(FITTING, total=nan), "sum of `whole` is nan"),
        ("prefill", replace(FITTING, counts=(*FITTING.counts[:-1], -1)), r"prefill\[30\] is -1"),
        ("open_calls", 1 << 60, "open_calls is 1152921504606846976"),
        ("finished", (("stop", -3),), "stop is -3"),
    ],
)
def test_stats_that_cannot_be_added_up(field: str, value: object, named: str) -> None:
    check(WELL)
    check(FrontendStats())
    with pytest.raises(msgspec.ValidationError, match=named):
        check(replace(WELL, **{field: value}))


def test_what_a_frontend_saw_outlives_it_and_its_open_calls_do_not() -> None:
    frontends, observer = Frontends(), Observer()
    observer.first_token(0.1)
    frontends.take(Observed("a", observer.snapshot(3)))
    frontends.take(Observed("b", observer.snapshot(2)))
    assert (count(frontends.sum().first_token), frontends.sum().open_calls) == (2, 5)
    frontends.lost("a")
    frontends.lost("nobody")
    assert (count(frontends.sum().first_token), frontends.sum().open_calls) == (2, 2)
    frontends.take(Observed("a", observer.snapshot(1)))  # another of the same name begins at its own beginning
    assert (count(frontends.sum().first_token), frontends.sum().open_calls) == (3, 3)


async def test_a_service_reports_before_it_asks(service: Service) -> None:
    await run(service, ask("hello", n=2))
    await fails(service, ask("", n=1))
    await service.inference.GetModel(pb.GetModelRequest())
    await service.link.ask(Question.STATS)
    seen = service.engine.observed
    assert dict(seen.finished) == {"length": 2}
    assert dict(seen.calls) == {
        "/pagewire.v1.InferenceService/Generate OK": 1,
        "/pagewire.v1.InferenceService/Generate INVALID_ARGUMENT": 1,
        "/pagewire.v1.InferenceService/GetModel OK": 1,
    }
    assert (count(seen.first_token), count(seen.between_tokens)) == (2, 8)

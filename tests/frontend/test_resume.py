"""Streams that go on: cut behind any message, over loopback, against a scripted engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import msgspec
import pytest
from google.rpc import error_details_pb2
from pagewire.v1 import inference_pb2 as pb

from protos.engine_wire import FinishReason, TokenDelta
from protos.wire import Ready
from scheduler_svc.frontend.limits import MAX_HELD
from tests.frontend.conftest import EOS, Service, byte_model, open_service
from tests.frontend.scripted import READY, Script, letters, spelling
from tests.frontend.test_generate import Collected, ask, detail, fails, run


async def messages(service: Service, request: pb.GenerateRequest) -> list[pb.GenerateResponse]:
    """One for each token: the engine makes the next when the client has this one."""
    service.engine.held = True
    call = service.inference.Generate(request)
    await call.initial_metadata()
    responses, got = aiter(call), list[pb.GenerateResponse]()

    async def read() -> bool:
        got.append(await anext(responses))
        return got[-1].HasField("delta")

    while running := len(service.engine.sequences):
        service.engine.step()
        while running:
            running -= await read()
    service.engine.release()
    return got + [response async for response in responses]


def going_on(request: pb.GenerateRequest, had: Collected) -> pb.GenerateRequest:
    resumed = pb.GenerateRequest()
    resumed.CopyFrom(request)
    resumed.resume_fingerprint = READY.fingerprint
    for index, token_ids in had.ids.items():
        resumed.resume_token_ids.add(index=index, token_ids=token_ids)
    return resumed


def check_whole(whole: Collected, had: Collected, rest: Collected) -> None:
    for index, finished in whole.finished.items():
        assert had.text[index] + rest.text[index] == whole.text[index]
        assert had.ids[index] + rest.ids[index] == whole.ids[index]
        assert had.logprobs[index] + rest.logprobs[index] == whole.logprobs[index]
        fresh = [] if had.ids[index] else whole.prompt_logprobs[index]
        assert rest.prompt_logprobs[index] == fresh
        again = rest.finished[index]
        assert (again.finish_reason, again.stop, again.stop_token_id) == (
            finished.finish_reason,
            finished.stop,
            finished.stop_token_id,
        )
        assert again.WhichOneof("matched") == finished.WhichOneof("matched")
        assert again.usage.prompt_tokens == finished.usage.prompt_tokens
        assert again.usage.completion_tokens == finished.usage.completion_tokens


@dataclass(frozen=True)
class Case:
    name: str
    script: Script
    sampling: dict[str, Any] = field(default_factory=dict)
    text: str | None = None  # that the whole stream has


def two(submit: Any, count: int) -> int:
    return b"abcdef"[count] if submit.index else b"uvwxyz"[count]


def ends_early(submit: Any, count: int) -> int:
    return EOS if (submit.index, count) in ((0, 2), (2, 4)) else 97 + count


KEPT = {"include_stop_str_in_output": True}
CASES = [
    Case("letters", letters, {"max_tokens": 6}),
    Case("stop string", spelling("one STEP two STOP three"), {"max_tokens": 40, "stop": ["STOP"]}, "one STEP two "),
    Case("stop string kept", spelling("a STOP b"), {"max_tokens": 40, "stop": ["STOP"], **KEPT}, "a STOP"),
    Case("held at the end", spelling("abc ST"), {"max_tokens": 6, "stop": ["STOP"]}, "abc ST"),
    Case("min_tokens", spelling("stop and stop"), {"max_tokens": 20, "stop": ["stop"], "min_tokens": 6}, "stop and "),
    Case("characters", spelling("日本 🎉 é"), {"max_tokens": len("日本 🎉 é".encode())}, "日本 🎉 é"),
    Case("half a character", spelling("a🎉"), {"max_tokens": 4}, "a\ufffd"),
    Case("half a character, stops", spelling("a🎉"), {"max_tokens": 4, "stop": ["x"]}, "a\ufffd"),
    Case("a stop of half a character", spelling("a🎉"), {"max_tokens": 4, "stop": ["\ufffd"]}, "a"),
    Case("end token", lambda _, count: EOS if count == 3 else 120, {"max_tokens": 9}, "xxx"),
    Case("stop id", spelling("abcabc"), {"max_tokens": 9, "stop_token_ids": [99]}, "ab"),
    Case(
        "stop id kept",
        spelling("abcabc"),
        {"max_tokens": 9, "stop_token_ids": [99], "include_stop_str_in_output": True},
    ),
    Case("logprobs", letters, {"max_tokens": 5, "logprobs": 2, "prompt_logprobs": 1}),
    Case("one of two ends", two, {"max_tokens": 6, "n": 2, "stop": ["wx"]}, "uv"),
    Case("ends at different times", ends_early, {"max_tokens": 6, "n": 3, "prompt_logprobs": 0, "seed": 2**64 - 1}),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_a_stream_cut_behind_any_message_goes_on(service: Service, case: Case) -> None:
    service.engine.script = case.script
    request = ask("hello", **case.sampling)
    responses = await messages(service, request)
    whole = Collected(responses)
    assert case.text in (None, whole.text[0])
    for cut in range(len(responses)):
        had = Collected(responses[:cut])
        service.engine.submits.clear()
        rest = await run(service, going_on(request, had))
        check_whole(whole, had, rest)
        for submit in service.engine.submits:
            assert submit.token_ids[submit.prompt_len :] == had.ids[submit.index]
            assert submit.num_siblings == len(service.engine.submits)
            assert submit.prompt_len == 5
    assert not service.engine.submits, "what had ended is not asked of the engine again"
    assert len(service.link) == 0


async def test_it_may_be_cut_again_and_again(service: Service) -> None:
    service.engine.script = spelling("one STEP 日本 STOP")
    request = ask("hello", max_tokens=40, stop=["STOP"], logprobs=0)
    whole = Collected(await messages(service, request))
    had = Collected([])
    while 0 not in had.finished:
        rest = await messages(service, going_on(request, had))
        had = Collected(had.responses + rest[:1])
    check_whole(whole, had, await run(service, going_on(request, had)))


async def test_a_long_past_is_taken_in_by_a_thread(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scheduler_svc.frontend.core.INLINE_TOKENS", 3)
    service.engine.script = spelling("one STEP two STOP three")
    request = ask("hello", max_tokens=40, stop=["STOP"])
    responses = await messages(service, request)
    had = Collected(responses[:8])
    check_whole(Collected(responses), had, await run(service, going_on(request, had)))


async def test_the_first_new_token_has_a_time_and_what_had_ended_has_none(service: Service) -> None:
    request = ask("hello", max_tokens=5)
    responses = await messages(service, request)
    rest = await run(service, going_on(request, Collected(responses[:2])))
    assert 0 < rest.finished[0].timings.first_token <= rest.finished[0].timings.total
    ended = await run(service, going_on(request, Collected(responses)))
    assert (ended.finished[0].timings.first_token, ended.finished[0].timings.total) == (0, 0)


# ---------------------------------------------------------------- where it may go on


def broken(**fields: Any) -> pb.GenerateRequest:
    request = ask("hello")
    request.resume_token_ids.add(token_ids=b"fg")
    request.resume_fingerprint = READY.fingerprint
    for name, value in fields.items():
        setattr(request, name, value)
    return request


def info(error: grpc.aio.AioRpcError) -> tuple[str, dict[str, str]]:
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    found = detail(error, error_details_pb2.ErrorInfo)
    assert isinstance(found, error_details_pb2.ErrorInfo)
    return found.reason, dict(found.metadata)


async def test_another_model_is_refused(service: Service) -> None:
    for ids in (b"fg", b""):
        request = broken(resume_fingerprint="beef")
        request.resume_token_ids[0].token_ids[:] = ids
        reason, metadata = info(await fails(service, request))
        assert (reason, metadata) == ("RESUME_FINGERPRINT", {"requested": "beef", "served": "f00d"})
    assert not service.engine.submits
    long = "é" * 100_000
    assert len(info(await fails(service, broken(resume_fingerprint=long)))[1]["requested"]) == 200


async def test_what_is_not_exact_goes_on_if_that_is_allowed(service: Service) -> None:
    service.engine.say(True, msgspec.structs.replace(READY, exact=False))
    reason, metadata = info(await fails(service, broken()))
    assert (reason, metadata["served"]) == ("RESUME_INEXACT", "f00d")
    assert not service.engine.submits
    assert (await run(service, broken(allow_inexact_resume=True))).text[0] == "hij"
    nothing_yet = broken()
    del nothing_yet.resume_token_ids[:]
    assert (await run(service, nothing_yet)).text[0] == "fghij", "nothing of it could differ"


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0)


async def test_a_call_to_be_resumed_waits_for_the_first_worker(loading_service: Service) -> None:
    core = loading_service.frontend._core
    going = asyncio.ensure_future(run(loading_service, broken()))
    refused = asyncio.ensure_future(fails(loading_service, broken(resume_fingerprint="beef")))
    await until(lambda: core._held == 2)
    assert not loading_service.engine.submits
    loading_service.engine.say(True)
    assert (await going).text[0] == "hij"
    assert info(await refused)[0] == "RESUME_FINGERPRINT"
    assert core._held == 0


async def test_it_waits_no_longer_than_its_deadline(loading_service: Service) -> None:
    core = loading_service.frontend._core
    call = loading_service.inference.Generate(broken(), timeout=0.2)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: core._held == 0)
    assert not loading_service.engine.submits


async def test_so_many_may_wait(loading_service: Service) -> None:
    loading_service.frontend._core._held = MAX_HELD
    error = await fails(loading_service, broken())
    assert (error.code(), f"and {MAX_HELD} calls wait" in (error.details() or "")) == (
        grpc.StatusCode.UNAVAILABLE,
        True,
    )
    assert isinstance(detail(error, error_details_pb2.RetryInfo), error_details_pb2.RetryInfo)


async def test_the_context_that_counts_is_the_workers() -> None:
    """It decides what max_tokens is where a request sets none, and so whether a stream has ended."""
    service = await open_service(byte_model(), serving=False)
    ready: Ready = msgspec.structs.replace(READY, max_model_len=12)
    request = broken()
    request.sampling.ClearField("max_tokens")
    request.resume_token_ids[0].token_ids[:] = b"fghijkl"
    going = asyncio.ensure_future(run(service, request))
    await until(lambda: service.frontend._core._held == 1)
    service.engine.say(True, ready)
    finished = (await going).finished[0]
    assert (finished.finish_reason, finished.usage.completion_tokens) == (pb.FINISH_REASON_LENGTH, 7)
    assert not service.engine.submits
    await service.channel.close()
    await service.frontend.stop()


async def test_what_the_engine_ends_without_a_token_brings_no_text_twice(service: Service) -> None:
    """A KV pool, say, in which it has no room for more: the ids that it ended with have brought all of its text."""
    service.engine.finish_with = TokenDelta("", 0, [], finish_reason=FinishReason.LENGTH)
    request = ask("hello", max_tokens=9, stop=["STOP"])
    request.resume_fingerprint = READY.fingerprint
    request.resume_token_ids.add(token_ids="a ST🎉".encode()[:-1])
    got = await run(service, request)
    assert (got.text[0], got.ids[0]) == ("", [])
    assert got.finished[0].finish_reason == pb.FINISH_REASON_LENGTH
    assert got.finished[0].usage.completion_tokens == 7

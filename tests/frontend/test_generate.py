"""Generate and its companions, over loopback, against a scripted engine."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from typing import Any, cast

import grpc
import grpc.aio
import msgspec
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from pagewire.v1 import admin_pb2
from pagewire.v1 import inference_pb2 as pb

from protos.engine_wire import FinishReason, Outputs, TokenDelta
from scheduler_svc.frontend.model import ServedModel
from scheduler_svc.frontend.server import FrontendConfig
from scheduler_svc.frontend.validation import child_seed
from tests.frontend.conftest import EOS, Service, byte_model, open_service
from tests.frontend.scripted import READY, spelling


def ask(text: str = "hello", **sampling: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(text=text, sampling=pb.SamplingParams(**{"max_tokens": 5, "seed": 0, **sampling}))


class Collected:
    """One call's messages, put together by index."""

    def __init__(self, responses: list[pb.GenerateResponse]) -> None:
        self.responses = responses
        self.text: dict[int, str] = defaultdict(str)
        self.ids: dict[int, list[int]] = defaultdict(list)
        self.logprobs: dict[int, list[pb.TokenLogprob]] = defaultdict(list)
        self.prompt_logprobs: dict[int, list[pb.TokenLogprob]] = defaultdict(list)
        self.finished: dict[int, pb.GenerateFinished] = {}
        for response in responses:
            match response.WhichOneof("response"):
                case "delta":
                    delta = response.delta
                    assert delta.index not in self.finished, "nothing comes behind the end"
                    self.text[delta.index] += delta.text
                    self.ids[delta.index] += delta.token_ids
                    self.logprobs[delta.index] += delta.logprobs
                    self.prompt_logprobs[delta.index] += delta.prompt_logprobs
                case "finished":
                    assert response.finished.index not in self.finished, "one end an index"
                    self.finished[response.finished.index] = response.finished


async def run(service: Service, request: pb.GenerateRequest) -> Collected:
    return Collected([response async for response in service.inference.Generate(request)])


async def fails(service: Service, request: pb.GenerateRequest) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await run(service, request)
    return caught.value


def detail(error: grpc.aio.AioRpcError, kind: type[Message]) -> Message | None:
    status = rpc_status.from_call(cast(grpc.Call, error))
    for packed in status.details if status else ():
        message = kind()
        if packed.Unpack(message):
            return message
    return None


async def test_a_stream_ends_once_with_usage_and_timings(service: Service) -> None:
    got = await run(service, ask("hello"))
    assert got.text[0] == "fghij"
    assert bytes(got.ids[0]) == b"fghij"
    finished = got.finished[0]
    assert finished.finish_reason == pb.FINISH_REASON_LENGTH
    assert finished.WhichOneof("matched") is None
    assert (finished.usage.prompt_tokens, finished.usage.completion_tokens, finished.usage.cached_tokens) == (5, 5, 2)
    assert (finished.usage.draft_tokens, finished.usage.accepted_tokens) == (15, 0)
    assert 0 < finished.timings.first_token <= finished.timings.total
    assert len(service.link) == 0


async def test_initial_metadata_comes_before_the_first_token(service: Service) -> None:
    service.engine.held = True
    request = ask(seed=77)
    request.request_id = "mine"
    call = service.inference.Generate(request)
    metadata = dict(await call.initial_metadata())
    assert {key: metadata[key] for key in ("request-id", "seed", "fingerprint", "exact")} == {
        "request-id": "mine",
        "seed": "77",
        "fingerprint": READY.fingerprint,
        "exact": "true",
    }
    service.engine.release()
    assert len([response async for response in call]) >= 2


async def test_a_refusal_is_the_only_message_of_its_call(service: Service) -> None:
    service.engine.finish_with = TokenDelta("", 0, [], finish_reason=FinishReason.REJECTED)
    call = service.inference.Generate(ask())
    assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "request-id" not in dict(await call.initial_metadata())


async def test_a_request_waits_while_no_worker_has_been_ready(loading_service: Service) -> None:
    loading_service.engine.held = True
    task = asyncio.ensure_future(run(loading_service, ask()))
    await loading_service.engine.submit_seen.wait()
    loading_service.engine.say(True)
    loading_service.engine.release()
    assert (await task).text[0] == "fghij"


async def test_the_seed_is_fixed_before_submit(service: Service) -> None:
    request = ask()
    request.sampling.ClearField("seed")
    call = service.inference.Generate(request)
    metadata = dict(await call.initial_metadata())
    assert service.engine.submits[0].sampling.seed == int(metadata["seed"])
    assert [response async for response in call]
    assert int(metadata["request-id"], 16), "the server makes an id"


async def test_the_tenant_comes_from_the_metadata(service: Service) -> None:
    async for _ in service.inference.Generate(ask(n=2), metadata=(("tenant", "search"),)):
        pass
    await run(service, ask())
    assert [submit.tenant for submit in service.engine.submits] == ["search", "search", ""]


@pytest.mark.parametrize(
    ("tenants", "words"),
    [
        (["x" * 65], "metadata tenant: has 65 characters; at most 64"),
        (["a", "b"], "metadata tenant: has 2 values; a call is of one tenant"),
    ],
)
async def test_a_tenant_that_is_none_is_refused(service: Service, tenants: list[str], words: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in service.inference.Generate(ask(), metadata=[("tenant", tenant) for tenant in tenants]):
            pass
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.INVALID_ARGUMENT, words)
    assert not service.engine.submits


async def test_n_children_share_the_prompt_and_differ_in_seed(service: Service) -> None:
    got = await run(service, ask("hello", n=3, seed=9))
    submits = service.engine.submits
    assert [(s.index, s.num_siblings) for s in submits] == [(0, 3), (1, 3), (2, 3)]
    assert [s.sampling.seed for s in submits] == [child_seed(9, i) for i in range(3)]
    assert len({s.sampling.seed for s in submits}) == 3
    assert sorted(got.finished) == [0, 1, 2]
    for submit in submits:
        start = (submit.sampling.seed + 5) % 26
        assert got.text[submit.index] == "".join(chr(97 + (start + i) % 26) for i in range(5))


async def test_what_the_engine_is_given(service: Service) -> None:
    request = ask(
        temperature=0.5, top_k=7, top_p=0.25, min_p=0.125, repetition_penalty=1.5, presence_penalty=-1,
        frequency_penalty=2, logit_bias={9: -3.5, 4: 1}, stop_token_ids=[5, 6], min_tokens=2, ignore_eos=True,
        bad_words=["no"], logprobs=2, prompt_logprobs=0,
    )  # fmt: skip
    request.priority, request.cache_salt = -3, "salt"
    await run(service, request)
    submit, sampling = service.engine.submits[0], service.engine.submits[0].sampling
    assert (submit.priority, submit.cache_salt, submit.skip_cache, submit.deadline) == (-3, "salt", True, 0.0)
    assert (submit.token_ids, submit.prompt_len) == (list(b"hello"), 5)
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.5, 7, 0.25, 0.125)
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.5, -1, 2)
    assert sampling.logit_bias == ((4, 1.0), (9, -3.5))
    assert (sampling.stop_token_ids, sampling.eos_token_ids) == ((5, 6), ())
    assert sampling.bad_words == (tuple(b"no"), tuple(b" no"))
    assert (sampling.min_tokens, sampling.max_tokens, sampling.logprobs, sampling.prompt_logprobs) == (2, 5, 2, 0)


async def test_defaults_and_the_context_as_limit(service: Service) -> None:
    service.engine.script = spelling(b"x")
    request = pb.GenerateRequest(text="hello")
    got = await run(service, request)
    sampling = service.engine.submits[0].sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.max_tokens) == (1.0, 0, 1.0, 256 - 5)
    assert (sampling.eos_token_ids, sampling.logprobs, sampling.prompt_logprobs) == ((EOS,), -1, -1)
    assert got.finished[0].usage.completion_tokens == 251


async def test_an_end_token_is_counted_and_not_written(service: Service) -> None:
    service.engine.script = lambda submit, count: EOS if count == 3 else 120
    got = await run(service, ask(max_tokens=9))
    assert (got.text[0], got.ids[0]) == ("xxx", [120, 120, 120, EOS])
    assert (got.finished[0].finish_reason, got.finished[0].stop_token_id) == (pb.FINISH_REASON_STOP, EOS)
    assert got.finished[0].usage.completion_tokens == 4


@pytest.mark.parametrize("tokens_per_delta", [1, 3, 50])
@pytest.mark.parametrize("include", [False, True])
async def test_a_stop_string_across_tokens_trims_everything_together(
    service: Service, tokens_per_delta: int, include: bool
) -> None:
    service.engine.script = spelling("one STEP two STOP three")
    service.engine.tokens_per_delta = tokens_per_delta
    got = await run(service, ask(max_tokens=100, stop=["STOP", "nope"], logprobs=1, include_stop_str_in_output=include))
    kept = len("one STEP two STOP")
    assert got.text[0] == "one STEP two " + "STOP" * include
    assert bytes(got.ids[0]) == b"one STEP two STOP"
    assert [entry.token_id for entry in got.logprobs[0]] == got.ids[0]
    assert [entry.logprob for entry in got.logprobs[0]] == [-0.5 - i for i in range(kept)]
    finished = got.finished[0]
    assert (finished.finish_reason, finished.stop) == (pb.FINISH_REASON_STOP, "STOP")
    assert finished.usage.completion_tokens == kept
    assert [(abort.reason, abort.index) for abort in service.engine.aborts] == [(FinishReason.STOP, 0)]
    assert len(service.engine.sequences) == len(service.link) == 0


async def test_a_stop_string_ends_one_index_only(service: Service) -> None:
    service.engine.script = lambda submit, count: b"abcdef"[count] if submit.index else b"uvwxyz"[count]
    got = await run(service, ask(max_tokens=6, n=2, stop=["wx"]))
    assert (got.text[0], got.text[1]) == ("uv", "abcdef")
    assert [got.finished[i].finish_reason for i in (0, 1)] == [pb.FINISH_REASON_STOP, pb.FINISH_REASON_LENGTH]


async def test_min_tokens_comes_before_stop_strings(service: Service) -> None:
    service.engine.script = spelling("stop and stop")
    got = await run(service, ask(max_tokens=30, stop=["stop"], min_tokens=6))
    assert got.text[0] == "stop and "


async def test_held_text_is_sent_at_the_end(service: Service) -> None:
    service.engine.script = spelling("abc ST")
    got = await run(service, ask(max_tokens=6, stop=["STOP"]))
    assert (got.text[0], got.finished[0].finish_reason) == ("abc ST", pb.FINISH_REASON_LENGTH)


async def test_no_message_holds_half_a_character(service: Service) -> None:
    text = "日本 🎉 é"
    service.engine.script = spelling(text)
    got = await run(service, ask(max_tokens=len(text.encode())))
    assert got.text[0] == text
    assert not any("\ufffd" in response.delta.text for response in got.responses)
    service.engine.script = spelling("🎉")
    assert (await run(service, ask(max_tokens=3))).text[0] == "\ufffd", "cut for good by max_tokens"


async def test_special_tokens_are_left_out_unless_asked_for(real_service: Service) -> None:
    model_ids = [1, 19556, 17, 2]
    real_service.engine.script = lambda submit, count: model_ids[count]
    hidden = await run(real_service, ask(max_tokens=4))
    shown = await run(real_service, ask(max_tokens=3, skip_special_tokens=False))
    assert hidden.text[0] == "Hello!"
    assert shown.text[0] == "<|im_start|>Hello!"


async def test_the_real_tokenizer_streams_any_script(real_service: Service, real_model: ServedModel) -> None:
    text = "Grüße 日本語 🎉🏳️‍🌈 العربية 1234\n" * 3
    token_ids = real_model.tokenizer.encode(text)
    real_service.engine.script = lambda submit, count: token_ids[count]
    got = await run(real_service, ask(max_tokens=len(token_ids)))
    assert got.text[0] == text
    assert not any("\ufffd" in response.delta.text for response in got.responses)


async def test_prompt_logprobs_come_first(service: Service) -> None:
    got = await run(service, ask("hello", prompt_logprobs=1))
    assert [entry.token_id for entry in got.prompt_logprobs[0]] == list(b"ello")
    assert got.responses[0].delta.prompt_logprobs


async def test_a_slow_reader_gets_few_large_messages(service: Service) -> None:
    """Everything has happened before the first read; flow control lets some messages through, the rest is one."""
    service.engine.script = spelling(b"z" * 250)
    service.engine.held = True
    call = service.inference.Generate(ask(max_tokens=250))
    await call.initial_metadata()
    for _ in range(250):
        service.engine.step()  # the loop has no chance to write in between
    got = Collected([response async for response in call])
    assert got.text[0] == "z" * 250
    assert len(got.responses) == 2


async def test_a_long_backlog_is_split_below_the_clients_limit(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scheduler_svc.frontend.streams.MAX_ENTRIES", 20)
    service.engine.tokens_per_delta = 100
    service.engine.script = spelling("é" * 50)
    got = await run(service, ask("hello there", max_tokens=100, logprobs=1, prompt_logprobs=3))
    assert got.text[0] == "é" * 50
    assert [entry.logprob for entry in got.logprobs[0]] == [-0.5 - i for i in range(100)]
    assert len(got.prompt_logprobs[0]) == 10
    assert all(len(r.delta.token_ids) <= 10 and len(r.delta.prompt_logprobs) <= 5 for r in got.responses)


# ---------------------------------------------------------------- endings that are errors


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        (FinishReason.ABORTED, grpc.StatusCode.CANCELLED),
        (FinishReason.DEADLINE, grpc.StatusCode.DEADLINE_EXCEEDED),
        (FinishReason.REJECTED, grpc.StatusCode.RESOURCE_EXHAUSTED),
        (FinishReason.QUOTA, grpc.StatusCode.RESOURCE_EXHAUSTED),
        (FinishReason.DRAINING, grpc.StatusCode.UNAVAILABLE),
        (FinishReason.ERROR, grpc.StatusCode.INTERNAL),
        (FinishReason.INVALID, grpc.StatusCode.INVALID_ARGUMENT),
        (FinishReason.DUPLICATE, grpc.StatusCode.ALREADY_EXISTS),
    ],
)
async def test_finish_reasons_become_statuses(service: Service, reason: FinishReason, code: grpc.StatusCode) -> None:
    service.engine.finish_with = TokenDelta("", 0, [], finish_reason=reason, retry_after=1.5, detail="because")
    error = await fails(service, ask())
    assert error.code() is code
    if reason is FinishReason.REJECTED:
        retry = detail(error, error_details_pb2.RetryInfo)
        assert isinstance(retry, error_details_pb2.RetryInfo)
        assert retry.retry_delay.ToMilliseconds() == 1500
    if reason is FinishReason.INVALID:
        assert isinstance(detail(error, error_details_pb2.BadRequest), error_details_pb2.BadRequest)
    if reason is FinishReason.DUPLICATE:
        assert not service.engine.aborts, "an abort would end the other request of this id"


async def test_a_quota_names_its_tenant_and_when_to_come_back(service: Service) -> None:
    refusal = TokenDelta("", 0, [], finish_reason=FinishReason.QUOTA, retry_after=2.25, detail="used up")
    service.engine.finish_with = refusal
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in service.inference.Generate(ask(), metadata=(("tenant", "search"),)):
            pass
    quota = detail(caught.value, error_details_pb2.QuotaFailure)
    retry = detail(caught.value, error_details_pb2.RetryInfo)
    info = detail(caught.value, error_details_pb2.ErrorInfo)
    assert isinstance(quota, error_details_pb2.QuotaFailure)
    assert isinstance(retry, error_details_pb2.RetryInfo)
    assert isinstance(info, error_details_pb2.ErrorInfo)
    assert [(v.subject, v.description) for v in quota.violations] == [("tenant:search", "used up")]
    assert retry.retry_delay.ToMilliseconds() == 2250
    assert info.reason == "QUOTA_EXCEEDED"


async def test_an_id_in_use_is_refused_and_the_first_goes_on(service: Service) -> None:
    service.engine.held = True
    request = ask()
    request.request_id = "twice"
    first = asyncio.ensure_future(run(service, request))
    await service.engine.submit_seen.wait()
    error = await fails(service, request)
    assert error.code() is grpc.StatusCode.ALREADY_EXISTS
    assert "twice" in (error.details() or "")
    service.engine.release()
    assert (await first).text[0] == "fghij"
    assert not service.engine.aborts
    assert (await run(service, request)).text[0] == "fghij", "free again"


async def test_what_was_made_before_a_failure_is_delivered(service: Service) -> None:
    service.engine.held = True
    request = ask()
    request.request_id = "r"
    call = service.inference.Generate(request)
    await service.engine.submit_seen.wait()
    service.engine.step()
    service.engine.sequences.clear()
    service.link.deliver(Outputs([TokenDelta("r", 0, [113], finish_reason=FinishReason.ERROR, detail="poison")]))
    texts = []

    async def read() -> None:
        async for response in call:
            texts.append(response.delta.text)

    with pytest.raises(grpc.aio.AioRpcError, match="poison"):
        await read()
    assert "".join(texts) == "fq"


async def test_the_unforeseen_is_internal_with_the_request_id(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    request = ask()
    request.request_id = "odd"
    service.engine.script = lambda submit, count: -(10**9)
    error = await fails(service, request)
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "odd" in (error.details() or "")
    assert "odd" in caplog.text
    service.engine.script = spelling("fine")
    assert (await run(service, ask(max_tokens=4))).text[0] == "fine", "and nobody else's delivery broke"


# ---------------------------------------------------------------- leaving early


async def test_a_client_that_cancels_is_aborted_at_once(service: Service) -> None:
    service.engine.held = True
    call = service.inference.Generate(ask())
    await service.engine.submit_seen.wait()
    call.cancel()
    await service.engine.abort_seen.wait()
    assert service.engine.aborts[0].request_id == service.engine.submits[0].request_id
    assert not service.engine.sequences


async def test_a_client_that_disconnects_is_aborted(service: Service) -> None:
    service.engine.held = True
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{service.port}")
    call = type(service.inference)(channel).Generate(ask())
    await service.engine.submit_seen.wait()
    await channel.close()
    await service.engine.abort_seen.wait()
    assert call.cancelled()


async def test_a_deadline_reaches_the_engine_and_ends_the_call(service: Service) -> None:
    service.engine.held = True
    call = service.inference.Generate(ask(), timeout=0.3)
    await service.engine.submit_seen.wait()
    remaining = service.engine.submits[0].deadline - time.monotonic()
    assert 0 < remaining <= 0.31  # gRPC rounds a timeout up
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await service.engine.abort_seen.wait()


async def test_cancel_generation(service: Service) -> None:
    service.engine.held = True
    request = ask(n=2)
    request.request_id = "victim"
    running = asyncio.ensure_future(fails(service, request))
    await service.engine.submit_seen.wait()
    await service.inference.CancelGeneration(pb.CancelGenerationRequest(request_id="victim"))
    assert (await running).code() is grpc.StatusCode.CANCELLED
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await service.inference.CancelGeneration(pb.CancelGenerationRequest(request_id="victim"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_stats_count_open_calls_and_all_leave(service: Service) -> None:
    service.engine.held = True
    calls = [service.inference.Generate(ask()) for _ in range(3)]
    for call in calls:
        await call.initial_metadata()
    stats = await service.admin.GetStats(admin_pb2.GetStatsRequest())
    assert (stats.open_calls, stats.total_blocks, stats.total_slots) == (3, 63, 8)
    assert [(w.state, w.pid) for w in stats.workers] == [(admin_pb2.WORKER_STATE_SERVING, 7)]
    for call in calls:
        call.cancel()
    while service.engine.sequences:
        service.engine.abort_seen.clear()
        await service.engine.abort_seen.wait()
    stats = await service.admin.GetStats(admin_pb2.GetStatsRequest())
    assert (stats.open_calls, len(service.link)) == (0, 0)


# ---------------------------------------------------------------- the rest of the service


async def test_tokenize_and_detokenize(real_service: Service, real_model: ServedModel) -> None:
    tokenized = await real_service.inference.Tokenize(pb.TokenizeRequest(text="Hello <|im_end|>"))
    assert list(tokenized.token_ids) == real_model.tokenizer.encode("Hello <|im_end|>")
    both = [
        (await real_service.inference.Detokenize(pb.DetokenizeRequest(token_ids=tokenized.token_ids, **skip))).text
        for skip in ({}, {"skip_special_tokens": False})
    ]
    assert both == ["Hello ", "Hello <|im_end|>"]
    chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="Hi")])
    ids = (await real_service.inference.Tokenize(pb.TokenizeRequest(chat=chat))).token_ids
    assert real_model.tokenizer.decode(list(ids), False).endswith(
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    chat.add_generation_prompt = False
    ids = (await real_service.inference.Tokenize(pb.TokenizeRequest(chat=chat))).token_ids
    assert real_model.tokenizer.decode(list(ids), False).endswith("<|im_start|>user\nHi<|im_end|>\n")


async def test_get_model(real_service: Service) -> None:
    model = await real_service.inference.GetModel(pb.GetModelRequest())
    assert (model.architecture, model.max_model_len, model.vocab_size) == ("llama", 8192, 49152)
    assert (list(model.eos_token_ids), model.has_chat_template, model.exact) == ([2], True, True)
    assert (model.fingerprint, model.backend, model.dtype) == ("f00d", "script", "float32")
    assert model.kv_cache_dtype == "float32"


@pytest.mark.parametrize(("chosen", "limit"), [(0, 512), (300, 300), (600, 512)])
async def test_the_workers_context_replaces_the_cards(chosen: int, limit: int) -> None:
    """A worker may scale positions beyond what the model's configuration says: 256 here."""
    service = await open_service(byte_model(), FrontendConfig(port=0, max_model_len=chosen))
    service.engine.say(True, msgspec.structs.replace(READY, max_model_len=512))
    assert (await service.inference.GetModel(pb.GetModelRequest())).max_model_len == limit
    await run(service, ask("x" * (limit - 1)))
    assert service.engine.submits[0].sampling.max_tokens == 1
    await service.channel.close()
    await service.frontend.stop()


async def test_flush_and_drain(service: Service) -> None:
    flushed = await service.admin.FlushCache(admin_pb2.FlushCacheRequest())
    assert flushed.freed_blocks == 5
    service.engine.held = True
    running = asyncio.ensure_future(run(service, ask()))
    await service.engine.submit_seen.wait()
    draining = asyncio.ensure_future(service.admin.Drain(admin_pb2.DrainRequest()))
    await service.admin.GetStats(admin_pb2.GetStatsRequest())
    assert not draining.done()
    service.engine.release()
    await draining
    assert (await running).finished

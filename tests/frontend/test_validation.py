"""Malformed requests: each is INVALID_ARGUMENT and names its field, the value's problem and the limit."""

from __future__ import annotations

import math
from typing import Any, cast

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from pagewire.v1 import inference_pb2 as pb
from smg_grpc_proto.generated import vllm_engine_pb2 as vllm  # type: ignore[import-untyped]
from smg_grpc_proto.generated import vllm_engine_pb2_grpc

from scheduler_svc.frontend.limits import MAX_GRAMMAR_BYTES
from scheduler_svc.frontend.model import load_model
from tests.frontend.conftest import EOS, Service, open_service
from tests.frontend.scripted import READY

NAN, INF = math.nan, math.inf
PENALTIES = (0, 1e-38, 0.0099, -1, 101, NAN, INF)
CHAT = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="hi")])


def sampled(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(text="hello", sampling=pb.SamplingParams(**fields))


def given(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(**{"text": "hello", **fields})


def state(*token_ids: int, index: int = 0) -> pb.ResumeState:
    return pb.ResumeState(index=index, token_ids=token_ids)


def resumed(states: list[pb.ResumeState], **sampling: Any) -> pb.GenerateRequest:
    request = sampled(**{"seed": 1, **sampling})
    request.resume_token_ids.extend(states)
    request.resume_fingerprint = READY.fingerprint
    return request


# (what is sent, the fields that the answer must name, a word of the problem)
NATIVE: list[tuple[pb.GenerateRequest, list[str], str]] = [
    *[(sampled(temperature=v), ["sampling.temperature"], "[0, 100]") for v in (-0.1, 100.5, NAN, INF, -INF)],
    *[(sampled(top_p=v), ["sampling.top_p"], "(0, 1]") for v in (0, -1, 1.1, NAN, INF)],
    *[(sampled(min_p=v), ["sampling.min_p"], "[0, 1]") for v in (-0.1, 1.1, NAN, INF)],
    *[(sampled(repetition_penalty=v), ["sampling.repetition_penalty"], "[0.01, 100]") for v in PENALTIES],
    *[(sampled(presence_penalty=v), ["sampling.presence_penalty"], "[-2, 2]") for v in (-2.1, 2.1, NAN, INF)],
    *[(sampled(frequency_penalty=v), ["sampling.frequency_penalty"], "[-2, 2]") for v in (-2.1, 2.1, NAN, -INF)],
    *[(sampled(logit_bias={5: v}), ["sampling.logit_bias[5]"], "[-100, 100]") for v in (-100.5, 101, NAN, INF)],
    (sampled(logit_bias={512: 1}), ["sampling.logit_bias[512]"], "512"),
    (sampled(logit_bias=dict.fromkeys(range(1025), 1.0)), ["sampling.logit_bias"], "1024"),
    (sampled(stop=["x"] * 17), ["sampling.stop"], "16"),
    (sampled(stop=["ok", ""]), ["sampling.stop[1]"], "1 to 1024"),
    (sampled(stop=["x" * 1025]), ["sampling.stop[0]"], "1025"),
    (sampled(stop_token_ids=[1, 512]), ["sampling.stop_token_ids[1]"], "512"),
    (sampled(stop_token_ids=[2**32 - 1]), ["sampling.stop_token_ids[0]"], "4294967295"),
    (sampled(stop_token_ids=[1] * 65), ["sampling.stop_token_ids"], "64"),
    (sampled(max_tokens=0), ["sampling.max_tokens"], "at least 1"),
    (sampled(max_tokens=3, min_tokens=4), ["sampling.min_tokens"], "max_tokens, 3"),
    (sampled(min_tokens=252), ["sampling.min_tokens"], "room for 251"),
    (sampled(min_tokens=2**32 - 1, max_tokens=2**32 - 1), ["sampling.min_tokens"], "room for 251"),
    *[(sampled(n=v), ["sampling.n"], "[1, 64]") for v in (0, 65, 2**32 - 1)],
    *[(sampled(logprobs=v), ["sampling.logprobs"], "[0, 20]") for v in (21, 2**32 - 1)],
    *[(sampled(prompt_logprobs=v), ["sampling.prompt_logprobs"], "[0, 20]") for v in (21, 2**32 - 1)],
    (sampled(bad_words=["x"] * 65), ["sampling.bad_words"], "64"),
    (sampled(bad_words=["", "ok"]), ["sampling.bad_words[0]"], "1 to 1024"),
    (sampled(bad_words=["x" * 1025]), ["sampling.bad_words[0]"], "1025"),
    (sampled(bad_words=["ok", "  "]), ["sampling.bad_words[1]"], "no token"),
    (pb.GenerateRequest(), ["prompt"], "not set"),
    (pb.GenerateRequest(text=""), ["text"], "empty"),
    (pb.GenerateRequest(text="x" * 256), ["text"], "at most 255"),
    (pb.GenerateRequest(text="x" * 100_000), ["text"], "256 tokens"),
    (pb.GenerateRequest(token_ids=pb.TokenIds()), ["token_ids.ids"], "empty"),
    (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, 2, 512])), ["token_ids.ids[2]"], "512"),
    (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[2**32 - 1])), ["token_ids.ids[0]"], "512"),
    (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * 256)), ["token_ids.ids"], "at most 255"),
    (pb.GenerateRequest(chat=pb.ChatMessages()), ["chat.messages"], "empty"),
    (
        pb.GenerateRequest(chat=pb.ChatMessages(messages=[pb.ChatMessage(content="hi")])),
        ["chat.messages[0].role"],
        "empty",
    ),
    (
        pb.GenerateRequest(chat=pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="x" * 300)])),
        ["chat.messages"],
        "at most 255",
    ),
    (given(request_id="x" * 257), ["request_id"], "256"),
    (given(request_id="日本"), ["request_id"], "ASCII"),
    (given(request_id="a\nb"), ["request_id"], "ASCII"),
    (given(request_id=" a"), ["request_id"], "spaces"),
    *[(given(priority=v), ["priority"], "[-100, 100]") for v in (-101, 101, 2**31 - 1)],
    (given(cache_salt="x" * 257), ["cache_salt"], "256"),
    (given(cache_salt="é" * 129), ["cache_salt"], "258 bytes"),
    (given(structured_output=pb.StructuredOutput()), ["structured_output"], "is empty"),
    (given(structured_output=pb.StructuredOutput(regex="")), ["structured_output.regex"], "is empty"),
    (given(structured_output=pb.StructuredOutput(json_object=False)), ["structured_output.json_object"], "is false"),
    (
        given(structured_output=pb.StructuredOutput(grammar="a" * (MAX_GRAMMAR_BYTES + 1))),
        ["structured_output.grammar"],
        str(MAX_GRAMMAR_BYTES),
    ),
    (
        given(structured_output=pb.StructuredOutput(choice=pb.Choice())),
        ["structured_output.choice"],
        "from 1 to 4096",
    ),
    (
        given(structured_output=pb.StructuredOutput(choice=pb.Choice(values=["a", ""]))),
        ["structured_output.choice.values[1]"],
        "is empty",
    ),
    (
        pb.GenerateRequest(
            text="a", sampling=pb.SamplingParams(ignore_eos=True), structured_output=pb.StructuredOutput(regex="a")
        ),
        ["sampling.ignore_eos"],
        "does not go with structured output",
    ),
    (given(resume_token_ids=[state(1)]), ["sampling.seed", "resume_fingerprint"], "not set"),
    (resumed([state(1)], seed=None), ["sampling.seed"], "not set"),
    (resumed([state(1), state(1, index=1)]), ["resume_token_ids"], "has 2 entries; n is 1"),
    (resumed([state(1, index=1)]), ["resume_token_ids[0].index"], "is 1; n is 1"),
    (resumed([state(1, index=2**32 - 1)], n=64), ["resume_token_ids[0].index"], "n is 64"),
    (resumed([state(1), state()], n=2), ["resume_token_ids[1].index"], "as in resume_token_ids[0]"),
    (resumed([state(), state(1, 512, index=1)], n=2), ["resume_token_ids[1].token_ids[1]"], "512"),
    (resumed([state(2**32 - 1)]), ["resume_token_ids[0].token_ids[0]"], "4294967295"),
    (resumed([state(1, 2, 3)], max_tokens=2), ["resume_token_ids[0].token_ids"], "has 3 ids"),
    (resumed([state(*[1] * 252)]), ["resume_token_ids[0].token_ids"], "room for 251"),
    (resumed([state(1, EOS, 2)]), ["resume_token_ids[0].token_ids[2]"], "comes behind 300, a token that ends"),
    (resumed([state(1, 9, 9)], stop_token_ids=[9]), ["resume_token_ids[0].token_ids[2]"], "comes behind 9"),
    (
        resumed([state(*b"a STOP b")], stop=["STOP"]),
        ["resume_token_ids[0].token_ids[6]"],
        "behind 'STOP'",
    ),
    (
        given(request_id="x" * 300, sampling=pb.SamplingParams(top_p=2, temperature=NAN, stop=[""]), priority=1000),
        ["request_id", "priority", "sampling.temperature", "sampling.top_p", "sampling.stop[0]"],
        "",
    ),
    (pb.GenerateRequest(sampling=pb.SamplingParams(n=0)), ["sampling.n", "prompt"], ""),
]


def tokenized(**fields: Any) -> vllm.GenerateRequest:
    return vllm.GenerateRequest(**{"tokenized": vllm.TokenizedInput(input_ids=[1, 2]), **fields})


def vsampled(**fields: Any) -> vllm.GenerateRequest:
    return tokenized(sampling_params=vllm.SamplingParams(**fields))


VLLM: list[tuple[vllm.GenerateRequest, list[str], str]] = [
    *[(vsampled(temperature=v), ["sampling_params.temperature"], "[0, 100]") for v in (-1, NAN)],
    *[(vsampled(top_p=v), ["sampling_params.top_p"], "(0, 1]") for v in (-0.5, 2, NAN)],
    (vsampled(min_p=2), ["sampling_params.min_p"], "[0, 1]"),
    (vsampled(repetition_penalty=-1), ["sampling_params.repetition_penalty"], "[0.01, 100]"),
    (vsampled(presence_penalty=3), ["sampling_params.presence_penalty"], "[-2, 2]"),
    (vsampled(max_tokens=0), ["sampling_params.max_tokens"], "at least 1"),
    (vsampled(n=65), ["sampling_params.n"], "[1, 64]"),
    *[(vsampled(logprobs=v), ["sampling_params.logprobs"], "[0, 20]") for v in (-1, 21)],
    *[(vsampled(prompt_logprobs=v), ["sampling_params.prompt_logprobs"], "[0, 20]") for v in (-1, 21)],
    (vsampled(logit_bias={-1: 1.0}), ["sampling_params.logit_bias[-1]"], "negative"),
    (vsampled(logit_bias={600: 1.0}), ["sampling_params.logit_bias[600]"], "512"),
    (vsampled(stop=[""]), ["sampling_params.stop[0]"], "1 to 1024"),
    (vsampled(stop_token_ids=[512]), ["sampling_params.stop_token_ids[0]"], "512"),
    (vsampled(truncate_prompt_tokens=5), ["sampling_params.truncate_prompt_tokens"], "not served"),
    (vsampled(regex=""), ["sampling_params.regex"], "is empty"),
    (vsampled(choice=vllm.ChoiceConstraint()), ["sampling_params.choice"], "from 1 to 4096"),
    (tokenized(kv_transfer_params=vllm.KvTransferParams()), ["kv_transfer_params"], "not served"),
    (tokenized(kv_transfer_params_json="{}"), ["kv_transfer_params_json"], "not served"),
    (tokenized(mm_inputs=vllm.MultimodalInputs()), ["mm_inputs"], "not served"),
    (tokenized(extra_mm_inputs=[vllm.MultimodalInputs()]), ["extra_mm_inputs"], "not served"),
    (tokenized(media_refs=vllm.MediaRefs()), ["media_refs"], "not served"),
    (tokenized(data_parallel_rank=0), ["data_parallel_rank"], "not served"),
    (vllm.GenerateRequest(), ["input"], "not set"),
    (vllm.GenerateRequest(text=""), ["text"], "empty"),
    (vllm.GenerateRequest(tokenized=vllm.TokenizedInput()), ["tokenized.input_ids"], "empty"),
    (vllm.GenerateRequest(tokenized=vllm.TokenizedInput(input_ids=[512])), ["tokenized.input_ids[0]"], "512"),
    (vllm.GenerateRequest(tokenized=vllm.TokenizedInput(input_ids=[1] * 300)), ["tokenized.input_ids"], "at most 255"),
    (
        tokenized(data_parallel_rank=1, sampling_params=vllm.SamplingParams(top_p=7, regex="")),
        ["data_parallel_rank", "sampling_params.regex", "sampling_params.top_p"],
        "",
    ),
]


def violations(error: grpc.aio.AioRpcError) -> dict[str, str]:
    """Field → problem, as the answer's BadRequest lists them."""
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, error
    status = rpc_status.from_call(cast(grpc.Call, error))
    assert status is not None
    bad = error_details_pb2.BadRequest()
    assert status.details[0].Unpack(bad)
    assert error.details() == status.message
    return {violation.field: violation.description for violation in bad.field_violations}


async def refused(call: Any) -> dict[str, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read() if hasattr(call, "read") else await call
    return violations(caught.value)


@pytest.mark.parametrize(("request_", "fields", "word"), NATIVE)
async def test_native(service: Service, request_: pb.GenerateRequest, fields: list[str], word: str) -> None:
    found = await refused(service.inference.Generate(request_, timeout=20))
    assert sorted(found) == sorted(fields)
    assert word in found[fields[0]]
    assert not service.engine.submits


@pytest.mark.parametrize(("request_", "fields", "word"), VLLM)
async def test_vllm(service: Service, request_: vllm.GenerateRequest, fields: list[str], word: str) -> None:
    stub = vllm_engine_pb2_grpc.VllmEngineStub(service.channel)
    found = await refused(stub.Generate(request_, timeout=20))
    assert sorted(found) == sorted(fields)
    assert word in found[fields[0]]
    assert not service.engine.submits


async def test_limits_are_within(service: Service) -> None:
    """As float32, the type of the field: 0.01 itself is a little less there."""
    request = sampled(repetition_penalty=0.01, temperature=100, min_p=1, presence_penalty=-2, max_tokens=1)
    assert [response async for response in service.inference.Generate(request)]


async def test_a_tokenizer_with_more_tokens_than_the_model() -> None:
    """Nothing beyond the embedding's rows may reach a worker, however it was written."""
    service = await open_service(load_model("fake:vocab=110,context=256"))  # bytes have tokens up to 255
    generate = service.inference.Generate
    said = pb.ChatMessages(messages=[pb.ChatMessage(role="a", content="so")])
    found = [
        await refused(generate(pb.GenerateRequest(text="fast"))),
        await refused(generate(pb.GenerateRequest(chat=said))),
        await refused(service.inference.Tokenize(pb.TokenizeRequest(text="fast"))),
    ]
    assert [next(iter(one)) for one in found] == ["text", "chat.messages", "text"]
    assert found[0]["text"] == "holds token 116; the vocabulary has 110 tokens, from 0"
    assert not service.engine.submits
    await service.channel.close()
    await service.frontend.stop()


async def test_other_methods(service: Service) -> None:
    stub = service.inference
    assert list(await refused(stub.Tokenize(pb.TokenizeRequest()))) == ["input"]
    assert list(await refused(stub.Tokenize(pb.TokenizeRequest(text="")))) == ["text"]
    assert list(await refused(stub.Tokenize(pb.TokenizeRequest(chat=CHAT, add_special_tokens=True)))) == [
        "add_special_tokens"
    ]
    assert list(await refused(stub.Detokenize(pb.DetokenizeRequest(token_ids=[1, 512])))) == ["token_ids[1]"]
    assert list(await refused(stub.CancelGeneration(pb.CancelGenerationRequest()))) == ["request_id"]


async def test_how_long_an_input_may_be(service: Service) -> None:
    """Also where no context bounds it. The chat has too many messages to be rendered at all."""
    stub = service.inference
    many = pb.ChatMessages(messages=[pb.ChatMessage(role="user")] * 4097)
    long = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="x" * 2**19)] * 2)
    ids = [0] * 2**20
    assert await refused(stub.Tokenize(pb.TokenizeRequest(text="x" * (2**20 + 1)))) == {
        "text": "has 1048577 characters; at most 1048576"
    }
    assert "at most 1048576" in (await refused(stub.Tokenize(pb.TokenizeRequest(chat=long))))["chat.messages"]
    assert len((await stub.Tokenize(pb.TokenizeRequest(text="x" * 2**20))).token_ids) == 2**20
    for call in (stub.Tokenize(pb.TokenizeRequest(chat=many)), stub.Generate(pb.GenerateRequest(chat=many))):
        assert await refused(call) == {"chat.messages": "has 4097 messages; at most 4096"}
    assert await refused(stub.Detokenize(pb.DetokenizeRequest(token_ids=[*ids, 0]))) == {
        "token_ids": "has 1048577 ids; at most 1048576"
    }
    assert len((await stub.Detokenize(pb.DetokenizeRequest(token_ids=ids))).text) == 2**20


async def test_many_violations_still_fit_into_the_trailers(service: Service) -> None:
    request = sampled(logit_bias=dict.fromkeys(range(500), NAN), stop=["x" * 2000] * 16)
    request.request_id = "é" * 100_000
    assert len(await refused(service.inference.Generate(request))) == 16


async def test_a_template_that_refuses(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    from scheduler_svc.frontend.chat_template import ChatTemplate

    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    monkeypatch.setattr(service.frontend._core.model.tokenizer, "chat_template", template)
    found = await refused(service.inference.Generate(pb.GenerateRequest(chat=CHAT)))
    assert "roles must alternate" in found["chat"]
    monkeypatch.setattr(service.frontend._core.model.tokenizer, "chat_template", None)
    found = await refused(service.inference.Generate(pb.GenerateRequest(chat=CHAT)))
    assert "no chat template" in found["chat"]


def test_there_are_a_hundred() -> None:
    assert len(NATIVE) + len(VLLM) >= 100

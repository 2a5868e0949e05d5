"""`vllm.grpc.engine.VllmEngine`, as a router uses it."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import io
import json
import zipfile
from typing import Any

import grpc
import grpc.aio
import pytest
import tokenizers
from smg_grpc_proto.generated import (  # type: ignore[import-untyped]
    common_pb2,
    vllm_engine_pb2_grpc,
)
from smg_grpc_proto.generated import vllm_engine_pb2 as vllm

from protos.engine_wire import EngineStats, FinishReason, TokenDelta
from scheduler_svc.frontend.model import Defaults, ServedModel
from scheduler_svc.frontend.server import FrontendConfig
from scheduler_svc.frontend.vllm_compat import Throughput
from tests.frontend.conftest import EOS, Service, byte_model, open_service
from tests.frontend.scripted import spelling


def stub(service: Service) -> Any:
    return vllm_engine_pb2_grpc.VllmEngineStub(service.channel)


def ask(stream: bool = True, **sampling: Any) -> vllm.GenerateRequest:
    return vllm.GenerateRequest(
        request_id="chatcmpl-1",
        tokenized=vllm.TokenizedInput(input_ids=list(b"hello")),
        sampling_params=vllm.SamplingParams(**{"max_tokens": 5, "seed": 0, **sampling}),
        stream=stream,
    )


async def run(service: Service, request: vllm.GenerateRequest) -> tuple[dict[int, list[int]], list[Any]]:
    """Chunk ids by index, and the completes."""
    ids: dict[int, list[int]] = {}
    completes = []
    async for response in stub(service).Generate(request):
        match response.WhichOneof("response"):
            case "chunk":
                ids.setdefault(response.chunk.index, []).extend(response.chunk.token_ids)
                assert response.chunk.completion_tokens == len(ids[response.chunk.index])
                assert response.chunk.prompt_tokens == 5
            case "complete":
                completes.append(response.complete)
    return ids, completes


async def test_chunks_are_deltas_and_each_index_completes_once(service: Service) -> None:
    ids, completes = await run(service, ask(n=2, temperature=0.0))
    assert sorted(ids) == sorted(complete.index for complete in completes) == [0, 1]
    assert bytes(ids[0]) == b"fghij"
    for complete in completes:
        assert list(complete.output_ids) == ids[complete.index]
        assert (complete.finish_reason, complete.prompt_tokens, complete.completion_tokens) == ("length", 5, 5)
        assert complete.cached_tokens == 2


async def test_without_streaming_there_are_only_completes(service: Service) -> None:
    ids, completes = await run(service, ask(stream=False))
    assert not ids
    assert [bytes(complete.output_ids) for complete in completes] == [b"fghij"]


async def test_zero_means_default(service: Service) -> None:
    service.engine.script = lambda submit, count: EOS
    request = vllm.GenerateRequest(text="hello", sampling_params=vllm.SamplingParams())
    await run(service, request)
    sampling = service.engine.submits[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.repetition_penalty) == (1.0, 1.0, 0, 1.0)
    assert (sampling.max_tokens, sampling.logprobs, sampling.eos_token_ids) == (251, -1, (EOS,))
    assert len(service.engine.submits) == 1


async def test_spaces_between_special_tokens_change_nothing(service: Service) -> None:
    """False cannot be told from unset, so neither is refused."""
    either = [await run(service, ask(spaces_between_special_tokens=value)) for value in (False, True)]
    assert either[0] == either[1]
    assert bytes(either[0][0][0]) == b"fghij"


async def test_the_models_defaults_are_the_routers_business() -> None:
    model = byte_model()
    card = dataclasses.replace(model.card, defaults=Defaults(temperature=0.5, top_k=3))
    service = await open_service(ServedModel(card, model.tokenizer))
    await run(service, ask())
    assert service.engine.submits[0].sampling.top_k == 0
    info = await stub(service).GetModelInfo(vllm.GetModelInfoRequest())
    assert json.loads(info.default_sampling_params_json) == {"temperature": 0.5, "top_k": 3}
    await service.channel.close()
    await service.frontend.stop()


async def test_a_stop_string_ends_the_stream_here(service: Service) -> None:
    service.engine.script = spelling("one STOP two")
    ids, completes = await run(service, ask(max_tokens=50, stop=["STOP"]))
    assert bytes(ids[0]) == b"one STOP"
    assert (completes[0].finish_reason, completes[0].matched_stop_str) == ("stop", "STOP")
    assert service.engine.aborts[0].reason is FinishReason.STOP


async def test_an_end_token_is_named(service: Service) -> None:
    service.engine.script = lambda submit, count: EOS
    _, completes = await run(service, ask())
    assert (completes[0].finish_reason, completes[0].matched_token_id) == ("stop", EOS)


async def test_abort_ends_the_stream(service: Service) -> None:
    """A router that lost its client sends Abort and reads on."""
    service.engine.held = True
    running = asyncio.ensure_future(run(service, ask(n=2)))
    await service.engine.submit_seen.wait()
    await stub(service).Abort(vllm.AbortRequest(request_ids=["chatcmpl-1", "unknown"]))
    _, completes = await running
    assert [(complete.index, complete.finish_reason) for complete in completes] == [(0, "abort"), (1, "abort")]
    assert not service.engine.sequences


async def test_a_cancel_frees_too(service: Service) -> None:
    service.engine.held = True
    call = stub(service).Generate(ask(stream=False))
    await service.engine.submit_seen.wait()
    call.cancel()
    await service.engine.abort_seen.wait()
    assert not service.engine.sequences


async def test_a_full_queue_is_resource_exhausted(service: Service) -> None:
    service.engine.finish_with = TokenDelta("", 0, [], finish_reason=FinishReason.REJECTED, retry_after=2)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await run(service, ask())
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_logprobs(service: Service) -> None:
    request = ask(stream=False, logprobs=2, prompt_logprobs=1)
    _, completes = await run(service, request)
    output, prompt = completes[0].output_logprobs, completes[0].input_logprobs
    assert bytes(output.token_ids) == b"fghij"
    assert list(output.token_logprobs) == [-0.5, -1.5, -2.5, -3.5, -4.5]
    assert [list(top.token_ids) for top in output.top_logprobs] == [[0, 1]] * 5
    assert bytes(prompt.token_ids) == b"hello", "the first has a place and no value"
    assert [entry.HasField("value") for entry in prompt.token_logprobs] == [False, True, True, True, True]


async def test_health_and_info(loading_service: Service) -> None:
    service = loading_service
    assert not (await stub(service).HealthCheck(vllm.HealthCheckRequest())).healthy
    service.engine.say(False, reason="loading")
    answer = await stub(service).HealthCheck(vllm.HealthCheckRequest())
    assert (answer.healthy, answer.message) == (False, "loading")
    service.engine.say(True)
    assert (await stub(service).HealthCheck(vllm.HealthCheckRequest())).healthy
    info = await stub(service).GetModelInfo(vllm.GetModelInfoRequest())
    assert (info.is_generation, info.max_context_length, info.vocab_size) == (True, 256, 512)
    assert (list(info.eos_token_ids), info.max_req_input_len) == ([EOS], 255)
    server = await stub(service).GetServerInfo(vllm.GetServerInfoRequest())
    assert (server.server_type, server.block_size, server.model_dtype) == ("vllm-grpc", 32, "float32")


async def test_loads_are_the_engines_own_numbers() -> None:
    service = await open_service(byte_model(), FrontendConfig(port=0, max_num_seqs=16, block_size=8))
    service.engine.stats = EngineStats(
        running=4, waiting=9, waiting_tokens=77, num_blocks=100, free_blocks=40, cached_blocks=30, owned_blocks=25,
        fenced_blocks=5, prompt_tokens=10, cached_tokens=5,
    )  # fmt: skip
    answer = await stub(service).GetLoads(vllm.GetLoadsRequest())
    load = answer.loads[0]
    assert (load.num_running_reqs, load.num_waiting_reqs, load.num_total_reqs) == (4, 9, 13)
    assert (load.num_used_tokens, load.max_total_num_tokens, load.token_usage) == (240, 800, 0.3)
    assert (load.max_running_requests, load.utilization, load.cache_hit_rate) == (16, 0.25, 0.5)
    assert load.num_waiting_uncached_tokens == 77
    assert not (await stub(service).GetLoads(vllm.GetLoadsRequest(dp_rank=3))).loads
    await service.channel.close()
    await service.frontend.stop()


def test_throughput_is_read_between_polls() -> None:
    now = 100.0
    throughput = Throughput(lambda: now)
    assert throughput.rate(5) == 0.0
    now = 110.0
    assert throughput.rate(200) == 20.0
    now = 110.5
    assert throughput.rate(900) == 20.0, "too soon for another reading"


async def test_the_tokenizer_travels(real_service: Service, real_model: ServedModel) -> None:
    chunks = [chunk async for chunk in stub(real_service).GetTokenizer(common_pb2.GetTokenizerRequest())]
    data = b"".join(chunk.data for chunk in chunks)
    assert [bool(chunk.sha256) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].sha256 == hashlib.sha256(data).hexdigest()
    files = zipfile.ZipFile(io.BytesIO(data))
    assert {"tokenizer.json", "tokenizer_config.json", "config.json"} <= set(files.namelist())
    rebuilt = tokenizers.Tokenizer.from_buffer(files.read("tokenizer.json"))
    text = "Hello 1234 日本 🎉<|im_end|>"
    assert rebuilt.encode(text).ids == real_model.tokenizer.encode(text)


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("StartProfile", common_pb2.StartProfileRequest()),
        ("StopProfile", common_pb2.StopProfileRequest()),
    ],
)
async def test_what_is_not_served_says_so(service: Service, method: str, request_: Any) -> None:
    call = getattr(stub(service), method)(request_)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert str(caught.value.details()).startswith(f"{method} is not served: ")


async def test_flush_cache(service: Service) -> None:
    assert (await stub(service).FlushCache(common_pb2.FlushCacheRequest())).success

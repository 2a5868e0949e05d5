"""What a stranger may cost: sizes that are refused before anything is done with them, and clients that are gone."""

from __future__ import annotations

import asyncio
import os
import signal
import struct
import sys
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from pagewire.v1 import inference_pb2 as pb
from smg_grpc_proto.generated import vllm_engine_pb2 as vllm  # type: ignore[import-untyped]
from smg_grpc_proto.generated import vllm_engine_pb2_grpc

from scheduler_svc.frontend.core import FrontendConfig
from scheduler_svc.frontend.limits import MAX_ABORTS, MAX_CONNECTION_STREAMS, MAX_METADATA_BYTES
from tests.frontend.conftest import Service, byte_model, open_service
from tests.frontend.test_generate import fails
from tests.frontend.test_validation import violations

ROOT = Path(__file__).parents[2]
MAX_CONCURRENT_STREAMS, MAX_HEADER_LIST_SIZE = 3, 6  # settings of HTTP/2


async def settings(port: int) -> dict[int, int]:
    """What the server says of itself to every new connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
    header = await reader.readexactly(9)
    assert header[3] == 4, "the first frame holds the settings"
    payload = await reader.readexactly(int.from_bytes(header[:3], "big"))
    writer.close()
    return dict(struct.iter_unpack(">HI", payload))


async def test_a_connection_is_told_its_bounds(service: Service) -> None:
    told = await settings(service.port)
    assert told[MAX_CONCURRENT_STREAMS] == MAX_CONNECTION_STREAMS
    assert told[MAX_HEADER_LIST_SIZE] == MAX_METADATA_BYTES


@pytest.mark.parametrize(("size", "served"), [(MAX_METADATA_BYTES - 1000, True), (MAX_METADATA_BYTES + 1000, False)])
async def test_metadata_is_bounded(service: Service, size: int, served: bool) -> None:
    call = service.inference.GetModel(pb.GetModelRequest(), metadata=(("x", "y" * size),))
    assert await call.code() is (grpc.StatusCode.OK if served else grpc.StatusCode.RESOURCE_EXHAUSTED)


async def test_a_prompt_of_too_many_ids_is_counted_and_no_more(service: Service) -> None:
    error = await fails(service, pb.GenerateRequest(token_ids=pb.TokenIds(ids=[600] * 1_000_000)))
    assert violations(error) == {"token_ids.ids": error.details().partition(": ")[2]}  # type: ignore[union-attr]
    assert "has 1000000 tokens; at most 255" in str(error.details())


async def test_a_conversation_that_cannot_fit_is_not_rendered(service: Service) -> None:
    service.frontend._core.model.tokenizer.chat_template = _never  # type: ignore[assignment]
    size = 256 * service.frontend._core.model.tokenizer.longest_token + 1
    chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="x" * size)])
    error = await fails(service, pb.GenerateRequest(chat=chat))
    assert f"have {size} characters" in violations(error)["chat.messages"]


class _Never:
    def render(self, *arguments: Any) -> str:
        raise AssertionError("it was rendered")


_never = _Never()


async def test_many_ids_of_one_abort_are_refused(service: Service) -> None:
    stub: Any = vllm_engine_pb2_grpc.VllmEngineStub(service.channel)
    await stub.Abort(vllm.AbortRequest(request_ids=["x"] * MAX_ABORTS))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Abort(vllm.AbortRequest(request_ids=["x"] * (MAX_ABORTS + 1)))
    assert f"at most {MAX_ABORTS}" in violations(caught.value)["request_ids"]


async def test_long_bad_words_leave_the_loop_alone(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = service.frontend._core.model.tokenizer
    words = ["x" * 1024] * 2 + ["ab", " c"]
    inline = [tokenizer.encode(lead + word.lstrip(), False) for word in words for lead in ("", " ")]
    monkeypatch.setattr(tokenizer, "encode", lambda *_: pytest.fail("encoded on the loop"))
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[1]), sampling=pb.SamplingParams(bad_words=words, max_tokens=1)
    )
    async for _ in service.inference.Generate(request):
        pass
    assert service.engine.submits[0].sampling.bad_words == tuple(dict.fromkeys(map(tuple, inline)))


CLIENT = """
import sys
from client.client import Client
with Client(sys.argv[1], keepalive=None) as client:
    stream = client.generate("hello", None)
    stream.metadata()
    print("open", flush=True)
    list(stream)
"""


async def test_a_client_whose_host_is_gone_is_found_out() -> None:
    """Here its process is stopped: the kernel still answers for TCP, and nobody does for HTTP/2."""
    config = FrontendConfig(port=0, keepalive=1.0, keepalive_answer=1.0)
    service = await open_service(byte_model(), config)
    service.engine.held = True
    command = [sys.executable, "-c", CLIENT, f"127.0.0.1:{service.port}"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}"}
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, env=environment)
    try:
        assert process.stdout
        assert await process.stdout.readline() == b"open\n"
        process.send_signal(signal.SIGSTOP)
        async with asyncio.timeout(30):
            await service.engine.abort_seen.wait()
    finally:
        process.kill()
        await process.wait()
        await service.channel.close()
        await service.frontend.stop()

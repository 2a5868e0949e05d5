"""A gRPC server without a model: it echoes the prompt word by word, and misbehaves where the prompt says so."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn

import grpc
from google.protobuf import duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from pagewire.v1 import admin_pb2, admin_pb2_grpc, inference_pb2_grpc
from pagewire.v1 import inference_pb2 as pb

Context = grpc.ServicerContext
PATIENCE = 20.0  # seconds, for what must happen


class ScriptedServer(inference_pb2_grpc.InferenceServiceServicer, admin_pb2_grpc.AdminServiceServicer):
    """A prompt's first word may be a misbehaviour; all others are echoed and end.

    `bad`, `overloaded`, `quota` and `large` are refused, `status NAME` with that code; `lost` and `stutter` break
    behind the first words; `forever` goes on. `busy N` is refused N times and then echoed, `gone N` likewise.
    """

    def __init__(self, port: int = 0) -> None:
        self.requests: list[pb.GenerateRequest] = []
        self.time_left: list[float | None] = []  # of each of them when it came
        self.metadata: list[dict[str, str | bytes]] = []  # of every call
        self.cancelled = threading.Event()
        self.heard = threading.Event()  # while it is not set, what follows the metadata waits
        self.heard.set()
        self.failing = 0  # so many calls of the others are UNAVAILABLE
        self.vocabulary: dict[str, int] = {}
        self._server = grpc.server(ThreadPoolExecutor(16), options=[("grpc.so_reuseport", 0)])
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self, self._server)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(self, self._server)
        self.health = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port(f'127.0.0.1:{port}')}"
        self._server.start()

    def close(self) -> None:
        self._server.stop(grace=None).wait()

    def serving(self, yes: bool) -> None:
        state = health_pb2.HealthCheckResponse.SERVING if yes else health_pb2.HealthCheckResponse.NOT_SERVING
        self.health.set("", state)

    def Generate(self, request: pb.GenerateRequest, context: Context) -> Iterator[pb.GenerateResponse]:
        self.requests.append(request)
        self.time_left.append(context.time_remaining())
        self.metadata.append(dict(context.invocation_metadata()))
        words = self._words(request)
        match words:
            case ["bad"]:
                _refuse(context, grpc.StatusCode.INVALID_ARGUMENT, "invalid request", BAD)
            case ["status", name]:
                context.abort(grpc.StatusCode[name], "as you wish")
            case ["large"]:
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the message is too large")
        request_id = request.request_id or f"r{len(self.requests)}"
        seed = request.sampling.seed if request.sampling.HasField("seed") else len(self.requests)
        if words == ["forever"]:
            context.add_callback(self.cancelled.set)  # before the first word: a client may leave with it
        context.send_initial_metadata((("request-id", request_id), ("seed", str(seed))))
        assert self.heard.wait(PATIENCE), "nobody read the metadata"
        self._behind_the_metadata(words, context)
        for word in words:
            yield pb.GenerateResponse(delta=pb.GenerateDelta(text=f"{word} ", token_ids=[self._id(word)]))
        match words:
            case ["lost"]:
                context.abort(grpc.StatusCode.INTERNAL, "the worker is gone")
            case ["stutter", *_]:
                context.abort(grpc.StatusCode.UNAVAILABLE, "the connection broke")
            case ["forever"]:
                assert self.cancelled.wait(PATIENCE), "nobody cancelled"
        usage = pb.Usage(prompt_tokens=len(words), completion_tokens=len(words))
        yield pb.GenerateResponse(
            finished=pb.GenerateFinished(
                finish_reason=pb.FINISH_REASON_LENGTH, usage=usage, timings=pb.Timings(total=1)
            )
        )

    def _behind_the_metadata(self, words: list[str], context: Context) -> None:
        """Refuses as the engine does: what the frontend knows of a request has been sent already."""
        match words:
            case ["overloaded"]:
                _refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full", _retry_in(2000))
            case ["quota"]:
                info = error_details_pb2.ErrorInfo(reason="QUOTA", metadata={"tenant": "us"})
                _refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "over the quota", QUOTA, _retry_in(2000), info)
            case ["busy", times, *_] if len(self.requests) <= int(times):
                _refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full", _retry_in(10))
            case ["gone", times, *_] if len(self.requests) <= int(times):
                context.abort(grpc.StatusCode.UNAVAILABLE, "draining")

    def _fail(self, context: Context) -> None:
        if self.failing > 0:
            self.failing -= 1
            context.abort(grpc.StatusCode.UNAVAILABLE, "draining")

    def _words(self, request: pb.GenerateRequest) -> list[str]:
        """Of a text or the last message of a conversation; token ids bring `max_tokens` words."""
        match request.WhichOneof("prompt"):
            case "token_ids":
                return ["word"] * request.sampling.max_tokens
            case "chat":
                return request.chat.messages[-1].content.split()
            case _:
                return request.text.split()

    def _id(self, word: str) -> int:
        return self.vocabulary.setdefault(word, len(self.vocabulary))

    def Embed(self, request: pb.EmbedRequest, context: Context) -> pb.EmbedResponse:
        """What was asked, as numbers."""
        self._fail(context)
        values = [request.pooling, request.dimensions, request.normalize, request.truncate_prompt_tokens]
        return pb.EmbedResponse(
            embeddings=[pb.Embedding(values=values, prompt_tokens=len(one.text)) for one in request.inputs]
        )

    def Score(self, request: pb.ScoreRequest, context: Context) -> pb.ScoreResponse:
        self._fail(context)
        return pb.ScoreResponse(scores=[pb.Score(sum=-len(request.text + one.text)) for one in request.candidates])

    def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        self._fail(context)
        self.metadata.append(dict(context.invocation_metadata()))
        return pb.TokenizeResponse(token_ids=[self._id(word) for word in request.text.split()])

    def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:
        self._fail(context)
        words = list(self.vocabulary)
        return pb.DetokenizeResponse(text=" ".join(words[i] for i in request.token_ids))

    def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        self._fail(context)
        return pb.GetModelResponse(name="echo", max_model_len=1000)

    def CancelGeneration(self, request: pb.CancelGenerationRequest, context: Context) -> pb.CancelGenerationResponse:
        context.abort(grpc.StatusCode.NOT_FOUND, f"no running request {request.request_id!r}")

    def GetStats(self, request: admin_pb2.GetStatsRequest, context: Context) -> admin_pb2.GetStatsResponse:
        self._fail(context)
        return admin_pb2.GetStatsResponse(running=3)

    def GetConfig(self, request: admin_pb2.GetConfigRequest, context: Context) -> admin_pb2.GetConfigResponse:
        return admin_pb2.GetConfigResponse()

    def Drain(self, request: admin_pb2.DrainRequest, context: Context) -> admin_pb2.DrainResponse:
        return admin_pb2.DrainResponse()

    def FlushCache(self, request: admin_pb2.FlushCacheRequest, context: Context) -> admin_pb2.FlushCacheResponse:
        return admin_pb2.FlushCacheResponse(freed_blocks=7)

    def WatchKvEvents(
        self, request: admin_pb2.WatchKvEventsRequest, context: Context
    ) -> Iterator[admin_pb2.WatchKvEventsResponse]:
        yield admin_pb2.WatchKvEventsResponse(reset=True)


BAD = error_details_pb2.BadRequest(
    field_violations=[
        error_details_pb2.BadRequest.FieldViolation(field="sampling.temperature", description="-1 is below 0")
    ]
)
QUOTA = error_details_pb2.QuotaFailure(
    violations=[error_details_pb2.QuotaFailure.Violation(subject="tenant:us", description="1000 tokens a minute")]
)


def _retry_in(milliseconds: int) -> error_details_pb2.RetryInfo:
    delay = duration_pb2.Duration()
    delay.FromMilliseconds(milliseconds)
    return error_details_pb2.RetryInfo(retry_delay=delay)


def _refuse(context: Context, code: grpc.StatusCode, message: str, *details: Message) -> NoReturn:
    status = status_pb2.Status(code=code.value[0], message=message)
    for detail in details:
        status.details.add().Pack(detail)
    context.abort_with_status(rpc_status.to_status(status))
    raise AssertionError("abort raises")

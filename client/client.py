"""A blocking client of `pagewire.v1`.

    with Client() as client:
        for chunk in client.generate("Once upon a time", SamplingParams(max_tokens=32)):
            if isinstance(chunk, GenerateDelta):
                print(chunk.text, end="")

Every call raises a `ServiceError`, or one of its kinds, where the service refuses or breaks it. With a policy,
`Client(retry=Retry())`, a stream that has brought nothing yet is tried again when the service says so, and so are
`tokenize`, `detokenize` and `model` (see `client.retry`). Calls about this moment, such as `stats`, never are.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

import grpc
from grpc_health.v1 import health_pb2
from pagewire.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc

from client import api
from client.errors import CancelledError, ServiceError, typed
from client.retry import Attempts

if TYPE_CHECKING:
    from grpc import _CallIterator

    Call = _CallIterator[inference_pb2.GenerateResponse]
    Start = Callable[[inference_pb2.GenerateRequest, float | None], Call]

T = TypeVar("T")


class Generation(Iterator[api.Chunk]):
    """One request's stream. Leave it early by `cancel()`, or as a context manager."""

    def __init__(self, start: Start, request: inference_pb2.GenerateRequest, address: str, attempts: Attempts) -> None:
        self._start, self._request = start, request
        self._address, self._attempts = address, attempts
        self._brought = False  # whether a chunk has been handed out
        self._left = threading.Event()
        self._again = threading.Lock()  # held by the one thread that waits for another attempt and begins it
        self._call = start(request, attempts.time_left())

    def __next__(self) -> api.Chunk:
        response = self._reach(next)
        self._brought = True
        return api.chunk(response)

    def metadata(self) -> dict[str, str]:
        """`request-id`, `seed`, `fingerprint` and `exact`; waits for the server's first word.

        From then on id and seed stay what they are, should the call be made again.
        """
        metadata = self._reach(self._announced)
        api.told(self._request, metadata)
        return metadata

    def _announced(self, call: Call) -> dict[str, str]:
        metadata = api.metadata(call.initial_metadata())
        if not metadata and call.code() is not grpc.StatusCode.OK:  # a refusal comes without
            next(call)  # raises it
        return metadata

    def _reach(self, read: Callable[[Call], T]) -> T:
        """What `read` finds, in this attempt or in a later one."""
        while True:
            call = self._call
            try:
                with typed(self._address):
                    return read(call)
            except ServiceError as error:
                self._begin_again(call, error)

    def _begin_again(self, failed: Call, error: ServiceError) -> None:
        """Raises `error` where it is the last word."""
        with self._again:
            if self._call is not failed:  # another thread has begun again meanwhile
                return
            pause = None if self._brought else self._attempts.pause(error)
            if pause is None:
                raise error
            if self._left.wait(pause):
                raise CancelledError(grpc.StatusCode.CANCELLED, "cancelled before another attempt") from error
            self._call = self._start(self._request, self._attempts.time_left())
        if self._left.is_set():  # `cancel` may have seen the failed call
            self._call.cancel()

    def cancel(self) -> None:
        """Ends the request, or the wait for another attempt; does nothing once the stream has ended."""
        self._left.set()
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()


class Client:
    """One connection, used by any number of threads.

    Timeouts are in seconds, for a whole call with its retries. `retry` is a policy for refused calls, none by default;
    `keepalive` says how a dead host is noticed, None that it is not.
    """

    def __init__(
        self,
        address: str = api.DEFAULT_ADDRESS,
        *,
        retry: api.Retry | None = None,
        keepalive: api.Keepalive | None = api.Keepalive(),
    ) -> None:
        self.address, self.retry = address, retry
        self._channel = grpc.insecure_channel(address, api.channel_options(keepalive))
        self._inference = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._admin = admin_pb2_grpc.AdminServiceStub(self._channel)
        self._check = self._channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            health_pb2.HealthCheckRequest.SerializeToString,
            health_pb2.HealthCheckResponse.FromString,
        )

    def generate(
        self,
        prompt: api.Prompt,
        sampling: api.SamplingParams | None = None,
        *,
        request_id: str = "",
        priority: int = 0,
        cache_salt: str = "",
        timeout: float | None = None,
    ) -> Generation:
        request = api.generate_request(prompt, sampling, request_id, priority, cache_salt)
        return Generation(self._start, request, self.address, Attempts(self.retry, timeout))

    def _start(self, request: inference_pb2.GenerateRequest, timeout: float | None) -> Call:
        return self._inference.Generate(request, timeout=timeout)

    def tokenize(self, text: str, *, add_special_tokens: bool = True, timeout: float | None = None) -> list[int]:
        request = inference_pb2.TokenizeRequest(text=text, add_special_tokens=add_special_tokens)
        response = self._retried(lambda left: self._inference.Tokenize(request, timeout=left), timeout)
        return list(response.token_ids)

    def detokenize(self, ids: list[int], *, skip_special_tokens: bool = True, timeout: float | None = None) -> str:
        request = inference_pb2.DetokenizeRequest(token_ids=ids, skip_special_tokens=skip_special_tokens)
        return self._retried(lambda left: self._inference.Detokenize(request, timeout=left), timeout).text

    def model(self, *, timeout: float | None = None) -> api.GetModelResponse:
        request = inference_pb2.GetModelRequest()
        return self._retried(lambda left: self._inference.GetModel(request, timeout=left), timeout)

    def _retried(self, call: Callable[[float | None], T], timeout: float | None) -> T:
        attempts = Attempts(self.retry, timeout)
        while True:
            try:
                with typed(self.address):
                    return call(attempts.time_left())
            except ServiceError as error:
                pause = attempts.pause(error)
                if pause is None:
                    raise
            time.sleep(pause)

    def cancel(self, request_id: str, *, timeout: float | None = None) -> None:
        """Ends a running request of any client."""
        with typed(self.address):
            self._inference.CancelGeneration(
                inference_pb2.CancelGenerationRequest(request_id=request_id), timeout=timeout
            )

    def stats(self, *, timeout: float | None = None) -> api.GetStatsResponse:
        with typed(self.address):
            return self._admin.GetStats(admin_pb2.GetStatsRequest(), timeout=timeout)

    def drain(self, *, timeout: float | None = None) -> None:
        """Returns when the last accepted request has ended; new ones are refused from now on."""
        with typed(self.address):
            self._admin.Drain(admin_pb2.DrainRequest(), timeout=timeout)

    def flush_cache(self, *, timeout: float | None = None) -> int:
        """Returns how many cached blocks were freed."""
        with typed(self.address):
            return self._admin.FlushCache(admin_pb2.FlushCacheRequest(), timeout=timeout).freed_blocks

    def serving(self, *, timeout: float | None = None) -> bool:
        """Whether the service as a whole says SERVING."""
        with typed(self.address):
            answer = self._check(health_pb2.HealthCheckRequest(), timeout=timeout)
        return answer.status == health_pb2.HealthCheckResponse.SERVING

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

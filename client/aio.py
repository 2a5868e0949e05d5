"""The asyncio client of `pagewire.v1`: the calls of `client.client`, awaited, with the same retries and errors."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

import grpc
from grpc_health.v1 import health_pb2
from pagewire.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc

from client import api
from client.errors import CancelledError, ServiceError, typed
from client.retry import Attempts

if TYPE_CHECKING:
    Call = grpc.aio.UnaryStreamCall[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse]
    Start = Callable[[inference_pb2.GenerateRequest, float | None], Call]

T = TypeVar("T")


class Generation(AsyncIterator[api.Chunk]):
    """One request's stream. Leave it early by `cancel()`, or as an asynchronous context manager."""

    def __init__(self, start: Start, request: inference_pb2.GenerateRequest, address: str, attempts: Attempts) -> None:
        self._start, self._request = start, request
        self._address, self._attempts = address, attempts
        self._brought = False  # whether a chunk has been handed out
        self._left = asyncio.Event()
        self._again = asyncio.Lock()  # held by the one task that waits for another attempt and begins it
        self._begin()

    def _begin(self) -> None:
        self._call = self._start(self._request, self._attempts.time_left())
        self._responses = aiter(self._call)

    async def __anext__(self) -> api.Chunk:
        response = await self._reach(lambda: anext(self._responses))
        self._brought = True
        return api.chunk(response)

    async def metadata(self) -> dict[str, str]:
        """`request-id`, `seed`, `fingerprint` and `exact`; waits for the server's first word.

        From then on id and seed stay what they are, should the call be made again.
        """
        metadata = await self._reach(self._announced)
        api.told(self._request, metadata)
        return metadata

    async def _announced(self) -> dict[str, str]:
        call = self._call
        metadata = api.metadata(await call.initial_metadata())
        if not metadata and await call.code() is not grpc.StatusCode.OK:  # a refusal comes without
            await anext(aiter(call))  # raises it
        return metadata

    async def _reach(self, read: Callable[[], Awaitable[T]]) -> T:
        """What `read` finds, in this attempt or in a later one."""
        while True:
            call = self._call
            try:
                with typed(self._address):
                    return await read()
            except ServiceError as error:
                await self._begin_again(call, error)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if not self._left.is_set() or (task and task.cancelling()):
                    raise  # it is the task that was cancelled, not the call
                raise CancelledError(grpc.StatusCode.CANCELLED, "cancelled by this client") from None

    async def _begin_again(self, failed: Call, error: ServiceError) -> None:
        """Raises `error` where it is the last word."""
        async with self._again:
            if self._call is not failed:  # another task has begun again meanwhile
                return
            pause = None if self._brought else self._attempts.pause(error)
            if pause is None:
                raise error
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._left.wait()
            if self._left.is_set():
                raise CancelledError(grpc.StatusCode.CANCELLED, "cancelled before another attempt") from error
            self._begin()

    def cancel(self) -> None:
        """Ends the request, or the wait for another attempt; does nothing once the stream has ended."""
        self._left.set()
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()


class Client:
    """One connection, used within one event loop. Arguments are those of `client.client.Client`."""

    def __init__(
        self,
        address: str = api.DEFAULT_ADDRESS,
        *,
        retry: api.Retry | None = None,
        keepalive: api.Keepalive | None = api.Keepalive(),
    ) -> None:
        self.address, self.retry = address, retry
        self._channel = grpc.aio.insecure_channel(address, api.channel_options(keepalive))
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

    async def tokenize(self, text: str, *, add_special_tokens: bool = True, timeout: float | None = None) -> list[int]:
        request = inference_pb2.TokenizeRequest(text=text, add_special_tokens=add_special_tokens)
        response = await self._retried(lambda left: self._inference.Tokenize(request, timeout=left), timeout)
        return list(response.token_ids)

    async def detokenize(
        self, ids: list[int], *, skip_special_tokens: bool = True, timeout: float | None = None
    ) -> str:
        request = inference_pb2.DetokenizeRequest(token_ids=ids, skip_special_tokens=skip_special_tokens)
        response = await self._retried(lambda left: self._inference.Detokenize(request, timeout=left), timeout)
        return response.text

    async def model(self, *, timeout: float | None = None) -> api.GetModelResponse:
        request = inference_pb2.GetModelRequest()
        return await self._retried(lambda left: self._inference.GetModel(request, timeout=left), timeout)

    async def _retried(self, call: Callable[[float | None], Awaitable[T]], timeout: float | None) -> T:
        attempts = Attempts(self.retry, timeout)
        while True:
            try:
                with typed(self.address):
                    return await call(attempts.time_left())
            except ServiceError as error:
                pause = attempts.pause(error)
                if pause is None:
                    raise
            await asyncio.sleep(pause)

    async def cancel(self, request_id: str, *, timeout: float | None = None) -> None:
        """Ends a running request of any client."""
        request = inference_pb2.CancelGenerationRequest(request_id=request_id)
        with typed(self.address):
            await self._inference.CancelGeneration(request, timeout=timeout)

    async def stats(self, *, timeout: float | None = None) -> api.GetStatsResponse:
        with typed(self.address):
            return await self._admin.GetStats(admin_pb2.GetStatsRequest(), timeout=timeout)

    async def drain(self, *, timeout: float | None = None) -> None:
        """Returns when the last accepted request has ended; new ones are refused from now on."""
        with typed(self.address):
            await self._admin.Drain(admin_pb2.DrainRequest(), timeout=timeout)

    async def flush_cache(self, *, timeout: float | None = None) -> int:
        """Returns how many cached blocks were freed."""
        with typed(self.address):
            return (await self._admin.FlushCache(admin_pb2.FlushCacheRequest(), timeout=timeout)).freed_blocks

    async def serving(self, *, timeout: float | None = None) -> bool:
        """Whether the service as a whole says SERVING."""
        with typed(self.address):
            answer = await self._check(health_pb2.HealthCheckRequest(), timeout=timeout)
        return answer.status == health_pb2.HealthCheckResponse.SERVING

    async def close(self) -> None:
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

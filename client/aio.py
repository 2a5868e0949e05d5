"""The asyncio client of `pagewire.v1`: the calls of `client.client`, awaited."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self

import grpc
from grpc_health.v1 import health_pb2
from pagewire.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc

from client import api
from client.errors import typed


class Generation(AsyncIterator[api.Chunk]):
    """One request's stream. Leave it early by `cancel()`, or as an asynchronous context manager."""

    def __init__(
        self,
        call: grpc.aio.UnaryStreamCall[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse],
        address: str,
    ) -> None:
        self._call, self._address = call, address
        self._responses = aiter(call)

    async def __anext__(self) -> api.Chunk:
        with typed(self._address):
            return api.chunk(await anext(self._responses))

    async def metadata(self) -> dict[str, str]:
        """`request-id`, `seed`, `fingerprint` and `exact`; waits for the server's first word."""
        with typed(self._address):
            return api.metadata(await self._call.initial_metadata())

    def cancel(self) -> None:
        """Ends the request; does nothing once the stream has ended."""
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()


class Client:
    """One connection, used within one event loop. Timeouts are in seconds, for a whole call."""

    def __init__(self, address: str = api.DEFAULT_ADDRESS, *, keepalive_seconds: float = 30) -> None:
        self.address = address
        self._channel = grpc.aio.insecure_channel(address, api.channel_options(keepalive_seconds))
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
        return Generation(self._inference.Generate(request, timeout=timeout), self.address)

    async def tokenize(self, text: str, *, add_special_tokens: bool = True, timeout: float | None = None) -> list[int]:
        request = inference_pb2.TokenizeRequest(text=text, add_special_tokens=add_special_tokens)
        with typed(self.address):
            return list((await self._inference.Tokenize(request, timeout=timeout)).token_ids)

    async def detokenize(
        self, ids: list[int], *, skip_special_tokens: bool = True, timeout: float | None = None
    ) -> str:
        request = inference_pb2.DetokenizeRequest(token_ids=ids, skip_special_tokens=skip_special_tokens)
        with typed(self.address):
            return (await self._inference.Detokenize(request, timeout=timeout)).text

    async def model(self, *, timeout: float | None = None) -> api.GetModelResponse:
        with typed(self.address):
            return await self._inference.GetModel(inference_pb2.GetModelRequest(), timeout=timeout)

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

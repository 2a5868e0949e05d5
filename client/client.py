"""A blocking client of `pagewire.v1`.

    with Client() as client:
        for chunk in client.generate("Once upon a time", SamplingParams(max_tokens=32)):
            if isinstance(chunk, GenerateDelta):
                print(chunk.text, end="")

Every call raises a `ServiceError`, or one of its kinds, where the service refuses or breaks it.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Self

import grpc
from grpc_health.v1 import health_pb2
from pagewire.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc

from client import api
from client.errors import typed

if TYPE_CHECKING:
    from grpc import _CallIterator


class Generation(Iterator[api.Chunk]):
    """One request's stream. Leave it early by `cancel()`, or as a context manager."""

    def __init__(self, call: _CallIterator[inference_pb2.GenerateResponse], address: str) -> None:
        self._call, self._address = call, address

    def __next__(self) -> api.Chunk:
        with typed(self._address):
            return api.chunk(next(self._call))

    def metadata(self) -> dict[str, str]:
        """`request-id`, `seed`, `fingerprint` and `exact`; waits for the server's first word."""
        with typed(self._address):
            return api.metadata(self._call.initial_metadata())

    def cancel(self) -> None:
        """Ends the request; does nothing once the stream has ended."""
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()


class Client:
    """One connection, used by any number of threads. Timeouts are in seconds, for a whole call."""

    def __init__(self, address: str = api.DEFAULT_ADDRESS, *, keepalive_seconds: float = 30) -> None:
        self.address = address
        self._channel = grpc.insecure_channel(address, api.channel_options(keepalive_seconds))
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

    def tokenize(self, text: str, *, add_special_tokens: bool = True, timeout: float | None = None) -> list[int]:
        request = inference_pb2.TokenizeRequest(text=text, add_special_tokens=add_special_tokens)
        with typed(self.address):
            return list(self._inference.Tokenize(request, timeout=timeout).token_ids)

    def detokenize(self, ids: list[int], *, skip_special_tokens: bool = True, timeout: float | None = None) -> str:
        request = inference_pb2.DetokenizeRequest(token_ids=ids, skip_special_tokens=skip_special_tokens)
        with typed(self.address):
            return self._inference.Detokenize(request, timeout=timeout).text

    def model(self, *, timeout: float | None = None) -> api.GetModelResponse:
        with typed(self.address):
            return self._inference.GetModel(inference_pb2.GetModelRequest(), timeout=timeout)

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

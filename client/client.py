"""A blocking client of `pagewire.v1`.

    with Client() as client:
        for chunk in client.generate("Once upon a time", SamplingParams(max_tokens=32)):
            if isinstance(chunk, GenerateDelta):
                print(chunk.text, end="")

Every call raises a `ServiceError`, or one of its kinds, where the service refuses or breaks it. With a policy,
`Client(retry=Retry())`, a stream that has brought nothing yet is tried again when the service says so, and so are
`embed`, `score`, `tokenize`, `detokenize` and `model` (see `client.retry`). Calls about this moment, such as `stats`,
never are. With `Client(retry=Resume())` a stream that broke goes on behind what it brought, also at another of several
addresses.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

import grpc
from grpc_health.v1 import health_pb2
from pagewire.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc

from client import api, channel
from client.continuation import STALE_TIMEOUT, Continuation
from client.errors import CancelledError, NotFoundError, ServiceError, UnavailableError, typed
from client.retry import Attempts, Places

if TYPE_CHECKING:
    from grpc import _CallIterator

    Call = _CallIterator[inference_pb2.GenerateResponse]

T = TypeVar("T")


class Generation(Iterator[api.Chunk]):
    """One request's stream. Leave it early by `cancel()`, or as a context manager."""

    def __init__(self, client: Client, stream: Continuation) -> None:
        self._client, self._stream = client, stream
        self._left = threading.Event()
        self._again = threading.Lock()  # held by the one thread that waits for another attempt and begins it
        self._begin()

    def _begin(self) -> None:
        attempts = self._stream.attempts
        self._target = self._client.targets[attempts.place]
        self._place, self._heard = attempts.place, False
        self._call = self._target.inference.Generate(self._stream.request, timeout=attempts.time_left())

    def __next__(self) -> api.Chunk:
        while (chunk := self._reach(self._next)) is None:
            pass
        return chunk

    def _next(self, call: Call) -> api.Chunk | None:
        response = next(call)
        if not self._heard and self._stream.attempts.resume:
            self._stream.told(api.metadata(call.initial_metadata()))  # it is here: it came before the response
            self._heard = True
        return self._stream.take(response)

    def metadata(self) -> dict[str, str]:
        """`request-id`, `seed`, `fingerprint` and `exact`; waits for the server's first word.

        From then on id and seed stay what they are, should the call be made again.
        """
        return self._stream.told(self._reach(self._announced))

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
                with typed(self._target.address):
                    return read(call)
            except ServiceError as error:
                self._begin_again(call, error)

    def _begin_again(self, failed: Call, error: ServiceError) -> None:
        """Raises `error` where it is the last word."""
        with self._again:
            if self._call is not failed:  # another thread has begun again meanwhile
                return
            if self._stream.complete:
                raise StopIteration from error
            if stale := self._stream.runs_at(self._place, error):
                with contextlib.suppress(ServiceError):  # what comes of it shows in the next attempt
                    self._client.cancel_at(self._target, stale, timeout=STALE_TIMEOUT)
            if self._left.wait(self._stream.again(error)):
                raise CancelledError(grpc.StatusCode.CANCELLED, "cancelled before another attempt") from error
            self._begin()
        if self._left.is_set():  # `cancel` may have seen the failed call
            self._call.cancel()

    @property
    def resumes(self) -> int:
        """How often the stream broke and was asked to go on."""
        return self._stream.resumes

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


class Target:
    """One address and its connection."""

    def __init__(self, address: str, channel: grpc.Channel) -> None:
        self.address, self.channel = address, channel
        self.inference = inference_pb2_grpc.InferenceServiceStub(channel)
        self.admin = admin_pb2_grpc.AdminServiceStub(channel)
        self.check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            health_pb2.HealthCheckRequest.SerializeToString,
            health_pb2.HealthCheckResponse.FromString,
        )


class Client:
    """A connection, used by any number of threads.

    `address` may be several, of services with the same model: calls go to the first, and to the next one from the
    moment that it is unavailable. Timeouts are in seconds, for a whole call with its retries. `retry` is a policy for
    refused calls, none by default; `keepalive` says how a dead host is noticed, None that it is not. `tls` is needed
    where the server has a certificate, `token` where it asks for one; `tenant` names who calls where it does not.
    """

    def __init__(
        self,
        address: str | Sequence[str] = api.DEFAULT_ADDRESS,
        *,
        retry: api.Retry | None = None,
        keepalive: api.Keepalive | None = api.Keepalive(),
        tls: channel.Tls | None = None,
        token: str = "",
        tenant: str = "",
    ) -> None:
        self.addresses, self.retry = api.addresses(address), retry
        said = channel.carried(token, tenant)
        self.targets = [Target(one, channel.open_sync(one, keepalive, tls, said)) for one in self.addresses]
        self._places = Places(len(self.targets))

    @property
    def address(self) -> str:
        """Where calls go now."""
        return self._target.address

    @property
    def _target(self) -> Target:
        return self.targets[self._places.current]

    def _attempts(self, timeout: float | None) -> Attempts:
        return Attempts(self.retry, timeout, places=self._places)

    def generate(
        self,
        prompt: api.Prompt,
        sampling: api.SamplingParams | None = None,
        *,
        request_id: str = "",
        priority: int = 0,
        cache_salt: str = "",
        adapter: str = "",
        structured_output: api.StructuredOutput | None = None,
        timeout: float | None = None,
    ) -> Generation:
        request = api.generate_request(prompt, sampling, request_id, priority, cache_salt, adapter, structured_output)
        return Generation(self, Continuation(request, self._attempts(timeout)))

    def embed(
        self,
        inputs: Sequence[api.Prompt],
        *,
        pooling: str = "",
        dimensions: int | None = None,
        normalize: bool | None = None,
        truncate_prompt_tokens: int | None = None,
        request_id: str = "",
        priority: int = 0,
        cache_salt: str = "",
        adapter: str = "",
        timeout: float | None = None,
    ) -> api.EmbedResponse:
        """One vector an input. `pooling`: last, mean or cls; the model's own where it is empty."""
        request = api.embed_request(
            inputs, pooling, dimensions, normalize, truncate_prompt_tokens,
            request_id=request_id, priority=priority, cache_salt=cache_salt, adapter=adapter,
        )  # fmt: skip
        return self._retried(lambda target, left: target.inference.Embed(request, timeout=left), timeout)

    def score(
        self,
        prompt: api.Prompt,
        candidates: Sequence[str | api.TokenIds],
        *,
        request_id: str = "",
        priority: int = 0,
        cache_salt: str = "",
        adapter: str = "",
        timeout: float | None = None,
    ) -> api.ScoreResponse:
        """How likely each of the candidates is behind the prompt."""
        request = api.score_request(
            prompt, candidates, request_id=request_id, priority=priority, cache_salt=cache_salt, adapter=adapter
        )
        return self._retried(lambda target, left: target.inference.Score(request, timeout=left), timeout)

    def tokenize(self, text: str, *, add_special_tokens: bool = True, timeout: float | None = None) -> list[int]:
        request = inference_pb2.TokenizeRequest(text=text, add_special_tokens=add_special_tokens)
        response = self._retried(lambda target, left: target.inference.Tokenize(request, timeout=left), timeout)
        return list(response.token_ids)

    def detokenize(self, ids: list[int], *, skip_special_tokens: bool = True, timeout: float | None = None) -> str:
        request = inference_pb2.DetokenizeRequest(token_ids=ids, skip_special_tokens=skip_special_tokens)
        return self._retried(lambda target, left: target.inference.Detokenize(request, timeout=left), timeout).text

    def model(self, *, timeout: float | None = None) -> api.GetModelResponse:
        request = inference_pb2.GetModelRequest()
        return self._retried(lambda target, left: target.inference.GetModel(request, timeout=left), timeout)

    def _retried(self, call: Callable[[Target, float | None], T], timeout: float | None) -> T:
        attempts = self._attempts(timeout)
        while True:
            target = self.targets[attempts.place]
            try:
                with typed(target.address):
                    return call(target, attempts.time_left())
            except ServiceError as error:
                time.sleep(attempts.again(error))

    def cancel(self, request_id: str, *, timeout: float | None = None) -> None:
        """Ends a running request of any client, at whichever address it runs."""
        for target in self.targets[:-1]:
            with contextlib.suppress(NotFoundError, UnavailableError):
                self.cancel_at(target, request_id, timeout=timeout)
                return
        self.cancel_at(self.targets[-1], request_id, timeout=timeout)

    def cancel_at(self, target: Target, request_id: str, *, timeout: float | None = None) -> None:
        with typed(target.address):
            target.inference.CancelGeneration(
                inference_pb2.CancelGenerationRequest(request_id=request_id), timeout=timeout
            )

    def stats(self, *, timeout: float | None = None) -> api.GetStatsResponse:
        with typed(self.address):
            return self._target.admin.GetStats(admin_pb2.GetStatsRequest(), timeout=timeout)

    def drain(self, *, timeout: float | None = None) -> None:
        """Returns when the last accepted request has ended; new ones are refused from now on."""
        with typed(self.address):
            self._target.admin.Drain(admin_pb2.DrainRequest(), timeout=timeout)

    def flush_cache(self, *, timeout: float | None = None) -> int:
        """Returns how many cached blocks were freed."""
        with typed(self.address):
            return self._target.admin.FlushCache(admin_pb2.FlushCacheRequest(), timeout=timeout).freed_blocks

    def load_adapter(self, name: str, path: str, *, timeout: float | None = None) -> api.Adapter:
        """`path`: absolute, of the service's host. Returns when requests may name it."""
        request = admin_pb2.LoadAdapterRequest(name=name, path=path)
        with typed(self.address):
            return self._target.admin.LoadAdapter(request, timeout=timeout).adapter

    def unload_adapter(self, name: str, *, timeout: float | None = None) -> None:
        """Returns when the last request that names it has ended; new ones are refused from now on."""
        with typed(self.address):
            self._target.admin.UnloadAdapter(admin_pb2.UnloadAdapterRequest(name=name), timeout=timeout)

    def adapters(self, *, timeout: float | None = None) -> list[api.Adapter]:
        """Those that requests may name."""
        with typed(self.address):
            answer = self._target.admin.ListAdapters(admin_pb2.ListAdaptersRequest(), timeout=timeout)
        return list(answer.adapters)

    def serving(self, *, timeout: float | None = None) -> bool:
        """Whether the service as a whole says SERVING."""
        with typed(self.address):
            answer = self._target.check(health_pb2.HealthCheckRequest(), timeout=timeout)
        return answer.status == health_pb2.HealthCheckResponse.SERVING

    def close(self) -> None:
        for target in self.targets:
            target.channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

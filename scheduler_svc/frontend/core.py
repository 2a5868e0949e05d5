"""What both services stand on: the model, the link, and the life of one call."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pagewire.v1 import inference_pb2 as pb

from protos.engine_wire import Question, ServiceStatus
from protos.wire import Ready, TokenLogprobs
from scheduler_svc.frontend import access, auth, resume
from scheduler_svc.frontend.call import Call, open_streams
from scheduler_svc.frontend.engine_link import EngineLink
from scheduler_svc.frontend.errors import Context, ServiceError, duplicate, internal, not_ready
from scheduler_svc.frontend.gate import Gate
from scheduler_svc.frontend.kv_events import KvWatchers
from scheduler_svc.frontend.limits import MAX_HELD
from scheduler_svc.frontend.model import ServedModel
from scheduler_svc.frontend.slow_readers import SlowReaders
from scheduler_svc.frontend.streams import Ending, Gain, IndexStream
from scheduler_svc.frontend.tls import TlsFiles
from scheduler_svc.frontend.tokenizer import INLINE_TOKENS
from scheduler_svc.frontend.validation import Caller, Prepared, Preparer
from scheduler_svc.metrics import Observer

REFUSED_BY: Final = 0.05  # seconds: what the engine refuses it has refused by then, unless it has much to do

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FrontendConfig:
    """What the operator chose. `max_model_len` 0: the model's own. `port` 0: any free one."""

    host: str = "127.0.0.1"
    port: int = 50051
    reuse_port: bool = False  # others of ours listen there as well
    served_name: str = ""  # "": the model's file or directory name
    max_model_len: int = 0
    max_num_seqs: int = 0
    block_size: int = 32
    max_message_bytes: int = 16 << 20  # of one received message
    slow_reader_timeout: float = 60.0  # seconds for which a client may read nothing; 0: without end
    max_pending_calls: int = 100_000  # calls that gRPC may hold before a handler has them: beyond, it answers CANCELLED
    prefix_caching: bool = True
    kv_dtype: str = "auto"
    metrics_port: int = 0  # 0: none is served
    otlp_endpoint: str = ""  # "": nothing is traced
    settings: tuple[tuple[str, str], ...] = ()  # of the whole service, as GetConfig tells them
    tls: TlsFiles | None = None
    tokens: Path | None = None  # None: nobody is asked for one
    router_listen: str = ""  # HOST:PORT of a plain port without tokens, for routers: vllm.grpc.engine alone
    keepalive: float = 60.0  # seconds between pings that find out whether a client still lives
    keepalive_answer: float = 20.0  # seconds that it has to answer one
    max_connection_age: float = 0.0  # seconds; 0: no bound


@dataclass
class Computed:
    """What came of one prompt."""

    pooled: bytes = b""
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    cached_tokens: int = 0


class Core:
    """One frontend's state: `calls` counts the Generate calls that are open."""

    def __init__(
        self, link: EngineLink, config: FrontendConfig, model: ServedModel, clock: Callable[[], float]
    ) -> None:
        self.link, self.config, self.model, self.clock = link, config, model, clock
        self.calls = 0
        self.started = clock()
        self.kv_watchers = KvWatchers(link)
        self.observer = Observer()
        link.observe = lambda: self.observer.snapshot(self.calls)
        self.preparer = Preparer(model, self.max_model_len, link.frontend)
        self.gate = Gate(link.frontend, link.tell_shed, clock, asyncio.get_running_loop().call_later)
        self._slow_readers = SlowReaders(config.slow_reader_timeout, clock)
        self._first_ready = asyncio.Event()
        self._held = 0  # calls that wait for it
        link.on_status(self._see)

    @property
    def name(self) -> str:
        return self.config.served_name or self.model.card.name

    @property
    def ready(self) -> Ready | None:
        """The newest worker's own words; None until the first is ready."""
        return self.link.status.ready if self.link.status else None

    def max_model_len(self) -> int:
        """Tokens, prompt and output. The worker's word replaces the card's: it may scale positions further."""
        served = (self.ready.max_model_len if self.ready else 0) or self.model.card.max_model_len
        return min(self.config.max_model_len or served, served)

    def caller(self, context: Context) -> Caller:
        """Who calls, and until when the answer is of use: on our clock; 0 where the client set no deadline.

        The tenant is the token's; where nobody is asked for a token, the metadata's is believed.
        """
        remaining = context.time_remaining()
        deadline = 0.0 if remaining is None else self.clock() + remaining
        if known := auth.identity():
            return Caller(deadline, (known.tenant,))
        tenants = (value for key, value in context.invocation_metadata() or () if key == auth.TENANT_KEY)
        return Caller(deadline, tuple(v if isinstance(v, str) else v.decode("latin-1") for v in tenants))

    async def cancel(self, request_id: str) -> bool:
        """Ends a request of the caller's own tenant (of any, for an admin). False where no such one is running."""
        known = auth.identity()
        tenant = None if known is None or known.admin else known.tenant
        return (await self.link.ask(Question.CANCEL, request_id, tenant)).found

    def _see(self, status: ServiceStatus) -> None:
        if status.ready:
            self._first_ready.set()

    async def check_resume(self, request: pb.GenerateRequest) -> None:
        """Waits until a worker has said what it computes with, where the request depends on it.

        Raises ServiceError FAILED_PRECONDITION where a stream cannot go on here, UNAVAILABLE where too many wait.
        """
        if resume.asks(request):
            resume.check_served(request, await self.first_ready())

    async def first_ready(self) -> Ready:
        """The newest worker's word, as soon as there is one. Raises ServiceError UNAVAILABLE where too many wait."""
        if self.ready is None:
            if self._held >= MAX_HELD:
                raise not_ready(self._held)
            self._held += 1
            try:
                await self._first_ready.wait()
            finally:
                self._held -= 1
        assert self.ready is not None
        return self.ready

    async def _open_streams(self, prepared: Prepared, with_text: bool) -> list[IndexStream]:
        """In a thread where much is resumed: no stream waits for a stranger's past."""
        arguments = (prepared, self.model.tokenizer, self.clock(), with_text)
        if sum(len(had.token_ids) for had in prepared.resumed.values()) <= INLINE_TOKENS:
            return open_streams(*arguments)
        return await asyncio.to_thread(open_streams, *arguments)

    @asynccontextmanager
    async def call(self, prepared: Prepared, context: Context, with_text: bool = True) -> AsyncIterator[Call]:
        """Runs a request for as long as the block lasts. Raises ServiceError ALREADY_EXISTS for an id in use."""
        streams = await self._open_streams(prepared, with_text)
        if prepared.request_id in self.link:
            raise duplicate(prepared.request_id)
        call = Call.open(prepared, self.link, streams, self.clock, self.observer)
        if record := access.CURRENT.get():
            record.opened(call)
        self.calls += 1
        try:
            with self._slow_readers.watch(call):
                yield call
        except ServiceError:
            if call.refusal:
                self.gate.heed(prepared, call.refusal)
            raise
        except Exception:
            log.exception("request %s: unforeseen", prepared.request_id)
            raise internal(prepared.request_id) from None
        finally:
            self.calls -= 1
            call.close()

    async def outputs(self, call: Call, context: Context, at_once: bool = True) -> AsyncIterator[Gain | Ending]:
        """The call's outputs, its initial metadata first: `at_once` if a worker has been ready, else with the first.

        A call that is refused costs no message but that.
        """
        announced = at_once and await call.within(REFUSED_BY) and await self._announce(call.prepared, context)
        async for output in call.outputs():
            if not announced:
                announced = await self._announce(call.prepared, context)
            yield output

    async def computed(self, prepared: Prepared, context: Context) -> list[Computed]:
        """By index, of a request that samples nothing."""
        found = [Computed() for _ in prepared.submits]
        async with self.call(prepared, context, with_text=False) as call:
            async for output in self.outputs(call, context, at_once=False):
                one = found[output.index]
                match output:
                    case Gain():
                        one.prompt_logprobs += output.prompt_logprobs
                    case Ending():
                        one.pooled, one.cached_tokens = output.pooled, output.cached_tokens
        return found

    async def _announce(self, prepared: Prepared, context: Context) -> bool:
        ready = self.ready
        if ready is None:
            return False
        await context.send_initial_metadata(
            (
                ("request-id", prepared.request_id),
                ("seed", str(prepared.seed)),
                ("fingerprint", ready.fingerprint),
                ("exact", "true" if ready.exact else "false"),
            )
        )
        return True

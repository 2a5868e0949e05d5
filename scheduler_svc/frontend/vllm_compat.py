"""`vllm.grpc.engine.VllmEngine` over the same core: lets smg, llm-d and published stubs in."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import time
import zipfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Final

import grpc
from google.protobuf.message import Message
from pagewire.v1 import inference_pb2 as pb
from smg_grpc_proto.generated import common_pb2  # type: ignore[import-untyped]
from smg_grpc_proto.generated import vllm_engine_pb2 as vllm

from protos.engine_wire import FinishReason, Question
from protos.wire import Sampling
from scheduler_svc.engine.prefix_cache import root
from scheduler_svc.frontend import auth, embedding, rpc
from scheduler_svc.frontend.checks import Violations
from scheduler_svc.frontend.core import Core
from scheduler_svc.frontend.errors import Context, ServiceError, Violation, invalid, unimplemented
from scheduler_svc.frontend.kv_messages import RouterBatches
from scheduler_svc.frontend.limits import MAX_ABORTS
from scheduler_svc.frontend.model import Defaults
from scheduler_svc.frontend.streams import Ending, Gain
from scheduler_svc.frontend.validation import Computing, Names, check_computing
from scheduler_svc.frontend.vllm_messages import IndexOutput, translate

SERVICE: Final = vllm.DESCRIPTOR.services_by_name["VllmEngine"].full_name
NAMES: Final = Names(
    sampling="sampling_params", token_ids="tokenized.input_ids", text="text", prompt="input", grammar="sampling_params"
)
CHUNK_BYTES: Final = 64 << 10
MAX_CURSOR: Final = 2**63 - 1  # batches are numbered on from it


class VllmEngine:
    def __init__(self, core: Core, now: Callable[[], float] = time.time) -> None:
        self.core, self.now = core, now
        self._throughput = Throughput(core.clock)
        self._last_receive = 0.0
        self.calls = 0  # of Generate and Embed, open
        self._bundle: asyncio.Future[bytes] | None = None  # made once, by the first who asks

    def handler(self) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Generate": rpc.server_stream(vllm.GenerateRequest, self.generate),
                "Embed": rpc.unary(vllm.EmbedRequest, self.embed),
                "HealthCheck": rpc.unary(vllm.HealthCheckRequest, self.health_check),
                "FlushCache": rpc.unary(common_pb2.FlushCacheRequest, self.flush_cache),
                "StartProfile": rpc.unary(common_pb2.StartProfileRequest, self._unimplemented("StartProfile")),
                "StopProfile": rpc.unary(common_pb2.StopProfileRequest, self._unimplemented("StopProfile")),
                "Abort": rpc.unary(vllm.AbortRequest, self.abort),
                "GetModelInfo": rpc.unary(vllm.GetModelInfoRequest, self.get_model_info),
                "GetServerInfo": rpc.unary(vllm.GetServerInfoRequest, self.get_server_info),
                "GetLoads": rpc.unary(vllm.GetLoadsRequest, self.get_loads),
                "GetTokenizer": rpc.server_stream(common_pb2.GetTokenizerRequest, self.get_tokenizer),
                "SubscribeKvEvents": rpc.server_stream(common_pb2.SubscribeKvEventsRequest, self.subscribe_kv_events),
            },
        )

    async def generate(self, request: vllm.GenerateRequest, context: Context) -> None:
        """Chunks are deltas; every index ends with one GenerateComplete, also where it was aborted."""
        self._last_receive = self.now()
        caller, (translated, found) = self.core.caller(context), translate(request)
        self.core.gate.check(caller, translated.priority, translated.sampling.n or 1)
        # A router fills in the model's defaults itself (`default_sampling_params_json`): unset is vLLM's default here.
        prepared = await self.core.preparer.prepare(translated, caller, NAMES, Defaults(), found)
        outputs = [IndexOutput(i, prepared.submits[0].token_ids) for i in range(len(prepared.submits))]
        async with self._counted(), self.core.call(prepared, context, with_text=False) as call:
            try:
                # Not at once: a router that has had no metadata yet may try another replica, whatever happens here.
                async for output in self.core.outputs(call, context, at_once=False):
                    match output:
                        case Gain():
                            chunk = outputs[output.index].gain(output)
                            if request.stream:
                                await context.write(vllm.GenerateResponse(chunk=chunk).SerializeToString())
                        case Ending():
                            complete = outputs[output.index].complete(output)
                            await context.write(vllm.GenerateResponse(complete=complete).SerializeToString())
            except ServiceError as error:
                if error.code is not grpc.StatusCode.CANCELLED:
                    raise
                for unfinished in (output for output in outputs if not output.is_complete):
                    complete = unfinished.aborted()
                    await context.write(vllm.GenerateResponse(complete=complete).SerializeToString())

    async def embed(self, request: vllm.EmbedRequest, context: Context) -> vllm.EmbedResponse:
        """One input, as vLLM has it by default: the model's own pooling, to length 1."""
        self._last_receive = self.now()
        core, caller = self.core, self.core.caller(context)
        core.gate.check(caller, 0, 1)
        form = embedding.VectorForm(await embedding.hidden_size(core))
        ours = pb.EmbedRequest(request_id=request.request_id)
        prompt = pb.EmbedInput(token_ids=pb.TokenIds(ids=request.tokenized.input_ids))
        violations = Violations()
        check_computing(ours, caller, violations)
        token_ids = await core.preparer.prompt(prompt, violations, NAMES, spare=0)
        violations.check()
        computing, pooling = Computing(token_ids, Sampling(max_tokens=0)), embedding.default_pooling(core)
        prepared = core.preparer.computing(ours, [computing], caller, "", pooling)
        async with self._counted():
            (one,) = await core.computed(prepared, context)
        values = form.vector(one.pooled)
        return vllm.EmbedResponse(embedding=values, prompt_tokens=len(token_ids), embedding_dim=len(values))

    @asynccontextmanager
    async def _counted(self) -> AsyncIterator[None]:
        self.calls += 1
        try:
            yield
        finally:
            self.calls -= 1

    async def abort(self, request: vllm.AbortRequest, context: Context) -> vllm.AbortResponse:
        if (count := len(request.request_ids)) > MAX_ABORTS:
            raise invalid([Violation("request_ids", f"has {count} ids; at most {MAX_ABORTS}")])
        for request_id in request.request_ids:
            if auth.identity():  # then only its own tenant's
                await self.core.cancel(request_id)
            else:
                self.core.link.abort(request_id, FinishReason.ABORTED, everywhere=True)
        return vllm.AbortResponse()

    async def health_check(self, request: vllm.HealthCheckRequest, context: Context) -> vllm.HealthCheckResponse:
        status = self.core.link.status
        if status is None:
            return vllm.HealthCheckResponse(healthy=False, message="starting")
        healthy = status.serving and not status.stats.draining
        return vllm.HealthCheckResponse(healthy=healthy, message="" if healthy else status.reason or "draining")

    async def flush_cache(
        self, request: common_pb2.FlushCacheRequest, context: Context
    ) -> common_pb2.FlushCacheResponse:
        """Running requests keep their blocks, so there is nothing to wait for."""
        answer = await self.core.link.ask(Question.FLUSH_CACHE)
        return common_pb2.FlushCacheResponse(success=True, message=f"{answer.freed_blocks} blocks freed")

    async def get_model_info(self, request: vllm.GetModelInfoRequest, context: Context) -> vllm.GetModelInfoResponse:
        core, card = self.core, self.core.model.card
        return vllm.GetModelInfoResponse(
            model_path=card.path,
            is_generation=True,
            max_context_length=core.max_model_len(),
            vocab_size=card.vocab_size,
            served_model_name=core.name,
            tokenizer_path=card.path,
            model_type=card.model_type,
            architectures=[card.architecture] if card.architecture else [],
            eos_token_ids=card.eos_token_ids,
            pad_token_id=card.pad_token_id or 0,
            bos_token_id=card.bos_token_id or 0,
            max_req_input_len=core.max_model_len() - 1,
            default_sampling_params_json=json.dumps(card.defaults.given()),
        )

    async def get_server_info(self, request: vllm.GetServerInfoRequest, context: Context) -> vllm.GetServerInfoResponse:
        core = self.core
        return vllm.GetServerInfoResponse(
            active_requests=core.calls,
            last_receive_timestamp=self._last_receive,
            uptime_seconds=core.clock() - core.started,
            server_type="vllm-grpc",
            data_parallel_size=1,
            kv_cache_dtype="auto",  # vLLM's word for: as the model's
            block_size=core.config.block_size,
            model_dtype=core.ready.dtype if core.ready else "",
            max_num_seqs=core.config.max_num_seqs,
        )

    async def get_loads(self, request: vllm.GetLoadsRequest, context: Context) -> vllm.GetLoadsResponse:
        """Asked of the engine at this moment: routers avoid a worker by these numbers."""
        stats = (await self.core.link.ask(Question.STATS)).status.stats
        used, block_size = stats.owned_blocks + stats.fenced_blocks, self.core.config.block_size
        usage = used / stats.num_blocks if stats.num_blocks else 0.0
        window = self.core.config.max_num_seqs or stats.num_slots
        load = vllm.SchedulerLoad(
            num_running_reqs=stats.running,
            num_waiting_reqs=stats.waiting,
            num_total_reqs=stats.running + stats.waiting,
            num_used_tokens=used * block_size,
            max_total_num_tokens=stats.num_blocks * block_size,
            token_usage=usage,
            gen_throughput=self._throughput.rate(stats.generated_tokens),
            cache_hit_rate=stats.cached_tokens / stats.prompt_tokens if stats.prompt_tokens else 0.0,
            utilization=stats.running / window if window else 0.0,
            max_running_requests=window,
            num_waiting_uncached_tokens=stats.waiting_tokens,
        )
        return vllm.GetLoadsResponse(
            timestamp=datetime.fromtimestamp(self.now(), UTC).isoformat(),
            version=f"pagewire {version('pagewire')}",
            dp_rank_count=1,
            loads=[load] if not request.HasField("dp_rank") or request.dp_rank == 0 else [],
        )

    async def get_tokenizer(self, request: common_pb2.GetTokenizerRequest, context: Context) -> None:
        """A zip of the tokenizer's files in chunks; the last carries the SHA-256 of the whole."""
        if self._bundle is None:
            self._bundle = asyncio.ensure_future(asyncio.to_thread(_bundle, self.core.model.tokenizer.files))
        data = await asyncio.shield(self._bundle)
        chunks = [data[i : i + CHUNK_BYTES] for i in range(0, len(data), CHUNK_BYTES)]
        for chunk in chunks[:-1]:
            await context.write(common_pb2.GetTokenizerChunk(data=chunk).SerializeToString())
        digest = hashlib.sha256(data).hexdigest()
        await context.write(common_pb2.GetTokenizerChunk(data=chunks[-1], sha256=digest).SerializeToString())

    async def subscribe_kv_events(self, request: common_pb2.SubscribeKvEventsRequest, context: Context) -> None:
        """What the caller's own tenant may hit without a salt: that is where its next prompt may be sent by."""
        if (cursor := request.start_sequence_number) > MAX_CURSOR:
            raise invalid([Violation("start_sequence_number", f"is {cursor}; at most {MAX_CURSOR}")])
        batches = RouterBatches(cursor)
        with self.core.kv_watchers.watch(root(self.core.caller(context).tenant, "", "")) as watch:
            async for part in watch.parts():
                await context.write(batches.batch(part, self.now()).SerializeToString())

    @staticmethod
    def _unimplemented(what: str) -> Callable[[Message, Context], Awaitable[Message]]:
        async def method(request: Message, context: Context) -> Message:
            raise unimplemented(f"{what} is not served: this service generates text")

        return method


def _bundle(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in sorted(files.items()):
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)  # no clock in it: same bytes always
    return buffer.getvalue()


class Throughput:
    """Tokens a second between two readings that lie at least a second apart."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._at, self._tokens, self._rate = clock(), 0, 0.0

    def rate(self, tokens: int) -> float:
        now = self._clock()
        if now - self._at >= 1.0:
            self._rate = (tokens - self._tokens) / (now - self._at)
            self._at, self._tokens = now, tokens
        return self._rate

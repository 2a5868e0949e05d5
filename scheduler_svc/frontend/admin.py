"""`pagewire.v1.AdminService`: what operators ask, and what they may do."""

from __future__ import annotations

import asyncio
from importlib.metadata import version
from pathlib import Path
from typing import Final

import grpc
from pagewire.v1 import admin_pb2

from protos import adapter_files
from protos.engine_wire import Adapter, Histogram, Question, ServiceStatus, TenantFigures, WorkerFigures, WorkerStatus
from scheduler_svc.frontend import rpc
from scheduler_svc.frontend.checks import Violations
from scheduler_svc.frontend.core import Core
from scheduler_svc.frontend.errors import Context, Violation, failed_precondition, invalid, unknown_adapter
from scheduler_svc.frontend.kv_messages import kv_message

ADMIN: Final = admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name

WORKER_STATES: Final = {
    "starting": admin_pb2.WORKER_STATE_STARTING,
    "loading": admin_pb2.WORKER_STATE_LOADING,
    "serving": admin_pb2.WORKER_STATE_SERVING,
    "lost": admin_pb2.WORKER_STATE_LOST,
}


class AdminService:
    def __init__(self, core: Core) -> None:
        self.core = core

    def handler(self) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler(
            ADMIN,
            {
                "GetStats": rpc.unary(admin_pb2.GetStatsRequest, self.get_stats),
                "GetConfig": rpc.unary(admin_pb2.GetConfigRequest, self.get_config),
                "Drain": rpc.unary(admin_pb2.DrainRequest, self.drain),
                "FlushCache": rpc.unary(admin_pb2.FlushCacheRequest, self.flush_cache),
                "LoadAdapter": rpc.unary(admin_pb2.LoadAdapterRequest, self.load_adapter),
                "UnloadAdapter": rpc.unary(admin_pb2.UnloadAdapterRequest, self.unload_adapter),
                "ListAdapters": rpc.unary(admin_pb2.ListAdaptersRequest, self.list_adapters),
                "WatchKvEvents": rpc.server_stream(admin_pb2.WatchKvEventsRequest, self.watch_kv_events),
            },
        )

    async def get_stats(self, request: admin_pb2.GetStatsRequest, context: Context) -> admin_pb2.GetStatsResponse:
        status = (await self.core.link.ask(Question.STATS)).status
        return stats_message(status, self.core.clock() - self.core.started)

    async def get_config(self, request: admin_pb2.GetConfigRequest, context: Context) -> admin_pb2.GetConfigResponse:
        settings = [admin_pb2.Setting(name=name, value=value) for name, value in self.core.config.settings]
        if ready := self.core.ready:
            names = [name for name in ready.__struct_fields__ if name not in ("epoch", "rank")]
            settings += [admin_pb2.Setting(name=f"worker.{name}", value=str(getattr(ready, name))) for name in names]
        return admin_pb2.GetConfigResponse(settings=settings, version=version("pagewire"))

    async def drain(self, request: admin_pb2.DrainRequest, context: Context) -> admin_pb2.DrainResponse:
        await self.core.link.ask(Question.DRAIN)
        return admin_pb2.DrainResponse()

    async def flush_cache(self, request: admin_pb2.FlushCacheRequest, context: Context) -> admin_pb2.FlushCacheResponse:
        answer = await self.core.link.ask(Question.FLUSH_CACHE)
        return admin_pb2.FlushCacheResponse(freed_blocks=answer.freed_blocks)

    async def load_adapter(
        self, request: admin_pb2.LoadAdapterRequest, context: Context
    ) -> admin_pb2.LoadAdapterResponse:
        violations, path = Violations(), Path(request.path)
        if problem := adapter_files.check_name(request.name):
            violations.add("name", problem)
        if not path.is_absolute():
            violations.add("path", f"is {request.path!r}; must be absolute, for it is the service's")
        violations.check()
        try:
            digest = await asyncio.to_thread(adapter_files.digest, path)
        except adapter_files.AdapterFilesError as error:
            raise invalid([Violation("path", str(error))]) from None
        answer = await self.core.link.ask(Question.LOAD_ADAPTER, adapter=Adapter(request.name, str(path), digest))
        if answer.trouble:
            raise failed_precondition(answer.trouble)
        loaded = next((one for one in answer.status.adapters if one.name == request.name), Adapter(request.name))
        return admin_pb2.LoadAdapterResponse(adapter=_adapter(loaded))

    async def unload_adapter(
        self, request: admin_pb2.UnloadAdapterRequest, context: Context
    ) -> admin_pb2.UnloadAdapterResponse:
        answer = await self.core.link.ask(Question.UNLOAD_ADAPTER, adapter=Adapter(request.name))
        if not answer.found:
            status = answer.status
            raise unknown_adapter(request.name, [one.name for one in status.adapters], status.max_adapters)
        if answer.trouble:
            raise failed_precondition(answer.trouble)
        return admin_pb2.UnloadAdapterResponse()

    async def list_adapters(
        self, request: admin_pb2.ListAdaptersRequest, context: Context
    ) -> admin_pb2.ListAdaptersResponse:
        answer = await self.core.link.ask(Question.LIST_ADAPTERS)
        adapters = [_adapter(one) for one in answer.adapters]
        return admin_pb2.ListAdaptersResponse(adapters=adapters, max_adapters=answer.status.max_adapters)

    async def watch_kv_events(self, request: admin_pb2.WatchKvEventsRequest, context: Context) -> None:
        with self.core.kv_watchers.watch() as watch:
            async for part in watch.parts():
                await context.write(kv_message(part, request.token_ids).SerializeToString())


def stats_message(status: ServiceStatus, uptime: float) -> admin_pb2.GetStatsResponse:
    stats, frontends = status.stats, status.frontends
    return admin_pb2.GetStatsResponse(
        running=stats.running,
        waiting=stats.waiting,
        waiting_tokens=stats.waiting_tokens,
        total_blocks=stats.num_blocks,
        free_blocks=stats.free_blocks,
        cached_blocks=stats.cached_blocks,
        owned_blocks=stats.owned_blocks,
        fenced_blocks=stats.fenced_blocks,
        free_slots=stats.free_slots,
        total_slots=stats.num_slots,
        steps=stats.steps,
        preemptions=stats.preemptions,
        recoveries=stats.recoveries,
        prompt_tokens=stats.prompt_tokens,
        cached_tokens=stats.cached_tokens,
        generated_tokens=stats.generated_tokens,
        finished=stats.finished,
        aborted=stats.aborted,
        rejected=stats.rejected,
        open_calls=frontends.open_calls,
        draining=stats.draining,
        workers=_workers(status),
        uptime_seconds=uptime,
        tenants=[_tenant(tenant) for tenant in stats.tenants],
        losses=[admin_pb2.WorkerLoss(seconds_ago=loss.ago, pid=loss.pid, reason=loss.reason) for loss in status.losses],
        first_token=_histogram(frontends.first_token),
        between_tokens=_histogram(frontends.between_tokens),
        stream=_histogram(frontends.whole),
        queue_wait=_histogram(stats.queue_wait),
        step=_histogram(stats.step_seconds),
        serving=status.serving,
        reason=status.reason,
        host_cached_tokens=stats.host_cached_tokens,
        total_host_blocks=stats.num_host_blocks,
        cached_host_blocks=stats.cached_host_blocks,
        blocks_copied_to_host=stats.copied_to_host,
        blocks_copied_to_device=stats.copied_to_device,
        draft_tokens=stats.draft_tokens,
        accepted_draft_tokens=sum(stats.accepted_at),
    )


def _adapter(adapter: Adapter) -> admin_pb2.Adapter:
    return admin_pb2.Adapter(
        name=adapter.name, path=adapter.path, digest=adapter.digest, rank=adapter.rank, users=adapter.users
    )


def _workers(status: ServiceStatus) -> list[admin_pb2.WorkerStats]:
    """Figures may be fewer than workers: the engine of a test tells none."""
    figures = [*status.figures, *[WorkerFigures()] * (len(status.workers) - len(status.figures))]
    return [_worker(worker, own) for worker, own in zip(status.workers, figures, strict=True)]


def _worker(worker: WorkerStatus, figures: WorkerFigures) -> admin_pb2.WorkerStats:
    return admin_pb2.WorkerStats(
        state=WORKER_STATES[worker.state],
        pid=worker.pid,
        device=worker.device,
        detail=worker.detail,
        progress=worker.progress,
        state_seconds=figures.state_seconds,
        steps=figures.steps,
        busy_seconds=figures.busy_seconds,
        steps_in_flight=figures.in_flight,
        losses=figures.losses,
    )


def _tenant(tenant: TenantFigures) -> admin_pb2.TenantStats:
    return admin_pb2.TenantStats(
        name=tenant.name,
        running=tenant.running,
        waiting=tenant.waiting,
        requests=tenant.requests,
        refused=tenant.refused,
        prompt_tokens=tenant.prompt_tokens,
        output_tokens=tenant.output_tokens,
    )


def _histogram(histogram: Histogram) -> admin_pb2.Histogram:
    return admin_pb2.Histogram(bounds=histogram.bounds, counts=histogram.counts, sum=histogram.total)

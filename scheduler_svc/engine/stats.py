"""The engine's books as one message, for whoever asks."""

from __future__ import annotations

from collections.abc import Sequence

from protos.engine_wire import EngineStats
from scheduler_svc.engine.device import Device
from scheduler_svc.engine.roster import Roster


def summary(roster: Roster, devices: Sequence[Device], draining: bool) -> EngineStats:
    counters, measures = roster.counters, roster.measures
    pools = [device.kv.pool for device in devices]
    num_blocks = sum(pool.num_blocks - 1 for pool in pools)
    fenced = sum(device.fenced_blocks() for device in devices)
    return EngineStats(
        running=len(roster.running),
        waiting=roster.num_queued,
        waiting_tokens=roster.queued_tokens,
        num_blocks=num_blocks,
        free_blocks=sum(len(pool.blank) for pool in pools),
        cached_blocks=sum(len(pool.cached) for pool in pools),
        owned_blocks=num_blocks - sum(pool.available for pool in pools) - fenced,
        fenced_blocks=fenced,
        num_slots=sum(device.num_slots for device in devices),
        free_slots=sum(len(device.free_slots) for device in devices),
        steps=counters.steps,
        preemptions=counters.preemptions,
        recoveries=counters.recoveries,
        prompt_tokens=counters.prompt_tokens,
        cached_tokens=counters.cached_tokens,
        generated_tokens=roster.ledger.output_tokens,
        finished=counters.finished,
        aborted=counters.aborted,
        rejected=counters.rejected,
        draining=draining,
        queue_wait=measures.queue_wait.freeze(),
        step_seconds=measures.step_seconds.freeze(),
        step_rows=measures.step_rows.freeze(),
        step_tokens=measures.step_tokens.freeze(),
        refused=tuple(measures.refused.items()),
        tenants=roster.ledger.figures(),
        host_cached_tokens=counters.host_cached_tokens,
        num_host_blocks=sum(pool.host.num_blocks for pool in pools),
        cached_host_blocks=sum(len(pool.host.by_hash) for pool in pools),
        copied_to_host=counters.copied_to_host,
        copied_to_device=counters.copied_to_device,
        draft_rows=counters.draft_rows,
        draft_tokens=counters.draft_tokens,
        accepted_at=tuple(counters.accepted_at),
    )

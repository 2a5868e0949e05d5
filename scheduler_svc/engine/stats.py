"""The engine's books as one message, for whoever asks."""

from __future__ import annotations

from protos.engine_wire import EngineStats
from scheduler_svc.engine.device import Device
from scheduler_svc.engine.roster import Roster


def summary(roster: Roster, device: Device | None, draining: bool) -> EngineStats:
    counters, measures = roster.counters, roster.measures
    pool = device.kv.pool if device else None
    fenced = device.fenced_blocks() if device else 0
    return EngineStats(
        running=len(roster.running),
        waiting=roster.num_queued,
        waiting_tokens=roster.queued_tokens,
        num_blocks=pool.num_blocks - 1 if pool else 0,
        free_blocks=len(pool.blank) if pool else 0,
        cached_blocks=len(pool.cached) if pool else 0,
        owned_blocks=pool.num_blocks - 1 - pool.available - fenced if pool else 0,
        fenced_blocks=fenced,
        num_slots=device.num_slots if device else 0,
        free_slots=len(device.free_slots) if device else 0,
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
    )

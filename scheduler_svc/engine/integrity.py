"""Recounts every block, slot and sequence from its owners, and compares with the books."""

from __future__ import annotations

from collections.abc import Iterable
from math import isclose

from scheduler_svc.engine.device import Device
from scheduler_svc.engine.roster import Roster
from scheduler_svc.engine.sequence import Sequence, State


class IntegrityError(Exception):
    """The books of the engine disagree with each other: a defect of the engine, never of a request."""


def check(roster: Roster, devices: Iterable[Device]) -> None:
    _check_roster(roster)
    somewhere: list[Sequence] = []
    for device in devices:
        somewhere += device.running
        _demand(all(s.device is device for s in device.running), f"group {device.group} runs what is another's")
        _check_slots(device)
        _check_blocks(device)
        _check_host(device)
    _demand(sorted(somewhere, key=lambda s: s.key) == roster.running, "who runs does not run in one group each")


def _check_roster(roster: Roster) -> None:
    live = list(roster)
    by_state = {state: [s for s in live if s.state is state] for state in State}
    _demand(len(live) == roster.num_live, f"{len(live)} sequences are live, {roster.num_live} counted")
    _demand(sorted(by_state[State.RUNNING], key=lambda s: s.key) == roster.running, "running is not who runs, in order")
    _demand(len(by_state[State.WAITING]) == len(roster.waiting), "the queue is not who waits")
    _demand(not by_state[State.FINISHED], "a finished sequence is live")
    queued = sum(s.queued_tokens for s in live if s.state is not State.RUNNING)
    _demand(queued == roster.queued_tokens, f"{queued} tokens are queued, {roster.queued_tokens} counted")
    likely = sum(s.likely_tokens for s in live if s.state is not State.RUNNING)
    _demand(isclose(likely, roster.queued_output, abs_tol=1e-3), f"{likely} come, {roster.queued_output} counted")
    _check_tenants(roster, live)
    hoping = {s.arrival for s in live if s.look_at}
    _demand({s.arrival for s in roster.doubtful.values()} == hoping, "who has to start in time is not in the books")
    for s in live:
        _demand(s.settled == len(s.token_ids), f"{s.request_id}: settled is {s.settled} of {len(s.token_ids)} tokens")
        has_device = s.state in (State.RUNNING, State.HOLDING, State.LEAVING)
        _demand((s.device is not None) == has_device, f"{s.request_id}: {s.state.name} with device {s.device}")
        _demand(s.computed <= s.settled, f"{s.request_id}: {s.computed} computed of {s.settled} settled")


def _check_tenants(roster: Roster, live: list[Sequence]) -> None:
    tenants = {s.submit.tenant for s in live}
    _demand(roster.ledger.num_live == len(tenants), f"{roster.ledger.num_live} tenants counted, {len(tenants)} live")
    for account in roster.ledger:
        own = [s for s in live if s.account is account]
        _demand(account.live == len(own), f"tenant {account.name!r}: {account.live} counted, {len(own)} live")
        running = sum(s.state is State.RUNNING for s in own)
        _demand(account.running == running, f"tenant {account.name!r}: {account.running} counted, {running} run")
        queued = [s for s in own if s.state is not State.RUNNING]
        counted = sum(work.sequences for work in account.backlog.values())
        _demand(counted == len(queued), f"tenant {account.name!r}: {counted} counted, {len(queued)} queued")
        tokens = sum(work.prompt_tokens for work in account.backlog.values())
        _demand(tokens == sum(s.queued_tokens for s in queued), f"tenant {account.name!r}: {tokens} tokens counted")
        waiting = {s.submit.priority for s in own if s.state is State.WAITING}
        _demand(set(account.lines) == waiting, f"tenant {account.name!r}: lines are not what waits")


def _check_slots(device: Device) -> None:
    fenced = [slot for flight in device.sent for slot, _ in flight.fenced]
    slots = device.free_slots + fenced + [s.slot for s in device.running]
    _demand(sorted(slots) == list(range(1, device.num_slots + 1)), "slots are lost or owned twice")


def _check_blocks(device: Device) -> None:
    pool = device.kv.pool
    refs = [0] * pool.num_blocks
    tables = [s.block_ids for s in device.running] + [blocks for f in device.sent for _, blocks in f.fenced]
    for table in tables:
        for block in table:
            refs[block] += 1
    _demand(refs == pool.refs, "refcounts differ from the tables' references")
    unused = sorted([*pool.blank, *pool.cached])
    _demand(unused == [b for b in range(1, pool.num_blocks) if not refs[b]], "free blocks are lost or owned twice")
    _demand(all(pool.hashes[b] for b in pool.cached), "a cached block has no digest")
    _demand(not any(pool.hashes[b] for b in pool.blank), "a blank block can be hit")
    published = {digest: block for block, digest in enumerate(pool.hashes) if digest}
    _demand(published == pool.by_hash, "the digests of blocks differ from the index")
    journal = pool.journal.blocks
    _demand(all(digest in journal for digest in pool.digests()), "the journal lacks a published block")


def _check_host(device: Device) -> None:
    host = device.kv.host
    _demand(not host.copies, "copies that no plan has taken")
    fences = [0] * host.num_blocks
    for flight in device.sent:
        for _, _, host_block in flight.plan.copies:
            fences[host_block] += 1
    _demand(fences == host.fences, "fences of host blocks differ from the copies in flight")
    held = {digest: block for block, digest in enumerate(host.hashes) if digest}
    _demand(held == host.by_hash, "the digests of host blocks differ from the index")
    forgotten = [b for b in range(host.num_blocks) if fences[b] and not host.hashes[b]]
    everywhere = sorted([*host.free, *held.values(), *forgotten])
    _demand(everywhere == list(range(host.num_blocks)), "host blocks are lost or held twice")


def _demand(holds: bool, complaint: str) -> None:
    if not holds:
        raise IntegrityError(complaint)

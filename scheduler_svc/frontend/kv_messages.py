"""Parts of a watch → messages: ours, and those that a router takes for a vLLM's."""

from __future__ import annotations

from array import array
from itertools import count
from typing import Final

from pagewire.v1 import admin_pb2
from smg_grpc_proto.generated import common_pb2  # type: ignore[import-untyped]

from protos.engine_wire import KvBlock
from scheduler_svc.frontend.kv_events import Part

HASH_BYTES: Final = 8


def kv_message(part: Part, with_token_ids: bool) -> admin_pb2.WatchKvEventsResponse:
    message = admin_pb2.WatchKvEventsResponse(sequence=part.number, reset=part.reset, beginning_left=part.left)
    for change in part.changes:
        if isinstance(change, bytes):
            message.events.add(removed=change)
            continue
        stored = message.events.add().stored
        stored.block_hash, stored.parent_hash, stored.root = change.digest, change.parent, change.root
        if with_token_ids:
            stored.token_ids.extend(token_ids(change))
    return message


class RouterBatches:
    """One router's stream, numbered without a gap.

    A router knows a prefix by its tokens; hashes are only names to it, so eight bytes of ours will do. It goes on from
    the number that it has seen last, also when it comes back: nothing is kept for it, so it gets a new beginning, which
    it takes for a snapshot that sets its cursor.
    """

    def __init__(self, after: int) -> None:
        self._numbers = count(after + 1)
        self._event_ids = count(1)

    def batch(self, part: Part, now: float) -> common_pb2.KvEventBatch:
        batch = common_pb2.KvEventBatch(sequence_number=next(self._numbers), timestamp=now)
        if part.of:
            batch.snapshot.index, batch.snapshot.count = part.of - 1 - part.left, part.of
            batch.snapshot.blocks = part.blocks
        if part.reset:
            batch.events.add().cleared.SetInParent()
        for change in part.changes:
            if isinstance(change, bytes):
                _remove(batch, change)
            else:
                _store(batch, change)
        if not part.of:  # events of a snapshot have no id of their own
            for event in batch.events:
                event.event_id = next(self._event_ids)
        return batch


def _store(batch: common_pb2.KvEventBatch, block: KvBlock) -> None:
    """In one event with the block before it, or in a new one that names it."""
    ids, parent = token_ids(block), name(block.parent)
    new = common_pb2.KvBlock(block_hash=name(block.digest), token_ids=ids, block_size=len(ids))
    last = batch.events[-1].stored if batch.events and batch.events[-1].HasField("stored") else None
    if last is not None and last.blocks[-1].block_hash == parent:
        last.blocks.append(new)
        return
    stored = batch.events.add().stored
    stored.blocks.append(new)
    if block.parent != block.root:
        stored.parent_block_hash = parent


def _remove(batch: common_pb2.KvEventBatch, digest: bytes) -> None:
    if not (batch.events and batch.events[-1].HasField("removed")):
        batch.events.add().removed.SetInParent()
    batch.events[-1].removed.block_hashes.append(name(digest))


def name(digest: bytes) -> int:
    """A digest as the signed number that stands for it in a router."""
    return int.from_bytes(digest[:HASH_BYTES], "little", signed=True)


def token_ids(block: KvBlock) -> array[int]:
    ids = array("I")
    ids.frombytes(block.token_ids)
    return ids

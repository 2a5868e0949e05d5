"""What a watcher knows of the published blocks, by what it was told alone."""

from __future__ import annotations

from array import array

from protos.engine_wire import KvBlock, KvEvents
from scheduler_svc.engine.prefix_cache import chain


class Mirror:
    """Checks every message against the ones before it."""

    def __init__(self, watcher: int) -> None:
        self.watcher = watcher
        self.blocks: dict[bytes, KvBlock] = {}
        self.number = 0
        self.begun = False
        self.messages: list[KvEvents] = []

    def take(self, message: KvEvents) -> None:
        if message.watcher not in (0, self.watcher) or not (self.begun or message.watcher):
            return
        self.messages.append(message)
        if message.watcher:
            assert message.reset
            self.begun = True
        else:
            assert message.changes or message.reset, "a message that says nothing"
            assert message.number == self.number + len(message.changes) + message.reset
        self.number = message.number
        if message.reset:
            self.blocks.clear()
        for change in message.changes:
            if isinstance(change, bytes):
                del self.blocks[change]
            else:
                self._store(change)

    def _store(self, block: KvBlock) -> None:
        assert block.digest not in self.blocks, "stored twice"
        ids = array("I")
        ids.frombytes(block.token_ids)
        assert block.digest == chain(block.parent, ids)
        self.blocks[block.digest] = block

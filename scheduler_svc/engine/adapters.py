"""Which adapters requests may name, and when one that they may name no more is free (R4).

loaded ──AdapterClosed──► closed ── nobody uses it, nor does a plan in flight ──► AdapterFree
"""

from __future__ import annotations

from collections.abc import Iterable

from protos.engine_wire import FinishReason, Submit
from scheduler_svc.engine.device import Device
from scheduler_svc.engine.door import Refusal
from scheduler_svc.engine.events import AdapterFree
from scheduler_svc.engine.roster import Roster


class Adapters:
    def __init__(self) -> None:
        self.digests: dict[str, str] = {}  # by name, of those that may be named
        self._closed: dict[str, None] = {}  # in order

    def open(self, name: str, digest: str) -> None:
        self.digests[name] = digest

    def close(self, name: str) -> None:
        if self.digests.pop(name, None) is not None:
            self._closed[name] = None

    def refusal(self, submit: Submit) -> Refusal | None:
        """By digest as well: a frontend may not have heard yet that the name is another's now."""
        digest = self.digests.get(submit.adapter, "")
        if digest == submit.adapter_digest:
            return None
        if digest:
            detail = f"adapter {submit.adapter!r} has been loaded from other files a moment ago"
        else:
            detail = f"adapter {submit.adapter!r} is not loaded; loaded are: {', '.join(self.digests) or 'none'}"
        return Refusal(FinishReason.NOT_FOUND, detail)

    def take_free(self, roster: Roster, devices: Iterable[Device]) -> list[AdapterFree]:
        """Those that were closed and are named by nobody any more: each once."""
        if not self._closed:
            return []
        flying = {
            sequence.submit.adapter for device in devices for flight in device.sent for sequence in flight.sequences
        }
        free = [name for name in self._closed if name not in roster.adapter_users and name not in flying]
        for name in free:
            del self._closed[name]
        return [AdapterFree(name) for name in free]

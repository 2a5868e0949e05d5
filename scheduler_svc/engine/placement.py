"""Which of several worker groups a waiting sequence goes to: where its prefix is, unless waiting there costs more."""

from __future__ import annotations

from collections.abc import Mapping

from scheduler_svc.engine.config import EngineConfig
from scheduler_svc.engine.device import Device
from scheduler_svc.engine.sequence import Sequence

SEQUENCE_COST = 64  # tokens of a prompt: what a sequence costs that decodes beside another, from its first to its last


class Placement:
    """`devices` are those that live, by group."""

    def __init__(self, config: EngineConfig, devices: Mapping[int, Device]) -> None:
        self._config, self._devices = config, devices

    @property
    def has_choice(self) -> bool:
        return len(self._devices) > 1

    @property
    def is_fenced(self) -> bool:
        """Whether slots or blocks anywhere are about to come back."""
        return any(flight.fenced for device in self._devices.values() for flight in device.sent)

    def best(self, sequence: Sequence, asking: Device | None = None) -> Device | None:
        """Where the least stands between it and its first token, of those with a slot and blocks for it.

        All in tokens that have to be computed: its own that are not in the cache there, those of the prompts before
        it, and SEQUENCE_COST for each that runs. So a prefix draws others to it until the queue before it has become
        longer than the prefix; then it is computed a second time, somewhere else. Who is `asking` could begin now: to
        wait for another's next plan has to be worth SEQUENCE_COST.
        """
        best: Device | None = None
        least = 0
        for device in self._devices.values():
            cost = self._cost(device, sequence)
            if cost is None:
                continue
            if device is asking:
                cost -= SEQUENCE_COST
            if best is None or (cost, device.group) < (least, best.group):
                best, least = device, cost
        return best

    def _cost(self, device: Device, sequence: Sequence) -> int | None:
        """None where there is no room."""
        running = len(device.running)
        if not device.free_slots or running >= self._config.max_num_seqs:
            return None
        cached = device.kv.outlook(sequence, reserve=running)
        if cached is None:
            return None
        before = sum(other.settled - other.computed for other in device.running)
        return before + SEQUENCE_COST * (running + device.kv.cache.num_expected) + sequence.settled - cached

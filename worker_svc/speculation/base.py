"""Who proposes drafts: what a backend asks of it behind a step's sampling. numpy only.

Whatever a proposer says, or forgets, costs or saves time and never changes a stream (R2). So it may keep what no Admit
brings back, and needs no more care than a cache does.
"""

from __future__ import annotations

from typing import Final, Protocol

import numpy as np

from protos.wire import Setup, StepPlan
from worker_svc.inputs import Ints, StepInputs
from worker_svc.slots import SlotTable

PROPOSERS: Final = ("ngram", "suffix", "draft")  # of the cpu and torch backends; the cpu backend has eagle3, too


class Proposer(Protocol):
    def propose(self, inputs: StepInputs, slots: SlotTable, most: Ints) -> None:
        """Behind a step's sampling: puts at most most[i] drafts behind the tokens of slot inputs.slots[i].

        Of one that is in a prompt still, or wants none, most[i] is 0.
        """

    def release(self, slots: SlotTable, slot: int) -> None:
        """The slot's sequence leaves; the table still knows it."""

    def reset(self) -> None:
        """A new epoch: no slot is what it was."""

    def close(self) -> None: ...


def host_proposer(setup: Setup) -> Proposer | None:
    """The one that `setup` names, where it needs no model of its own; None for one that does, or none."""
    if setup.speculation == "ngram":
        from worker_svc.speculation.ngram import NgramProposer

        return NgramProposer()
    if setup.speculation == "suffix":
        from worker_svc.speculation.suffix import SuffixProposer

        return SuffixProposer()
    return None


def release(proposer: Proposer, plan: StepPlan, slots: SlotTable) -> None:
    """Before a plan is applied."""
    for slot in plan.release:
        slots.held(slot)
        proposer.release(slots, slot)


def propose(proposer: Proposer, plan: StepPlan, inputs: StepInputs, slots: SlotTable) -> None:
    """Behind a step's sampling. Nobody is drafted for beyond its last token but one: what follows comes by itself."""
    ids, most = inputs.slots, np.zeros(len(inputs.slots), np.int64)
    if plan.num_propose:
        wanting = np.array([row.sample and not row.masked for row in plan.rows], np.bool_)
        room = slots.limits[ids] - slots.lengths[ids] - 1
        most = np.where(wanting, np.clip(room, 0, plan.num_propose), 0)
    proposer.propose(inputs, slots, most)

"""What the engine is told and what it answers: the whole of its border. All of it can be recorded and replayed."""

from __future__ import annotations

import msgspec

from protos.engine_wire import Abort, FinishReason, FrontendLost, KvEvents, Outputs, Shed, Submit, WatchKv
from protos.wire import Epoch, StepPlan, StepResult


class Happening(msgspec.Struct, frozen=True, tag=True, array_like=True, gc=False):
    """Something the loop saw."""


class WorkerReady(Happening, frozen=True):
    """A worker group with empty KV can take plans."""

    epoch: Epoch
    num_blocks: int  # null block included
    max_slots: int
    align: int = 1
    groups: int = 1  # KV groups
    max_model_len: int = 0
    group: int = 0  # which of the worker groups behind this scheduler
    num_host_blocks: int = 0  # of the second tier
    step_seconds: tuple[tuple[int, float], ...] = ()  # see Ready
    propose_seconds: tuple[tuple[int, float], ...] = ()


class WorkerLost(Happening, frozen=True):
    """The epoch is over: whatever was in flight is lost, and its requests are suspects (R5) unless `blameless`."""

    epoch: Epoch
    reason: str
    blameless: bool = False  # a stop that was asked for; the loop asks for none yet


class Tick(Happening, frozen=True):
    """The clock, brought to the engine: seconds, monotonic."""

    now: float


class FlushCache(Happening, frozen=True):
    """Forget every cached block that no sequence uses."""


class AdapterLoaded(Happening, frozen=True):
    """Every worker that can take plans has it: requests may name it."""

    name: str
    digest: str  # of its files


class AdapterClosed(Happening, frozen=True):
    """Requests may name it no more. `reason`: why those that do end now; empty: they finish first."""

    name: str
    reason: str = ""


class Drain(Happening, frozen=True):
    """Take no new requests; finish what was accepted."""


class Verdict(Happening, frozen=True):
    """What a stream's grammar says behind all its settled tokens. The first one says that it is compiled."""

    request_id: str
    index: int
    token_ids: list[int] = []  # nothing else may follow: known without being sampled
    ends: FinishReason | None = None  # and behind them the stream has ended, for this reason
    detail: str = ""


class Matched(Happening, frozen=True):
    """The grammars have taken in what a step with masked rows brought. Nothing is planned between the two."""

    epoch: Epoch
    step: int
    verdicts: list[Verdict]


Event = (
    Submit
    | Shed
    | Abort
    | FrontendLost
    | StepResult
    | Verdict
    | Matched
    | WorkerReady
    | WorkerLost
    | Tick
    | FlushCache
    | Drain
    | WatchKv
    | AdapterLoaded
    | AdapterClosed
)


class EndEpoch(Happening, frozen=True):
    """The engine no longer trusts this epoch (a gap in steps, a length that disagrees): the loop ends the workers."""

    epoch: Epoch
    reason: str


class AdapterFree(Happening, frozen=True):
    """An adapter that was closed: no sequence and no plan in flight names it, and none will."""

    name: str


class MaskRequest(Happening, frozen=True):
    """Behind its plan, which samples in these rows what a grammar allows (R3): (row, request id, index) of each."""

    epoch: Epoch
    step: int
    rows: list[tuple[int, str, int]]


Instruction = StepPlan | MaskRequest | Outputs | EndEpoch | KvEvents | AdapterFree

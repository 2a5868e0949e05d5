"""The seam between a worker and a device: a backend executes whole steps. Nothing above it imports torch."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from protos.wire import LoadAdapter, Mask, Phase, RowResult, Setup, StepPlan

KV_BYTES: Final = 1 << 30  # where Setup leaves it open, but never more than a quarter of the machine's memory
MAX_SLOTS: Final = 256  # where Setup leaves it open

# (LOADING or COMPILING, share of it done 0..1); called from the worker's main thread.
Progress = Callable[[Phase, float], None]


@dataclass(frozen=True)
class Capacity:
    """What a loaded backend can do: the worker's `Ready`, without the epoch."""

    num_blocks: int  # null block included
    align: int  # tokens
    exact: bool
    device: str
    dtype: str
    backend: str
    max_model_len: int
    vocab_size: int
    fingerprint: str
    quantization: str = ""
    kv_dtype: str = ""  # empty: as dtype
    graph_shapes: tuple[int, ...] = ()
    num_host_blocks: int = 0
    step_seconds: tuple[tuple[int, float], ...] = ()  # where it speculates: positions of a decode step, its seconds
    hidden_size: int = 0  # floats of a pooled output; 0: it makes none
    propose_seconds: tuple[tuple[int, float], ...] = ()  # slots that propose, seconds of one more draft of each


@dataclass(frozen=True)
class Options:
    """What a worker's own command line says about the backend; everything else is in Setup."""

    home: Path  # for packed weights of the cpu backend
    device: str = "auto"
    isa: str = "auto"  # of the cpu backend
    patience: float = 600.0  # seconds that a rank waits for the others
    memory_share: float = 0.9  # of a GPU's memory, for everything
    eager: bool = False  # a GPU captures no graphs
    attention: str = "auto"  # the library that computes it on a GPU


class BackendError(Exception):
    """A model or a setting that this backend cannot serve, in one line for the person who started it."""


class Unsuited(BackendError):
    """Not this backend, but another may serve it."""


class Landing(Protocol):
    """The results of a step that is still computed, while the next one may be launched already."""

    def has_come(self) -> bool: ...

    def rows(self) -> list[RowResult]:
        """In the plan's row order. Waits for them; raises what became of the step."""


class DeviceBackend(Protocol):
    """Owns weights, KV pages, slots, token tables and sampler. One call of `forward` and one of `sample` are a step.

    Neither may keep anything that the Admits of a new epoch could not rebuild. A backend that computes beside its
    caller answers with a Landing, and calls the `land` that it was made with, from any thread, when one has come.
    """

    def load(self, setup: Setup, progress: Progress) -> Capacity:
        """Reads weights, sizes and warms KV. Raises BackendError where `setup` cannot be served."""

    def reset(self, setup: Setup) -> None:
        """A new epoch with the same Setup: forget every slot and adapter, and whatever is in flight; weights stay."""

    def forward(self, plan: StepPlan) -> None:
        """Applies release, admit, copies and rows, in this order, and computes up to the logits that sampling needs."""

    def sample(self, mask: Mask | None) -> list[RowResult] | Landing:
        """Samples the rows of the last `forward`, appends to the slots' tables, answers in the plan's row order."""

    def load_adapter(self, load: LoadAdapter) -> int:
        """Admits of later steps may name it; answers with its rank. Raises AdapterError, and nothing has changed."""

    def unload_adapter(self, name: str) -> None:
        """Nobody names it any more, nor does a step in flight. Raises AdapterError where it is not loaded."""

    def close(self) -> None: ...


def refuse_unsupported(
    backend: str,
    setup: Setup,
    *,
    dtype: tuple[str, ...],
    quantization: tuple[str, ...],
    kv_dtype: tuple[str, ...],
    activations: tuple[str, ...] = ("auto",),
    splits: bool = False,
    offloads: bool = False,
    adapts: bool = False,
    speculation: tuple[str, ...] = (),
) -> None:
    """Every field that asks for what a backend does not do. `splits`: it takes a rank's part of a model; `offloads`: it
    has a second tier of KV; `adapts`: it takes adapters; `speculation`: who may propose drafts.

    Raises BackendError naming it.
    """
    for field, value, known in [
        ("dtype", setup.dtype, dtype),
        ("quantization", setup.quantization, quantization),
        ("kv_dtype", setup.kv_dtype, kv_dtype),
        ("activations", setup.activations, activations),
        ("speculation", setup.speculation, ("", *speculation)),
        ("revision", setup.revision, ("",)),
        ("tp_size", setup.tp_size, (setup.tp_size if splits else 1,)),
        ("kv_host_bytes", setup.kv_host_bytes, (setup.kv_host_bytes if offloads else 0,)),
        ("max_adapters", setup.max_adapters, (setup.max_adapters if adapts else 0,)),
    ]:
        if value not in known:
            names = ", ".join(repr(name) for name in known)
            raise BackendError(f"{field} {value!r} is not supported by the {backend} backend, only {names}")
    if setup.tp_size > 1 and not setup.tp_address:
        raise BackendError(f"tp_size {setup.tp_size} needs a tp_address, where the ranks find each other")
    if not 0 <= setup.tp_rank < setup.tp_size:
        raise BackendError(f"tp_rank {setup.tp_rank} is not in 0..{setup.tp_size - 1}")
    if setup.threads > (cpus := os.cpu_count() or 1):
        raise BackendError(f"threads {setup.threads} is over this machine's {cpus} CPUs")
    if setup.speculation and setup.num_drafts < 1:
        raise BackendError(f"speculation {setup.speculation!r} with num_drafts {setup.num_drafts}: must be at least 1")
    if setup.speculation in ("draft", "eagle3") and not setup.draft_model:
        raise BackendError(f"speculation {setup.speculation!r} needs a draft_model")
    if setup.block_size < 1:
        raise BackendError(f"block_size {setup.block_size} must be at least 1")


def check_draft_model(setup: Setup, vocab_size: int, draft_vocab_size: int) -> None:
    """Raises BackendError where its tokens are not the model's."""
    if vocab_size != draft_vocab_size:
        raise BackendError(
            f"draft_model {setup.draft_model} has a vocabulary of {draft_vocab_size} tokens, "
            f"and {setup.model} one of {vocab_size}"
        )


def kv_blocks(setup: Setup, block_bytes: int) -> int:
    """How many blocks the memory for KV holds, null block included. Raises BackendError where it is too little."""
    memory = _memory()
    size = setup.kv_bytes or min(KV_BYTES, memory // 4 // setup.sharing)
    if size > memory:
        raise BackendError(f"kv_bytes {size} is more than this machine's memory, {memory}")
    if size < 2 * block_bytes:
        raise BackendError(
            f"kv_bytes {size} must hold two blocks: one of {setup.block_size} tokens takes {block_bytes}"
        )
    return size // block_bytes


def host_blocks(setup: Setup, num_blocks: int, block_bytes: int) -> int:
    """How many blocks the second tier holds beside the `num_blocks` of the first. Raises BackendError where it holds
    none, or where both are more than there is.
    """
    size, first, memory = setup.kv_host_bytes, num_blocks * block_bytes, _memory()
    if size + first > memory:
        raise BackendError(
            f"kv_host_bytes {size} and the first tier's {first} are more than this machine's memory, {memory}"
        )
    if 0 < size < block_bytes:
        raise BackendError(
            f"kv_host_bytes {size} must hold a block: one of {setup.block_size} tokens takes {block_bytes}"
        )
    return size // block_bytes


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def served_len(setup: Setup, num_blocks: int, longest: int) -> int:
    """Tokens of the longest sequence: `longest` is the model's. Raises BackendError where more was asked for."""
    held = min(longest, (num_blocks - 1) * setup.block_size)
    if setup.max_model_len > held:
        raise BackendError(f"max_model_len {setup.max_model_len} is more than the {held} tokens of KV memory")
    return held

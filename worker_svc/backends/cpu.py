"""The cpu backend: whole steps by our own kernels, in bfloat16 or with integer weights. numpy and a C library alone.

Each mode gives the same bits however rows are batched, chunked and cached, on any number of threads (R2): `exact`.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from kernels.cpu import library
from kernels.cpu.library import LibraryError, source_digest, usable_threads
from protos.wire import LoadAdapter, Mask, Phase, RowResult, Setup, StepPlan
from worker_svc.adapters.peft import read_adapter
from worker_svc.adapters.places import Places
from worker_svc.backends.base import (
    MAX_SLOTS,
    BackendError,
    Capacity,
    Progress,
    Unsuited,
    check_draft_model,
    host_blocks,
    kv_blocks,
    refuse_unsupported,
    served_len,
)
from worker_svc.backends.cpu_adapters import loras
from worker_svc.backends.cpu_decode import Decode, repeatable
from worker_svc.backends.cpu_draft import CpuDraft
from worker_svc.backends.cpu_eagle3 import CpuEagle3, tap_bytes, with_taps
from worker_svc.backends.cpu_model import KVForm, Tables, batch, outputs_wanted, shape, tables, whole
from worker_svc.backends.cpu_sampling import CpuSampler, Outputs
from worker_svc.backends.cpu_warmup import step_seconds
from worker_svc.backends.cpu_weights import Weights, readable
from worker_svc.host_blocks import HostBlocks
from worker_svc.inputs import StepInputs, build_inputs
from worker_svc.models.spec import ModelSpec
from worker_svc.pooling import Pooler
from worker_svc.quant import on_load
from worker_svc.quant.packed import FORMAT, PackedModel
from worker_svc.results import build_results
from worker_svc.slots import SlotTable
from worker_svc.speculation.base import PROPOSERS, Proposer, host_proposer, propose, release
from worker_svc.speculation.draft import DraftProposer, spare_blocks
from worker_svc.speculation.eagle3 import Eagle3Head, read_head

_KV_KINDS: Final = {"auto": "bf16", "bf16": "bf16", "int8": "int8"}


class CpuBackend:
    """`isa` is "auto" or an instruction set of the library's; packed weights go to `home` where their model's own
    directory takes none.
    """

    def __init__(self, setup: Setup, device: str, isa: str, home: Path) -> None:
        """Opens the library and the model. Raises Unsuited for what another backend may serve, else BackendError."""
        _refuse_unsupported(setup, device)
        self._isa = isa
        self._pending: tuple[StepPlan, StepInputs, library.Batch, Outputs | None] | None = None
        self._last: tuple[StepPlan, StepInputs, library.Batch, Outputs] | None = None  # of one that may be repeated
        self._decode: Decode | None = None  # while plans ask for nothing but the next token of the same slots
        try:
            self._library = library.load()
        except LibraryError as error:
            raise Unsuited(str(error)) from error
        if isa not in ("auto", *self._library.isas):
            raise BackendError(f"cpu_isa {isa!r}: this host has only {', '.join(self._library.isas)}")
        self._weights = Weights(setup, setup.model, home, self._library)
        self._draft: Weights | None = None
        self._head = _head(setup, self._weights.spec) if setup.speculation == "eagle3" else None
        if setup.speculation == "draft":
            self._draft = Weights(setup, setup.draft_model, home, self._library, draft=True)
            check_draft_model(setup, self._weights.spec.vocab_size, self._draft.spec.vocab_size)

    def load(self, setup: Setup, progress: Progress) -> Capacity:
        # What there is no room for is refused before anything is packed.
        longest, kind = _longest(setup, self._weights.spec), _KV_KINDS[setup.kv_dtype]
        form = KVForm(kind, setup.block_size)
        block_bytes = self._library.kv_block_bytes(shape(self._weights.spec, form, longest))
        mirrored = self._mirrored(form, longest)
        kv = KVForm(kind, setup.block_size, kv_blocks(setup, block_bytes + mirrored))
        num_host_blocks = host_blocks(setup, kv.num_blocks, block_bytes)
        self._max_len = served_len(setup, kv.num_blocks, longest)
        threads = setup.threads or max(1, usable_threads() // setup.sharing)
        told = partial(progress, Phase.LOADING)
        packed = self._weights.packed(threads, told)
        if packed.quantization:
            print(f"pagewire worker: weights are {packed.about}", file=sys.stderr, flush=True)
        ropes = tables(packed.spec, longest)
        try:
            spec = whole(packed, kv, ropes)
            if self._head:
                with_taps(spec, self._head.taps)
            self._model = self._library.open(spec, threads, self._isa)
        except LibraryError as error:
            raise BackendError(f"{setup.model}: {error}") from error
        self._spec, self._num_blocks, self._vocab_size = packed.spec, kv.num_blocks, packed.spec.vocab_size
        self._host = HostBlocks(self._model.kv(), num_host_blocks)
        self._sampler, self._places = CpuSampler(self._vocab_size), Places(0)
        self._max_adapter_rank = setup.max_adapter_rank
        self._proposer: Proposer | None = host_proposer(setup)
        draft = self._open_draft(setup, threads, told, kv)
        if draft:
            self._proposer = DraftProposer(draft, kv.num_blocks, setup.num_drafts, setup.block_size)
        self.reset(setup)
        return Capacity(
            num_blocks=kv.num_blocks,
            num_host_blocks=num_host_blocks,
            align=1,
            exact=True,
            device=f"cpu {self._model.isa}",
            dtype="bfloat16",
            backend="cpu",
            max_model_len=self._max_len,
            vocab_size=self._vocab_size,
            quantization=packed.about,
            kv_dtype="int8" if kind == "int8" else "bfloat16",
            fingerprint=self._fingerprint(packed, kind, ropes),
            step_seconds=self._step_seconds(setup) if setup.speculation else (),
            hidden_size=packed.spec.hidden_size,
            propose_seconds=draft.seconds(kv.num_blocks, kv.block_size) if draft else (),
        )

    def reset(self, setup: Setup) -> None:
        self._pending = self._last = self._decode = None
        self._host.forget()
        for name in list(self._places.by_name):
            self.unload_adapter(name)
        self._places = Places(setup.max_adapters)
        self._slots = SlotTable(
            max_slots=setup.max_slots or MAX_SLOTS,
            max_model_len=self._max_len,
            block_size=setup.block_size,
            num_blocks=self._num_blocks,
            vocab_size=self._vocab_size,
            copy=self._host.copy,
            adapters=self._places.by_name,
        )
        self._pooler = Pooler(self._slots)
        self._sampler.reset()
        if self._proposer:
            self._proposer.reset()

    def forward(self, plan: StepPlan) -> None:
        """Where no mask has to be waited for, sampling is in the same call."""
        if self._decode is None and self._last is not None and not (plan.admit or plan.release):
            self._decode = Decode(self._model, *self._last, self._slots)
        self._last = None
        if self._decode is not None:
            if self._decode.advance(plan):
                with self._naming_slots(self._decode.outputs):
                    self._decode.run()
                return
            self._decode.settle()
            self._decode = None
        self._forward_any(plan)

    def _forward_any(self, plan: StepPlan) -> None:
        if self._proposer:
            release(self._proposer, plan, self._slots)
        self._slots.apply(plan)
        inputs = build_inputs(plan, self._slots)
        made, outputs = batch(inputs, outputs_wanted(inputs)), None
        if any(row.masked and row.sample for row in plan.rows):
            self._model.forward(made)
        elif plan.rows:
            outputs = self._sampler.prepare(plan, inputs, self._slots, None)
            with self._naming_slots(outputs):
                self._model.step(made, outputs)
        self._pending = plan, inputs, made, outputs

    def sample(self, mask: Mask | None) -> list[RowResult]:
        if self._decode is not None:
            with self._naming_slots(self._decode.outputs):
                return self._decode.results(mask)
        assert self._pending is not None, "forward comes first"
        (plan, inputs, made, outputs), self._pending = self._pending, None
        if not plan.rows:
            return []
        if outputs is None:
            outputs = self._sampler.prepare(plan, inputs, self._slots, mask)
            with self._naming_slots(outputs):
                self._model.sample(outputs)
        if repeatable(inputs, outputs):
            self._last = plan, inputs, made, outputs
        token_ids, logprobs = self._sampler.finish(outputs)
        scores = self._sampler.prompt_logprobs(self._model, inputs, self._slots)
        pooled = self._pooler.pool(inputs, self._model.hidden)
        results = build_results(plan, inputs, self._slots, token_ids, logprobs, scores, pooled)
        if self._proposer:
            propose(self._proposer, plan, inputs, self._slots)
        return results

    def load_adapter(self, load: LoadAdapter) -> int:
        index = self._places.free(load.adapter)
        adapter = read_adapter(Path(load.path), self._spec, self._max_adapter_rank, load.digest)
        self._model.set_adapter(index, loras(adapter))
        self._places.by_name[load.adapter] = index
        return adapter.rank

    def unload_adapter(self, name: str) -> None:
        self._model.set_adapter(self._places.remove(name), [])

    def close(self) -> None:
        self._pending = self._last = self._decode = None
        if self._proposer:
            self._proposer.close()
        self._model.close()

    def _mirrored(self, form: KVForm, longest: int) -> int:
        """Bytes beside a block's keys and values."""
        if self._head:
            own = self._library.kv_block_bytes(shape(self._head.spec, form, longest))
            return own + tap_bytes(self._weights.spec, self._head.taps, form.block_size)
        return self._library.kv_block_bytes(shape(self._draft.spec, form, longest)) if self._draft else 0

    def _open_draft(self, setup: Setup, threads: int, told: Callable[[float], None], kv: KVForm) -> CpuDraft | None:
        spare = spare_blocks(setup.max_slots or MAX_SLOTS, setup.num_drafts, setup.block_size)
        mirror = KVForm(kv.kind, kv.block_size, kv.num_blocks + spare)
        if self._head:
            return CpuEagle3(self._library, self._head, setup.draft_model, mirror, self._max_len, self._model)
        if self._draft:
            packed = self._draft.packed(threads, told)
            return CpuDraft(self._library, packed, setup.draft_model, mirror, self._max_len, self._model)
        return None

    def _step_seconds(self, setup: Setup) -> tuple[tuple[int, float], ...]:
        return step_seconds(self._model, self._num_blocks, setup.block_size, self._max_len, setup.max_step_tokens)

    def _fingerprint(self, packed: PackedModel, kv_kind: str, ropes: Tables) -> str:
        """Digest of all that decides the arithmetic: weights and how they were rounded, the form of KV, instructions,
        the kernels' sources, and the rope tables, which numpy computed here for the longest context.
        """
        turns = [f"{self._library.checksum(table.view(np.uint8)):x}" for pair in ropes.values() for table in pair]
        parts = [packed.weights, packed.mode, str(FORMAT), kv_kind, self._model.isa, source_digest(), *turns]
        return hashlib.blake2b("|".join(parts).encode(), digest_size=16).hexdigest()

    @contextmanager
    def _naming_slots(self, outputs: Outputs) -> Iterator[None]:
        """The library knows no slots: where one could not be sampled, the sampler says which."""
        try:
            yield
        except LibraryError:
            self._sampler.finish(outputs)
            raise


def _refuse_unsupported(setup: Setup, device: str) -> None:
    if device not in ("auto", "cpu"):
        raise Unsuited(f"device {device!r} is not the cpu backend's")
    if setup.block_size % library.PAGE:
        raise Unsuited(f"block_size {setup.block_size} is no multiple of the cpu backend's {library.PAGE}")
    if setup.tp_size > 1:
        raise Unsuited(f"tp_size {setup.tp_size} is not supported by the cpu backend, which has no part of a model")
    refuse_unsupported(
        "cpu",
        setup,
        dtype=("auto", "bfloat16"),
        quantization=("", *on_load.MODES),
        activations=("auto", "int8"),
        kv_dtype=tuple(_KV_KINDS),
        offloads=True,
        adapts=True,
        speculation=(*PROPOSERS, "eagle3"),
    )


def _head(setup: Setup, target: ModelSpec) -> Eagle3Head:
    with readable(setup.draft_model):
        return read_head(Path(setup.draft_model), target)


def _longest(setup: Setup, spec: ModelSpec) -> int:
    if setup.max_model_len > spec.max_positions:
        raise BackendError(f"max_model_len {setup.max_model_len} is over the model's {spec.max_positions}")
    return setup.max_model_len or spec.max_model_len

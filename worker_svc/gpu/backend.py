"""A whole worker on one accelerator: loads, measures, captures, steps. What accelerator it is, a Place knows."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
import triton

from kernels.gpu.attention_plan import AttentionShape
from kernels.gpu.attention_tuning import Device as Kind
from kernels.gpu.slot_state import MAX_ROWS, SlotState
from protos.wire import LoadAdapter, Mask, Phase, Setup, StepPlan
from worker_svc.adapters.peft import read_adapter
from worker_svc.adapters.places import Places
from worker_svc.attention.choice import Choice, Where, choose
from worker_svc.attention.paged import PagedAttention, Rows, UnsuitedAttention
from worker_svc.backends.base import (
    MAX_SLOTS,
    BackendError,
    Capacity,
    Landing,
    Progress,
    host_blocks,
    refuse_unsupported,
)
from worker_svc.device.base import Device
from worker_svc.gpu.engine import GpuEngine, Room
from worker_svc.gpu.memory import DeviceMemory, blocks_that_fit
from worker_svc.gpu.model import GpuModel, StepTensors
from worker_svc.gpu.pooling import Pools
from worker_svc.gpu.sample_words import SamplePacker
from worker_svc.gpu.step_words import StepPacker
from worker_svc.gpu.stepping import Steps, Watch
from worker_svc.host_blocks import HostLedger
from worker_svc.kv_cache import KVShape
from worker_svc.models.checkpoint import CheckpointError
from worker_svc.models.loader import DType, Model, open_model, weights_digest
from worker_svc.models.spec import SpecError
from worker_svc.parallel.ranks import Ranks, join
from worker_svc.pipeline import Pipeline, Sizes
from worker_svc.quant.on_load import MODES
from worker_svc.slots import SlotTable

ARITHMETIC = 1  # of this backend: another number where a change may change bits
DEPTH = 2  # steps in flight
STEP_TOKENS = 8192  # positions of a step, where Setup leaves it open
PLAN_WORDS = 8 << 20  # that a plan may bring: two for each token of what it admits
SAMPLE_WORDS_A_ROW = 4096  # beside the row's mask
PROPOSERS = ("ngram",)  # the others keep on the host what no host knows in time, or need a second model
MAX_TOP = 20  # alternatives beside a token: what the API allows


class Place(Protocol):
    """An accelerator."""

    name: str  # "NVIDIA H100"
    where: torch.device
    kind: Kind
    capability: tuple[int, int]  # NVIDIA's; (0, 0): it is another's
    device: Device
    float8: torch.dtype | None  # what it multiplies of such

    def memory(self) -> DeviceMemory:
        """As it stands; the peak since the last `forget_peak`."""

    def forget_peak(self) -> None: ...

    def watch(self, land: Callable[[], None]) -> Watch:
        """Calls `land`, from any thread, when a step has landed."""


class GpuBackend:
    """`memory_share`: of the device's memory, for everything; `captured`: rows of the steps to capture, none: eager;
    `attention`: "auto" or a library's name; `patience`: seconds that a rank waits for the others.
    """

    def __init__(
        self,
        place: Place,
        land: Callable[[], None],
        memory_share: float,
        captured: Sequence[int],
        attention: str = "auto",
        patience: float = 600.0,
    ) -> None:
        torch.set_grad_enabled(False)
        self._place, self._land, self._share, self._captured = place, land, memory_share, captured
        self._asked, self._patience, self._ranks = attention, patience, Ranks()
        self._steps: Steps | None = None

    def load(self, setup: Setup, progress: Progress) -> Capacity:
        dtypes = ("auto", "bfloat16", "float32")
        refuse_unsupported(
            "cuda",
            setup,
            dtype=dtypes,
            quantization=("", *MODES),
            kv_dtype=_kv_dtypes(setup),
            offloads=True,
            splits=True,
            adapts=True,
            speculation=PROPOSERS,
        )
        dtype: DType = "float32" if setup.dtype == "float32" else "bfloat16"
        path, place = Path(setup.model), self._place
        try:
            model = _opened(path)
            self._max_len = _served(setup, model)
            self._ranks = join(setup.tp_rank, setup.tp_size, setup.tp_address, self._patience, place.where.type)
            self._model = GpuModel(
                model,
                dtype,
                place.where,
                place.kind.kind,
                self._max_len,
                lambda share: progress(Phase.LOADING, share),
                batch_invariant=setup.batch_invariant,
                ranks=self._ranks,
                float8=place.float8,
                quantization=setup.quantization,
                max_adapters=setup.max_adapters,
                max_adapter_rank=setup.max_adapter_rank,
            )
            weights = weights_digest(path)
        except (CheckpointError, SpecError, OSError) as error:
            raise BackendError(f"{setup.model}: {error}") from error
        self._max_adapter_rank = setup.max_adapter_rank
        self._kv_dtype = torch.float8_e4m3fn if setup.kv_dtype == "fp8" else self._model.dtype
        progress(Phase.COMPILING, 0.0)
        choice = self._allocate(setup)
        self._pipeline = self._piped(progress)
        self.reset(setup)
        return Capacity(
            num_blocks=self._num_blocks,
            align=1,
            exact=setup.batch_invariant,  # else products take another kernel for another number of rows
            device=place.name,
            dtype=dtype,
            backend="cuda",
            max_model_len=self._max_len,
            vocab_size=model.spec.vocab_size,
            fingerprint=_fingerprint(
                *(weights, dtype, setup.quantization, self._kv_dtype, choice.name, setup.batch_invariant),
                *(self._max_len, setup.block_size, place.name, setup.tp_size),
            ),
            quantization=self._quantization(model, setup),
            kv_dtype=setup.kv_dtype if setup.kv_dtype == "fp8" else "",
            graph_shapes=tuple(self._captured),
            num_host_blocks=len(self._host),
            hidden_size=model.spec.hidden_size,
            step_seconds=tuple(sorted(self._engine.step_seconds)),
        )

    def _quantization(self, model: Model, setup: Setup) -> str:
        """What is quantized, and by which kernels it is multiplied; empty where nothing is."""
        name = model.quantization or setup.quantization
        if not name:
            return ""
        kernels = "; ".join(f"{count} × {what}" for what, count in self._model.kernels.most_common())
        print(f"pagewire worker: weights are {name} ({kernels})", file=sys.stderr, flush=True)
        return f"{name} ({kernels})"

    def _allocate(self, setup: Setup) -> Choice:
        """All that stays: pages of both tiers and the slots' state, by what a step of the largest size leaves free."""
        spec, where, size = self._model.spec, self._place.where, setup.block_size
        rows, num_drafts = _rows(setup), setup.num_drafts if setup.speculation else 0
        self._room = Room(rows, max(setup.max_step_tokens or STEP_TOKENS, rows), size, num_drafts)
        choice = self._chosen(size, setup.batch_invariant)
        self._attention = choice.attention
        shape = KVShape(spec.num_layers, spec.num_kv_heads, spec.head_dim, self._kv_dtype)
        memory = _measured(self._place, self._model, shape, self._attention, self._room, self._max_len)
        block_bytes = shape.block_bytes(size)
        longest = self._max_len if setup.max_model_len else 0
        fit = blocks_that_fit(memory, self._share, block_bytes, size, longest, setup.kv_bytes)
        self._num_blocks = self._ranks.least(fit)
        self._max_len = min(self._max_len, (self._num_blocks - 1) * size)
        layers, block = spec.num_layers, (spec.num_kv_heads, size, spec.head_dim)
        self._pages = torch.zeros((layers, 2, self._num_blocks, *block), dtype=self._kv_dtype, device=where)
        # Only the host's memory limits them: the first tier is not there.
        num_host_blocks, pinned = self._ranks.least(host_blocks(setup, 0, block_bytes)), where.type == "cuda"
        self._host = torch.empty((num_host_blocks, layers, 2, *block), dtype=self._kv_dtype, pin_memory=pinned)
        adapts = setup.max_adapters > 0
        self._state = SlotState.empty(self._room.rows, self._max_len, -(-self._max_len // size), where, adapts)
        self._captured = [rows for rows in self._captured if rows <= self._room.rows]
        return choice

    def reset(self, setup: Setup) -> None:
        if self._steps is not None:
            self._steps.close()  # what still flies is of the epoch that has ended
        self._places = Places(setup.max_adapters)
        ledger = HostLedger(self._num_blocks, len(self._host))
        slots = SlotTable(
            max_slots=self._room.rows,
            max_model_len=self._max_len,
            block_size=setup.block_size,
            num_blocks=self._num_blocks,
            vocab_size=self._model.spec.vocab_size,
            copy=ledger.enter if len(ledger) else None,
            adapters=self._places.by_name,
        )
        room = self._room
        packer = StepPacker(slots, self._state, self._captured, room.verifying(self._captured), room.num_drafts)
        watch = self._place.watch(self._land)
        self._steps = Steps(self._pipeline, self._engine, packer, SamplePacker(slots), watch)

    def forward(self, plan: StepPlan) -> None:
        assert self._steps is not None, "load comes first"
        self._steps.forward(plan)

    def sample(self, mask: Mask | None) -> Landing:
        assert self._steps is not None, "load comes first"
        return self._steps.sample(mask)

    def load_adapter(self, load: LoadAdapter) -> int:
        index, gpu = self._places.free(load.adapter), self._model
        adapter = read_adapter(Path(load.path), gpu.whole, self._max_adapter_rank, load.digest)
        staged = gpu.adapters.stage(adapter)
        self._pipeline.between(lambda stream: self._engine.put_adapter(stream, index, staged))
        self._places.by_name[load.adapter] = index
        return adapter.rank

    def unload_adapter(self, name: str) -> None:
        self._places.remove(name)

    def close(self) -> None:
        if self._steps is not None:
            self._steps.close()
            self._steps = None
        self._ranks.close()

    def _chosen(self, block_size: int, batch_invariant: bool) -> Choice:
        """Raises BackendError where what was asked for cannot serve this model."""
        spec, gpu, place = self._model.spec, self._model, self._place
        shapes = [
            AttentionShape(
                spec.num_heads, spec.num_kv_heads, spec.head_dim, block_size, gpu.dtype, self._kv_dtype,
                spec.query_scale, self._max_len, window, spec.attention_softcap, batch_invariant,
            )
            for window in gpu.windows()
        ]  # fmt: skip
        try:
            room = self._room
            where = Where(place.kind, place.where, place.capability, DEPTH, room.rows, room.num_drafts)
            choice = choose(self._asked, shapes, where)
        except UnsuitedAttention as error:
            raise BackendError(f"attention_backend {self._asked!r}: {error}") from error
        print(f"pagewire worker: attention by {choice.name}: {choice.reason}", file=sys.stderr, flush=True)
        return choice

    def _piped(self, progress: Progress) -> Pipeline:
        place, room, vocab = self._place, self._room, self._model.spec.vocab_size
        self._engine = GpuEngine(
            place.device, self._model, self._attention, self._pages, self._state, room, self._captured, self._host,
            lambda share: progress(Phase.COMPILING, share),
        )  # fmt: skip
        sizes = Sizes(
            plan=min(PLAN_WORDS, 2 * room.rows * self._max_len) + 64 * room.rows + 2 * room.outputs,
            mask=room.rows * -(-vocab // 32) + room.outputs * SAMPLE_WORDS_A_ROW + room.tokens,
            results=room.rows * (3 + self._model.spec.hidden_size)
            + 2 * room.outputs
            + (room.outputs + room.tokens) * (2 + 2 * MAX_TOP),
        )
        return Pipeline(place.device, self._engine, sizes, DEPTH)


def _opened(path: Path) -> Model:
    model = open_model(path)
    if model is None:
        raise SpecError("its architecture is none that runs on this device")
    return model


def _served(setup: Setup, model: Model) -> int:
    if setup.max_model_len > model.spec.max_positions:
        raise SpecError(f"max_model_len {setup.max_model_len} is over the model's {model.spec.max_positions}")
    return setup.max_model_len or model.spec.max_model_len


def _kv_dtypes(setup: Setup) -> tuple[str, ...]:
    return ("auto", "fp8") if setup.dtype == "float32" else ("auto", "bf16", "fp8")


def _rows(setup: Setup) -> int:
    rows = setup.max_slots or MAX_SLOTS
    if rows > MAX_ROWS:
        raise BackendError(f"max_slots {rows} is more than the {MAX_ROWS} rows that a step can have here")
    return rows


def _measured(
    place: Place,
    model: GpuModel,
    kv: KVShape,
    attention: Mapping[int, PagedAttention],
    room: Room,
    max_len: int,
) -> DeviceMemory:
    """After a step of the largest size, that writes nothing: one row over the null block, and all logits."""
    tokens, where = min(room.tokens, max_len), place.where
    spec = model.spec

    def words(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=where)

    place.forget_peak()
    blocks = torch.zeros(1, -(-tokens // room.block_size), dtype=torch.int32, device=where)
    step = StepTensors(
        torch.zeros(room.tokens, dtype=torch.int32, device=where),
        torch.arange(room.tokens, dtype=torch.int32, device=where) % tokens,
        torch.full((room.tokens,), -1, dtype=torch.int32, device=where),
        Rows(words(0, tokens), words(tokens), blocks),
        {window: each.plan([tokens], [tokens]) for window, each in attention.items()},
        torch.zeros(room.tokens, dtype=torch.int32, device=where),
    )
    for window, each in attention.items():
        each.begin(step.plans[window], step.rows)
    shape = (spec.num_layers, 2, 1, spec.num_kv_heads, room.block_size, spec.head_dim)
    sums = Pools(room.rows, spec.hidden_size, where)
    hidden = model.forward(step, torch.zeros(shape, dtype=kv.dtype, device=where), attention)
    logits = torch.empty(room.outputs, spec.vocab_size, dtype=torch.float32, device=where)
    model.logits(hidden, torch.zeros(room.outputs, dtype=torch.int32, device=where), logits)
    del sums  # of pooled outputs: there was room for them, too
    logits.clone()  # where requests edit theirs, there are two
    return place.memory()


def _fingerprint(*parts: object) -> str:
    """Digest of all that decides the arithmetic: `parts` and what computes."""
    computing = "cuda", ARITHMETIC, torch.__version__, triton.__version__
    return hashlib.blake2b("|".join(map(str, (*computing, *parts))).encode(), digest_size=16).hexdigest()

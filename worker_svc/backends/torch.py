"""The torch backend: whole steps on the CPU, in float32 (exact, R2) or bfloat16."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from protos.wire import Mask, Phase, RowResult, Setup, StepPlan, TokenLogprobs
from worker_svc.attention.cpu import kv_tile
from worker_svc.backends.base import (
    MAX_SLOTS,
    BackendError,
    Capacity,
    Progress,
    check_draft_model,
    host_blocks,
    kv_blocks,
    refuse_unsupported,
    served_len,
)
from worker_svc.backends.torch_draft import TorchDraft
from worker_svc.exactness import ARITHMETIC, exact_steps
from worker_svc.host_blocks import HostBlocks
from worker_svc.inputs import Ints, StepInputs, build_inputs
from worker_svc.kv_cache import KVCache, KVShape
from worker_svc.model_runner import ModelRunner
from worker_svc.models.checkpoint import CheckpointError
from worker_svc.models.loader import DType, Model, open_model, weights_digest
from worker_svc.models.spec import SpecError
from worker_svc.parallel.ranks import Ranks, join
from worker_svc.pooling import Pooler
from worker_svc.results import build_results
from worker_svc.sampler import Sampler
from worker_svc.slots import SlotTable
from worker_svc.speculation.base import PROPOSERS, Proposer, host_proposer, propose, release
from worker_svc.speculation.draft import DraftProposer, spare_blocks

LOGIT_ROWS = 64  # a prompt's positions scored at once


class StepOutputs(Protocol):
    """Of a step's tokens [S], given as indices into T."""

    def __call__(self, tokens: Ints) -> Tensor:
        """Logits [S, vocab] float32."""

    def states(self, tokens: Ints) -> Tensor:
        """After the final norm [S, hidden] float32, of inputs.pooled_tokens."""


class Runner(Protocol):
    """What executes a model: ours for the families that are ours, transformers for others."""

    kv_shape: KVShape
    vocab_size: int
    hidden_size: int
    max_model_len: int

    def step(self, inputs: StepInputs, cache: KVCache) -> StepOutputs: ...


class TorchBackend:
    """`threads` 0 is one a CPU. `patience`: seconds that a rank waits for the others. `transformers` runs families of
    ours by transformers as well: with it tests compare the two runners on one model, and nothing else sets it.
    """

    def __init__(
        self, device: str = "auto", threads: int = 0, patience: float = 600.0, transformers: bool = False
    ) -> None:
        if device not in ("auto", "cpu"):
            raise BackendError(f"device {device!r} is not supported by the torch backend, only 'cpu'")
        torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
        torch.set_grad_enabled(False)
        self._transformers, self._patience = transformers, patience
        self._ranks = Ranks()
        self._pending: tuple[StepPlan, StepInputs, StepOutputs | None] | None = None  # no outputs: no rows

    def load(self, setup: Setup, progress: Progress) -> Capacity:
        refuse_unsupported(
            "torch",
            setup,
            dtype=("auto", "float32", "bfloat16"),
            quantization=("",),
            kv_dtype=("auto", "bf16") if setup.dtype == "bfloat16" else ("auto",),
            splits=True,
            offloads=True,
            speculation=PROPOSERS,
        )
        path = Path(setup.model)
        dtype: DType = "bfloat16" if setup.dtype == "bfloat16" else "float32"
        try:
            runner = self._open(path, dtype, setup, progress)
            draft = _open_draft(dtype, setup, runner, progress) if setup.speculation == "draft" else None
            weights = weights_digest(path)
        except (CheckpointError, SpecError, OSError) as error:
            raise BackendError(f"{setup.model}: {error}") from error
        self._runner = runner
        shape, size = runner.kv_shape, setup.block_size
        block_bytes = shape.block_bytes(size)
        mirrored = draft.kv_shape.block_bytes(size) if draft else 0
        self._cache = KVCache(shape, self._ranks.least(kv_blocks(setup, block_bytes + mirrored)), size)
        num_host_blocks = self._ranks.least(host_blocks(setup, self._cache.num_blocks, block_bytes))
        self._host = HostBlocks(self._cache.runs, num_host_blocks)
        self._max_len = served_len(setup, self._cache.num_blocks, runner.max_model_len)
        self._sampler = Sampler(runner.vocab_size)
        self._proposer: Proposer | None = host_proposer(setup)
        if draft:
            num_blocks = self._cache.num_blocks
            spare = spare_blocks(setup.max_slots or MAX_SLOTS, setup.num_drafts, size)
            model = TorchDraft(draft, num_blocks + spare, size)
            self._proposer = DraftProposer(model, num_blocks, setup.num_drafts, size)
        self.reset(setup)
        progress(Phase.COMPILING, 0.0)
        backend = "torch" if isinstance(runner, ModelRunner) else "transformers"
        exact = isinstance(runner, ModelRunner) and exact_steps(runner, self._cache) and dtype == "float32"
        return Capacity(
            num_blocks=self._cache.num_blocks,
            num_host_blocks=num_host_blocks,
            align=1,
            exact=exact,
            device="cpu",
            dtype=dtype,
            backend=backend,
            max_model_len=self._max_len,
            vocab_size=runner.vocab_size,
            quantization=self._quantization,
            hidden_size=runner.hidden_size,
            fingerprint=_fingerprint(weights, dtype, backend, runner.max_model_len, kv_tile(size), setup.tp_size),
        )

    def reset(self, setup: Setup) -> None:
        self._pending = None
        self._host.forget()
        self._slots = SlotTable(
            max_slots=setup.max_slots or MAX_SLOTS,
            max_model_len=self._max_len,
            block_size=setup.block_size,
            num_blocks=self._cache.num_blocks,
            vocab_size=self._runner.vocab_size,
            copy=self._host.copy,
        )
        self._pooler = Pooler(self._slots)
        self._sampler.reset()
        if self._proposer:
            self._proposer.reset()

    def forward(self, plan: StepPlan) -> None:
        if self._proposer:
            release(self._proposer, plan, self._slots)
        self._slots.apply(plan)
        inputs = build_inputs(plan, self._slots)
        self._pending = plan, inputs, self._runner.step(inputs, self._cache) if plan.rows else None

    def sample(self, mask: Mask | None) -> list[RowResult]:
        assert self._pending is not None, "forward comes first"
        (plan, inputs, outputs), self._pending = self._pending, None
        if outputs is None:
            return []
        sampled = self._sampler.sample(outputs(inputs.sample_tokens), plan, inputs, self._slots, mask)
        scores: list[TokenLogprobs] = []
        for first in range(0, len(inputs.prompt_logprob_tokens), LOGIT_ROWS):
            tokens = inputs.prompt_logprob_tokens[first : first + LOGIT_ROWS]
            scores += self._sampler.prompt_logprobs(outputs(tokens), inputs, self._slots, first)
        pooled = self._pooler.pool(inputs, lambda tokens: outputs.states(tokens).numpy())
        results = build_results(plan, inputs, self._slots, sampled.token_ids, sampled.logprobs, scores, pooled)
        if self._proposer:
            propose(self._proposer, plan, inputs, self._slots)
        return results

    def close(self) -> None:
        self._pending = None
        if self._proposer:
            self._proposer.close()
        self._ranks.close()

    def _open(self, path: Path, dtype: DType, setup: Setup, progress: Progress) -> Runner:
        model = None if self._transformers else open_model(path)
        self._quantization = f"{model.quantization} (as {dtype})" if model and model.quantization else ""
        if model is not None:
            longest = _max_model_len(setup.max_model_len, model)
            self._ranks = join(setup.tp_rank, setup.tp_size, setup.tp_address, self._patience)
            return ModelRunner(model, dtype, longest, lambda share: progress(Phase.LOADING, share), self._ranks)
        if setup.tp_size > 1:
            raise SpecError(f"tp_size {setup.tp_size}: a model that transformers runs is not split, only 1 serves it")
        from worker_svc.models.transformers_model import TransformersRunner

        progress(Phase.LOADING, 0.0)
        return TransformersRunner(path, dtype, setup.max_model_len)


def _open_draft(dtype: DType, setup: Setup, target: Runner, progress: Progress) -> ModelRunner:
    """Raises BackendError, CheckpointError, SpecError."""
    if setup.tp_size > 1:
        raise SpecError(f"tp_size {setup.tp_size}: a draft model is not split, only 1 serves it")
    model = open_model(Path(setup.draft_model))
    if model is None:
        raise BackendError(f"draft_model {setup.draft_model}: not of a family that the torch backend runs by itself")
    check_draft_model(setup, target.vocab_size, model.spec.vocab_size)
    longest = min(target.max_model_len, model.spec.max_positions)
    return ModelRunner(model, dtype, longest, lambda share: progress(Phase.LOADING, share))


def _max_model_len(asked: int, model: Model) -> int:
    if asked > model.spec.max_positions:
        raise SpecError(f"max_model_len {asked} is over the model's {model.spec.max_positions}")
    return asked or model.spec.max_model_len


def _fingerprint(weights: str, dtype: str, backend: str, max_len: int, tile: int, ranks: int) -> str:
    """Digest of all that decides the arithmetic: weights, dtype, our version of it, torch, the instructions it chose
    here, the longest context, which settles the rope of some models, how many keys attention takes at a time, and how
    many ranks add up a sum.
    """
    isa = torch.backends.cpu.get_cpu_capability()
    parts = [weights, dtype, backend, str(ARITHMETIC), torch.__version__, isa, str(max_len), str(tile), f"tp{ranks}"]
    return hashlib.blake2b("|".join(parts).encode(), digest_size=16).hexdigest()

"""The torch backend: whole steps on the CPU, in float32 (exact, R2) or bfloat16."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from protos.wire import Mask, RowResult, Setup, StepPlan, TokenLogprobs
from worker_svc.backends.base import BackendError, Capacity, Progress
from worker_svc.exactness import exact_steps
from worker_svc.inputs import Ints, StepInputs, build_inputs
from worker_svc.kv_cache import KVCache
from worker_svc.model_runner import ModelRunner
from worker_svc.models.checkpoint import CheckpointError
from worker_svc.models.loader import DType, Model, open_model, weights_digest
from worker_svc.models.spec import SpecError
from worker_svc.results import build_results
from worker_svc.sampler import Sampler
from worker_svc.slots import SlotTable

KV_BYTES = 1 << 30  # where Setup leaves it open, but never more than a quarter of the machine's memory
LOGIT_ROWS = 64  # of a prompt's positions scored at once: 64 * 150,000 * 4 bytes


class Runner(Protocol):
    """What executes a model: ours, or transformers'."""

    def forward(self, inputs: StepInputs, cache: KVCache) -> Tensor: ...

    def logits(self, hidden: Tensor, tokens: Ints) -> Tensor: ...


class TorchBackend:
    """`threads` 0 is one a CPU."""

    def __init__(self, device: str = "auto", threads: int = 0) -> None:
        if device not in ("auto", "cpu"):
            raise BackendError(f"device {device!r} is not supported by the torch backend yet, only cpu")
        torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
        torch.set_grad_enabled(False)
        self._pending: tuple[StepPlan, StepInputs, Tensor] | None = None

    def load(self, setup: Setup, progress: Progress) -> Capacity:
        _refuse_unsupported(setup)
        path = Path(setup.model)
        dtype: DType = "bfloat16" if setup.dtype == "bfloat16" else "float32"
        try:
            model = open_model(path)
            if model is None:
                raise BackendError(f"{path}: its architecture is not supported")
            max_len = _max_model_len(setup, model)
            self._runner = ModelRunner(model, dtype, max_len, lambda share: progress("reading weights", share))
        except (CheckpointError, SpecError, OSError) as error:
            raise BackendError(str(error)) from error
        spec = model.spec
        block_bytes = spec.kv_bytes_per_token * setup.block_size * (4 if dtype == "float32" else 2)
        num_blocks = (setup.kv_bytes or _kv_bytes()) // block_bytes
        if num_blocks < 2:
            raise BackendError(
                f"kv_bytes {setup.kv_bytes} holds no block: one of {setup.block_size} tokens takes {block_bytes}"
            )
        max_len = min(max_len, (num_blocks - 1) * setup.block_size)
        progress("taking KV memory", 0.0)
        self._cache = KVCache(
            spec.num_layers, num_blocks, spec.num_kv_heads, setup.block_size, spec.head_dim, self._runner.dtype
        )
        self._vocab_size, self._max_len = spec.vocab_size, max_len
        self._sampler = Sampler(spec.vocab_size)
        self.reset(setup)
        progress("warming up", 0.0)
        exact = exact_steps(self._runner, self._cache) if dtype == "float32" else False
        return Capacity(
            num_blocks=num_blocks,
            align=1,
            exact=exact,
            device="cpu",
            dtype=dtype,
            backend="torch",
            max_model_len=max_len,
            vocab_size=spec.vocab_size,
            fingerprint=_fingerprint(path, dtype, max_len),
        )

    def reset(self, setup: Setup) -> None:
        self._pending = None
        self._slots = SlotTable(
            max_slots=setup.max_slots or 256,
            max_model_len=self._max_len,
            block_size=setup.block_size,
            num_blocks=self._cache.num_blocks,
            vocab_size=self._vocab_size,
        )
        self._sampler.reset()

    def forward(self, plan: StepPlan) -> None:
        self._slots.apply(plan)
        inputs = build_inputs(plan, self._slots)
        hidden = self._runner.forward(inputs, self._cache)
        self._pending = plan, inputs, hidden

    def sample(self, mask: Mask | None) -> list[RowResult]:
        assert self._pending is not None, "forward comes first"
        plan, inputs, hidden = self._pending
        self._pending = None
        logits = self._runner.logits(hidden, inputs.sample_tokens)
        sampled = self._sampler.sample(logits, plan, inputs, self._slots, mask)
        scores: list[TokenLogprobs] = []
        for first in range(0, len(inputs.prompt_logprob_tokens), LOGIT_ROWS):
            tokens = inputs.prompt_logprob_tokens[first : first + LOGIT_ROWS]
            scores += self._sampler.prompt_logprobs(self._runner.logits(hidden, tokens), inputs, self._slots, first)
        return build_results(plan, inputs, self._slots, sampled.token_ids, sampled.logprobs, scores)

    def close(self) -> None:
        self._pending = None


def _refuse_unsupported(setup: Setup) -> None:
    """Every field that asks for what this backend does not do. Raises BackendError naming it."""
    for field, value, known in [
        ("dtype", setup.dtype, ("auto", "float32", "bfloat16")),
        ("quantization", setup.quantization, ("",)),
        ("kv_dtype", setup.kv_dtype, ("auto", setup.dtype)),
        ("speculation", setup.speculation, ("",)),
        ("revision", setup.revision, ("",)),
        ("tp_size", setup.tp_size, (1,)),
        ("host_blocks", setup.host_blocks, (0,)),
    ]:
        if value not in known:
            raise BackendError(f"{field} {value!r} is not supported by the torch backend, only {known[0]!r}")
    if setup.block_size < 1:
        raise BackendError(f"block_size {setup.block_size} must be at least 1")


def _max_model_len(setup: Setup, model: Model) -> int:
    if setup.max_model_len > model.spec.max_positions:
        raise BackendError(f"max_model_len {setup.max_model_len} is over the model's {model.spec.max_positions}")
    return setup.max_model_len or model.spec.max_model_len


def _kv_bytes() -> int:
    return min(KV_BYTES, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4)


def _fingerprint(path: Path, dtype: str, max_len: int) -> str:
    """Digest of all that decides the arithmetic: weights, dtype, torch and the instructions that it chose here."""
    parts = [
        weights_digest(path),
        dtype,
        "torch",
        torch.__version__,
        torch.backends.cpu.get_cpu_capability(),
        str(max_len),
    ]
    return hashlib.blake2b("|".join(parts).encode(), digest_size=16).hexdigest()

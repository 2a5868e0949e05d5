"""A draft model on the kernels and the threads of the cpu backend."""

from __future__ import annotations

import numpy as np

from kernels.cpu.library import PARAMS, Floats, Library, LibraryError, Model, Samples
from worker_svc.backends.base import BackendError
from worker_svc.backends.cpu_model import KVForm, batch, tables, whole
from worker_svc.backends.cpu_warmup import SEQUENCES, step_seconds
from worker_svc.inputs import Ints, StepInputs
from worker_svc.quant.packed import PackedModel


class CpuDraft:
    shift = 0

    def __init__(
        self, library: Library, packed: PackedModel, name: str, kv: KVForm, max_model_len: int, beside: Model
    ) -> None:
        """Raises BackendError."""
        self.max_model_len = longest = min(max_model_len, packed.spec.max_positions)
        try:
            self._model = library.open_beside(whole(packed, kv, tables(packed.spec, longest)), beside)
        except LibraryError as error:
            raise BackendError(f"{name}: {error}") from error

    def greedy(self, inputs: StepInputs, before: Ints | None) -> Ints:
        return self._greedy(inputs, None)

    def _greedy(self, inputs: StepInputs, states: Floats | None) -> Ints:
        """`states`: of an EAGLE-3 head, [T, hidden] what it made of the tokens before; null: what the model did."""
        tokens = inputs.sample_tokens
        made = batch(inputs, tokens).point(states=states)
        out = np.empty(len(tokens), np.int64)
        if not len(tokens):
            self._model.forward(made)
            return out
        params = np.zeros(len(tokens), PARAMS)
        params["top_p"], params["logprobs"] = 1.0, -1
        self._model.step(made, Samples(len(tokens)).point(tokens=tokens, params=params, token_ids=out))
        return out

    def seconds(self, num_blocks: int, block_size: int) -> tuple[tuple[int, float], ...]:
        """Of one token of each of so many slots. Leaves KV as it began."""
        return step_seconds(self._model, num_blocks, block_size, self.max_model_len, SEQUENCES)

    def close(self) -> None:
        self._model.close()

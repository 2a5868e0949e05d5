"""A draft model on the kernels and the threads of the cpu backend."""

from __future__ import annotations

import numpy as np

from kernels.cpu.library import PARAMS, Library, LibraryError, Model, Samples
from worker_svc.backends.base import BackendError
from worker_svc.backends.cpu_model import KVForm, batch, tables, whole
from worker_svc.inputs import Ints, StepInputs
from worker_svc.quant.packed import PackedModel


class CpuDraft:
    def __init__(
        self, library: Library, packed: PackedModel, name: str, kv: KVForm, max_model_len: int, beside: Model
    ) -> None:
        """Raises BackendError."""
        self.max_model_len = max_model_len
        try:
            self._model = library.open_beside(whole(packed, kv, tables(packed.spec, max_model_len)), beside)
        except LibraryError as error:
            raise BackendError(f"{name}: {error}") from error

    def greedy(self, inputs: StepInputs) -> Ints:
        """Computes the tokens, and answers with the likeliest behind each of inputs.sample_tokens [S]."""
        tokens = inputs.sample_tokens
        made = batch(inputs, tokens)
        out = np.empty(len(tokens), np.int64)
        if not len(tokens):
            self._model.forward(made)
            return out
        params = np.zeros(len(tokens), PARAMS)
        params["top_p"], params["logprobs"] = 1.0, -1
        self._model.step(made, Samples(len(tokens)).point(tokens=tokens, params=params, token_ids=out))
        return out

    def close(self) -> None:
        self._model.close()

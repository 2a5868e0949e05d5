"""Models that read a text and say at every position what may come next: ours, and those of others."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from benchmarks.process import StartError
from kernels.cpu import library
from worker_svc.backends.cpu_model import KVForm, batch, tables, whole
from worker_svc.inputs import Ints, StepInputs
from worker_svc.kv_cache import KVCache
from worker_svc.model_runner import ModelRunner
from worker_svc.models.loader import Model, open_model
from worker_svc.quant.packed import PackedStore
from worker_svc.quant.plan import MODES
from worker_svc.trial_step import TrialRow, trial_step

CHUNK = 512  # tokens read at once
BLOCK = 32  # tokens of a KV block

Logits = NDArray[np.float32]  # [tokens, vocab]


class Reader(Protocol):
    """Windows one after the other, each from its first token on, in chunks of up to CHUNK tokens."""

    name: str
    about: str

    def read(self, tokens: Ints, start: int) -> Logits:
        """Reads tokens[start:], after tokens[:start] of the same window; their logits."""

    def close(self) -> None: ...


class Float32:
    """The torch backend in float32: what everybody is compared with."""

    name, about = "float32", "torch backend, float32 throughout, weights as the file has them"

    def __init__(self, path: Path, window: int) -> None:
        self._runner = ModelRunner(_opened(path), "float32", window, lambda share: None)
        self.vocab_size = self._runner.vocab_size
        self._cache = KVCache(self._runner.kv_shape, 1 + -(-window // BLOCK), BLOCK)

    def read(self, tokens: Ints, start: int) -> Logits:
        inputs = _row(tokens, start)
        hidden = self._runner.forward(inputs, self._cache)
        return self._runner.logits(hidden, np.arange(len(inputs.token_ids))).numpy()

    def close(self) -> None:
        pass


class Ours:
    """The cpu backend's step: `mode` is a key of worker_svc.quant.plan.MODES, `kv` one of library.KV_KINDS."""

    def __init__(self, path: Path, home: Path, mode: str, kv: str, isa: str, threads: int, window: int) -> None:
        kernels = library.load()
        store = PackedStore(path, mode, home, kernels)
        packed = store.read() or store.pack(_opened(path), threads, lambda share: None)
        spec = whole(packed, KVForm(kv, BLOCK, 1 + -(-window // BLOCK)), tables(packed.spec, window))
        self._model = kernels.open(spec, threads, isa)
        self.name = mode or "bf16"
        self.name += " + int8 KV" if kv == "int8" else ""
        layers, head = MODES[mode]
        kernels_of = packed.about if packed.quantization else f"layers {layers}, head {head}"
        self.about = f"cpu backend, {self._model.isa}: {kernels_of}, KV {kv}"

    def read(self, tokens: Ints, start: int) -> Logits:
        inputs = _row(tokens, start)
        self._model.forward(batch(inputs))
        return self._model.logits(np.arange(len(inputs.token_ids)))

    def close(self) -> None:
        self._model.close()


class Program:
    """Another engine's program, spoken to over its standard streams, in int32 and float32 of this machine.

    It says how large its vocabulary is; then, for each (start, count, tokens[count]), logits [count, vocab].
    """

    def __init__(self, name: str, about: str, command: Sequence[str | Path], vocab_size: int) -> None:
        self.name, self.about, self._vocab_size = name, about, vocab_size
        quiet = {**os.environ, "OMP_WAIT_POLICY": "passive"}  # it shares the cores with the others
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=quiet)
        size = int(self._answer(1, np.int32)[0])
        if size != vocab_size:
            self.close()
            raise StartError(f"{name} has a vocabulary of {size}, not {vocab_size}")

    def read(self, tokens: Ints, start: int) -> Logits:
        new = tokens[start:].astype(np.int32)
        assert self._process.stdin is not None
        self._process.stdin.write(np.array([start, len(new)], np.int32).tobytes() + new.tobytes())
        self._process.stdin.flush()
        return self._answer(len(new) * self._vocab_size, np.float32).reshape(len(new), self._vocab_size)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _answer(self, count: int, dtype: type[np.generic]) -> NDArray[Any]:
        out = np.empty(count, dtype)
        assert self._process.stdout is not None
        view = out.view(np.uint8).data
        while view:
            got = self._process.stdout.readinto(view)  # type: ignore[attr-defined]
            if not got:
                raise StartError(f"{self.name} ended with status {self._process.wait()}")
            view = view[got:]
        return out


def _opened(path: Path) -> Model:
    model = open_model(path)
    if model is None:
        raise StartError(f"{path.name} is not of a family that the cpu backend knows")
    return model


def _row(tokens: Ints, start: int) -> StepInputs:
    blocks = np.arange(1, 1 + -(-len(tokens) // BLOCK))
    return trial_step([TrialRow(tokens, start, blocks)], BLOCK)

"""A checkpoint as the cpu backend reads it: packed by an earlier start, or now."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kernels.cpu.library import Library
from protos.wire import Setup
from worker_svc.backends.base import BackendError, Unsuited
from worker_svc.backends.cpu_model import unfit
from worker_svc.models.checkpoint import CheckpointError
from worker_svc.models.loader import open_model
from worker_svc.models.spec import ModelSpec, SpecError
from worker_svc.quant.packed import PackedModel, PackedStore
from worker_svc.quant.plan import mode_of


class Weights:
    def __init__(self, setup: Setup, model: str, home: Path, library: Library, *, draft: bool = False) -> None:
        """Opens what is at `model`, with setup's mode; a draft model that is quantized already is taken as it is.

        Raises Unsuited for what another backend may serve, BackendError for what cannot be read.
        """
        path, self._model = Path(model), model
        with readable(model):
            mode = mode_of(setup.quantization, setup.activations)
            if draft and (opened := open_model(path)) and opened.quantization:
                mode = ""
            self._store = PackedStore(path, mode, home, library)
            self._packed = self._store.read()
            self._source = None if self._packed else open_model(path)
        found = self._packed or self._source
        if found is None:
            raise Unsuited(f"{path.name}: not of a family that the cpu backend knows")
        if trouble := unfit(found.spec):
            raise Unsuited(f"{path.name}: {trouble}")
        self.spec: ModelSpec = found.spec

    def packed(self, threads: int, progress: Callable[[float], None]) -> PackedModel:
        """Raises BackendError."""
        if self._packed is None:
            assert self._source is not None
            with readable(self._model):
                self._packed = self._store.pack(self._source, threads, progress)
            self._source = None  # and its mapping of the file
        return self._packed


@contextmanager
def readable(model: str) -> Iterator[None]:
    try:
        yield
    except (CheckpointError, SpecError, OSError) as error:
        raise BackendError(f"{model}: {error}") from error

"""The weights of a GGUF file as views of the mapped file. numpy only; the header is read by protos.gguf_header."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np

from protos import gguf_header
from worker_svc.models.ggml_quants import QUANTS
from worker_svc.models.raw_tensor import NUMPY_TYPES, CheckpointError, RawTensor


class GGUFCheckpoint:
    """Names, shapes and the order of q and k rows are the file's own."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError for an unsound header, OSError for a file that cannot be opened."""
        try:
            header = gguf_header.read(path)
        except gguf_header.GGUFError as error:
            raise CheckpointError(str(error)) from error
        self.path, self.metadata, self.tensors = path, header.metadata, header.tensors
        with path.open("rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def names(self) -> list[str]:
        return list(self.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def tensor(self, name: str) -> RawTensor:
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.path}: there is no tensor {name!r}")
        kind = gguf_header.GGML_TYPES[info.ggml_type]
        if kind.name in NUMPY_TYPES:
            dtype = np.dtype(NUMPY_TYPES[kind.name])
            data = np.frombuffer(self._data, dtype, info.nbytes // dtype.itemsize, info.offset).reshape(info.shape)
        elif kind.name in QUANTS:
            data = np.frombuffer(self._data, np.uint8, info.nbytes, info.offset).reshape(-1, kind.block_bytes)
        else:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} has type {kind.name}, which cannot be read: only "
                f"{', '.join([*NUMPY_TYPES, *QUANTS])}"
            )
        return RawTensor(name, kind.name, info.shape, data)

"""Safetensors checkpoints, single and sharded, as views of the mapped files. numpy only.

The format is a page (u64 header length, JSON, bytes), and the `safetensors` package cannot be used above the backend
seam: its numpy reader copies every tensor and has no bfloat16, and its other readers bring a framework.
Format: huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from worker_svc.models.raw_tensor import NUMPY_TYPES, CheckpointError, RawTensor

INDEX_NAME: Final = "model.safetensors.index.json"
SINGLE_NAME: Final = "model.safetensors"
MAX_HEADER: Final = 100_000_000  # bytes; the format's own limit
# Sizes of the types that a checkpoint may have beside ours: it opens, and only reading such a tensor is refused.
OTHER_SIZES: Final = {"F8_E5M2": 1, "U16": 2, "U32": 4, "U64": 8}
SIZES: Final = {name: np.dtype(code).itemsize for name, code in NUMPY_TYPES.items()} | OTHER_SIZES


class Entry(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    begin: int  # bytes from the file's beginning
    end: int


class SafetensorsFile:
    """One file. Raises CheckpointError where the header does not fit the bytes, OSError where it cannot be read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 8:
                raise CheckpointError(f"{path}: {size} bytes are too few for a safetensors header")
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        length = int.from_bytes(self._data[:8], "little")
        if length > min(size - 8, MAX_HEADER):
            raise CheckpointError(
                f"{path}: claims a header of {length} bytes, where {size - 8} follow: it is cut short"
            )
        header = _parse_json(path, self._data[8 : 8 + length])
        self.metadata: dict[str, Any] = _expect(path, "__metadata__", header.pop("__metadata__", {}), dict)
        self.entries = {name: _entry(path, name, fields, 8 + length) for name, fields in header.items()}
        self._check_layout(8 + length, size)

    def tensor(self, name: str) -> RawTensor:
        entry = self.entries[name]
        if entry.dtype not in NUMPY_TYPES:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} has type {entry.dtype}, which cannot be read: only "
                f"{', '.join(NUMPY_TYPES)}"
            )
        data = np.frombuffer(self._data, NUMPY_TYPES[entry.dtype], math.prod(entry.shape), entry.begin)
        return RawTensor(name, entry.dtype, entry.shape, data.reshape(entry.shape))

    def _check_layout(self, begin: int, size: int) -> None:
        """Tensors must tile the rest of the file: anything else is damage, or bytes smuggled along."""
        end, previous = begin, "the header"
        for name, entry in sorted(self.entries.items(), key=lambda item: (item[1].begin, item[1].end)):
            if entry.begin != end:
                trouble = "overlaps" if entry.begin < end else "leaves a gap after"
                raise CheckpointError(
                    f"{self.path}: tensor {name!r} begins at byte {entry.begin} and {trouble} {previous}, which ends "
                    f"at {end}"
                )
            end, previous = entry.end, f"tensor {name!r}"
        if end != size:
            trouble = "it is cut short" if end > size else "bytes are left over"
            raise CheckpointError(f"{self.path}: {previous} ends at byte {end}, the file at {size}: {trouble}")


class SafetensorsCheckpoint:
    """A file, or a directory with `model.safetensors` or an index of shards. Names are the files' own."""

    def __init__(self, path: Path) -> None:
        index = path / INDEX_NAME
        if path.is_file():
            self._files = _owners([SafetensorsFile(path)])
        elif index.is_file():
            self._files = _indexed(index)
        elif (path / SINGLE_NAME).is_file():
            self._files = _owners([SafetensorsFile(path / SINGLE_NAME)])
        else:
            raise CheckpointError(f"{path}: there is neither {SINGLE_NAME} nor {INDEX_NAME}")
        self.path = path
        self.metadata: dict[str, Any] = {}
        for file in self._files.values():
            self.metadata |= file.metadata

    def names(self) -> list[str]:
        return list(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def tensor(self, name: str) -> RawTensor:
        if name not in self._files:
            raise CheckpointError(f"{self.path}: there is no tensor {name!r}")
        return self._files[name].tensor(name)


def _owners(files: list[SafetensorsFile]) -> dict[str, SafetensorsFile]:
    owners: dict[str, SafetensorsFile] = {}
    for file in files:
        for name in file.entries:
            if name in owners:
                raise CheckpointError(f"{file.path}: tensor {name!r} is also in {owners[name].path}")
            owners[name] = file
    return owners


def _indexed(index: Path) -> dict[str, SafetensorsFile]:
    """The shards of an index, which must agree with it about who has what."""
    weight_map = _expect(index, "weight_map", _parse_json(index, index.read_bytes()).get("weight_map"), dict)
    for name, shard in weight_map.items():
        # A checkpoint may come from anywhere: it does not get to name files outside its directory.
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{index}: tensor {name!r} is said to be in {shard!r}, which is not a file name")
    files = []
    for shard in sorted(set(weight_map.values())):
        if not (index.parent / shard).is_file():
            raise CheckpointError(f"{index}: the shard {shard} is missing")
        files.append(SafetensorsFile(index.parent / shard))
    owners = _owners(files)
    for name, shard in weight_map.items():
        if name not in owners or owners[name].path.name != shard:
            raise CheckpointError(f"{index}: tensor {name!r} is not in {shard}, as the index says")
    for name, file in owners.items():
        if name not in weight_map:
            raise CheckpointError(f"{index}: tensor {name!r} of {file.path.name} is not in the index")
    return owners


def _parse_json(path: Path, data: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(data.decode(), object_pairs_hook=lambda pairs: _unique(path, pairs))
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, numbers of thousands of digits
        raise CheckpointError(f"{path}: its header is not JSON: {error}") from error
    return _expect(path, "the header", parsed, dict)


def _unique(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise CheckpointError(f"{path}: the header has {twice!r} twice")
    return fields


def _expect(path: Path, what: str, value: Any, kind: type[dict[str, Any]]) -> dict[str, Any]:
    if not isinstance(value, kind):
        raise CheckpointError(f"{path}: {what} is {type(value).__name__}, not an object")
    return value


def _entry(path: Path, name: str, fields: Any, base: int) -> Entry:
    """One line of the header, with offsets made absolute."""
    fields = _expect(path, f"tensor {name!r}", fields, dict)
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in SIZES:
        raise CheckpointError(f"{path}: tensor {name!r} has the unknown type {dtype!r}")
    for what, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
            raise CheckpointError(f"{path}: tensor {name!r} has {what} {numbers!r}, not a list of sizes")
    if len(offsets) != 2:
        raise CheckpointError(f"{path}: tensor {name!r} has data_offsets {offsets!r}, not a begin and an end")
    begin, end = offsets
    if end - begin != math.prod(shape) * SIZES[dtype]:
        raise CheckpointError(
            f"{path}: tensor {name!r} is {dtype} of shape {shape}, {math.prod(shape) * SIZES[dtype]} bytes, but its "
            f"data_offsets {offsets} span {end - begin}"
        )
    return Entry(dtype, tuple(shape), base + begin, base + end)

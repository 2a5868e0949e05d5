"""A model's packed weights: mapped from a file that an earlier start wrote, or packed now, into that file.

    file: arrays, each 64-byte aligned | Header as JSON | length of the JSON, checksum of the JSON, "PAGEWIRE"

The warm path reads no checkpoint: the spec is in the header. What is stale (made of other sources, or by
another version) is packed again; so is what is damaged, and that is said. Where no file can be written, the
weights are packed into memory, which is said as well.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from kernels.cpu.library import Library, source_digest
from protos import model_cache
from worker_svc.models.loader import Model, weights_digest
from worker_svc.models.spec import ModelSpec
from worker_svc.quant.layout import Layout, Matrix, layout
from worker_svc.quant.pack import pack
from worker_svc.quant.plan import described, plan

FORMAT: Final = 2  # raised when the same spec and mode are laid out or rounded otherwise by what is written here
MAGIC: Final = b"PAGEWIRE"
FOOTER: Final = struct.Struct("<QQ8s")
MAX_HEADER: Final = 1 << 24  # bytes


class Header(msgspec.Struct, frozen=True):
    format: int
    kernels: str  # digest of their sources, which decide what packed bytes mean
    mode: str  # a key of MODES
    stamp: list[list[str | int]]  # of the checkpoint's files
    weights: str  # digest of the checkpoint
    spec: ModelSpec
    quantization: str  # what the checkpoint is quantized by; empty: it is not
    matrices: dict[str, Matrix]
    nbytes: int
    checksum: int  # of the arrays


@dataclass(frozen=True)
class PackedModel:
    spec: ModelSpec
    mode: str
    weights: str  # digest of the checkpoint
    quantization: str  # what the checkpoint is quantized by; empty: it is not
    layout: Layout
    arrays: dict[str, NDArray[Any]]  # views of one mapping, which lives as long as they do

    @property
    def about(self) -> str:
        """What is quantized and how it is multiplied, in one line: its mode, or what its checkpoint's matrices are."""
        if not self.quantization:
            return self.mode
        return f"{self.quantization} ({'; '.join(described(self.layout.matrices))})"


class Damaged(Exception):
    """A packed file that cannot be used although it looks new, and why."""


class PackedStore:
    """Packed weights of one checkpoint, in one of MODES."""

    def __init__(self, path: Path, mode: str, home: Path, library: Library) -> None:
        """Raises OSError where there is nothing at `path`."""
        sources = [path]
        if path.is_dir():
            sources = [
                file
                for pattern in ("config.json", "quant*_config.json", "*.safetensors*")
                for file in sorted(path.glob(pattern))
            ]
        self._path, self._mode, self._library = path, mode, library
        self._stamp = model_cache.stamp(sources)
        self._places = [directory / f"weights-{mode or 'bf16'}" for directory in model_cache.directories(path, home)]

    def read(self) -> PackedModel | None:
        """What an earlier start packed; None where there is nothing that can be used."""
        for place in self._places:
            try:
                packed = self._read(place)
            except (Damaged, OSError) as error:
                _say(f"{place}: {error}: the weights are packed again")
                continue
            if packed is not None:
                return packed
        return None

    def pack(self, model: Model, threads: int, progress: Callable[[float], None]) -> PackedModel:
        """Raises CheckpointError for weights that cannot be packed."""
        began = time.perf_counter()
        made = layout(model.spec, plan(model, self._mode), self._library)
        weights, quantization = weights_digest(self._path), model.quantization
        with self._storage(made.nbytes) as (memory, descriptor, where):
            arrays = _views(memory, made)
            pack(model, made, arrays, self._library, threads, progress)
            if descriptor is not None:
                checksum = self._library.checksum(np.frombuffer(memory, np.uint8, made.nbytes))
                version = FORMAT, source_digest(), self._mode, self._stamp
                header = Header(*version, weights, model.spec, quantization, dict(made.matrices), made.nbytes, checksum)
                self._write_header(descriptor, header)
                _forget_embedding(memory, made)
        taken = time.perf_counter() - began
        packed = PackedModel(model.spec, self._mode, weights, quantization, made, arrays)
        what = "" if packed.quantization else f" as {self._mode or 'bfloat16'}"
        _say(f"packed {self._path.name}{what} in {taken:.1f} s, into {where}")
        return packed

    @contextlib.contextmanager
    def _storage(self, nbytes: int) -> Iterator[tuple[mmap.mmap, int | None, str]]:
        """Zeroed memory: of a file that appears in the first place that takes it, else nobody's.

        Blocks are reserved first, so that a full disk is an error here and no signal in the middle of packing.
        """
        troubles = []
        for place in self._places:
            with contextlib.ExitStack() as attempt:
                try:
                    descriptor = attempt.enter_context(model_cache.replacing(place))
                    os.posix_fallocate(descriptor, 0, nbytes)
                    memory = mmap.mmap(descriptor, nbytes)
                except OSError as error:
                    attempt.pop_all().__exit__(OSError, error, error.__traceback__)
                    troubles.append(f"{place.parent}: {error.strerror or error}")
                    continue
                yield memory, descriptor, str(place)
                try:
                    attempt.close()
                except OSError as error:  # what is packed is in memory all the same
                    _say(f"packed weights are not kept: {place}: {error.strerror or error}")
                return
        _say(f"packed weights are not kept, so every start packs them: {'; '.join(troubles)}")
        yield mmap.mmap(-1, nbytes), None, "memory"

    def _write_header(self, descriptor: int, header: Header) -> None:
        data = msgspec.json.encode(header)
        checksum = self._library.checksum(np.frombuffer(data, np.uint8))
        os.pwrite(descriptor, data + FOOTER.pack(len(data), checksum, MAGIC), header.nbytes)

    def _read(self, place: Path) -> PackedModel | None:
        """None where there is no such file, or one of other sources or of another version."""
        try:
            with place.open("rb") as file:
                memory = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=mmap.PROT_READ)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError as error:  # an empty file
            raise Damaged(str(error)) from error
        header = self._header(memory)
        if header is None or (header.format, header.kernels) != (FORMAT, source_digest()):
            return None
        if header.mode != self._mode or not self._is_of_our_sources(header):
            return None
        made = layout(header.spec, header.matrices, self._library)
        if made.nbytes != header.nbytes:
            return None
        if self._library.checksum(np.frombuffer(memory, np.uint8, made.nbytes)) != header.checksum:
            raise Damaged("its bytes are not those that were written")
        _forget_embedding(memory, made)
        return PackedModel(header.spec, header.mode, header.weights, header.quantization, made, _views(memory, made))

    def _is_of_our_sources(self, header: Header) -> bool:
        """An image's packed weights were made where inodes and ctimes were others: then the content tells."""
        if header.stamp == self._stamp:
            return True
        return model_cache.alike(header.stamp, self._stamp) and header.weights == weights_digest(self._path)

    def _header(self, memory: mmap.mmap) -> Header | None:
        """None where another version wrote it."""
        if len(memory) < FOOTER.size or memory[-len(MAGIC) :] != MAGIC:
            raise Damaged("no file of packed weights, or cut short")
        length, checksum, _ = FOOTER.unpack(memory[-FOOTER.size :])
        end = len(memory) - FOOTER.size
        if length > min(end, MAX_HEADER):
            raise Damaged(f"claims a header of {length} bytes")
        data = memory[end - length : end]
        if self._library.checksum(np.frombuffer(data, np.uint8)) != checksum:
            raise Damaged("its header is not the one that was written")
        try:
            header = msgspec.json.decode(data, type=Header)
        except msgspec.DecodeError:  # it is what somebody wrote
            return None
        if header.nbytes != end - length:
            raise Damaged(f"{end - length} bytes of arrays, not the {header.nbytes} that were written")
        return header


def _forget_embedding(memory: mmap.mmap, made: Layout) -> None:
    """A step reads a few rows of it: those come back from the file as they are touched, and the others take no memory
    of this process.
    """
    if array := made.arrays.get("embed"):
        begin = -(-array.offset // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (array.offset + array.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if begin < end:
            memory.madvise(mmap.MADV_DONTNEED, begin, end - begin)


def _views(memory: mmap.mmap, made: Layout) -> dict[str, NDArray[Any]]:
    views = {}
    for name, array in made.arrays.items():
        dtype = np.dtype(array.dtype)
        flat = np.frombuffer(memory, dtype, array.nbytes // dtype.itemsize, array.offset)
        views[name] = flat.reshape(array.shape)
    return views


def _say(text: str) -> None:
    print(f"pagewire worker: {text}", file=sys.stderr, flush=True)

"""The header of a GGUF file, versions 2 and 3: metadata and tensor table. Standard library only.

The frontend reads the tokenizer from it and the worker the weights. Neither trusts the file: every length is checked
against the bytes that are there before anything is read or allocated. Format: github.com/ggml-org/ggml, docs/gguf.md.

Not named `gguf.py`: this folder is on the import path for the generated stubs, and the PyPI package of that name, which
transformers asks for, must stay visible.

    magic "GGUF" | version u32 | tensors u64 | pairs u64 | pairs … | tensor infos … | padding | tensor data …
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn

MAGIC: Final = b"GGUF"
MAX_DIMS: Final = 4
MAX_NESTING: Final = 4  # arrays of arrays; nobody writes deeper ones
# One flipped bit in a count of a large file still fits that file: these keep it from eating the memory.
MAX_ELEMENTS: Final = 1 << 24
MAX_STRING: Final = 1 << 26  # bytes

U32: Final = struct.Struct("<I")
U64: Final = struct.Struct("<Q")

ARRAY: Final = 9
STRING: Final = 8
BOOL: Final = 7
SCALARS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
# The least bytes that an element of each type can take: a count is believed only if that many are left.
MIN_BYTES: Final = {code: struct.calcsize("<" + char) for code, char in SCALARS.items()} | {STRING: 8, ARRAY: 12}
MIN_PAIR: Final = 8 + 4 + 1
MIN_TENSOR: Final = 8 + 4 + 4 + 8


class GGUFError(ValueError):
    """A file that is not GGUF, is cut short, or contradicts itself: the message names file, place and trouble."""


class GGMLType(NamedTuple):
    name: str
    block_size: int  # elements that share a block
    block_bytes: int


GGML_TYPES: Final = {
    0: GGMLType("F32", 1, 4),
    1: GGMLType("F16", 1, 2),
    2: GGMLType("Q4_0", 32, 18),
    3: GGMLType("Q4_1", 32, 20),
    6: GGMLType("Q5_0", 32, 22),
    7: GGMLType("Q5_1", 32, 24),
    8: GGMLType("Q8_0", 32, 34),
    9: GGMLType("Q8_1", 32, 36),
    10: GGMLType("Q2_K", 256, 84),
    11: GGMLType("Q3_K", 256, 110),
    12: GGMLType("Q4_K", 256, 144),
    13: GGMLType("Q5_K", 256, 176),
    14: GGMLType("Q6_K", 256, 210),
    15: GGMLType("Q8_K", 256, 292),
    16: GGMLType("IQ2_XXS", 256, 66),
    17: GGMLType("IQ2_XS", 256, 74),
    18: GGMLType("IQ3_XXS", 256, 98),
    19: GGMLType("IQ1_S", 256, 50),
    20: GGMLType("IQ4_NL", 32, 18),
    21: GGMLType("IQ3_S", 256, 110),
    22: GGMLType("IQ2_S", 256, 82),
    23: GGMLType("IQ4_XS", 256, 136),
    24: GGMLType("I8", 1, 1),
    25: GGMLType("I16", 1, 2),
    26: GGMLType("I32", 1, 4),
    27: GGMLType("I64", 1, 8),
    28: GGMLType("F64", 1, 8),
    29: GGMLType("IQ1_M", 256, 56),
    30: GGMLType("BF16", 1, 2),
    34: GGMLType("TQ1_0", 256, 54),
    35: GGMLType("TQ2_0", 256, 66),
    39: GGMLType("MXFP4", 32, 17),
}


@dataclass(frozen=True)
class TensorInfo:
    name: str
    shape: tuple[int, ...]  # row-major, outermost first (the file has them innermost first)
    ggml_type: int  # a key of GGML_TYPES
    offset: int  # bytes from the file's beginning
    nbytes: int


@dataclass(frozen=True)
class GGUFFile:
    version: int
    metadata: dict[str, Any]  # int, float, bool, str, or a list of one of these
    tensors: dict[str, TensorInfo]  # in the file's order


def read(path: str | os.PathLike[str]) -> GGUFFile:
    """Parses the header at `path`. Raises GGUFError for an unsound file, OSError for one that cannot be opened."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < 24:
            raise GGUFError(f"{path}: {size} bytes are too few for a GGUF header (24)")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Parser(Path(path), data).parse()


class _Parser:
    """A cursor over the mapped file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.size, self.at = path, data, len(data), 0
        self.where = "header"  # what is being read, for messages
        self.readers: dict[int, Callable[[int], Any]] = {
            code: self._scalar_reader(char) for code, char in SCALARS.items() if code != BOOL
        }
        self.readers |= {BOOL: self._bool, STRING: lambda _: self._string(), ARRAY: self._array}

    def parse(self) -> GGUFFile:
        magic = self._take(4)
        if magic != MAGIC:
            self._fail(f"the magic is {magic!r}, not {MAGIC!r}")
        version = self._u32()
        if version not in (2, 3):
            hint = " (a big-endian file?)" if version and not version & 0xFFFF else ""
            self._fail(f"version {version} is not 2 or 3{hint}")
        num_tensors = self._count(self._u64(), MIN_TENSOR, "tensors")
        num_pairs = self._count(self._u64(), MIN_PAIR, "metadata pairs")
        metadata = self._metadata(num_pairs)
        return GGUFFile(version, metadata, self._tensors(num_tensors, self._alignment(metadata)))

    def _metadata(self, num_pairs: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for index in range(num_pairs):
            self.where = f"key of metadata pair {index}"
            key = self._string()
            self.where = f"metadata {key!r}"
            if key in metadata:
                self._fail("occurs twice")
            metadata[key] = self._value(self._u32(), 0)
        return metadata

    def _alignment(self, metadata: dict[str, Any]) -> int:
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            self.where = "metadata 'general.alignment'"
            self._fail(f"{alignment!r} is not a power of two")
        return alignment

    def _tensors(self, num_tensors: int, alignment: int) -> dict[str, TensorInfo]:
        """The table; its offsets become absolute once the table's end, which they count from, is known."""
        table: dict[str, TensorInfo] = {}
        for index in range(num_tensors):
            self.where = f"name of tensor {index}"
            name = self._string()
            self.where = f"tensor {name!r}"
            if name in table:
                self._fail("occurs twice")
            table[name] = self._tensor(name, alignment)
        base = -(-self.at // alignment) * alignment
        end, previous = base, "the header"
        tensors: dict[str, TensorInfo] = {}
        for info in table.values():
            tensors[info.name] = TensorInfo(info.name, info.shape, info.ggml_type, base + info.offset, info.nbytes)
        for info in sorted(tensors.values(), key=lambda info: info.offset):
            self.where = f"tensor {info.name!r}"
            if info.offset < end:
                self._fail(f"begins at byte {info.offset}, inside {previous}, which ends at {end}")
            end, previous = info.offset + info.nbytes, f"tensor {info.name!r}"
            if end > self.size:
                self._fail(f"ends at byte {end}, the file at {self.size}: it is cut short")
        return tensors

    def _tensor(self, name: str, alignment: int) -> TensorInfo:
        num_dims = self._u32()
        if num_dims > MAX_DIMS:
            self._fail(f"has {num_dims} dimensions, more than {MAX_DIMS}")
        shape = tuple(self._u64() for _ in range(num_dims))[::-1]
        code = self._u32()
        offset = self._u64()
        kind = GGML_TYPES.get(code)
        if kind is None:
            self._fail(f"has the unknown type {code}")
        if 0 in shape or (shape and shape[-1] % kind.block_size):
            self._fail(f"of type {kind.name} has shape {shape}: rows must be multiples of {kind.block_size}, not 0")
        if offset % alignment:
            self._fail(f"has offset {offset}, not a multiple of the alignment {alignment}")
        return TensorInfo(name, shape, code, offset, math.prod(shape) // kind.block_size * kind.block_bytes)

    def _value(self, code: int, depth: int) -> Any:
        reader = self.readers.get(code)
        if reader is None:
            self._fail(f"has the unknown value type {code}")
        return reader(depth)

    def _scalar_reader(self, char: str) -> Callable[[int], Any]:
        scalar = struct.Struct("<" + char)

        def read_scalar(_: int) -> Any:
            return scalar.unpack(self._take(scalar.size))[0]

        return read_scalar

    def _bool(self, _: int) -> bool:
        return self._booleans(1)[0]

    def _booleans(self, count: int) -> list[bool]:
        data = self._take(count)
        if data.strip(b"\0\1"):
            self._fail("holds a boolean that is neither 0 nor 1")
        return [byte == 1 for byte in data]

    def _array(self, depth: int) -> list[Any]:
        if depth >= MAX_NESTING:
            self._fail(f"nests arrays deeper than {MAX_NESTING}")
        code = self._u32()
        count = self._u64()
        if code not in MIN_BYTES:
            self._fail(f"is an array of the unknown value type {code}")
        if self._count(count, MIN_BYTES[code], "elements") > MAX_ELEMENTS:
            self._fail(f"claims {count} elements, more than {MAX_ELEMENTS}")
        if code == BOOL:
            return self._booleans(count)
        if code == STRING:
            return self._strings(count)
        if code == ARRAY:
            return [self._array(depth + 1) for _ in range(count)]
        layout = f"<{count}{SCALARS[code]}"
        return list(struct.unpack(layout, self._take(struct.calcsize(layout))))

    def _strings(self, count: int) -> list[str]:
        """A vocabulary is most of a header: the one loop here that is written for speed."""
        data, size, at, unpack = self.data, self.size, self.at, U64.unpack_from
        strings: list[str] = []
        for _ in range(count):
            if at + 8 > size:
                self._fail(f"is cut short in its element {len(strings)}")
            begin = at + 8
            at = begin + unpack(data, at)[0]
            if at > size or at - begin > MAX_STRING:
                self._fail(f"has an element {len(strings)} of {at - begin} bytes, where {size - begin} are left")
            strings.append(self._text(data[begin:at]))
        self.at = at
        return strings

    def _string(self) -> str:
        length = self._u64()
        if length > MAX_STRING:
            self._fail(f"claims a text of {length} bytes, more than {MAX_STRING}")
        return self._text(self._take(length))

    def _text(self, data: bytes) -> str:
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            self._fail(f"has text that is not UTF-8: {error.reason} in {data[:40]!r}")

    def _u32(self) -> int:
        return int(U32.unpack(self._take(4))[0])

    def _u64(self) -> int:
        return int(U64.unpack(self._take(8))[0])

    def _count(self, count: int, min_bytes: int, what: str) -> int:
        left = self.size - self.at
        if count * min_bytes > left:
            self._fail(f"claims {count} {what}, which cannot fit the {left} bytes left")
        return count

    def _take(self, count: int) -> bytes:
        if count > self.size - self.at:
            self._fail(f"needs {count} bytes at byte {self.at}, of {self.size} in the file: it is cut short")
        self.at += count
        return self.data[self.at - count : self.at]

    def _fail(self, trouble: str) -> NoReturn:
        raise GGUFError(f"{self.path}: {self.where}: {trouble}")

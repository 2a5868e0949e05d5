"""Files in memory, written straight from the formats' descriptions and not with the code under test."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import Any

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
SCALARS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def value(kind: int | tuple[int, ...], data: Any) -> bytes:
    """One metadata value without its type; an array's kind is (ARRAY, kind of its elements …)."""
    if isinstance(kind, tuple):
        inner = kind[1] if len(kind) == 2 else kind[1:]
        return struct.pack("<IQ", kind[1], len(data)) + b"".join(value(inner, item) for item in data)
    return string(data) if kind == STRING else struct.pack("<" + SCALARS[kind], data)


def pair(key: str, kind: int | tuple[int, ...], data: Any) -> bytes:
    code = kind[0] if isinstance(kind, tuple) else kind
    return string(key) + struct.pack("<I", code) + value(kind, data)


def tensor_info(name: str, shape: Sequence[int], ggml_type: int, offset: int) -> bytes:
    dims = b"".join(struct.pack("<Q", dim) for dim in reversed(shape))
    return string(name) + struct.pack("<I", len(shape)) + dims + struct.pack("<IQ", ggml_type, offset)


def gguf(
    pairs: Sequence[bytes],
    tensors: Sequence[tuple[str, Sequence[int], int, bytes]],
    *,
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    infos, data = b"", b""
    for name, shape, ggml_type, content in tensors:
        data += bytes(-len(data) % alignment)
        infos += tensor_info(name, shape, ggml_type, len(data))
        data += content
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(pairs)) + b"".join(pairs) + infos
    return head + bytes(-len(head) % alignment) + data


def safetensors(
    tensors: Sequence[tuple[str, str, Sequence[int], bytes]], metadata: dict[str, str] | None = None
) -> bytes:
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for name, dtype, shape, content in tensors:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    return with_header(header, data)


def with_header(header: object, data: bytes) -> bytes:
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + data

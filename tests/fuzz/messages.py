"""Messages to break things with: any protobuf message by its descriptor, and bytes changed in the usual bad ways."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

DEEPEST = 4
_TEXTS = (
    "",
    "a",
    "hello world",
    "é漢🙂",
    "\x00",
    "\n",
    "<|im_start|>",
    "{{ 1 / 0 }}",
    "{% for",
    "a" * 2000,
    "\U0010ffff",
)
_NUMBERS = (0, 1, 2, 3, 7, 64, 255, 1024, 1 << 16, (1 << 31) - 1, (1 << 32) - 1, (1 << 63) - 1, (1 << 64) - 1)
_FLOATS = (0.0, 1.0, -1.0, 0.5, 1e-30, 1e30, float("nan"), float("inf"), float("-inf"), -0.0, 1e-6)
_COUNTS = (0, 1, 1, 2, 3, 17, 70)

_BITS = {
    FieldDescriptor.CPPTYPE_INT32: (31, True),
    FieldDescriptor.CPPTYPE_INT64: (63, True),
    FieldDescriptor.CPPTYPE_UINT32: (32, False),
    FieldDescriptor.CPPTYPE_UINT64: (64, False),
}


def message_class(descriptor: Descriptor) -> type[Message]:
    return GetMessageClass(descriptor)


def any_message(descriptor: Descriptor, rng: random.Random, depth: int = 0) -> Message:
    made = message_class(descriptor)()
    share = rng.choice((0.1, 0.3, 0.7))
    for field in descriptor.fields:
        if rng.random() < share and depth < DEEPEST:
            set_field(made, field, rng, depth)
    return made


def set_field(made: Message, field: FieldDescriptor, rng: random.Random, depth: int = 0) -> None:
    """To anything that its type can hold."""
    entry = field.message_type
    if entry and entry.GetOptions().map_entry:
        key, value = entry.fields_by_name["key"], entry.fields_by_name["value"]
        if value.message_type is None:
            for _ in range(rng.choice(_COUNTS)):
                getattr(made, field.name)[_scalar(key, rng)] = _scalar(value, rng)
    elif field.is_repeated:
        made.ClearField(field.name)
        items = getattr(made, field.name)
        items.extend(_value(field, rng, depth) for _ in range(rng.choice(_COUNTS)))
    elif entry:
        getattr(made, field.name).CopyFrom(_value(field, rng, depth))
    else:
        setattr(made, field.name, _scalar(field, rng))


def change_field(made: Message, rng: random.Random) -> Message:
    """The same with one field, at any depth, set to anything or cleared."""
    there: list[FieldDescriptor] = [field for field, _ in made.ListFields()]
    inside = [field for field in there if field.message_type and not field.is_repeated]
    if inside and rng.random() < 0.5:
        change_field(getattr(made, rng.choice(inside).name), rng)
    elif made.DESCRIPTOR.fields:
        field: Any = rng.choice(made.DESCRIPTOR.fields)
        if rng.random() < 0.2:
            made.ClearField(field.name)
        else:
            set_field(made, field, rng)
    return made


def _value(field: FieldDescriptor, rng: random.Random, depth: int) -> Any:
    return any_message(field.message_type, rng, depth + 1) if field.message_type else _scalar(field, rng)


def _scalar(field: FieldDescriptor, rng: random.Random) -> Any:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_BOOL:
            return rng.random() < 0.5
        case FieldDescriptor.CPPTYPE_FLOAT | FieldDescriptor.CPPTYPE_DOUBLE:
            return rng.choice(_FLOATS)
        case FieldDescriptor.CPPTYPE_ENUM:
            assert field.enum_type
            return rng.choice(field.enum_type.values).number
        case FieldDescriptor.CPPTYPE_STRING:
            text = rng.choice(_TEXTS)
            return text.encode() if field.type == FieldDescriptor.TYPE_BYTES else text
    bits, signed = _BITS[field.cpp_type]
    number = rng.choice(_NUMBERS) % (1 << bits)
    return -number if signed and rng.random() < 0.3 else number


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to four changes."""
    for _ in range(rng.randrange(1, 5)):
        data = rng.choice(_CHANGES)(data, rng)
    return data[: 1 << 16]


def _flip(data: bytes, rng: random.Random) -> bytes:
    if not data:
        return data
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :]


def _cut(data: bytes, rng: random.Random) -> bytes:
    begin, end = _piece(data, rng)
    return data[:begin] + data[end:]


def _truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _repeat(data: bytes, rng: random.Random) -> bytes:
    begin, end = _piece(data, rng)
    return data[:end] + data[begin:end] * rng.choice((1, 2, 50)) + data[end:]


def _insert(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data) + 1)
    what = rng.choice((rng.randbytes(rng.randrange(1, 20)), b"\xff" * 10, b"\x00" * 8, b"\xff\xff\xff\xff\x0f"))
    return data[:place] + what + data[place:]


def _piece(data: bytes, rng: random.Random) -> tuple[int, int]:
    begin = rng.randrange(len(data) + 1)
    return begin, min(len(data), begin + rng.randrange(1, 30))


_CHANGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (_flip, _flip, _cut, _truncate, _repeat, _insert)

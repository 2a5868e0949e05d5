"""Schemas of varied features, and grammars that are made to cost a server dearly. The texts are our own."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any, Final

from pagewire.v1 import inference_pb2 as pb

Schema = dict[str, Any]

LEAVES: Final[list[Schema]] = [
    *({"type": kind} for kind in ("string", "integer", "number", "boolean", "null")),
    {"type": "string", "maxLength": 40},
    {"type": "string", "minLength": 3, "maxLength": 3},
    {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3,6}$"},
    *({"type": "string", "format": name} for name in ("date", "date-time", "time", "uuid", "email", "ipv4", "uri")),
    {"type": "integer", "minimum": -7, "maximum": 1200},
    {"type": "integer", "exclusiveMinimum": 0, "multipleOf": 5},
    {"type": "number", "minimum": 0.5, "maximum": 99.25},
    {"enum": ["red", "green", 3, None]},
    {"const": {"a": [1, 2]}},
    {"type": ["string", "null"]},
    {"anyOf": [{"type": "integer"}, {"type": "string", "maxLength": 5}]},
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 9}]},
    {"oneOf": [{"type": "boolean"}, {"type": "integer"}]},
]
FRAMES: Final[list[Callable[[Schema], Schema]]] = [
    lambda leaf: leaf,
    lambda leaf: {"type": "array", "items": leaf, "minItems": 1, "maxItems": 4},
    lambda leaf: {"type": "array", "prefixItems": [leaf, {"type": "integer"}], "items": False, "minItems": 2},
    lambda leaf: {"type": "object", "properties": {"a": leaf, "b": leaf}, "required": ["a"]},
    lambda leaf: {"type": "object", "properties": {"a": leaf}, "required": ["a"], "additionalProperties": False},
    lambda leaf: {"type": "object", "additionalProperties": leaf},
    lambda leaf: {"type": "object", "patternProperties": {"^x_": leaf}, "additionalProperties": False},
    lambda leaf: {"$defs": {"l": leaf}, "type": "array", "items": {"$ref": "#/$defs/l"}},
    lambda leaf: {"type": "object", "properties": {"v": leaf, "next": {"$ref": "#"}}, "required": ["v"]},
    lambda leaf: {"type": "object", "properties": {"in": {"type": "object", "properties": {"v": leaf}}}},
]
_TREE: Final[Schema] = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 8},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
            },
            "required": ["name", "children"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
# What frames and leaves do not have; some of it no grammar can say, and is refused by name.
SPECIAL: Final[list[Schema]] = [
    _TREE,
    {"enum": [f"item {i}" for i in range(500)]},
    {"enum": ['a "quoted" \\ word', "Zeile\nneu", "é ü 漢字", "\u0007"]},
    {"type": "object", "properties": {"ключ": {"type": "integer"}, 'a"b': {"const": 1}}, "required": ["ключ", 'a"b']},
    {"type": "object", "minProperties": 1, "maxProperties": 3, "additionalProperties": {"type": "integer"}},
    {"type": "object", "propertyNames": {"pattern": "^[a-z]{1,6}$"}},
    {"type": "object", "dependentRequired": {"a": ["b"]}, "properties": {"a": {"const": 1}, "b": {"const": 2}}},
    {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
    {"type": "array", "contains": {"const": 7}},
    {"not": {"type": "string"}},
    {"if": {"type": "integer"}, "then": {"minimum": 3}, "else": {"type": "string"}},
    {"type": "number", "multipleOf": 0.25, "minimum": 0, "maximum": 4},
    {"type": "integer", "minimum": 10**12, "maximum": 10**15},
    {"type": "string", "pattern": "^(foo|ba[rz])+$", "maxLength": 12},
    {"type": "string", "pattern": "(?i)yes|no"},
    {"type": "string", "format": "hostname"},
    {"type": "string", "format": "duration"},
    {"type": "string", "format": "ipv6"},
    {"anyOf": [{"properties": {"k": {"const": k}, k: {"type": "integer"}}, "required": ["k", k]} for k in "abc"]},
    {"allOf": [{"properties": {k: {"type": "boolean"}}, "required": [k]} for k in "ab"], "type": "object"},
    {"$ref": "#/$defs/far", "$defs": {"far": {"$ref": "#/$defs/near"}, "near": {"type": "null"}}},
    {"type": "array", "items": {"type": "array", "items": {"type": "array", "maxItems": 1}, "maxItems": 2}},
    {"type": "object", "required": ["undescribed"], "additionalProperties": {"type": "boolean"}},
    {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "t", "description": "d", "type": "boolean"},
]


def all_schemas() -> Iterator[Schema]:
    """Some hundreds: each leaf in each frame, and the special ones."""
    yield from (frame(leaf) for frame, leaf in itertools.product(FRAMES, LEAVES))
    yield from SPECIAL


# More than a grammar may take: of time, of memory, of depth, of tokens that are forced at once.
HOSTILE: Final = {
    "26 patterns at once": pb.StructuredOutput(
        json_schema=json.dumps({"allOf": [{"pattern": f".*{c}.*"} for c in "abcdefghijklmnopqrstuvwxyz"]})
    ),
    "multiples of a prime": pb.StructuredOutput(json_schema='{"type": "integer", "multipleOf": 999983}'),
    "a deep schema": pb.StructuredOutput(json_schema='{"properties": {"a":' * 5000 + "{}" + "}}" * 5000),
    "deep parentheses": pb.StructuredOutput(regex="(" * 5000 + "a" + ")" * 5000),
    "a long run": pb.StructuredOutput(regex="[xy]a{10000000}"),
    "a deep grammar": pb.StructuredOutput(grammar="start: " + "(" * 5000 + '"a"' + ")" * 5000),
    "references in a circle": pb.StructuredOutput(
        json_schema='{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}'
    ),
    "a huge schema": pb.StructuredOutput(json_schema=json.dumps({"enum": [f"{i:064}" for i in range(8000)]})),
}

"""From what a client may give to one of llguidance's grammars, or the place where it is none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

from llguidance import LLMatcher, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark

from protos.engine_wire import Grammar
from scheduler_svc.grammars import structural_tag
from scheduler_svc.grammars.errors import GrammarError, one_line
from scheduler_svc.grammars.structural_tag import json_options
from scheduler_svc.grammars.vocabulary import LIMITS

MAX_PLACES: Final = 200  # subschemas that are looked at for the place of an error
_MAPS: Final = ("properties", "patternProperties", "$defs", "definitions")
_LISTS: Final = ("allOf", "anyOf", "oneOf", "prefixItems")
_ONE: Final = ("items", "additionalProperties", "additionalItems", "not", "if", "then", "else")


def lower(grammar: Grammar) -> str:
    """Raises GrammarError. What it returns may still be no grammar, see `trouble`."""
    match grammar.kind:
        case "json_schema":
            return _json_schema(parse_json(grammar.text))
        case "json":
            return _json_schema({"type": "object"})
        case "regex":
            return LLMatcher.grammar_from_regex(grammar.text)
        case "ebnf":
            return _ebnf(grammar.text)
        case "choice":
            return LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, parse_json(grammar.text))))
        case "structural_tag":
            return LLMatcher.grammar_from_lark(structural_tag.to_lark(parse_json(grammar.text)))
        case _:
            raise GrammarError(f"{grammar.kind!r} is no kind of grammar")


def parse_json(text: str) -> Any:
    """Raises GrammarError with line and column."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise GrammarError(f"line {error.lineno} column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise GrammarError("is nested too deeply") from None


def trouble(grammar: Grammar, lowered: str, tokenizer: LLTokenizer | None) -> str:
    """Why it cannot be compiled, with the place; empty if it can."""
    problem = _problem(lowered, tokenizer)
    if not problem or grammar.kind != "json_schema":
        return problem
    pointer = _place(json.loads(grammar.text), problem)
    return f"at {pointer or 'the root'}: {problem}"


def _problem(lowered: str, tokenizer: LLTokenizer | None) -> str:
    is_error, messages = LLMatcher.validate_grammar_with_warnings(lowered, tokenizer, limits=LIMITS)
    return one_line(messages[0]) if is_error else ""


def _json_schema(schema: Any) -> str:
    if not isinstance(schema, dict | bool):
        raise GrammarError("is no JSON schema: that is an object, or true or false")
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    try:
        return LLMatcher.grammar_from_json_schema({**schema, "x-guidance": json_options(schema)})
    except ValueError as error:
        raise GrammarError(str(error)) from None


def _ebnf(text: str) -> str:
    try:
        return LLMatcher.grammar_from_lark(any_to_lark(text))
    except RecursionError:
        raise GrammarError("is nested too deeply") from None
    except Exception as error:  # the converter raises bare Exceptions
        raise GrammarError(f"is no GBNF: {one_line(str(error))}") from None


def _place(schema: Any, problem: str) -> str:
    """JSON pointer of the smallest subschema that has the same problem by itself. References stay within $defs."""
    pointer, left = "", MAX_PLACES
    shared = {key: schema[key] for key in ("$defs", "definitions") if isinstance(schema, dict) and key in schema}
    while True:
        for step, inner in _subschemas(schema):
            left -= 1
            if left < 0:
                return pointer
            alone = {**shared, **inner}
            lowered = LLMatcher.grammar_from_json_schema(alone)
            if _problem(lowered, None) == problem and alone != schema:
                pointer, schema = pointer + step, inner
                break
        else:
            return pointer


def _subschemas(schema: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """What stands directly in it, with the way there."""
    if not isinstance(schema, dict):
        return
    found: list[tuple[str, Any]] = [(f"/{key}", schema[key]) for key in _ONE if key in schema]
    for key in _MAPS:
        if isinstance(named := schema.get(key), dict):
            found += [(f"/{key}/{_escape(name)}", inner) for name, inner in named.items()]
    for key in _LISTS:
        if isinstance(listed := schema.get(key), list):
            found += [(f"/{key}/{i}", inner) for i, inner in enumerate(listed)]
    yield from ((step, inner) for step, inner in found if isinstance(inner, dict))


def _escape(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")

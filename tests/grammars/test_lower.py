"""What is taken as a grammar, and where in it is said to be wrong what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from llguidance import LLTokenizer

from protos.engine_wire import Grammar
from scheduler_svc.grammars import lower, vocabulary
from scheduler_svc.grammars.checker import check
from scheduler_svc.grammars.errors import GrammarError


@pytest.fixture(scope="module")
def tokenizer() -> LLTokenizer:
    return vocabulary.load("fake:vocab=300")


def schema(value: Any) -> Grammar:
    return Grammar("json_schema", json.dumps(value))


def tag(**form: Any) -> Grammar:
    return Grammar("structural_tag", json.dumps({"type": "structural_tag", "format": form}))


CONTENT = {"type": "json_schema", "json_schema": {"type": "object"}}
TAGS = [{"type": "tag", "begin": "<f=a>", "content": CONTENT, "end": "</f>"}]


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        (Grammar("json_schema", '{"a": 1,}'), "line 1 column 9"),
        (schema([]), "is no JSON schema"),
        (schema({"properties": {"a/b": {"items": {"uniqueItems": True}}}}), "at /properties/a~1b/items: "),
        (schema({"anyOf": [{"type": "string"}, {"type": "strin"}]}), "at /anyOf/1: "),
        (schema({"$ref": "#/$defs/x"}), "/$defs/x"),
        (schema({"$ref": "#"}), "nothing satisfies it"),
        (Grammar("json_schema", "[" * 100_000), "nested too deeply"),
        (Grammar("regex", "(a"), "unclosed group"),
        (Grammar("ebnf", 'start: "a" b'), "1("),
        (Grammar("ebnf", 'root ::= "a" b'), "Rule 'b' not found"),
        (Grammar("ebnf", 'root ::= ("a"\n'), "line 2"),
        (Grammar("structural_tag", "[]"), "is no structural tag"),
        (tag(type="sequence", elements=[]), "/format/type: 'sequence' is not served"),
        (tag(type="triggered_tags", triggers=[""], tags=TAGS), "/format/triggers/0"),
        (tag(type="triggered_tags", triggers=["<"], tags=TAGS, excludes=["a"]), "/format/excludes: is not served"),
        (tag(type="triggered_tags", triggers=["<"], tags=TAGS, at_least_one=1), "/format/at_least_one: must be true"),
        (tag(type="triggered_tags", triggers=["x"], tags=TAGS), "/format/tags/0/begin"),
        (tag(type="tag", begin="<", content={"type": "any_text"}, end=">"), "/format/content/type: 'any_text'"),
        (Grammar("prose"), "no kind of grammar"),
    ],
)
def test_what_is_refused_says_where(grammar: Grammar, words: str, tokenizer: LLTokenizer) -> None:
    report = check(grammar, tokenizer)
    assert words in report.trouble
    assert not report.lowered


@pytest.mark.parametrize(
    "grammar",
    [
        schema(True),
        schema({"type": "object", "properties": {"a": {"$ref": "#"}}}),
        Grammar("json"),
        Grammar("regex", "[a-z]+/[0-9]"),
        Grammar("choice", '["é\\n", "\\"", "/"]'),
        Grammar("ebnf", "start: /a+/ b\nb: /b/"),
        Grammar("ebnf", 'root ::= "a" [0-9]*'),
        Grammar("structural_tag", json.dumps({"structures": [{**TAGS[0], "schema": {}}], "triggers": ["<f="]})),
        tag(type="triggered_tags", triggers=["<f="], tags=TAGS, at_least_one=True, stop_after_first=True),
        tag(type="tag", begin="", content={"type": "grammar", "grammar": "start: /x/"}, end="."),
    ],
)
def test_what_is_taken(grammar: Grammar, tokenizer: LLTokenizer) -> None:
    report = check(grammar, tokenizer)
    assert not report.trouble
    assert report.lowered


def test_a_kind_is_asked_for_by_name() -> None:
    with pytest.raises(GrammarError, match="'prose' is no kind"):
        lower.lower(Grammar("prose"))

"""Structural tags: free text in which tags open that hold something of a grammar. As xgrammar and vLLM write them.

{"structures": [{"begin", "schema", "end"}, …], "triggers": […]}                              (the older form)
{"type": "structural_tag", "format": {"type": "triggered_tags", "triggers": […],
  "tags": [{"type": "tag", "begin", "content": {"type": "json_schema", "json_schema"}, "end"}, …],
  "at_least_one", "stop_after_first"}}

Of the newer form: `tag`, `triggered_tags`, and as a tag's content `json_schema`, `regex`, `grammar`, `const_string`.
Whatever else it knows is refused by its place.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from llguidance import regex_to_lark

from scheduler_svc.grammars.errors import GrammarError

# Between two tokens of JSON: nothing, a space, or a line break with its indent. Without a bound a model may write white
# space until its last token. A schema's `x-guidance` overrides it.
JSON_DEFAULTS: Final = {"whitespace_flexible": True, "whitespace_pattern": r"(\x20|\x0A[\x20\x09]{0,40})"}
_TEXT: Final = r"/(.|\n)*/"
_FLAGS: Final = ("at_least_one", "stop_after_first")


class Tag(NamedTuple):
    begin: str
    content: str  # a Lark expression
    end: str


def to_lark(given: Any) -> str:
    """Raises GrammarError with the place."""
    if not isinstance(given, dict):
        raise GrammarError("is no structural tag: that is an object")
    if given.get("type") == "structural_tag":
        return _from_format(_field(given, "", "format", dict), "/format")
    tags = {
        place: Tag(_text(one, place, "begin"), _json(one, place, "schema"), _text(one, place, "end"))
        for place, one in _each(given, "", "structures")
    }
    return _triggered([*tags.values()], _triggers(given, "", tags), at_least_one=False, stop_after_first=False)


def _from_format(form: dict[str, Any], place: str) -> str:
    match form.get("type"):
        case "triggered_tags":
            _known(form, place, {"type", "triggers", "tags", *_FLAGS})
            tags = {at: _tag(one, at) for at, one in _each(form, place, "tags")}
            first, only = (_flag(form, place, name) for name in _FLAGS)
            return _triggered([*tags.values()], _triggers(form, place, tags), at_least_one=first, stop_after_first=only)
        case "tag":
            return f"start: {_body(_tag(form, place), '')}\n"
        case kind:
            raise GrammarError(f"{place}/type: {kind!r} is not served; only 'triggered_tags' and 'tag' are")


def _triggered(tags: Sequence[Tag], triggers: Sequence[str], *, at_least_one: bool, stop_after_first: bool) -> str:
    """Text is lazy up to the first trigger in it; what follows has to be one of that trigger's tags."""
    rules, options = [f"TEXT: {_TEXT}"], []
    for i, trigger in enumerate(triggers):
        own = [tag for tag in tags if tag.begin.startswith(trigger)]
        bodies = " | ".join(_body(tag, trigger) for tag in own)
        rules.append(f"trigger_{i}[lazy]: TEXT {json.dumps(trigger)}")
        rules.append(f"tag_{i}: trigger_{i} ({bodies})")
        options.append(f"tag_{i}")
    any_tag = f"({' | '.join(options)})"
    if at_least_one:  # it begins with one
        first = " | ".join(_body(tag, "") for tag in tags)
        start = f"({first})" if stop_after_first else f"({first}) {any_tag}* TEXT"
    else:
        start = f"TEXT | {any_tag}" if stop_after_first else f"{any_tag}* TEXT"
    return "\n".join([f"start: {start}", *rules]) + "\n"


def _body(tag: Tag, trigger: str) -> str:
    """The tag behind its trigger."""
    rest = tag.begin[len(trigger) :]
    parts = [json.dumps(rest) if rest else "", tag.content, json.dumps(tag.end) if tag.end else ""]
    return " ".join(part for part in parts if part)


def _tag(form: Any, place: str) -> Tag:
    if not isinstance(form, dict) or form.get("type", "tag") != "tag":
        raise GrammarError(f"{place}: must be an object of type 'tag'")
    _known(form, place, {"type", "begin", "content", "end"})
    content, at = _field(form, place, "content", dict), f"{place}/content"
    match content.get("type"):
        case "json_schema":
            lark = _json(content, at, "json_schema")
        case "regex":
            lark = f"/{regex_to_lark(_text(content, at, 'pattern'), '')}/"
        case "grammar":
            lark = "%lark {\n" + _text(content, at, "grammar") + "\n}"
        case "const_string":
            lark = json.dumps(_text(content, at, "value"))
        case kind:
            served = "'json_schema', 'regex', 'grammar' and 'const_string'"
            raise GrammarError(f"{at}/type: {kind!r} is not served; only {served} are")
    return Tag(_text(form, place, "begin"), lark, _text(form, place, "end"))


def _json(form: Any, place: str, name: str) -> str:
    schema = form.get(name) if isinstance(form, dict) else None
    if not isinstance(schema, dict):
        raise GrammarError(f"{place}/{name}: must be a JSON schema, which is an object")
    return f"%json {json.dumps({**schema, 'x-guidance': json_options(schema)})}"


def json_options(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema's `x-guidance`, and what holds without."""
    given = schema.get("x-guidance", {})
    if not isinstance(given, dict):
        raise GrammarError("/x-guidance: must be an object")
    if given.get("whitespace_flexible") is False:
        return given  # a pattern would bring white space back
    return {**JSON_DEFAULTS, **given}


def _triggers(form: dict[str, Any], place: str, tags: dict[str, Tag]) -> list[str]:
    """Each begins some tag, and each tag begins with one."""
    triggers = _field(form, place, "triggers", list)
    for i, trigger in enumerate(triggers):
        if not isinstance(trigger, str) or not trigger:
            raise GrammarError(f"{place}/triggers/{i}: must be a string that is not empty")
    if not triggers:
        raise GrammarError(f"{place}/triggers: is empty")
    for at, tag in tags.items():
        if not tag.begin.startswith(tuple(triggers)):
            raise GrammarError(f"{at}/begin: begins with none of the triggers")
    for i, trigger in enumerate(triggers):
        if not any(tag.begin.startswith(trigger) for tag in tags.values()):
            raise GrammarError(f"{place}/triggers/{i}: begins no tag")
    return list(triggers)


def _each(form: dict[str, Any], place: str, name: str) -> list[tuple[str, Any]]:
    listed = _field(form, place, name, list)
    if not listed:
        raise GrammarError(f"{place}/{name}: is empty")
    return [(f"{place}/{name}/{i}", one) for i, one in enumerate(listed)]


def _text(form: Any, place: str, name: str) -> str:
    return str(_field(form, place, name, str))


def _field(form: Any, place: str, name: str, kind: type) -> Any:
    if not isinstance(form, dict) or not isinstance(form.get(name), kind):
        names = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
        raise GrammarError(f"{place}/{name}: must be {names[kind]}")
    return form[name]


def _flag(form: dict[str, Any], place: str, name: str) -> bool:
    return bool(_field(form, place, name, bool)) if name in form else False


def _known(form: dict[str, Any], place: str, names: set[str]) -> None:
    for name in sorted(form.keys() - names):
        raise GrammarError(f"{place}/{name}: is not served; leave it unset")

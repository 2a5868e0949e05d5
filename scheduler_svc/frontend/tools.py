"""Tools that a chat may call: as templates write them, and as a grammar where one has to be called."""

from __future__ import annotations

import json
import re
from typing import Any, Final

from pagewire.v1 import inference_pb2 as pb

from protos.engine_wire import Grammar
from scheduler_svc.frontend.chat_template import ChatTemplate
from scheduler_svc.frontend.checks import Violations
from scheduler_svc.frontend.limits import MAX_GRAMMAR_BYTES, MAX_TOOLS

FIELD: Final = "chat.tools"
CHOICE: Final = "chat.tool_choice"
MODES: Final = ("", "auto", "none", "required")
_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_TAG: Final = "<tool_call>"  # of Hermes, Qwen and many after them


def check(chat: pb.ChatMessages, template: ChatTemplate, violations: Violations) -> None:
    names = [tool.name for tool in chat.tools]
    if len(names) > MAX_TOOLS:
        violations.add(FIELD, f"has {len(names)} tools; at most {MAX_TOOLS}")
    elif (size := sum(tool.ByteSize() for tool in chat.tools)) > MAX_GRAMMAR_BYTES:
        violations.add(FIELD, f"have {size} bytes; at most {MAX_GRAMMAR_BYTES}")
    elif names and not template.knows_tools:
        violations.add(FIELD, "the model's chat template has no place for tools")
    else:
        for i, tool in enumerate(chat.tools):
            if not _NAME.fullmatch(tool.name) or tool.name in MODES:
                violations.add(
                    f"{FIELD}[{i}].name", "must be 1 to 64 of A-Z a-z 0-9 _ -, and none of tool_choice's words"
                )
            elif tool.name in names[:i]:
                violations.add(f"{FIELD}[{i}].name", f"{tool.name!r} is another tool's, too")
            _object(f"{FIELD}[{i}].parameters", tool.parameters, violations)
    if chat.tool_choice not in (*MODES, *names):
        violations.add(CHOICE, "must be auto, none, required, or the name of one of the tools")
    elif chat.tool_choice == "required" and not names:
        violations.add(CHOICE, "is required, and there are no tools")
    for i, message in enumerate(chat.messages):
        for j, call in enumerate(message.tool_calls):
            _object(f"chat.messages[{i}].tool_calls[{j}].arguments", call.arguments, violations)


def grammar(chat: pb.ChatMessages, template: ChatTemplate | None, violations: Violations) -> Grammar | None:
    """Of the calls that the output has to be one of; None where it need not be any, or where `check` says why not."""
    if not chat.tools or chat.tool_choice in ("", "auto", "none"):
        return None
    if template is None or _TAG not in template.source:
        violations.add(CHOICE, f"the model's chat template writes no {_TAG}; only auto and none go with it")
        return None
    try:
        tags = [_tag(tool) for tool in chat.tools if chat.tool_choice in ("required", tool.name)]
    except (ValueError, RecursionError):
        return None
    form = {
        "type": "triggered_tags", "triggers": [_TAG], "tags": tags, "at_least_one": True, "stop_after_first": True,
    }  # fmt: skip
    return Grammar("structural_tag", json.dumps({"type": "structural_tag", "format": form}))


def _tag(tool: pb.Tool) -> dict[str, Any]:
    return {
        "type": "tag",
        "begin": f'{_TAG}\n{{"name": "{tool.name}", "arguments": ',
        "content": {"type": "json_schema", "json_schema": _schema(tool)},
        "end": f"}}\n{_TAG.replace('<', '</')}",
    }


def described(chat: pb.ChatMessages) -> list[dict[str, Any]] | None:
    """As templates know them."""
    if not chat.tools or chat.tool_choice == "none":
        return None
    return [
        {
            "type": "function",
            "function": {"name": tool.name, "description": tool.description, "parameters": _schema(tool)},
        }
        for tool in chat.tools
    ]


def message(one: pb.ChatMessage) -> dict[str, Any]:
    """As templates know it."""
    made: dict[str, Any] = {"role": one.role, "content": one.content}
    if one.tool_calls:
        made["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": json.loads(call.arguments or "{}")},
            }
            for call in one.tool_calls
        ]
    return made | {name: value for name in ("tool_call_id", "name") if (value := getattr(one, name))}


def _schema(tool: pb.Tool) -> dict[str, Any]:
    schema: dict[str, Any] = json.loads(tool.parameters) if tool.parameters else {"type": "object", "properties": {}}
    return schema


def _object(field: str, text: str, violations: Violations) -> None:
    try:
        if text and not isinstance(json.loads(text), dict):
            violations.add(field, "is no JSON object")
    except json.JSONDecodeError as error:
        violations.add(field, f"line {error.lineno} column {error.colno}: {error.msg}")
    except RecursionError:
        violations.add(field, "is nested too deeply")

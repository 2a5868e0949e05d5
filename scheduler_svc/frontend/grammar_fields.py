"""What a request wants its output to be: sizes are looked at here, the grammar itself by the checker, see grammars/."""

from __future__ import annotations

import json

from pagewire.v1 import inference_pb2 as pb

from protos.engine_wire import Grammar
from scheduler_svc.frontend import tools
from scheduler_svc.frontend.chat_template import ChatTemplate
from scheduler_svc.frontend.checks import Violations
from scheduler_svc.frontend.limits import MAX_CHOICES, MAX_GRAMMAR_BYTES

KINDS = {"json_schema": "json_schema", "regex": "regex", "grammar": "ebnf", "structural_tag": "structural_tag"}


def read(
    request: pb.GenerateRequest, template: ChatTemplate | None, prefix: str, sampling: str, violations: Violations
) -> tuple[str, Grammar | None]:
    """The field that holds it and what it says; None where none is given, or with a violation."""
    if call := tools.grammar(request.chat, template, violations):
        if request.HasField("structured_output"):
            violations.add(prefix, f"does not go with {tools.CHOICE}: a call is of its tool's schema")
        _check_sampling(request.sampling, sampling, violations)
        return tools.CHOICE, call
    if not request.HasField("structured_output"):
        return "", None
    given = request.structured_output
    which = given.WhichOneof("constraint")
    field = f"{prefix}.{which}"
    _check_sampling(request.sampling, sampling, violations)
    match which:
        case None:
            violations.add(prefix, "is empty; give one of its fields, or leave it unset")
        case "json_object" if given.json_object:
            return field, Grammar("json")
        case "json_object":
            violations.add(field, "is false; set it to true, or leave it unset")
        case "choice":
            return field, _choice(field, given.choice, violations)
        case kind:
            text: str = getattr(given, kind)
            if not text:
                violations.add(field, "is empty")
            elif (size := len(text.encode())) > MAX_GRAMMAR_BYTES:
                violations.add(field, f"has {size} bytes; at most {MAX_GRAMMAR_BYTES}")
            else:
                return field, Grammar(KINDS[kind], text)
    return field, None


def _choice(field: str, choice: pb.Choice, violations: Violations) -> Grammar | None:
    values = list(choice.values)
    if not 1 <= len(values) <= MAX_CHOICES:
        violations.add(field, f"has {len(values)} values; from 1 to {MAX_CHOICES}")
    elif not all(values):
        violations.add(f"{field}.values[{values.index('')}]", "is empty")
    elif (size := sum(len(value.encode()) for value in values)) > MAX_GRAMMAR_BYTES:
        violations.add(field, f"has {size} bytes; at most {MAX_GRAMMAR_BYTES}")
    else:
        return Grammar("choice", json.dumps(values, ensure_ascii=False))
    return None


def _check_sampling(params: pb.SamplingParams, prefix: str, violations: Violations) -> None:
    """What could leave no token at all to be sampled."""
    given = {
        "ignore_eos": params.ignore_eos,
        "min_tokens": params.min_tokens > 0,
        "bad_words": bool(params.bad_words),
    }
    for name in (name for name, is_given in given.items() if is_given):
        violations.add(f"{prefix}.{name}", "does not go with structured output, which alone says what may come next")

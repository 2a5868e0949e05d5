"""A model's chat template: Jinja in a sandbox, with the environment that Hugging Face templates are written for.

Reference: transformers `utils/chat_template_utils.py`. The template is the model's, the messages are a stranger's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

_FAILURES = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RecursionError,
    MemoryError,
)


class TemplateRefusedError(ValueError):
    """The template does not take these messages: a role it does not know, an order it forbids."""


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks an assistant's turn for training; to us it is only its body."""

    tags = {"generation"}  # noqa: RUF012 (the base class has it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """`special_tokens` are the names a template may use, such as `bos_token`. Raises jinja2.TemplateSyntaxError."""

    def __init__(self, source: str, special_tokens: dict[str, str], now: Callable[[], datetime] = datetime.now) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationTag]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda pattern: now().strftime(pattern)
        self.source = source
        self._template = environment.from_string(source)
        self._special_tokens = special_tokens
        self.knows_tools = "tools" in jinja2.meta.find_undeclared_variables(environment.parse(source))

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        add_generation_prompt: bool,
        tools: Sequence[dict[str, Any]] | None = None,
    ) -> str:
        """The prompt's text. Raises TemplateRefusedError with the template's own reason."""
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=tools,
                documents=None,
                **self._special_tokens,
            )
        except _FAILURES as error:
            raise TemplateRefusedError(str(error) or type(error).__name__) from error


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Not Jinja's own: that one escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

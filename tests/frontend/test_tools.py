"""Tools of a chat: in the prompt as the model's template writes them, and as a grammar where one has to be called."""

from __future__ import annotations

import json

import pytest
from llguidance import LLMatcher
from pagewire.v1 import inference_pb2 as pb

from scheduler_svc.frontend import tools
from scheduler_svc.frontend.chat_template import ChatTemplate
from scheduler_svc.frontend.checks import Violations
from scheduler_svc.grammars import vocabulary
from scheduler_svc.grammars.checker import check
from scheduler_svc.grammars.matcher import Matcher
from tests.frontend.conftest import Service
from tests.frontend.test_validation import refused

SOURCE = """\
{%- if tools %}{% for tool in tools %}[{{ tool | tojson }}]{% endfor %}{% endif %}
{%- for message in messages %}<{{ message.role }}>{{ message.content }}
{%- for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}
{%- if message.tool_call_id %}({{ message.tool_call_id }}){% endif %}{% endfor %}
{%- if add_generation_prompt %}<assistant>{% endif %}"""
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = pb.Tool(name="weather", description="of a city", parameters=json.dumps(SCHEMA))
CLOCK = pb.Tool(name="clock")
ASKED = pb.ChatMessage(role="user", content="Is it raining?")


def chat(choice: str = "", given: tuple[pb.Tool, ...] = (WEATHER, CLOCK), *more: pb.ChatMessage) -> pb.ChatMessages:
    return pb.ChatMessages(messages=[ASKED, *more], tools=given, tool_choice=choice)


def test_templates_have_them_as_they_know_them() -> None:
    call = pb.ToolCall(id="1", name="weather", arguments='{"city": "Paris"}')
    said = chat(
        "auto",
        (WEATHER,),
        pb.ChatMessage(role="assistant", tool_calls=[call]),
        pb.ChatMessage(role="tool", content="no", tool_call_id="1"),
    )
    text = ChatTemplate(SOURCE, {}).render([tools.message(one) for one in said.messages], True, tools.described(said))
    function = {"name": "weather", "description": "of a city", "parameters": SCHEMA}
    assert text == (
        f"[{json.dumps({'type': 'function', 'function': function})}]<user>Is it raining?<assistant>"
        '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call><tool>no(1)<assistant>'
    )
    assert tools.described(chat("none")) is None
    assert not ChatTemplate("{{ messages }}", {}).knows_tools


def follows(choice: str, text: str) -> bool:
    """Whether the whole text is what may be said."""
    tokenizer = vocabulary.load("fake:vocab=300")
    grammar = tools.grammar(chat(choice), ChatTemplate(SOURCE, {}), Violations())
    assert grammar
    report = check(grammar, tokenizer)
    assert not report.trouble
    matcher = Matcher(LLMatcher(tokenizer, report.lowered), is_told=True)
    token_ids = tokenizer.tokenize_str(text)
    return matcher.consume(token_ids) == len(token_ids) and matcher.ends is not None


PARIS = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'


@pytest.mark.parametrize(
    ("choice", "text", "may"),
    [
        ("required", PARIS, True),
        ("weather", PARIS, True),
        ("clock", PARIS, False),
        ("required", '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>', True),
        ("weather", PARIS.replace("city", "town"), False),
        ("required", "I do not know.", False),
    ],
)
def test_who_has_to_call_says_nothing_else(choice: str, text: str, may: bool) -> None:
    assert follows(choice, text) is may


def test_who_may_call_says_what_it_wants() -> None:
    for choice in ("", "auto", "none"):
        assert tools.grammar(chat(choice), ChatTemplate(SOURCE, {}), Violations()) is None


REFUSED = [
    ([WEATHER, WEATHER], "", ["chat.tools[1].name"], "another tool's"),
    ([pb.Tool(name="a b")], "", ["chat.tools[0].name"], "1 to 64"),
    ([pb.Tool(name="auto")], "", ["chat.tools[0].name"], "tool_choice's words"),
    ([pb.Tool(name="a", parameters="{")], "required", ["chat.tools[0].parameters"], "line 1 column 2"),
    ([pb.Tool(name="a", parameters="[]")], "", ["chat.tools[0].parameters"], "no JSON object"),
    ([pb.Tool(name=f"t{i}") for i in range(129)], "", ["chat.tools"], "at most 128"),
    ([pb.Tool(name="a", description="x" * (256 << 10))], "", ["chat.tools"], "at most 262144"),
    ([WEATHER], "clock", ["chat.tool_choice"], "the name of one of the tools"),
    ([], "required", ["chat.tool_choice"], "there are no tools"),
]


@pytest.mark.parametrize(("given", "choice", "fields", "words"), REFUSED)
async def test_what_is_wrong_is_named(
    service: Service, given: list[pb.Tool], choice: str, fields: list[str], words: str
) -> None:
    service.frontend._core.model.tokenizer.chat_template = ChatTemplate(SOURCE, {})
    found = await refused(service.inference.Generate(pb.GenerateRequest(chat=chat(choice, tuple(given)))))
    assert sorted(found) == fields
    assert words in found[fields[0]]


async def test_templates_that_cannot_are_named(service: Service) -> None:
    tokenizer = service.frontend._core.model.tokenizer
    tokenizer.chat_template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", {})
    found = await refused(service.inference.Generate(pb.GenerateRequest(chat=chat())))
    assert found == {"chat.tools": "the model's chat template has no place for tools"}
    tokenizer.chat_template = ChatTemplate("{% if tools %}x{% endif %}", {})
    found = await refused(service.inference.Generate(pb.GenerateRequest(chat=chat("weather"))))
    assert list(found) == ["chat.tool_choice"]
    both = pb.GenerateRequest(chat=chat("clock", (CLOCK,)), structured_output=pb.StructuredOutput(regex="a"))
    tokenizer.chat_template = ChatTemplate(SOURCE, {})
    assert list(await refused(service.inference.Generate(both))) == ["structured_output"]
    arguments = pb.ChatMessage(role="assistant", tool_calls=[pb.ToolCall(name="a", arguments="x")])
    asked = pb.GenerateRequest(chat=chat("", (WEATHER,), arguments))
    assert list(await refused(service.inference.Generate(asked))) == ["chat.messages[1].tool_calls[0].arguments"]

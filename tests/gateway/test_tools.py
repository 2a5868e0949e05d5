"""Tool calls are text that smg reads: what the model would say is scripted here, smg and client are real."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path

import openai
import pytest
from openai.types.chat import ChatCompletionToolParam

from protos.engine_wire import Submit
from scheduler_svc.frontend.model import ServedModel, load_model
from scheduler_svc.frontend.server import FrontendConfig
from tests.frontend.conftest import Service, open_service
from tests.gateway.routers import router

NAME = "qwen2.5-scripted"  # by which smg knows how such a model calls tools
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
WEATHER: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture(scope="module")
def model(model_path: Path) -> ServedModel:
    return load_model(model_path)


@pytest.fixture
async def service(model: ServedModel) -> AsyncIterator[Service]:
    opened = await open_service(model, FrontendConfig(port=0, served_name=NAME))
    said = [*model.tokenizer.encode(CALL), model.card.eos_token_ids[0]]

    def speak(submit: Submit, count: int) -> int:
        return said[count]

    opened.engine.script = speak
    yield opened
    await opened.channel.close()
    await opened.frontend.stop()


async def test_a_tool_is_called_whole_and_in_pieces(service: Service, tmp_path: Path) -> None:
    def ask(api: openai.OpenAI) -> None:
        answer = api.chat.completions.create(
            model=NAME, messages=[{"role": "user", "content": "How is the weather in Paris?"}], tools=[WEATHER]
        )
        assert answer.choices[0].finish_reason == "tool_calls"
        [call] = answer.choices[0].message.tool_calls or []
        assert call.type == "function"
        assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Paris"})
        chunks = api.chat.completions.create(
            model=NAME,
            messages=[{"role": "user", "content": "How is the weather in Paris?"}],
            tools=[WEATHER],
            stream=True,
        )
        name, arguments, ends = "", "", []
        for chunk in chunks:
            for choice in chunk.choices:
                ends += [choice.finish_reason] if choice.finish_reason else []
                for piece in choice.delta.tool_calls or []:
                    assert piece.function is not None
                    name += piece.function.name or ""
                    arguments += piece.function.arguments or ""
        assert (name, json.loads(arguments), ends) == ("weather", {"city": "Paris"}, ["tool_calls"])

    with ExitStack() as stack:
        running = await asyncio.to_thread(stack.enter_context, router(tmp_path, f"127.0.0.1:{service.port}"))
        await asyncio.to_thread(ask, running.client)

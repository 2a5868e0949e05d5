"""The official OpenAI client, through `pagewire serve --openai-port`, against the real model: what a newcomer has."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
from openai.types.chat import ChatCompletion

from client.api import ChatMessage, GenerateDelta, GenerateFinished, SamplingParams
from client.client import Client
from examples import live
from tests.gateway.routers import client, until_stats

QUESTION = "Name three colours."
PROMPT = "One, two, three, four,"


@dataclass(frozen=True)
class Api:
    """OpenAI's and our own, of one service."""

    openai: openai.OpenAI
    native: Client
    model: str

    def chat(self, **fields: object) -> ChatCompletion:
        given = {"max_tokens": 16, "temperature": 0.0, "messages": [{"role": "user", "content": QUESTION}], **fields}
        answer = self.openai.chat.completions.create(model=self.model, **given)  # type: ignore[call-overload]
        assert isinstance(answer, ChatCompletion)
        return answer

    def natively(self, prompt: str | list[ChatMessage], **sampling: float) -> tuple[str, GenerateFinished]:
        given = SamplingParams(**{"max_tokens": 16, "temperature": 0, **sampling})  # type: ignore[arg-type]
        text = ""
        for chunk in self.native.generate(prompt, given):
            if isinstance(chunk, GenerateDelta):
                text += chunk.text
            else:
                end = chunk
        return text, end


@pytest.fixture(scope="module")
def api(model_path: Path) -> Iterator[Api]:
    port = live.free_port()
    flags = ("--openai-port", str(port), "--served-model-name", "smollm2", "--kv-cache-gib", "0.5")
    with live.served([str(model_path)], flags) as address, Client(address) as native:
        yield Api(client(port), native, "smollm2")


def test_the_model_is_listed_by_its_name(api: Api) -> None:
    assert [model.id for model in api.openai.models.list().data] == ["smollm2"]


def test_a_chat_is_the_native_one(api: Api) -> None:
    """The same template, the same tokens, the same text, the same counts."""
    answer = api.chat()
    text, end = api.natively([ChatMessage(role="user", content=QUESTION)])
    assert answer.choices[0].message.content == text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (end.usage.prompt_tokens, 16)


def test_a_chat_ends_with_the_models_own_end(api: Api) -> None:
    answer = api.chat(max_tokens=400, messages=[{"role": "user", "content": "Say hi."}])
    text, end = api.natively([ChatMessage(role="user", content="Say hi.")], max_tokens=400)
    assert (answer.choices[0].finish_reason, answer.choices[0].message.content) == ("stop", text)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == end.usage.completion_tokens


def test_a_streamed_chat_is_the_whole_one(api: Api) -> None:
    whole = api.chat(max_tokens=40)
    stream = api.openai.chat.completions.create(
        model=api.model,
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=40,
        temperature=0.0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    pieces = [choice.delta.content for chunk in chunks for choice in chunk.choices if choice.delta.content]
    assert "".join(pieces) == whole.choices[0].message.content
    assert len(pieces) > 1
    assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] == ["length"]
    assert chunks[-1].usage == whole.usage


def test_a_completion_is_the_native_one(api: Api) -> None:
    answer = api.openai.completions.create(model=api.model, prompt=PROMPT, max_tokens=16, temperature=0.0)
    text, end = api.natively(PROMPT)
    assert answer.choices[0].text == text
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (end.usage.prompt_tokens, 16)
    chunks = api.openai.completions.create(model=api.model, prompt=PROMPT, max_tokens=16, temperature=0.0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == text


def test_stop_strings_end_it_before_themselves(api: Api) -> None:
    """smg does not stop the engine: the stream ends here, and the tokens behind are never made."""
    answer = api.openai.completions.create(
        model=api.model, prompt=PROMPT, max_tokens=200, temperature=0.0, stop=[" seven", " eight"]
    )
    assert (answer.choices[0].finish_reason, "seven" in answer.choices[0].text) == ("stop", False)
    assert answer.choices[0].text == api.natively(PROMPT)[0].partition(" seven")[0]
    assert answer.usage is not None
    assert answer.usage.completion_tokens < 16
    chat = api.chat(max_tokens=200, stop="\n")
    assert chat.choices[0].finish_reason == "stop"
    assert "\n" not in (chat.choices[0].message.content or "")
    until_stats(api.native, lambda stats: stats.running == 0, "both have ended in the engine")


def test_logprobs(api: Api) -> None:
    answer = api.chat(logprobs=True, top_logprobs=3, max_tokens=5)
    assert answer.choices[0].logprobs is not None
    entries = answer.choices[0].logprobs.content or []
    assert len(entries) == 5
    assert "".join(entry.token for entry in entries) == answer.choices[0].message.content
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].token == entry.token, "greedy takes the likeliest"
        assert entry.top_logprobs[0].logprob == pytest.approx(entry.logprob)
    native = SamplingParams(max_tokens=5, temperature=0, logprobs=3)
    ours = [
        logprob.logprob
        for chunk in api.native.generate([ChatMessage(role="user", content=QUESTION)], native)
        if isinstance(chunk, GenerateDelta)
        for logprob in chunk.logprobs
    ]
    assert [entry.logprob for entry in entries] == pytest.approx(ours, rel=1e-5)


def test_a_seed_gives_the_same_again_and_another_one_something_else(api: Api) -> None:
    texts = [api.chat(temperature=1.0, seed=seed).choices[0].message.content for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0] == api.natively([ChatMessage(role="user", content=QUESTION)], temperature=1, seed=1)[0]


def test_n_gives_so_many_different_ones(api: Api) -> None:
    answer = api.chat(temperature=1.0, seed=3, n=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) == 3
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 48


def test_penalties_and_the_rest_arrive(api: Api) -> None:
    """Each changes a greedy answer; top_p at nearly nothing makes a sampled one greedy."""
    plain = api.chat(max_tokens=40).choices[0].message.content
    for field in ({"frequency_penalty": 2.0}, {"presence_penalty": 2.0}):
        assert api.chat(max_tokens=40, **field).choices[0].message.content != plain
    assert api.chat(max_tokens=40, temperature=1.0, top_p=1e-6).choices[0].message.content == plain


def test_what_cannot_be_served_is_a_bad_request(api: Api) -> None:
    with pytest.raises(openai.BadRequestError):
        api.chat(messages=[{"role": "user", "content": "word " * 20_000}])
    with pytest.raises(openai.BadRequestError):
        api.chat(response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "strin"}}})


def test_a_response_format_is_kept(api: Api) -> None:
    schema: dict[str, object] = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}},
        "required": ["colour"],
    }
    schema["additionalProperties"] = False
    wanted = {"type": "json_schema", "json_schema": {"name": "colours", "schema": schema, "strict": True}}
    choice = api.chat(response_format=wanted, max_tokens=60, temperature=0.7, seed=3).choices[0]
    assert choice.finish_reason == "stop"
    assert json.loads(choice.message.content or "")["colour"] in ("red", "blue")


def test_a_client_that_leaves_a_stream_frees_it(api: Api) -> None:
    """smg says so by Abort, and lets go of its call; tests/e2e/cancel.py has either alone."""
    before = api.native.stats()
    stream = api.openai.chat.completions.create(
        model=api.model,
        messages=[{"role": "user", "content": "Tell me a very long story."}],
        max_tokens=1500,
        temperature=1.0,
        seed=1,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    assert api.native.stats().running == 1
    stream.close()
    until_stats(api.native, lambda s: s.running + s.owned_blocks + s.fenced_blocks + s.open_calls == 0, "it is freed")
    after = api.native.stats()
    assert (after.aborted - before.aborted, after.finished) == (1, before.finished)


def test_a_client_that_leaves_without_a_stream_frees_it(api: Api) -> None:
    """smg says so by cancelling its call."""
    before = api.native.stats()
    impatient = api.openai.with_options(timeout=1.0)

    def ask() -> None:
        with pytest.raises(openai.APITimeoutError):
            impatient.chat.completions.create(
                model=api.model,
                messages=[{"role": "user", "content": "Tell me a very long story."}],
                max_tokens=1900,
                temperature=1.0,
                seed=1,
                extra_body={"ignore_eos": True},
            )

    asking = threading.Thread(target=ask)
    asking.start()
    until_stats(api.native, lambda stats: stats.running == 1, "it runs")
    asking.join()
    until_stats(api.native, lambda s: s.running + s.owned_blocks + s.fenced_blocks + s.open_calls == 0, "it is freed")
    after = api.native.stats()
    assert (after.aborted - before.aborted, after.finished) == (1, before.finished)


def test_embeddings_are_the_native_ones(api: Api) -> None:
    answer = api.openai.embeddings.create(model=api.model, input=QUESTION, encoding_format="float")
    (native,) = api.native.embed([QUESTION]).embeddings
    assert answer.data[0].embedding == pytest.approx(list(native.values), abs=1e-6)
    assert answer.usage.prompt_tokens == native.prompt_tokens

"""The official OpenAI client against `pagewire serve --openai-port PORT`: each part shows one habit, and checks it.

    python -m examples.openai_client --url http://127.0.0.1:8000/v1

Exit codes: 0 everything was as it must be, 1 something was not, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import openai
from openai import OpenAI
from openai.types.chat import ChatCompletion

PATIENCE = 300.0  # seconds for one call
ENDLESS = 1000  # tokens: far more than anything here waits for


class UnexpectedError(Exception):
    """What came is not what should have."""


@dataclass(frozen=True)
class Example:
    client: OpenAI
    model: str
    question: str

    def ask(self, tokens: int, *, temperature: float = 0.0, n: int = 1, seed: int | None = None) -> ChatCompletion:
        return self.client.chat.completions.create(
            model=self.model,
            messages=[{"role": "user", "content": self.question}],
            max_tokens=tokens,
            temperature=temperature,
            n=n,
            seed=seed,
        )

    def chat(self) -> str:
        """A whole answer, with what it cost."""
        answer = self.ask(24)
        text, usage = answer.choices[0].message.content, answer.usage
        expect(bool(text) and usage is not None, f"no text or no usage in {answer}")
        return f"{text!r}, {usage.prompt_tokens} + {usage.completion_tokens} tokens" if usage else ""

    def stream(self) -> str:
        """The same answer in pieces; the last piece has the usage."""
        whole, pieces, usage = self.ask(24), list[str](), None
        stream = self.client.chat.completions.create(
            model=self.model,
            messages=[{"role": "user", "content": self.question}],
            max_tokens=24,
            temperature=0.0,
            stream=True,
            stream_options={"include_usage": True},
        )
        for chunk in stream:
            pieces += [choice.delta.content for choice in chunk.choices if choice.delta.content]
            usage = chunk.usage or usage
        expect("".join(pieces) == whole.choices[0].message.content, f"{pieces} is not what came as a whole: {whole}")
        expect(usage is not None and usage == whole.usage, f"usage {usage}, as a whole {whole.usage}")
        return f"{len(pieces)} pieces"

    def completion(self) -> str:
        """Text goes on; what follows a stop string never comes."""
        answer = self.client.completions.create(
            model=self.model, prompt="One, two, three, four,", max_tokens=24, temperature=0.0, stop=[" seven"]
        )
        choice = answer.choices[0]
        expect(choice.finish_reason == "stop" and "seven" not in choice.text, f"{choice}")
        return repr(choice.text)

    def samples(self) -> str:
        """Several answers at once; the same seed gives the same ones again."""
        first, second = (self.ask(16, temperature=1.0, n=3, seed=7) for _ in range(2))
        texts = [choice.message.content for choice in first.choices]
        expect(len(set(texts)) == 3, f"{texts}")
        expect(texts == [choice.message.content for choice in second.choices], "another seed gave the same")
        return f"{len(texts)}, the same ones twice"

    def leave(self) -> str:
        """Closing a stream ends the request, and frees what it held."""
        stream = self.client.chat.completions.create(
            model=self.model,
            messages=[{"role": "user", "content": self.question}],
            max_tokens=ENDLESS,
            temperature=1.0,
            stream=True,
        )
        for _ in zip(range(3), stream, strict=False):
            pass
        stream.close()
        return "after 3 pieces"

    def refusal(self) -> str:
        """A request that cannot be served is told why, as a status and in words."""
        try:
            self.client.chat.completions.create(
                model=self.model, messages=[{"role": "user", "content": "word " * 100_000}]
            )
        except openai.BadRequestError as error:
            return f"{error.status_code}: {error.message[:160]}"
        raise UnexpectedError("a prompt longer than any context was taken")


PARTS: dict[str, Callable[[Example], str]] = {
    "chat": Example.chat,
    "stream": Example.stream,
    "completion": Example.completion,
    "samples": Example.samples,
    "leave": Example.leave,
    "refusal": Example.refusal,
}


def expect(holds: bool, complaint: str) -> None:
    if not holds:
        raise UnexpectedError(complaint)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.openai_client", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="of the API")
    parser.add_argument("--question", default="What is the capital of France?")
    args = parser.parse_args(argv)
    client = OpenAI(base_url=args.url, api_key="none is asked for", timeout=PATIENCE)
    try:
        model = client.models.list().data[0].id
    except openai.OpenAIError as error:
        print(f"{args.url}: {error}", file=sys.stderr)
        return 1
    failed = 0
    for name, part in PARTS.items():
        verdict = "ok"
        try:
            line = part(Example(client, model, args.question))
        except (UnexpectedError, openai.OpenAIError) as error:
            verdict, line = "FAILED", str(error)
            failed += 1
        print(f"{name:12} {verdict:7}  {line}")
    print(f"{len(PARTS) - failed} ok, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

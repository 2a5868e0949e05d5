"""`pagewire chat`: a conversation, typed or piped in, one message a line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from client.api import ChatMessage, GenerateDelta, SamplingParams
from client.client import Client
from client.commands import flags
from client.errors import InvalidRequestError

HELP = "/reset forgets the conversation, /quit or Ctrl-D leaves, Ctrl-C stops an answer"


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=f"Holds a conversation. {HELP}.")
    parser.add_argument("--system", metavar="TEXT", help="how the model should behave")
    flags.add_address(parser)
    flags.add_resume(parser)
    flags.add_sampling(parser, max_tokens=512)
    return parser


def main(prog: str, argv: Sequence[str]) -> int:
    arguments = _parser(prog).parse_args(argv)
    opening = [ChatMessage(role="system", content=arguments.system)] if arguments.system else []
    sampling = flags.sampling(arguments)
    interactive = sys.stdin.isatty()
    with Client(arguments.address, retry=flags.retry(arguments), **flags.access(arguments)) as client:
        if interactive:
            import readline  # noqa: F401  gives input() a line editor and a history

            print(f"{client.model().name}: {HELP}")
        messages = list(opening)
        while (line := _ask(interactive)) is not None:
            match line.strip():
                case "":
                    continue
                case "/quit":
                    break
                case "/reset":
                    messages = list(opening)
                case said:
                    _exchange(client, messages, said, sampling)
    return 0


def _ask(interactive: bool) -> str | None:
    """The next line, or None at the end of the conversation."""
    if not interactive:
        return sys.stdin.readline() or None
    try:
        return input("> ")
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def _exchange(client: Client, messages: list[ChatMessage], said: str, sampling: SamplingParams) -> None:
    """One message and its answer, added to `messages`; what the service refuses is said, and forgotten."""
    asked = ChatMessage(role="user", content=said)
    try:
        answer = _answer(client, [*messages, asked], sampling)
    except InvalidRequestError as error:
        print(f"pagewire: {error}", file=sys.stderr)
    else:
        messages += [asked, ChatMessage(role="assistant", content=answer)]


def _answer(client: Client, messages: list[ChatMessage], sampling: SamplingParams) -> str:
    """Streams one answer to standard output and returns it; Ctrl-C keeps what had come so far."""
    text: list[str] = []
    with client.generate(messages, sampling) as generation:
        try:
            for chunk in generation:
                if isinstance(chunk, GenerateDelta):
                    print(chunk.text, end="", flush=True)
                    text.append(chunk.text)
        except KeyboardInterrupt:
            print(" (stopped)", end="")
    print(flush=True)
    return "".join(text)

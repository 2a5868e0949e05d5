"""`pagewire generate PROMPT`: one text, continued."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from client.api import Choice, FinishReason, GenerateDelta, GenerateFinished, StructuredOutput
from client.client import Client, Generation
from client.commands import flags


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description="Continues a text; streams to standard output. Ctrl-C cancels."
    )
    parser.add_argument("prompt", metavar="PROMPT", help="the text to continue; - reads it from standard input")
    flags.add_address(parser)
    flags.add_resume(parser)
    flags.add_sampling(parser, max_tokens=256)
    parser.add_argument("--adapter", default="", metavar="NAME", help="a LoRA adapter, see `pagewire adapters`")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end instead of a stream")
    constraint = parser.add_mutually_exclusive_group()
    constraint.add_argument("--json-schema", type=_text, metavar="FILE", help="the output is JSON of this schema")
    constraint.add_argument("--json-object", action="store_true", help="the output is any JSON object")
    constraint.add_argument("--regex", metavar="PATTERN", help="the output matches, in Rust's syntax")
    constraint.add_argument("--grammar", type=_text, metavar="FILE", help="the output follows it: Lark or GBNF")
    constraint.add_argument("--choice", action="append", metavar="TEXT", help="the output is one of these; repeatable")
    return parser


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"{path!r} cannot be read: {error}") from None


def _structured_output(arguments: argparse.Namespace) -> StructuredOutput | None:
    given = {
        "json_schema": arguments.json_schema,
        "json_object": arguments.json_object or None,
        "regex": arguments.regex,
        "grammar": arguments.grammar,
        "choice": Choice(values=arguments.choice) if arguments.choice else None,
    }
    chosen = {name: value for name, value in given.items() if value is not None}
    return StructuredOutput(**chosen) if chosen else None


def main(prog: str, argv: Sequence[str]) -> int:
    arguments = _parser(prog).parse_args(argv)
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    with (
        Client(arguments.address, retry=flags.retry(arguments), **flags.access(arguments)) as client,
        client.generate(
            prompt,
            flags.sampling(arguments),
            adapter=arguments.adapter,
            structured_output=_structured_output(arguments),
        ) as generation,
    ):
        if arguments.json:
            print(json.dumps(_collect(generation)))
        else:
            _stream(generation)
    return 0


def _stream(generation: Generation) -> None:
    ends_line = False
    for chunk in generation:
        if isinstance(chunk, GenerateDelta) and chunk.text:
            print(chunk.text, end="", flush=True)
            ends_line = chunk.text.endswith("\n")
    if not ends_line:
        print()


def _collect(generation: Generation) -> dict[str, object]:
    metadata = generation.metadata()
    text: list[str] = []
    token_ids: list[int] = []
    finished = GenerateFinished()
    for chunk in generation:
        if isinstance(chunk, GenerateDelta):
            text.append(chunk.text)
            token_ids += chunk.token_ids
        else:
            finished = chunk
    usage, timings = finished.usage, finished.timings
    return {
        "request_id": metadata.get("request-id", ""),
        "seed": int(metadata["seed"]) if "seed" in metadata else None,
        "text": "".join(text),
        "token_ids": token_ids,
        "finish_reason": FinishReason.Name(finished.finish_reason).removeprefix("FINISH_REASON_").lower(),
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "completion_tokens": usage.completion_tokens,
        },
        "seconds": {"first_token": timings.first_token, "total": timings.total},
    }

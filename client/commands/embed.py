"""`pagewire embed TEXT …`: texts as vectors, in one JSON object."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from client.client import Client
from client.commands import flags


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description="Turns texts into vectors; prints one JSON object.")
    parser.add_argument("texts", metavar="TEXT", nargs="+", help="a text; - reads one a line from standard input")
    flags.add_address(parser)
    parser.add_argument("--adapter", default="", metavar="NAME", help="a LoRA adapter, see `pagewire adapters`")
    parser.add_argument("--pooling", choices=("last", "mean", "cls"), default="", help="default: the model's own")
    parser.add_argument("--dimensions", type=flags.unsigned(32), metavar="N", help="keep the first N of a vector")
    parser.add_argument("--raw", action="store_true", help="vectors of any length, not brought to 1")
    parser.add_argument("--truncate", type=flags.unsigned(32), metavar="N", help="keep the first N tokens of a text")
    return parser


def main(prog: str, argv: Sequence[str]) -> int:
    arguments = _parser(prog).parse_args(argv)
    texts = sys.stdin.read().splitlines() if arguments.texts == ["-"] else arguments.texts
    with Client(arguments.address, **flags.access(arguments)) as client:
        response = client.embed(
            texts,
            pooling=arguments.pooling,
            dimensions=arguments.dimensions,
            normalize=not arguments.raw,
            truncate_prompt_tokens=arguments.truncate,
            adapter=arguments.adapter,
        )
    usage = response.usage
    print(
        json.dumps(
            {
                "embeddings": [list(embedding.values) for embedding in response.embeddings],
                "usage": {"prompt_tokens": usage.prompt_tokens, "cached_tokens": usage.cached_tokens},
            }
        )
    )
    return 0

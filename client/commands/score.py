"""`pagewire score PROMPT CANDIDATE …`: how likely each continuation is, in one JSON object."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from client.client import Client
from client.commands import flags


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description="Tells how likely the model finds continuations of a prompt; prints one JSON object."
    )
    parser.add_argument("prompt", metavar="PROMPT", help="the text before each of them")
    parser.add_argument("candidates", metavar="CANDIDATE", nargs="+", help="a continuation, with its leading space")
    flags.add_address(parser)
    parser.add_argument("--adapter", default="", metavar="NAME", help="a LoRA adapter, see `pagewire adapters`")
    return parser


def main(prog: str, argv: Sequence[str]) -> int:
    arguments = _parser(prog).parse_args(argv)
    with Client(arguments.address, **flags.access(arguments)) as client:
        response = client.score(arguments.prompt, arguments.candidates, adapter=arguments.adapter)
    scores = [
        {
            "candidate": candidate,
            "sum": score.sum,
            "mean": score.mean,
            "token_ids": list(score.token_ids),
            "logprobs": list(score.logprobs),
        }
        for candidate, score in zip(arguments.candidates, response.scores, strict=True)
    ]
    usage = response.usage
    told = {"prompt_tokens": usage.prompt_tokens, "cached_tokens": usage.cached_tokens}
    print(json.dumps({"scores": scores, "usage": told}))
    return 0

"""Flags that several commands share."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

from client import api
from client.channel import Tls


def unsigned(bits: int) -> Callable[[str], int]:
    """A whole number that fits the message's field: for anything else, argparse names the flag and exits with 2."""

    def convert(text: str) -> int:
        if not text.isascii() or not text.isdigit() or int(text) >= 1 << bits:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {(1 << bits) - 1}")
        return int(text)

    return convert


# Flags of the sampling parameters that bear the same names: type, name of the value in --help, what it does.
_NUMBERS: dict[str, tuple[Callable[[str], float], str, str]] = {
    "max_tokens": (unsigned(32), "N", "output tokens at most"),
    "min_tokens": (unsigned(32), "N", "no end before this many output tokens"),
    "temperature": (float, "X", "0 is greedy"),
    "top_p": (float, "X", "in (0, 1]"),
    "top_k": (unsigned(32), "N", "0 is off"),
    "min_p": (float, "X", "in [0, 1]"),
    "repetition_penalty": (float, "X", "over prompt and output; 1 is off"),
    "presence_penalty": (float, "X", "over the output; 0 is off"),
    "frequency_penalty": (float, "X", "over the output; 0 is off"),
    "seed": (unsigned(64), "N", "makes the output reproducible"),
}


def add_address(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--address", default=api.DEFAULT_ADDRESS, metavar="HOST:PORT", help="default: %(default)s")
    group = parser.add_argument_group("access")
    group.add_argument("--tls", action="store_true", help="the server's certificate is of a known authority")
    group.add_argument("--tls-ca", type=Path, metavar="FILE", help="… or of the one in this file (PEM)")
    group.add_argument("--tls-cert", type=Path, metavar="FILE", help="certificate to show to the server")
    group.add_argument("--tls-key", type=Path, metavar="FILE", help="… and its key")
    group.add_argument("--token-file", type=Path, metavar="FILE", help="holds the token; default: $PAGEWIRE_TOKEN")
    group.add_argument("--tenant", default="", metavar="NAME", help="who calls, where the server asks for no token")


class Access(TypedDict):
    """Arguments of both clients."""

    tls: Tls | None
    token: str
    tenant: str


def access(arguments: argparse.Namespace) -> Access:
    """Raises OSError for a file that cannot be read, ValueError for flags that do not go together."""
    ca, certificate, key = arguments.tls_ca, arguments.tls_cert, arguments.tls_key
    tls = Tls(ca, certificate, key) if arguments.tls or ca or certificate or key else None
    file = arguments.token_file
    token = file.read_text().strip() if file else os.environ.get("PAGEWIRE_TOKEN", "")
    return Access(tls=tls, token=token, tenant=arguments.tenant)


def add_resume(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--resume", action="store_true", help="go on where a stream broke, once the service is back")


def retry(arguments: argparse.Namespace) -> api.Retry | None:
    return api.Resume() if arguments.resume else None


def add_sampling(parser: argparse.ArgumentParser, *, max_tokens: int) -> None:
    group = parser.add_argument_group(
        "sampling", f"not given: the model's own defaults, and {max_tokens} tokens at most"
    )
    for name, (kind, metavar, about) in _NUMBERS.items():
        group.add_argument("--" + name.replace("_", "-"), type=kind, metavar=metavar, help=about)
    group.set_defaults(max_tokens=max_tokens)
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    group.add_argument("--ignore-eos", action="store_true", default=None, help="go on past the model's end tokens")


def sampling(arguments: argparse.Namespace) -> api.SamplingParams:
    params = api.SamplingParams(stop=arguments.stop)
    for name in (*_NUMBERS, "ignore_eos"):
        if (value := getattr(arguments, name)) is not None:
            setattr(params, name, value)
    return params

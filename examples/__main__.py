"""Builds clients of other languages and runs them against a live service: `python -m examples [CLIENT …]`.

Without --address it starts `pagewire serve` on a free port, and stops it again. A client whose toolchain this host
lacks is not run, and the summary says what is missing. Exit codes: 0 every client that could run did well, 1 one did
not or none could run, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence

from client.errors import ServiceError
from examples import live
from examples.clients import EXAMPLES, ClientError, Example, Load
from examples.toolchains import missing

# A door so narrow that an example can find it closed; still wider than what ghz sends at once.
DOOR = ("--max-num-seqs", "8", "--max-waiting", "16")
OVERLOAD = 32


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    chosen = args.clients or list(EXAMPLES)
    if unknown := [name for name in chosen if name not in EXAMPLES]:
        parser.error(f"{unknown[0]!r} is none of {', '.join(EXAMPLES)}")
    verdicts = {name: f"not run: {'; '.join(why)}" for name in chosen if (why := missing(EXAMPLES[name].tools))}
    runnable = [name for name in chosen if name not in verdicts]
    failed = not runnable
    built = []
    for name in runnable:
        try:
            EXAMPLES[name].build()
            built.append(name)
        except ClientError as error:
            verdicts[name], failed = f"FAILED to build: {error}", True
    if built:
        failed |= _run(built, args, verdicts)
    print()
    for name in chosen:
        print(f"{name:10} {verdicts[name]}")
    return int(failed)


def _run(names: Sequence[str], args: argparse.Namespace, verdicts: dict[str, str]) -> bool:
    """Into `verdicts`; whether one failed."""
    narrow = not args.address and any(not name.startswith("ghz") for name in names)
    flags, url = DOOR if narrow else (), args.openai_url
    if "openai" in names and not args.address:
        port = live.free_port()
        flags, url = (*flags, "--openai-port", str(port)), f"http://127.0.0.1:{port}/v1"
    load = Load(overload=OVERLOAD if narrow else 0, ghz=_ghz_arguments(args), openai=url)
    place = contextlib.nullcontext(args.address) if args.address else live.served(flags=flags)
    failed = False
    try:
        with place as address:
            for name in names:
                verdicts[name] = _verdict(EXAMPLES[name], address, load)
                failed |= verdicts[name] != "ok"
    except live.LiveError as error:
        verdicts.update({name: f"FAILED: {error}" for name in names if name not in verdicts})
        return True
    return failed


def _verdict(example: Example, address: str, load: Load) -> str:
    try:
        example.run(address, load)
        live.nothing_left(address)
    except (ClientError, live.LiveError, ServiceError) as error:
        return f"FAILED: {error}"
    return "ok"


def _ghz_arguments(args: argparse.Namespace) -> tuple[str, ...]:
    given = {"--total": args.total, "--concurrency": args.concurrency}
    return tuple(word for flag, value in given.items() if value for word in (flag, str(value)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m examples", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("clients", metavar="CLIENT", nargs="*", help=f"of {', '.join(EXAMPLES)}; default: all")
    add("--address", default="", metavar="HOST:PORT", help="a service that runs already; default: one is started")
    add("--openai-url", default="", metavar="URL", help="of OpenAI's API of the service at --address")
    add("--total", type=_positive, metavar="N", help="calls that ghz makes in all")
    add("--concurrency", type=_positive, metavar="N", help="calls that ghz has open at once")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


if __name__ == "__main__":
    sys.exit(main())

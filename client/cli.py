"""`pagewire`: the command line. One file a command in `client/commands`, imported only when it is called.

Exit codes: 0 done, 1 failed, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "serve": "serve a model on this host",
    "generate": "continue a text",
    "chat": "hold a conversation",
    "embed": "turn texts into vectors",
    "score": "tell how likely continuations are",
    "bench": "measure a running service",
    "model": "pull and list models",
    "top": "watch a running service",
    "token": "make a token that lets a client in",
    "keys": "make keys for a worker on another host",
    "replay": "replay a recorded engine log and compare every plan",
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="pagewire",
        description="LLM inference over gRPC.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(["commands:", *(f"  {name:10} {about}" for name, about in COMMANDS.items())]),
    )
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help="one of the commands below")
    parser.add_argument("arguments", metavar="...", nargs=argparse.REMAINDER, help="see pagewire COMMAND --help")
    given = parser.parse_args(argv)
    command = import_module(f"client.commands.{given.command}")
    try:
        code: int = command.main(f"pagewire {given.command}", given.arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _failed("interrupted")
    except BrokenPipeError:  # the reader of our output has left: nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except UnicodeError as error:
        return _failed(f"the input is not UTF-8: {error}", 2)
    except Exception as error:
        failure = _code(error)
        if failure is None:
            raise
        return _failed(str(error), failure)


def _code(error: Exception) -> int | None:
    """The exit code of what is told in one line; None for a bug of ours. Looked up late, because it imports gRPC."""
    from client.channel import AccessError
    from client.errors import ServiceError
    from client.load import ShortStreamError
    from client.store import StoreError, UnknownModelError

    match error:
        case UnknownModelError() | AccessError():
            return 2
        case ServiceError() | ShortStreamError() | StoreError() | OSError():
            return 1
    return None


def _failed(reason: str, code: int = 1) -> int:
    print(f"pagewire: {reason}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())

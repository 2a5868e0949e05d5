"""`pagewire serve [MODEL] [FLAG …]`: turns MODEL into a path, pulled when it is missing, and becomes the scheduler.

Every flag belongs to the scheduler, which explains it with --help or refuses it. Here only MODEL is looked for.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from client import store
from client.commands.model import pull

# The flags that take no value.
SWITCHES = {
    "--batch-invariant",
    "--enable-prefix-caching",
    "--no-enable-prefix-caching",
    "--enforce-eager",
    "--record-private",
}


def main(prog: str, argv: Sequence[str]) -> int:
    arguments = list(argv)
    if not {"-h", "--help"}.isdisjoint(arguments):
        print(f"{prog}: MODEL may also be a name: {', '.join(store.MODELS)} (default: {store.DEFAULT})\n", flush=True)
        become_scheduler("--help")
    place = _find_model(arguments)
    model = store.DEFAULT if place is None else arguments.pop(place)
    if model in store.MODELS and not any(a.startswith("--served-model-name") for a in arguments):
        arguments += ["--served-model-name", model]
    become_scheduler(str(pull(model)), *arguments)


def become_scheduler(*arguments: str) -> NoReturn:
    os.execv(sys.executable, [sys.executable, "-m", "scheduler_svc", *arguments])


def _find_model(arguments: Sequence[str]) -> int | None:
    """Where the positional argument stands: it is no flag, and no flag's value."""
    previous = ""
    for place, argument in enumerate(arguments):
        takes_value = previous.startswith("--") and "=" not in previous and previous not in SWITCHES
        if not argument.startswith("-") and not takes_value:
            return place
        previous = "" if takes_value else argument
    return None

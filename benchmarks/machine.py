"""What a figure depends on beside the code: when, which versions, which commit, which machine; but not where on it."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

DIRECTORIES = re.compile(r"(?<![\w./])(?:~|\.{0,2})/(?:[^\s/'\"=]+/)+")  # of an absolute path, or one from . or ~
PACKAGES = ("pagewire", "torch", "transformers", "grpcio", "msgspec", "pyzmq")


def describe() -> dict[str, object]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "machine": {
            "cpu": _field(Path("/proc/cpuinfo"), "model name"),
            "cores": len(os.sched_getaffinity(0)),
            "memory": _field(Path("/proc/meminfo"), "MemTotal"),
            "system": f"{platform.system()} {platform.machine()}",
        },
    }


def anywhere(text: str) -> str:
    """The same, with names alone left of its paths: where things lie on this machine is nobody's business."""
    return DIRECTORIES.sub("…/", text)


def _commit() -> str:
    """With a `+` where the tree holds more than the commit, results aside; empty outside a checkout."""
    root = Path(__file__).parent
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    others = ["git", "status", "--porcelain", "--", ":/", ":(top,exclude)benchmarks/results"]
    changes = subprocess.run(others, cwd=root, capture_output=True, text=True, check=False)
    return head.stdout.strip() + ("+" if changes.stdout else "")


def _field(path: Path, name: str) -> str:
    """The first `name: value` of one of the kernel's tables."""
    for line in path.read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""

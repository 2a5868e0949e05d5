"""What the service says on stderr: a line an event, as text for a person or as JSON for a collector.

Text lines begin with `pagewire`, and carry no time: journald and container engines add their own. In JSON each line is
one object with time, level, logger and message, and whatever is known of the call that it belongs to. No line holds a
prompt or an output, and nothing in a line can begin another one.
"""

from __future__ import annotations

import logging
import re
import sys
import threading
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import IO, Any, Final

import msgspec

FORMATS: Final = ("text", "json")
LEVELS: Final = ("debug", "info", "warning", "error")
HEADLINE: Final[Mapping[str, object]] = {"headline": True}  # `extra` of a line that names itself: "pagewire ready: …"
_ROOT: Final = "scheduler_svc"
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")

# Of the call that the present task serves: request id, tenant.
CALL: Final[ContextVar[Mapping[str, object] | None]] = ContextVar("call", default=None)


def configure(form: str, level: str, stream: IO[str] | None = None) -> None:
    """Of this process. Other libraries are heard from `warning` on."""
    handler: logging.StreamHandler[IO[str]] = logging.StreamHandler(stream) if stream else _Stderr()
    handler.setFormatter(_Json() if form == "json" else _Text())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    least = logging.getLevelNamesMapping()[level.upper()]
    root.setLevel(max(least, logging.WARNING))
    logging.getLogger(_ROOT).setLevel(least)


def about(**fields: object) -> dict[str, Any]:
    """`extra` of a line: facts beside its message."""
    return {"facts": fields}


def relay(lines: IO[bytes], pid: int) -> None:
    """A worker's own lines, as lines of ours, until it ends."""
    log = logging.getLogger(f"{_ROOT}.worker")

    def read() -> None:
        with lines:
            for line in lines:
                if text := line.decode("utf-8", "replace").rstrip():
                    log.info(text, extra=about(worker_pid=pid))

    threading.Thread(target=read, name=f"log-of-{pid}", daemon=True).start()


def _facts(record: logging.LogRecord) -> dict[str, object]:
    return {**(CALL.get() or {}), **getattr(record, "facts", {})}


class _Stderr(logging.StreamHandler[IO[str]]):
    """To whatever sys.stderr is at that moment."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> IO[str]:  # type: ignore[override]
        return sys.stderr


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        words = [record.getMessage(), *(f"{key}={value}" for key, value in _facts(record).items())]
        colon = "" if getattr(record, "headline", False) else ":"
        line = _CONTROL.sub(_escape, f"pagewire{colon} {' '.join(words)}")
        if record.exc_info:
            trace = self.formatException(record.exc_info).splitlines()
            line = "\n".join([line, *(f"  | {_CONTROL.sub(_escape, part)}" for part in trace)])
        return line


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_facts(record),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return _CONTROL.sub(_escape_json, msgspec.json.encode(entry).decode())


def _escape(match: re.Match[str]) -> str:
    return f"\\x{ord(match[0]):02x}" if ord(match[0]) < 256 else f"\\u{ord(match[0]):04x}"


def _escape_json(match: re.Match[str]) -> str:
    return f"\\u{ord(match[0]):04x}"

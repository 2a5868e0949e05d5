"""What a worker is told on its command line; everything else arrives in `Setup`."""

from __future__ import annotations

import argparse
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from protos import model_cache
from worker_svc.backends import ISAS, NAMES


@dataclass(frozen=True)
class WorkerConfig:
    connect: str  # the scheduler's ZeroMQ endpoint
    backend: str
    device: str
    parent_pid: int  # 0: nobody spawned it, and it waits for a scheduler that is away
    mask_deadline: float  # seconds
    cpu_isa: str
    home: Path  # where packed weights go whose model lies where nobody may write


def parse(argv: Sequence[str] | None = None) -> WorkerConfig:
    """Exits with code 2 and one line where an argument is wrong."""
    parser = argparse.ArgumentParser(prog="worker_svc", description="Holds weights and KV, and executes step plans.")
    parser.add_argument("--connect", required=True, type=endpoint, help="ipc://PATH or tcp://127.0.0.1:PORT")
    parser.add_argument("--backend", choices=NAMES, default="auto")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--parent-pid", type=int, default=0, metavar="N", help="exit when this parent is gone")
    parser.add_argument(
        "--mask-deadline", type=float, default=30.0, metavar="SECONDS", help="how long a sample waits for its mask"
    )
    parser.add_argument("--cpu-isa", choices=ISAS, default="auto", help="instructions of the cpu backend")
    parser.add_argument(
        "--home",
        type=Path,
        default=Path(os.environ.get("PAGEWIRE_HOME") or model_cache.HOME),
        help="for packed weights whose model lies where nobody may write; default: $PAGEWIRE_HOME",
    )
    return WorkerConfig(**vars(parser.parse_args(argv)))


def endpoint(value: str) -> str:
    """Raises argparse's error unless nothing outside this host can be at the other end: there is no CURVE yet."""
    if value.startswith("ipc://"):
        return value
    host = value.removeprefix("tcp://").rpartition(":")[0]
    if not value.startswith("tcp://") or not host:
        raise argparse.ArgumentTypeError(f"{value!r} is neither ipc://PATH nor tcp://HOST:PORT")
    try:
        loopback = ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not loopback:
        raise argparse.ArgumentTypeError(f"{value!r}: only loopback addresses until links between hosts are encrypted")
    return value

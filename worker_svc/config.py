"""What a worker is told on its command line; everything else arrives in `Setup`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from protos import curve, model_cache
from worker_svc.backends import ATTENTION, ISAS, NAMES


@dataclass(frozen=True)
class WorkerConfig:
    connect: str  # the scheduler's ZeroMQ endpoint
    backend: str
    device: str
    parent_pid: int  # 0: nobody spawned it, and it waits for a scheduler that is away
    mask_deadline: float  # seconds
    cpu_isa: str
    home: Path  # where packed weights go whose model lies where nobody may write
    curve_keys: Path | None  # None: the link needs none
    gpu_memory_utilization: float
    enforce_eager: bool
    attention_backend: str
    rank: int  # in its group
    rank_deadline: float  # seconds


def parse(argv: Sequence[str] | None = None) -> WorkerConfig:
    """Exits with code 2 and one line where an argument is wrong."""
    parser = argparse.ArgumentParser(prog="worker_svc", description="Holds weights and KV, and executes step plans.")
    parser.add_argument("--connect", required=True, type=endpoint, help="ipc:///PATH or tcp://HOST:PORT")
    parser.add_argument("--backend", choices=NAMES, default="auto")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9, metavar="SHARE", help="of a GPU's memory")
    parser.add_argument("--enforce-eager", action="store_true", help="a GPU captures no graphs")
    parser.add_argument("--attention-backend", choices=ATTENTION, default="auto", help="of a GPU")
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
    parser.add_argument(
        "--curve-keys",
        type=Path,
        metavar="DIR",
        help="keys of a tcp link, which the scheduler has made; default for other hosts: $PAGEWIRE_HOME/curve",
    )
    parser.add_argument("--rank", type=int, default=0, metavar="N", help="its place in a group that splits the model")
    parser.add_argument(
        "--rank-deadline", type=float, default=600.0, metavar="SECONDS", help="how long it waits for the other ranks"
    )
    args = parser.parse_args(argv)
    if args.curve_keys and args.connect.startswith("ipc://"):
        parser.error(f"--curve-keys goes with --connect tcp://…, not with {args.connect}")
    if args.curve_keys is None and curve.needs_keys(args.connect):
        args.curve_keys = args.home.expanduser() / "curve"
    return WorkerConfig(**vars(args))


def endpoint(value: str) -> str:
    """Raises argparse's error for what cannot be connected to."""
    try:
        checked = curve.check_endpoint(value)
    except curve.CurveError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if checked.endswith(":*"):
        raise argparse.ArgumentTypeError(f"{value!r} names no port")
    return checked

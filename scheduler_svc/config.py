"""The service's settings: flags by vLLM's names where it has one. A flag that would do nothing yet is refused."""

from __future__ import annotations

import argparse
import ipaddress
import secrets
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from protos.wire import Epoch, Setup
from scheduler_svc.engine.config import EngineConfig
from scheduler_svc.tenants import Tenants, TenantsError
from scheduler_svc.tenants import load as load_tenants

SHORT_STEP = 4  # positions: such a step takes little longer than one of a single row
STEP_TOKENS = 256  # so that who decodes beside a prompt waits a quarter of a second at most, see decision 0015
FAKE = "fake:"  # a model that is none, for tests: its worker imports no torch


@dataclass(frozen=True)
class LoopConfig:
    engine: EngineConfig
    setup: Setup  # of every epoch, but for its counter
    listen: str = ""  # ZeroMQ endpoint for workers; empty: one in a private directory
    spawn: bool = True  # False: workers come by themselves
    worker_arguments: tuple[str, ...] = ()
    step_deadline: float = 60.0  # seconds for one step
    load_deadline: float = 600.0  # seconds without a word while a worker starts
    record: Path | None = None


@dataclass(frozen=True)
class ServiceConfig:
    model: str
    served_name: str
    host: str
    port: int
    drain_timeout: float
    stream_interval: float  # seconds
    loop: LoopConfig


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"pagewire serve: {message}\n")


def parse(argv: Sequence[str] | None = None) -> ServiceConfig:
    """Exits with code 2 and one line where an argument is wrong or asks for what is not built."""
    parser = _build_parser()
    args = parser.parse_args(argv)
    _refuse_unbuilt(parser, args)
    model: str = args.model
    if not model.startswith(FAKE):
        if not Path(model).exists():
            parser.error(f"MODEL {model!r}: no such file or directory")
        model = str(Path(model).resolve())
    if args.workers == 0 and not args.listen:
        parser.error("--workers 0 needs --listen, or no worker could ever connect")
    try:
        tenants = load_tenants(args.tenants) if args.tenants else Tenants()
        engine = EngineConfig(
            block_size=args.block_size,
            max_num_seqs=args.max_num_seqs,
            max_step_tokens=args.max_step_tokens or max(STEP_TOKENS, args.max_num_seqs),
            depth=args.depth,
            long_step=args.max_num_seqs,  # whoever decodes fits into one that is not
            short_step=SHORT_STEP,
            short_depth=2 * args.depth if args.depth > 1 else 1,
            max_model_len=args.max_model_len,
            max_waiting=args.max_waiting,
            max_waiting_tokens=args.max_waiting_tokens,
            prefix_caching=args.enable_prefix_caching,
            tenants=tenants.named,
            default_tenant=tenants.default,
            prompt_cost=tenants.prompt_cost,
            output_cost=tenants.output_cost,
        )
    except (TenantsError, ValueError) as error:
        parser.error(str(error))
    setup = Setup(
        epoch=Epoch(secrets.randbits(63), 0),
        model=model,
        dtype=args.dtype,
        quantization=args.quantization,
        kv_dtype=args.kv_cache_dtype,
        block_size=engine.block_size,
        max_slots=engine.max_slots,
        max_model_len=args.max_model_len,
        max_step_tokens=engine.max_step_tokens,
        kv_bytes=int(args.kv_cache_gib * (1 << 30)),
        threads=args.threads,
    )
    loop = LoopConfig(
        engine=engine,
        setup=setup,
        listen=args.listen or "",
        spawn=args.workers > 0,
        worker_arguments=("--backend", args.backend, "--device", args.device, "--cpu-isa", args.cpu_isa),
        step_deadline=args.step_deadline,
        load_deadline=args.load_deadline,
        record=args.record,
    )
    name = args.served_model_name or Path(model).name.removesuffix(".gguf")
    return ServiceConfig(model, name, args.host, args.port, args.drain_timeout, args.stream_interval / 1000, loop)


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="pagewire serve", description="Serves a model over gRPC, each worker a child process.")
    add = parser.add_argument
    add("model", metavar="MODEL", help="a .gguf file, or a directory with safetensors, config.json and tokenizer.json")
    add("--host", default="127.0.0.1")
    add("--port", type=_whole(0, 65535), default=50051, help="0 takes a free one; the ready line names it")
    add("--served-model-name", default="", help="default: the file's or directory's name")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add(
        "--backend",
        choices=("auto", "cpu", "torch", "fake"),
        default="auto",
        help="auto: cpu (our own kernels) for the families that are ours, torch for float32 and for all others",
    )
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="auto: bfloat16; float32 is the torch backend's, the reference",
    )
    add(
        "--quantization",
        choices=("", "int8", "int4"),
        metavar="{int8,int4}",
        default="",
        help="weights in integers, made on load: int8 by channel; int4 by groups of 32 (a 4-bit GGUF keeps its own)",
    )
    add("--kv-cache-dtype", choices=("auto", "bf16", "int8"), default="auto", help="auto: as the backend computes")
    add(
        "--cpu-isa",
        choices=("auto", "avx512_bf16", "avx512_vnni", "avx2", "generic"),
        default="auto",
        help="instructions of the cpu backend; auto: the best that this host has",
    )
    add(
        "--max-model-len",
        type=_whole(0),
        default=0,
        metavar="N",
        help="tokens of prompt and output; 0: the model's own",
    )
    add("--max-num-seqs", type=_whole(1), default=64, metavar="N", help="sequences running at once")
    add(
        "--max-step-tokens",
        type=_whole(0),
        default=0,
        metavar="N",
        help=f"positions computed in one step; 0: {STEP_TOKENS}, or --max-num-seqs where that is more",
    )
    add("--max-waiting", type=_whole(1), default=1024, metavar="N", help="queued requests before RESOURCE_EXHAUSTED")
    add("--max-waiting-tokens", type=_whole(1), default=4_194_304, metavar="N", help="… and their tokens")
    add("--tenants", type=Path, metavar="FILE", help="weights and quotas of tenants (TOML)")
    add("--kv-cache-gib", type=_number, default=0.0, metavar="GIB", help="memory for KV; 0: the worker chooses")
    add("--block-size", type=_whole(1, 512), default=32, metavar="N", help="tokens of a KV block")
    add("--depth", type=_whole(1, 4), default=2, metavar="N", help="plans in flight; none behind a long one")
    add("--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=True)
    add("--workers", type=_whole(0), default=1, metavar="N", help="0: workers come by themselves, see --listen")
    add("--listen", type=_endpoint, metavar="tcp://127.0.0.1:PORT", help="where workers connect")
    add("--threads", type=_whole(0, 1024), default=0, metavar="N", help="compute threads of a worker; 0: it chooses")
    add(
        "--step-deadline",
        type=_duration,
        default=60.0,
        metavar="SECONDS",
        help="a worker is replaced if a step takes longer",
    )
    add(
        "--load-deadline",
        type=_duration,
        default=600.0,
        metavar="SECONDS",
        help="… or if its start says nothing for so long",
    )
    add(
        "--drain-timeout",
        type=_number,
        default=600.0,
        metavar="SECONDS",
        help="how long a drain waits for running calls",
    )
    add(
        "--stream-interval",
        type=_number,
        default=25.0,
        metavar="MS",
        help="milliseconds between two messages of a stream, but for its first and its end; 0: a message a step",
    )
    add("--record", type=Path, metavar="FILE", help="log every engine event, for `pagewire replay FILE`")
    unbuilt = parser.add_argument_group("known, and refused until they are built")
    for flag, kind, default in _UNBUILT:
        unbuilt.add_argument(flag, type=kind, default=default, metavar="X")
    return parser


_UNBUILT: list[tuple[str, type[str] | type[int], str | int]] = [
    ("--tensor-parallel", int, 1),
    ("--frontends", int, 1),
    ("--metrics-port", int, 0),
    ("--openai-port", int, 0),
    ("--speculation", str, ""),
]


def _refuse_unbuilt(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for flag, _, default in [*_UNBUILT, ("--workers", int, 1)]:
        value = getattr(args, flag[2:].replace("-", "_"))
        if value != default and (flag, value) != ("--workers", 0):
            parser.error(f"{flag} {value}: not built yet; only {default!r} is served")


def _whole(least: int, most: int = sys.maxsize) -> Callable[[str], int]:
    def convert(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{value} is not in {least}..{most if most < sys.maxsize else ''}")
        return value

    convert.__name__ = "whole number"  # argparse calls the type so
    return convert


def _number(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1e9:
        raise argparse.ArgumentTypeError(f"{text} is not in 0..1e9")
    return value


def _duration(text: str) -> float:
    """Of a deadline: one of 0 would end whatever it watches at once."""
    value = float(text)
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"{text} is not over 0 and under 1e9")
    return value


def _endpoint(text: str) -> str:
    """Workers are believed, so nobody from outside this host may be one until the links are encrypted."""
    if text.startswith("ipc://"):
        return text
    host, _, port = text.removeprefix("tcp://").rpartition(":")
    if not text.startswith("tcp://") or not host or not (port.isdecimal() or port == "*"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither ipc://PATH nor tcp://HOST:PORT")
    try:
        loopback = ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not loopback:
        raise argparse.ArgumentTypeError(f"{text!r}: only loopback addresses until links between hosts are encrypted")
    return text

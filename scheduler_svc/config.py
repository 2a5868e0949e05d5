"""The service's settings: flags by vLLM's names where it has one. A flag that would do nothing is refused."""

from __future__ import annotations

import argparse
import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from protos import adapter_files, curve, model_cache
from protos.engine_wire import Adapter
from protos.wire import Epoch, Setup
from scheduler_svc.engine.config import EngineConfig
from scheduler_svc.flags import ADAPTER_RANK, STEP_TOKENS, build_parser
from scheduler_svc.gateway import GatewayConfig
from scheduler_svc.record import RecordConfig
from scheduler_svc.tenants import Tenants, TenantsError
from scheduler_svc.tenants import load as load_tenants

SHORT_STEP = 4  # positions: such a step takes little longer than one of a single row
LOOPBACK = "127.0.0.1"
FAKE = "fake:"  # a model that is none, for tests: its worker imports no torch


@dataclass(frozen=True)
class LoopConfig:
    engine: EngineConfig
    setup: Setup  # of every epoch, but for its counter
    adapters: tuple[Adapter, ...] = ()  # that every epoch begins with
    listen: str = ""  # ZeroMQ endpoint for workers; empty: one in a private directory
    workers: int = 1  # 0: they come by themselves
    worker_arguments: tuple[str, ...] = ()
    curve_keys: Path | None = None  # their directory; None: the link needs none
    step_deadline: float = 60.0  # seconds for one step
    load_deadline: float = 600.0  # seconds without a word while a worker starts
    record: RecordConfig = field(default_factory=RecordConfig)
    relay_workers: bool = False  # what a worker writes goes through our log, so that each line is one of ours


@dataclass(frozen=True)
class ServiceConfig:
    model: str
    served_name: str
    host: str
    port: int
    drain_timeout: float
    stream_interval: float  # seconds
    slow_reader_timeout: float  # seconds; 0: none
    loop: LoopConfig
    access: Access
    gateway: GatewayConfig | None = None
    metrics_port: int = 0  # 0: none
    log_format: str = "text"
    log_level: str = "info"
    otlp_endpoint: str = ""  # "": nothing is traced
    frontends: int = 1  # 1: in the engine's process


@dataclass(frozen=True)
class Access:
    """Who gets in at the gRPC port, and how. None and "": not asked for."""

    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    tokens: Path | None = None
    router_listen: str = ""
    max_connection_age: float = 0.0  # seconds; 0: no bound


def parse(argv: Sequence[str] | None = None) -> ServiceConfig:
    """Exits with code 2 and one line where an argument is wrong or asks for what is not built."""
    parser = build_parser()
    args = parser.parse_args(argv)
    model: str = args.model
    if not model.startswith(FAKE):
        if not Path(model).exists():
            parser.error(f"MODEL {model!r}: no such file or directory")
        model = str(Path(model).resolve())
    if args.workers == 0 and not args.listen:
        parser.error("--workers 0 needs --listen, or no worker could ever connect")
    if args.workers == 0 and args.tensor_parallel_size > 1:
        ranks = f"--tensor-parallel-size {args.tensor_parallel_size}"
        parser.error(f"{ranks} goes with --workers 1 or more: what comes by itself serves a whole model")
    if args.kv_host_gib and not args.enable_prefix_caching:
        parser.error(
            f"--kv-host-gib {args.kv_host_gib:g} holds what prefixes are found in: not with --no-enable-prefix-caching"
        )
    draft_model = _draft_model(parser, args)
    if args.openai_port and args.frontends > 1:
        parser.error(f"--openai-port {args.openai_port} goes with --frontends 1: more of them start no gateway yet")
    if args.openai_port and args.openai_port == args.port:
        parser.error(f"--openai-port {args.openai_port}: gRPC has that port, see --port")
    try:
        loop = _loop_config(args, model, draft_model)
    except (TenantsError, ValueError) as error:
        parser.error(str(error))
    return ServiceConfig(
        model=model,
        served_name=args.served_model_name or Path(model).name.removesuffix(".gguf"),
        host=args.host,
        port=args.port,
        drain_timeout=args.drain_timeout,
        stream_interval=args.stream_interval / 1000,
        slow_reader_timeout=args.slow_reader_timeout,
        loop=loop,
        access=_access(parser, args),
        gateway=_gateway(args),
        metrics_port=args.metrics_port,
        log_format=args.log_format,
        log_level=args.log_level,
        otlp_endpoint=args.otlp_endpoint or "",
        frontends=args.frontends,
    )


def _gateway(args: argparse.Namespace) -> GatewayConfig | None:
    """It asks nobody for a token and speaks plain HTTP: where gRPC does not, it stays on this host."""
    host = LOOPBACK if args.tls_cert or args.tokens else args.host
    return GatewayConfig(host, args.openai_port, args.drain_timeout) if args.openai_port else None


def _access(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Access:
    if (args.tls_cert is None) != (args.tls_key is None):
        parser.error("--tls-cert and --tls-key go together")
    if args.tls_client_ca and not args.tls_cert:
        parser.error("--tls-client-ca needs --tls-cert and --tls-key")
    beside = f"{LOOPBACK}:0" if args.openai_port and (args.tls_cert or args.tokens) else ""
    return Access(
        args.tls_cert,
        args.tls_key,
        args.tls_client_ca,
        args.tokens,
        args.vllm_listen or beside,
        args.max_connection_age,
    )


def _curve_keys(args: argparse.Namespace) -> Path | None:
    """Raises ValueError."""
    endpoint: str = args.listen or ""
    given: Path | None = args.curve_keys
    if given and not endpoint.startswith("tcp://"):
        raise ValueError(f"--curve-keys goes with --listen tcp://…, not with {endpoint or 'a private socket'}")
    if given is None and curve.needs_keys(endpoint):
        return Path(os.environ.get("PAGEWIRE_HOME") or model_cache.HOME).expanduser() / "curve"
    return given.resolve() if given else None


def _draft_model(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """Its path; empty where the proposer needs none."""
    needs_model, given = args.speculation in ("draft", "eagle3"), args.draft_model
    if needs_model and not given:
        parser.error(f"--speculation {args.speculation} needs --draft-model")
    if given and not needs_model:
        parser.error(f"--draft-model {given} goes with --speculation draft or eagle3")
    if not given or given.startswith(FAKE):
        return given or ""
    if not Path(given).exists():
        parser.error(f"--draft-model {given!r}: no such file or directory")
    return str(Path(given).resolve())


def _loop_config(args: argparse.Namespace, model: str, draft_model: str) -> LoopConfig:
    """Raises TenantsError, ValueError."""
    engine = _engine_config(args)
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
        kv_host_bytes=int(args.kv_host_gib * (1 << 30)),
        batch_invariant=args.batch_invariant,
        activations=args.activations,
        speculation=args.speculation,
        num_drafts=engine.num_drafts,
        draft_model=draft_model,
        threads=args.threads,
        sharing=max(1, args.workers) * args.tensor_parallel_size,
        tp_size=args.tensor_parallel_size,
        max_adapters=args.max_adapters,
        max_adapter_rank=(args.max_adapter_rank or ADAPTER_RANK) if args.max_adapters else 0,
    )
    return LoopConfig(
        engine=engine,
        setup=setup,
        adapters=_adapters(args),
        listen=args.listen or "",
        workers=args.workers,
        worker_arguments=_worker_arguments(args),
        curve_keys=_curve_keys(args),
        step_deadline=args.step_deadline,
        load_deadline=args.load_deadline,
        record=_record_config(args),
        relay_workers=args.log_format == "json",
    )


def _adapters(args: argparse.Namespace) -> tuple[Adapter, ...]:
    """Raises ValueError."""
    found: dict[str, Adapter] = {}
    for given in args.adapter:
        name, _, path = given.partition("=")
        if not path or (trouble := adapter_files.check_name(name)):
            raise ValueError(f"--adapter {given!r} is not NAME=PATH: {trouble if path else 'there is no PATH'}")
        if name in found:
            raise ValueError(f"--adapter {name} is given twice")
        directory = Path(path).resolve()
        found[name] = Adapter(name, str(directory), adapter_files.digest(directory))
    if args.max_adapter_rank and not args.max_adapters:
        raise ValueError(f"--max-adapter-rank {args.max_adapter_rank} goes with --max-adapters 1 or more")
    if len(found) > args.max_adapters:
        raise ValueError(f"--adapter is given {len(found)} times, over --max-adapters {args.max_adapters}")
    return tuple(found.values())


def _worker_arguments(args: argparse.Namespace) -> tuple[str, ...]:
    device = ("--backend", args.backend, "--device", args.device, "--cpu-isa", args.cpu_isa)
    gpu = (
        "--gpu-memory-utilization",
        f"{args.gpu_memory_utilization:g}",
        "--attention-backend",
        args.attention_backend,
    )
    arguments = (*device, *gpu, *(("--enforce-eager",) if args.enforce_eager else ()))
    if args.tensor_parallel_size == 1:
        return arguments
    # Who waits for the others in vain is ended by a deadline of ours before this one.
    return (*arguments, "--rank-deadline", f"{2 * max(args.step_deadline, args.load_deadline):g}")


def _record_config(args: argparse.Namespace) -> RecordConfig:
    return RecordConfig(
        file=args.record,
        mib=args.record_mib,
        crash_dir=args.crash_dir or Path(os.environ.get("PAGEWIRE_HOME") or model_cache.HOME).expanduser() / "crashes",
        crash_mib=args.crash_mib,
        key=secrets.token_bytes(32) if args.record_private else b"",
        clock=time.time() - time.monotonic(),
    )


def _engine_config(args: argparse.Namespace) -> EngineConfig:
    """Raises TenantsError, ValueError."""
    tenants = load_tenants(args.tenants) if args.tenants else Tenants()
    return EngineConfig(
        block_size=args.block_size,
        max_num_seqs=args.max_num_seqs,
        max_step_tokens=args.max_step_tokens or max(STEP_TOKENS, args.max_num_seqs),
        depth=args.depth,
        long_step=args.max_num_seqs,  # whoever decodes fits into one that is not
        short_step=SHORT_STEP,
        short_depth=2 * args.depth if args.depth > 1 else 1,
        num_drafts=args.num_drafts if args.speculation else 0,
        max_model_len=args.max_model_len,
        max_waiting=args.max_waiting,
        max_waiting_tokens=args.max_waiting_tokens,
        prefix_caching=args.enable_prefix_caching,
        tenants=tenants.named,
        default_tenant=tenants.default,
        prompt_cost=tenants.prompt_cost,
        output_cost=tenants.output_cost,
    )

"""The flags of `pagewire serve`, by vLLM's names where it has one, and what each may be."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

from protos import curve
from scheduler_svc.logs import FORMATS, LEVELS

SPECULATION = ("ngram", "suffix", "draft", "eagle3")
ADAPTER_RANK = 16
STEP_TOKENS = 256  # so that who decodes beside a prompt waits a quarter of a second at most, see decision 0015


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"pagewire serve: {message}\n")


def build_parser() -> Parser:
    parser = Parser(prog="pagewire serve", description="Serves a model over gRPC, each worker a child process.")
    parser.add_argument(
        "model", metavar="MODEL", help="a .gguf file, or a directory with safetensors, config.json and tokenizer.json"
    )
    for title, add_flags in _GROUPS:
        add_flags(parser.add_argument_group(title).add_argument)
    return parser


Add = Callable[..., object]  # of a group


def _service_flags(add: Add) -> None:
    add("--host", default="127.0.0.1")
    add("--port", type=_whole(0, 65535), default=50051, help="0 takes a free one; the ready line names it")
    add("--frontends", type=_whole(1, 64), default=1, metavar="N", help="gRPC processes that share the port")
    add("--served-model-name", default="", help="default: the file's or directory's name")
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
    add(
        "--slow-reader-timeout",
        type=_number,
        default=60.0,
        metavar="SECONDS",
        help="a stream ends whose client has read nothing for so long while tokens wait for it; 0: never",
    )


def _model_flags(add: Add) -> None:
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="auto: bfloat16; float32 is the torch backend's, the reference",
    )
    add(
        "--quantization",
        choices=("", "int8", "int4", "fp8"),
        metavar="{int8,int4,fp8}",
        default="",
        help="of a float checkpoint, on load: int8, fp8 by channel; int4 by groups of 32 (a 4-bit GGUF keeps its own)",
    )
    add(
        "--activations",
        choices=("auto", "int8"),
        default="auto",
        help="what a quantized checkpoint's weights are multiplied by: what it says itself, or 8 bits (cpu backend)",
    )
    add(
        "--kv-cache-dtype",
        choices=("auto", "bf16", "int8", "fp8"),
        default="auto",
        help="auto: as the backend computes; int8 on a CPU, fp8 on a GPU: half the memory",
    )
    add(
        "--max-model-len",
        type=_whole(0),
        default=0,
        metavar="N",
        help="tokens of prompt and output; 0: the model's own",
    )


def _adapter_flags(add: Add) -> None:
    add(
        "--max-adapters",
        type=_whole(0, 1024),
        default=0,
        metavar="N",
        help="LoRA adapters loaded at once, see `pagewire adapters`; 0: none are served",
    )
    add("--max-adapter-rank", type=_whole(1, 512), metavar="R", help=f"of each; default: {ADAPTER_RANK}")
    add(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="load this one at the start: a directory as PEFT writes it; may be repeated",
    )


def _batching_flags(add: Add) -> None:
    add("--max-num-seqs", type=_whole(1), default=64, metavar="N", help="sequences running at once in each worker")
    add(
        "--max-step-tokens",
        type=_whole(0),
        default=0,
        metavar="N",
        help=f"positions computed in one step; 0: {STEP_TOKENS}, or --max-num-seqs where that is more",
    )
    add("--max-waiting", type=_whole(1), default=1024, metavar="N", help="queued requests before RESOURCE_EXHAUSTED")
    add("--max-waiting-tokens", type=_whole(1), default=4_194_304, metavar="N", help="… and their tokens")
    add("--kv-cache-gib", type=_number, default=0.0, metavar="GIB", help="memory for KV; 0: the worker chooses")
    add(
        "--kv-host-gib",
        type=_number,
        default=0.0,
        metavar="GIB",
        help="memory of each worker's host for cached blocks that those have no room for; 0: none",
    )
    add("--block-size", type=_whole(1, 512), default=32, metavar="N", help="tokens of a KV block")
    add("--depth", type=_whole(1, 4), default=2, metavar="N", help="plans in flight; none behind a long one")
    add("--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=True)


def _speculation_flags(add: Add) -> None:
    add(
        "--speculation",
        choices=("", *SPECULATION),
        metavar="{" + ",".join(SPECULATION) + "}",
        default="",
        help="who proposes tokens that a step then verifies, several at once: the streams stay the same, to the bit. "
        "ngram: what followed the same words before, in the stream itself; suffix: and in the tenant's earlier "
        "outputs; draft: a smaller model; eagle3: a head that reads the model's hidden states",
    )
    add("--num-drafts", type=_whole(1, 63), default=7, metavar="N", help="… of a stream in a step at most")
    add("--draft-model", metavar="MODEL", help="a .gguf file or a directory, for --speculation draft and eagle3")


def _gateway_flags(add: Add) -> None:
    add(
        "--openai-port",
        type=_whole(0, 65535),
        default=0,
        metavar="PORT",
        help="also serve OpenAI's HTTP API there, through smg (pip install 'pagewire[openai]'); 0: no. "
        "It knows no tokens: with --tls-cert or --tokens it listens on loopback alone",
    )


def _access_flags(add: Add) -> None:
    add("--tls-cert", type=Path, metavar="FILE", help="certificate chain of the gRPC port (PEM); read again on change")
    add("--tls-key", type=Path, metavar="FILE", help="… and its key, without a pass phrase")
    add("--tls-client-ca", type=Path, metavar="FILE", help="clients must show a certificate of this authority (mTLS)")
    add("--tokens", type=Path, metavar="FILE", help="bearer tokens, see `pagewire token new`; read again on change")
    add(
        "--vllm-listen",
        type=_host_and_port,
        metavar="HOST:PORT",
        help="a plain port that asks for no token and serves vllm.grpc.engine alone, for a router beside it",
    )
    add(
        "--max-connection-age",
        type=_number,
        default=0.0,
        metavar="SECONDS",
        help="clients connect again so often, between their calls; 0: never",
    )


def _tenant_flags(add: Add) -> None:
    add("--tenants", type=Path, metavar="FILE", help="weights and quotas of tenants (TOML)")


def _worker_flags(add: Add) -> None:
    add(
        "--workers",
        type=_whole(0, 64),
        default=1,
        metavar="N",
        help="each with the whole model, and its share of this host's cores; 0: they come by themselves, see --listen",
    )
    add(
        "--tensor-parallel-size",
        type=_whole(1, 64),
        default=1,
        metavar="N",
        help="processes that each worker splits the model among (torch and cuda backends); memory for KV is of each",
    )
    add("--listen", type=_endpoint, metavar="tcp://HOST:PORT", help="where workers connect; or ipc:///PATH")
    add(
        "--curve-keys",
        type=Path,
        metavar="DIR",
        help="keys of a tcp link to workers, made if missing; default where other hosts can connect: "
        "$PAGEWIRE_HOME/curve",
    )
    add("--threads", type=_whole(0, 1024), default=0, metavar="N", help="compute threads of each worker; 0: it chooses")
    add(
        "--device", type=_device, default="auto", help="auto, cpu, cuda or cuda:N; auto: a GPU where the worker has one"
    )
    add(
        "--backend",
        choices=("auto", "cpu", "cuda", "torch", "fake"),
        default="auto",
        help="auto: cuda where there is a GPU; else cpu (our own kernels) for the families that are ours, torch for "
        "float32, experts and all others",
    )
    add(
        "--gpu-memory-utilization",
        type=_share,
        default=0.9,
        metavar="SHARE",
        help="of a GPU's memory, for weights, steps and KV (default: %(default)s)",
    )
    add(
        "--batch-invariant",
        action="store_true",
        help="the same tokens whatever else is in a step; a GPU takes slower kernels for it, CPUs are so anyway, and a "
        "worker that cannot is refused",
    )
    add("--enforce-eager", action="store_true", help="a GPU launches every kernel by itself, and captures no graphs")
    add(
        "--attention-backend",
        choices=("auto", "flash_attn", "flashinfer", "triton", "torch"),
        default="auto",
        help="what computes attention on a GPU; auto: FlashAttention 3 where it is installed and suits, else our own "
        "Triton kernels",
    )
    add(
        "--cpu-isa",
        choices=("auto", "avx512_bf16", "avx512_vnni", "avx2", "generic"),
        default="auto",
        help="instructions of the cpu backend; auto: the best that this host has",
    )
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


def _operator_flags(add: Add) -> None:
    add("--record", type=Path, metavar="FILE", help="log every engine event, for `pagewire replay FILE`")
    add("--record-mib", type=_whole(1), default=256, metavar="N", help="… in FILE, FILE.1, FILE.2, FILE.3 together")
    add(
        "--record-private",
        action="store_true",
        help="prompts, outputs and names of requests only as keyed hashes, in crash logs too",
    )
    add(
        "--crash-dir",
        type=Path,
        metavar="DIR",
        help="where the last seconds go when a worker or the engine is lost; default: $PAGEWIRE_HOME/crashes",
    )
    add("--crash-mib", type=_whole(0), default=16, metavar="N", help="memory for them; 0: they are not kept")


def _seeing_flags(add: Add) -> None:
    add(
        "--metrics-port",
        type=_whole(0, 65535),
        default=0,
        metavar="PORT",
        help="metrics for Prometheus, at --host, by HTTP, to whoever asks; 0: none",
    )
    add("--log-format", choices=FORMATS, default="text", help="of stderr: lines for a person, or an object a line")
    add("--log-level", choices=LEVELS, default="info", help="debug has a line for every call")
    add(
        "--otlp-endpoint",
        type=_url,
        metavar="http://HOST:PORT",
        help="send a trace of every request there, by OTLP over gRPC; needs pagewire[otel]",
    )


_GROUPS: list[tuple[str, Callable[[Add], None]]] = [
    ("service", _service_flags),
    ("OpenAI's API", _gateway_flags),
    ("model", _model_flags),
    ("adapters", _adapter_flags),
    ("batching and memory", _batching_flags),
    ("speculation", _speculation_flags),
    ("access", _access_flags),
    ("tenants", _tenant_flags),
    ("workers", _worker_flags),
    ("for operators", _operator_flags),
    ("to see what it does", _seeing_flags),
]


def _whole(least: int, most: int = sys.maxsize) -> Callable[[str], int]:
    def convert(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{value} is not in {least}..{most if most < sys.maxsize else ''}")
        return value

    convert.__name__ = "whole number"  # argparse calls the type so
    return convert


def _device(text: str) -> str:
    name, colon, index = text.partition(":")
    if text not in ("auto", "cpu", "cuda") and not (name == "cuda" and colon and index.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not auto, cpu, cuda or cuda:N")
    return text


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and up to 1")
    return value


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


def _url(text: str) -> str:
    """Of a collector."""
    try:
        parts = urlsplit(text)
        is_bare = parts.netloc == f"{parts.hostname}:{parts.port}" and not (parts.path or parts.query or parts.fragment)
    except ValueError:  # a port that is no number
        is_bare = False
    if not is_bare or parts.scheme not in ("http", "https"):
        raise argparse.ArgumentTypeError(f"{text!r} is not http://HOST:PORT or https://HOST:PORT")
    return text


def _endpoint(text: str) -> str:
    try:
        return curve.check_endpoint(text)
    except curve.CurveError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _host_and_port(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) >= 1 << 16:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    return text

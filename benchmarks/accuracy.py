"""How much each precision costs in accuracy: ours, and those of the peers that are installed.

    python -m benchmarks.accuracy                          # every mode and every installed peer
    python -m benchmarks.accuracy --window 8192 --peers llama-q4_1

All read the same tokens in the same windows, and each position's distribution of the next token is compared with that
of the torch backend in float32: mean KL divergence, perplexity, and how often both find the same token likeliest.
The text is the prose of Python's own reference manual, which comes with Python. Writes NAME.json into --out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import machine
from benchmarks.divergence import Estimate, Marks, Reference
from benchmarks.peers.catalogue import engines, peers
from benchmarks.peers.llama_cpp import LlamaCpp
from benchmarks.peers.openvino import OpenVINO
from benchmarks.process import StartError
from benchmarks.readers import CHUNK, Float32, Ours, Program, Reader
from client import english, store
from kernels.cpu import library
from scheduler_svc.frontend.model import load_model
from worker_svc.inputs import Ints

MODES = {  # name: (quantization, KV)
    "bf16": ("", "bf16"),
    "bf16-kv8": ("", "int8"),
    "int8": ("int8", "bf16"),
    "int8-kv8": ("int8", "int8"),
    "int4": ("int4", "bf16"),
    "int4-kv8": ("int4", "int8"),
}
BORDERS = (256, 1024, 4096)  # positions between which divergence is also reported by itself


@dataclass
class Reading:
    """One model's marks, chunk by chunk."""

    reader: Reader
    parts: list[Marks] = field(default_factory=list)


@dataclass(frozen=True)
class Result:
    name: str
    about: str
    perplexity: float
    growth: Estimate  # over float32's, as a share
    growth_over_bf16: Estimate | None  # over that of our bf16 step, as a share
    kl: Estimate  # nats
    kl_by_position: dict[str, float]
    kl_greatest: float
    same_likeliest: float  # share


def main() -> int:
    arguments = _parser().parse_args()
    torch.set_grad_enabled(False)
    threads = arguments.threads or library.usable_threads()
    torch.set_num_threads(threads)
    try:
        path = store.resolve(arguments.model)
        tokens = np.array(load_model(path).tokenizer.encode(english.in_order()), np.int64)
        windows = _windows(tokens, arguments.window, arguments.windows)
        with ExitStack() as opened:
            reference, readings = _open(arguments, path, threads, opened)
            surprise = _read(reference, readings, windows)
    except (StartError, store.StoreError, library.LibraryError) as error:
        print(f"benchmarks.accuracy: {error}", file=sys.stderr)
        return 1
    results = _results(readings, surprise, arguments.window)
    about = _about(path, windows, surprise)
    Console(width=max(Console().width, 140)).print(_table(results, about))
    out = arguments.out / f"{arguments.name or time.strftime('%Y-%m-%d') + '-accuracy'}.json"
    out.write_text(json.dumps({"about": about, "results": [asdict(result) for result in results]}, indent=1) + "\n")
    print(out)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=store.DEFAULT, help="a name or a GGUF file; default: %(default)s")
    parser.add_argument("--modes", nargs="*", choices=MODES, default=list(MODES), help="of ours; default: all")
    parser.add_argument("--peers", nargs="*", metavar="PEER", help="default: all that are installed")
    parser.add_argument("--window", type=_window, default=2048, metavar="N", help="tokens; default: %(default)s")
    parser.add_argument("--windows", type=int, default=0, metavar="N", help="how many; default: the whole text")
    parser.add_argument("--isa", default="auto", help="instructions of our step; default: the best there are")
    parser.add_argument("--threads", type=int, default=0, help="default: one a core")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", metavar="DIR")
    parser.add_argument("--name", default="", help="of the file; default: the date and -accuracy")
    return parser


def _window(text: str) -> int:
    if not text.isdecimal() or int(text) < CHUNK or int(text) % CHUNK:
        raise argparse.ArgumentTypeError(f"{text!r} is no multiple of {CHUNK}")
    return int(text)


def _windows(tokens: Ints, size: int, most: int) -> list[Ints]:
    """Whole ones from the text's beginning on. Raises StartError where there is none."""
    count = len(tokens) // size
    if not count:
        raise StartError(f"the text has {len(tokens)} tokens, and a window {size}")
    return list(tokens[: count * size].reshape(count, size)[: most or None])


def _open(arguments: argparse.Namespace, path: Path, threads: int, opened: ExitStack) -> tuple[Reader, list[Reading]]:
    """Raises StartError or LibraryError."""
    window, readers = arguments.window, list[Reader]()
    reference = opened.enter_context(closing(Float32(path, window)))
    for mode in arguments.modes:
        ours = Ours(path, store.home(), *MODES[mode], arguments.isa, threads, window)
        readers.append(opened.enter_context(closing(ours)))
    commands = LlamaCpp().logits(window, threads) | OpenVINO().logits(threads)
    for name in commands if arguments.peers is None else arguments.peers:
        if name not in commands:
            raise StartError(f"peer {name!r} cannot be asked; installed: {', '.join(commands) or 'none'}")
        peer = peers()[name]
        program = Program(name, f"{engines()[peer.engine].version}, {peer.about}", commands[name], reference.vocab_size)
        readers.append(opened.enter_context(closing(program)))
    return reference, [Reading(reader) for reader in readers]


def _read(reference: Reader, readings: list[Reading], windows: list[Ints]) -> torch.Tensor:
    """Fills in the readings; −log p of each token by the reference [windows · (window − 1)]."""
    surprise = []
    chunks = [(window, start) for window in windows for start in range(0, len(window), CHUNK)]
    with Progress() as bars:
        for window, start in bars.track(chunks, description="reading"):
            tokens = window[: start + CHUNK]
            targets = torch.from_numpy(window[start + 1 : start + CHUNK + 1])  # the window's last token has none
            expected = Reference(torch.from_numpy(reference.read(tokens, start))[: len(targets)], targets)
            surprise.append(expected.surprise)
            for reading in readings:
                logits = torch.from_numpy(reading.reader.read(tokens, start))
                reading.parts.append(expected.marks(logits[: len(targets)]))
    return torch.cat(surprise)


def _results(readings: list[Reading], surprise: torch.Tensor, window: int) -> list[Result]:
    marks = [Marks.join(reading.parts) for reading in readings]
    bf16 = next((m for m, reading in zip(marks, readings, strict=True) if reading.reader.name == "bf16"), None)
    return [
        Result(
            name=reading.reader.name,
            about=reading.reader.about,
            perplexity=(surprise + m.rise).mean().exp().item(),
            growth=Estimate.of(m.rise).as_growth(),
            growth_over_bf16=None if bf16 is None else Estimate.of(m.rise - bf16.rise).as_growth(),
            kl=Estimate.of(m.kl),
            kl_by_position=dict(_by_position(m.kl, window)),
            kl_greatest=m.kl.max().item(),
            same_likeliest=m.same.mean().item(),
        )
        for m, reading in zip(marks, readings, strict=True)
    ]


def _by_position(kl: torch.Tensor, window: int) -> Iterator[tuple[str, float]]:
    by_window = kl.view(-1, window - 1)
    borders = [0, *(border for border in BORDERS if border < window), window]
    for begin, end in pairwise(borders):
        yield f"{begin}–{end}", by_window[:, begin:end].mean().item()


def _about(path: Path, windows: list[Ints], surprise: torch.Tensor) -> dict[str, Any]:
    tokens = np.concatenate(windows)
    return machine.describe() | {
        "model": path.name,
        "text": f"the prose of Python's manual: pydoc_data.topics of Python {platform.python_version()}",
        "tokens": len(tokens),
        "tokens_digest": hashlib.blake2b(tokens.astype("<i4").tobytes(), digest_size=8).hexdigest(),
        "window": len(windows[0]),
        "scored": len(surprise),
        "float32_perplexity": math.exp(surprise.mean().item()),
    }


def _table(results: list[Result], about: dict[str, Any]) -> Table:
    title = (
        f"{about['model']}: {about['tokens']} tokens of {about['text']}, windows of {about['window']}\n"
        f"float32 has perplexity {about['float32_perplexity']:.3f}; ± is a standard error; 0–256: KL × 1000 there"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for name in (
        "KL × 1000",
        "most",
        *results[0].kl_by_position,
        "same best",
        "perplexity",
        "over float32",
        "over bf16",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for r in results:
        table.add_row(
            r.name,
            f"{1000 * r.kl.mean:.2f} ± {1000 * r.kl.error:.2f}",
            f"{1000 * r.kl_greatest:.0f}",
            *(f"{1000 * value:.2f}" for value in r.kl_by_position.values()),
            f"{100 * r.same_likeliest:.2f} %",
            f"{r.perplexity:.3f}",
            _percent(r.growth),
            "" if r.growth_over_bf16 is None else _percent(r.growth_over_bf16),
        )
    return table


def _percent(growth: Estimate) -> str:
    return f"{100 * growth.mean:+.2f} ± {100 * growth.error:.2f} %"


if __name__ == "__main__":
    sys.exit(main())

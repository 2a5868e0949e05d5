"""What quantized checkpoints cost in accuracy here, and whether their producers' own libraries say the same of them.

    python -m benchmarks.quantized FOLDER --json FILE [--theirs FILE] [--tokens N]
    python -m benchmarks.quantized FOLDER --write-tokens FILE

FOLDER/base is the model that the others in FOLDER are made of (tests/quantized/make/real.py). All read the text of
`benchmarks.accuracy` in the same windows, on the cpu backend and on the torch backend in float32, and are compared with
FOLDER/base on the latter. --theirs adds what tests/quantized/make/perplexity.py found on the tokens of --write-tokens:
`apart` is how far −log p of a token is from ours by that library, on average: of the float32 backend, which takes
weights as they are and rounds nothing, near 0 says that the file is read as its producer reads it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import machine
from benchmarks.divergence import Estimate, Marks, Reference
from benchmarks.process import StartError
from benchmarks.readers import CHUNK, Float32, Ours, Reader
from client import english, store
from kernels.cpu import library
from scheduler_svc.frontend.model import load_model
from worker_svc.inputs import Ints
from worker_svc.models.checkpoint import CheckpointError
from worker_svc.models.spec import SpecError

BASE = "base"


@dataclass(frozen=True)
class Side:
    """What one of our backends makes of a checkpoint, beside FOLDER/base in float32."""

    about: str
    perplexity: float
    growth: Estimate  # of perplexity, as a share
    kl: Estimate  # nats
    same_likeliest: float  # share


@dataclass(frozen=True)
class Theirs:
    """What the producer's library makes of it, or where it runs it not, transformers with the weights that the second
    reading of its format finds: `how` says which. apart: mean |difference| of −log p of a token, nats.
    """

    how: str
    versions: dict[str, str]
    perplexity: float
    apart_from_float32: float
    apart_from_cpu: float


@dataclass(frozen=True)
class Result:
    name: str
    made: dict[str, Any]  # producer, versions, recipe, date
    nbytes: int  # of safetensors
    cpu: Side | None
    float32: Side | None
    theirs: Theirs | None
    why_not: str = ""  # it is refused here, or not run by its own library


@dataclass(frozen=True)
class Text:
    windows: list[Ints]

    @property
    def digest(self) -> str:
        return hashlib.blake2b(np.concatenate(self.windows).astype("<i4").tobytes(), digest_size=8).hexdigest()

    def chunks(self) -> Iterator[tuple[Ints, int, torch.Tensor]]:
        """Each one's window up to its end, where it begins, and the tokens that follow its own."""
        for window in self.windows:
            for start in range(0, len(window), CHUNK):
                yield window[: start + CHUNK], start, torch.from_numpy(window[start + 1 : start + CHUNK + 1])


def main() -> int:
    arguments = _parser().parse_args()
    torch.set_grad_enabled(False)
    threads = arguments.threads or library.usable_threads()
    torch.set_num_threads(threads)
    base = arguments.folder / BASE
    try:
        text = _text(base, arguments.tokens, arguments.window)
        if arguments.write_tokens:
            said = {"digest": text.digest, "windows": [window.tolist() for window in text.windows]}
            arguments.write_tokens.write_text(json.dumps(said) + "\n")
            return 0
        told = theirs_of(arguments.theirs, text) if arguments.theirs else {}
        names = [path.parent.name for path in arguments.folder.glob("*/config.json")]
        results = measure(arguments.folder, [BASE, *sorted({*names} - {BASE})], text, told, threads)
    except (StartError, OSError, library.LibraryError) as error:
        print(f"benchmarks.quantized: {error}", file=sys.stderr)
        return 1
    about = _about(text)
    Console(width=max(Console().width, 150)).print(table(results, about))
    if arguments.json:
        found = {"about": about, "results": [asdict(result) for result in results]}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path, metavar="FILE", help="to write")
    parser.add_argument("--theirs", type=Path, metavar="FILE", help="what tests.quantized.make.perplexity wrote")
    parser.add_argument("--write-tokens", type=Path, metavar="FILE", help="write the tokens, and do nothing else")
    parser.add_argument("--tokens", type=int, default=2048, metavar="N", help="at most; default: %(default)s")
    parser.add_argument("--window", type=int, default=1024, metavar="N", help="tokens; default: %(default)s")
    parser.add_argument("--threads", type=int, default=0, help="default: one a core")
    return parser


def _text(base: Path, count: int, window: int) -> Text:
    """Whole windows from the text's beginning on. Raises StartError where there is none."""
    tokens = np.array(load_model(base).tokenizer.encode(english.in_order())[:count], np.int64)
    windows = len(tokens) // window
    if not windows:
        raise StartError(f"{len(tokens)} tokens are no window of {window}")
    return Text(list(tokens[: windows * window].reshape(windows, window)))


def theirs_of(path: Path, text: Text) -> dict[str, Any]:
    """By the model's name: `surprise` of each token that is scored, `how` and `versions`; or the `reason` why not.

    Raises StartError where they are of another text.
    """
    told = json.loads(path.read_text())
    if told["digest"] != text.digest:
        raise StartError(f"{path.name} is of other tokens: write them with the same --tokens and --window")
    models: dict[str, Any] = told["models"]
    return models


def measure(folder: Path, names: list[str], text: Text, told: dict[str, Any], threads: int) -> list[Result]:
    """What is refused is a result too, with the reason."""
    window = len(text.windows[0])
    results = []
    with Progress() as bars:
        with closing(Float32(folder / BASE, window)) as reader:
            references = [Reference(_logits(reader, *chunk), chunk[2]) for chunk in text.chunks()]
        for name in bars.track(names, description="checkpoints"):
            results.append(_measured(folder / name, text, references, told.get(name, {}), threads))
    return results


def _measured(path: Path, text: Text, references: list[Reference], told: dict[str, Any], threads: int) -> Result:
    made = json.loads((path / "made.json").read_text())
    nbytes = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    window = len(text.windows[0])
    surprise = torch.cat([reference.surprise for reference in references])
    try:
        with closing(Ours(path, store.home(), "", "bf16", "auto", threads, window)) as ours:
            cpu = _read(ours, text, references)
        with closing(Float32(path, window)) as plain:
            exact = _read(plain, text, references)
    except (CheckpointError, SpecError, StartError) as error:
        return Result(path.name, made, nbytes, None, None, None, f"refused: {error}".replace(f"{path}", path.name))
    theirs, why_not = _theirs(told, surprise + cpu.rise, surprise + exact.rise)
    sides = _side(ours.about, cpu, surprise), _side(plain.about, exact, surprise)
    return Result(path.name, made, nbytes, *sides, theirs, why_not)


def _logits(reader: Reader, tokens: Ints, start: int, targets: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(reader.read(tokens, start))[: len(targets)]  # a window's last token has no target


def _read(reader: Reader, text: Text, references: list[Reference]) -> Marks:
    pairs = zip(references, text.chunks(), strict=True)
    return Marks.join([reference.marks(_logits(reader, *chunk)) for reference, chunk in pairs])


def _side(about: str, marks: Marks, surprise: torch.Tensor) -> Side:
    return Side(
        about=about,
        perplexity=(surprise + marks.rise).mean().exp().item(),
        growth=Estimate.of(marks.rise).as_growth(),
        kl=Estimate.of(marks.kl),
        same_likeliest=marks.same.mean().item(),
    )


def _theirs(told: dict[str, Any], cpu: torch.Tensor, exact: torch.Tensor) -> tuple[Theirs | None, str]:
    """`cpu`, `exact`: −log p of each token by our two backends. Raises StartError for another number of tokens."""
    why_not = f"its library does not run it: {told['reason']}" if "reason" in told else ""
    if "surprise" not in told:
        return None, why_not
    theirs = torch.tensor(told["surprise"], dtype=torch.float64)
    if theirs.shape != exact.shape:
        raise StartError(f"{len(theirs)} tokens are scored there, {len(exact)} here")
    apart = [(theirs - ours).abs().mean().item() for ours in (exact, cpu)]
    return Theirs(told["how"], told["versions"], math.exp(theirs.mean().item()), *apart), why_not


def _about(text: Text) -> dict[str, Any]:
    return machine.describe() | {
        "base": "SmolLM2-135M-Instruct as its Q4_1 GGUF has it, in bfloat16",
        "compared_with": f"{BASE} on the torch backend in float32",
        "text": f"the prose of Python's manual: pydoc_data.topics of Python {platform.python_version()}",
        "tokens": sum(map(len, text.windows)),
        "tokens_digest": text.digest,
        "window": len(text.windows[0]),
        "scored": sum(len(window) - 1 for window in text.windows),
    }


def table(results: list[Result], about: dict[str, Any]) -> Table:
    title = (
        f"{about['tokens']} tokens of {about['text']}, windows of {about['window']}\n"
        f"beside {about['compared_with']}; apart: mean |difference| of −log p × 1000 from the producer's library"
    )
    reasons = "\n".join(f"{r.name}: {r.why_not}" for r in results if r.why_not)
    drawn = Table(title=title, title_justify="left", caption=reasons, caption_justify="left")
    for name in ("", "MB", "cpu", "KL × 1000", "float32", "KL × 1000", "theirs", "cpu apart", "float32 apart"):
        drawn.add_column(name, justify="right" if name else "left", no_wrap=True)
    for r in results:
        sides = [
            text
            for side in (r.cpu, r.float32)
            for text in (("", "") if side is None else (f"{side.perplexity:.3f}", f"{1000 * side.kl.mean:.2f}"))
        ]
        theirs = ["", "", ""] if r.theirs is None else [f"{r.theirs.perplexity:.3f}"]
        if r.theirs is not None:
            theirs += [f"{1000 * apart:.3f}" for apart in (r.theirs.apart_from_cpu, r.theirs.apart_from_float32)]
        drawn.add_row(r.name, f"{r.nbytes / 1e6:.0f}", *sides, *theirs)
    return drawn


if __name__ == "__main__":
    sys.exit(main())

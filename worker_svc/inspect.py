"""`python -m worker_svc.inspect MODEL`: what a checkpoint is, and what the cpu backend makes of it.

Headers and scales are read, and nothing is packed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Final

from kernels.cpu import library
from worker_svc.backends.cpu_model import KVForm, shape, unfit
from worker_svc.models.checkpoint import CheckpointError
from worker_svc.models.loader import open_model, read_config
from worker_svc.models.registry import architecture
from worker_svc.models.spec import SpecError
from worker_svc.quant import on_load
from worker_svc.quant.layout import Matrix, layout
from worker_svc.quant.plan import check_mode, chosen, mode_of, tensors_of, uniform

BLOCK: Final = 32  # tokens
MOST: Final = 24  # characters of the numbers of layers
KERNELS: Final = {  # by kind: weights, then what they are multiplied by
    "bf16": "bf16", "int8": "w8a8 rotated", "int4": "w4a8", "w8a8": "w8a8", "w4a16": "w4a16", "w8a16": "w8a16",
}  # fmt: skip


@dataclass(frozen=True)
class Product:
    """Some layers' matrix: how it is stored, and how it is multiplied."""

    layers: str  # "0-29", "0, 3"; empty for lm_head
    name: str  # qkv, o, gate_up, down, lm_head
    rows: int
    columns: int
    stored: str
    kernel: str
    why: str  # it is not multiplied as it is stored


@dataclass
class Report:
    path: str
    architecture: str
    quantization: str = ""  # by what the checkpoint is quantized; empty: it is not
    weights: int = 0
    packed_bytes: int = 0
    kv_bytes_per_token: dict[str, int] = field(default_factory=dict)  # by dtype of KV
    products: list[Product] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)  # why the cpu backend does not serve it


def inspect(path: Path, mode: str) -> Report:
    """Raises CheckpointError, SpecError or OSError for what is no checkpoint, or one of a method that is not known."""
    model = open_model(path)
    if model is None:
        name = architecture(read_config(path)) or "its architecture"
        why = f"{name} is no family of ours: transformers runs it, by the torch backend"
        return Report(str(path), name, refused=[why])
    check_mode(model, mode)
    report = Report(str(path), model.spec.architecture, model.quantization)
    matrices: dict[str, Matrix] = {}
    stored: dict[str, str] = {}
    for name, matrix in uniform(model.spec, mode).items():
        try:
            tensors = tensors_of(model, name, matrix)
            matrices[name] = chosen(name, matrix, tensors, mode == "a8") if model.quantization else matrix
            stored[name] = ", ".join(dict.fromkeys(tensor.dtype for tensor in tensors))
        except CheckpointError as error:
            report.refused.append(str(error))
    report.products = list(_products(matrices, stored))
    report.weights = sum(matrix.n * matrix.k for matrix in matrices.values())
    if trouble := unfit(model.spec):
        report.refused.append(trouble)
    if not report.refused:
        kernels = library.load()
        report.packed_bytes = layout(model.spec, matrices, kernels).nbytes
        for kind in library.KV_KINDS:
            form = shape(model.spec, KVForm(kind, BLOCK), BLOCK)
            report.kv_bytes_per_token[kind] = kernels.kv_block_bytes(form) // BLOCK
    return report


def _products(matrices: Mapping[str, Matrix], stored: Mapping[str, str]) -> Iterator[Product]:
    """One for each matrix that differs: layers alike are told together."""
    seen: dict[Product, list[int]] = {}
    for full_name, matrix in matrices.items():
        layer, _, name = full_name.rpartition(".")
        product = Product("", name, matrix.n, matrix.k, stored[full_name], KERNELS[matrix.kind], matrix.why)
        seen.setdefault(product, []).append(int(layer or -1))
    for product, layers in seen.items():
        yield replace(product, layers="" if layers == [-1] else _ranges(layers))


def _ranges(numbers: list[int]) -> str:
    """1, 2, 3, 5 → "1-3, 5"."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    text = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return text if len(text) <= MOST else f"{len(numbers)} of {numbers[0]}-{numbers[-1]}"


def text(report: Report) -> str:
    lines = [f"{report.path}", f"  architecture   {report.architecture}"]
    types = "the types of GGUF" if report.path.endswith(".gguf") else "nothing"
    lines.append(f"  quantized by   {report.quantization or types}")
    if report.weights:
        lines.append(f"  weights        {report.weights / 1e6:.1f} million in products")
    if report.packed_bytes:
        lines.append(f"  packed         {report.packed_bytes / 2**20:.1f} MiB, embedding rows included")
        kv = ", ".join(f"{size / 2**10:.1f} KiB in {kind}" for kind, size in report.kv_bytes_per_token.items())
        lines.append(f"  KV a token     {kv}")
    rows = [("layers", "product", "shape", "stored as", "kernel (cpu)", "")]
    rows += [
        (each.layers, each.name, f"{each.rows} × {each.columns}", each.stored, each.kernel, each.why)
        for each in report.products
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    if report.products:
        lines.append("")
        padded = (zip(row, [*widths, 0], strict=True) for row in rows)
        lines += ["  ".join(cell.ljust(width) for cell, width in row).rstrip() for row in padded]
    if report.refused:
        lines += ["", "the cpu backend refuses it:", *(f"  {reason}" for reason in report.refused)]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """0: it can be served; 1: it cannot; 2: wrong usage."""
    parser = argparse.ArgumentParser(prog="pagewire model inspect", description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, metavar="MODEL", help="a directory, or a .gguf file")
    parser.add_argument(
        "--quantization", choices=("", *on_load.MODES), default="", help="what becomes of a float one, on load"
    )
    parser.add_argument("--activations", choices=("auto", "int8"), default="auto", help="of a quantized one's products")
    parser.add_argument("--json", action="store_true", help="for programs")
    arguments = parser.parse_args(argv)
    try:
        report = inspect(arguments.model, mode_of(arguments.quantization, arguments.activations))
    except (CheckpointError, SpecError, OSError, library.LibraryError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    print(json.dumps(asdict(report), indent=2) if arguments.json else text(report))
    return 1 if report.refused else 0


if __name__ == "__main__":
    sys.exit(main())

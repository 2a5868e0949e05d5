"""`make quant-table`: the tables of docs/quantization.md, from the fixtures and from the newest measured run.

python -m tests.quantized.table            # says whether the page still holds, but for numbers
python -m tests.quantized.table --write
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.models.cpu_stepping import Runner, packed
from tests.models.stepping import Sequence as Prompt
from tests.quantized.test_fixtures import FOLDER, NAMES, REFUSED, error, expected, float32_logits, opened, tokens_of
from worker_svc.quant import gpu_choice
from worker_svc.quant.plan import tensors_of, uniform

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "quantization.md"
RESULTS = ROOT / "benchmarks" / "results"
HEAD = ("checkpoint", "stored as", "weights", "logits, float32", "logits, cpu", "kernel, CPU", "kernel, NVIDIA and AMD")


def row(name: str, home: Path) -> tuple[str, ...]:
    """Of one fixture."""
    shutil.copytree(FOLDER / name, home / name)
    model = packed(home / name, "", home)
    quantized = {key: matrix for key, matrix in model.layout.matrices.items() if matrix.origin}
    stored = dict.fromkeys(each.dtype for each in _tensors(name))
    gpu = dict.fromkeys(gpu_choice.choose(each, float8=True).kernel for each in _tensors(name))
    prompt = tokens_of(name)
    (ours,) = Runner(model, max_model_len=64).run([Prompt(prompt, [len(prompt)])])
    return (
        name,
        ", ".join(stored),
        _short(_weights(name)),
        _logits(name, float32_logits(name, prompt)),
        _logits(name, ours),
        ", ".join(dict.fromkeys(matrix.kind for matrix in quantized.values())),
        ", ".join(gpu),
    )


def _tensors(name: str) -> list[Any]:
    """Those that are quantized, of all products."""
    model = opened(name)
    found = [tensor for key, matrix in uniform(model.spec, "").items() for tensor in tensors_of(model, key, matrix)]
    return [tensor for tensor in found if hasattr(tensor, "scheme")]


def _weights(name: str) -> float:
    worst = 0.0
    for key, value in expected(name).items():
        if key.endswith(".weight"):
            theirs = value.float().numpy()
            difference = np.abs(opened(name).checkpoint.tensor(key).float32() - theirs).max()
            worst = max(worst, float(difference / np.abs(theirs).max()))
    return worst


def _logits(name: str, ours: Any) -> str:
    theirs = expected(name).get("logits")
    return "–" if theirs is None else _short(error(ours, theirs.float().numpy()))


def _short(value: float) -> str:
    return "0" if value == 0 else "< 0.00001" if value < 1e-5 else f"{value:.2g}"


def fixtures() -> str:
    with tempfile.TemporaryDirectory() as home:
        rows = [row(name, Path(home)) for name in NAMES]
    refused = [(name, "bitsandbytes", "refused", "–", "–", "–", "–") for name in REFUSED]
    return table([HEAD, *rows, *refused])


def real() -> str:
    """Of the newest run of benchmarks.quantized, and of the newest of speed that has its checkpoints."""
    runs = sorted(RESULTS.glob("*-quantized.json"))
    if not runs:
        return "Not measured yet.\n"
    run = json.loads(runs[-1].read_text())
    rows: list[tuple[str, ...]] = [
        ("checkpoint", "MB", "perplexity, cpu", "float32", "theirs", "apart", "KL to the original, cpu", "kernels, cpu")
    ]
    for each in run["results"]:
        cpu, plain, theirs = each["cpu"], each["float32"], each["theirs"]
        rows.append(
            (
                each["name"],
                f"{each['nbytes'] / 1e6:.0f}",
                f"{cpu['perplexity']:.2f}" if cpu else each["why_not"],
                f"{plain['perplexity']:.2f}" if plain else "–",
                f"{theirs['perplexity']:.2f}" if theirs else "–",
                f"{theirs['apart_from_float32']:.4f}" if theirs else "–",
                f"{cpu['kl']['mean']:.4f}" if cpu else "–",
                ", ".join(dict.fromkeys(re.findall(r": (\w+)(?=[;)])", cpu["about"]))) if cpu else "–",
            )
        )
    return f"From `benchmarks/results/{runs[-1].name}`.\n\n" + table(rows)


def speed() -> str:
    """The first table of the newest run that has checkpoints."""
    runs = sorted(RESULTS.glob("*-quantized-speed.md"))
    if not runs:
        return "Not measured yet.\n"
    lines = runs[-1].read_text().split("\n\n")[1]
    return f"From `benchmarks/results/{runs[-1].name}`.\n\n{lines}\n"


def table(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"


def renewed(page: str, tables: dict[str, str]) -> str:
    """Raises KeyError where the page lacks a place."""
    for name, text in tables.items():
        found = re.search(rf"<!-- {name} -->\n(.*?)<!-- end -->", page, re.DOTALL)
        if not found:
            raise KeyError(name)
        page = page[: found.start(1)] + text + page[found.end(1) :]
    return page


def shape(page: str) -> list[str]:
    """Without the numbers, which are another machine's."""
    return [re.sub(r"\d+\.\d+(e-\d+)?|< 0\.00001", "n", line) for line in page.splitlines()]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.quantized.table", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    page = PAGE.read_text()
    new = renewed(page, {"fixtures": fixtures(), "real": real(), "speed": speed()})
    if arguments.write:
        PAGE.write_text(new)
    elif shape(new) != shape(page):
        print(f"{PAGE.name} tells something else than the fixtures: --write renews it", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What the producers' own libraries make of a text, for `python -m benchmarks.quantized --theirs OUT`.

    python -m tests.quantized.make.perplexity TOKENS FOLDER OUT [NAME ...]

in a producer's venv, from the root of the repository, with HF_HUB_OFFLINE=1. TOKENS is what `benchmarks.quantized
--write-tokens` wrote. Each FOLDER/NAME whose producer this venv has is run on a CPU in float32; OUT has −log p of every
token, and why the producer's library does not run it where it does not. Results of other venvs in OUT stay.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import time
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.quantized.make import reading

# producer, as its made.json calls it: (module here, what it imports)
PRODUCERS = {
    "AutoRound": ("auto_round", "auto_round"),
    "LLM Compressor": ("compressed", "llmcompressor"),
    "GPTQModel": ("gptqmodel", "gptqmodel"),
}


@torch.no_grad()
def surprise(model: Any, windows: list[list[int]]) -> list[float]:
    """−log p in nats of every token but the first of each window."""
    found: list[float] = []
    for window in windows:
        tokens = torch.tensor(window)
        logits = model(input_ids=tokens[None], use_cache=False).logits[0, :-1].float()
        found += (-torch.log_softmax(logits, -1).gather(1, tokens[1:, None])[:, 0]).tolist()
    return found


def load(folder: Path, producer: str) -> tuple[Any, str]:
    if producer not in PRODUCERS:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), "transformers in float32 on a CPU"
    loaded: tuple[Any, str] = import_module(f"tests.quantized.make.{PRODUCERS[producer][0]}").load(folder)
    return loaded


def plainly(folder: Path) -> tuple[Any, str]:
    """Transformers without quantization, with the weights that reading.py finds. Raises ValueError as it does."""
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    weights, rest = reading.read(config, tensors)
    unquantized = {name: value for name, value in config.items() if name != "quantization_config"}
    model: Any = LlamaForCausalLM(LlamaConfig(**(unquantized | {"dtype": torch.float32})))
    state = {name: tensor.float() for name, tensor in (rest | weights).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"}, missing  # the embedding, where it is tied
    assert not unexpected, unexpected
    return model, "transformers in float32 on a CPU with the weights of tests/quantized/make/reading.py"


def of(folder: Path, producer: str, windows: list[list[int]]) -> dict[str, Any]:
    """Of one model: −log p and how it was run. Where the producer's library does not run it, `reason` says why, and
    the second reading of the format stands in for it.
    """
    told: dict[str, Any] = {}
    try:
        model, how = load(folder, producer)
        found = surprise(model.eval(), windows)
    except (Exception, SystemExit) as error:  # whatever keeps it from running here is told
        told["reason"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        try:
            model, how = plainly(folder)
        except (KeyError, ValueError, OSError, SafetensorError):  # a format that the second reading does not know
            return told
        found = surprise(model.eval(), windows)
    if not all(map(math.isfinite, found)):
        return {"reason": f"{how}: logits are not finite"}
    return told | {"how": how, "surprise": [round(value, 6) for value in found]}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*", help="default: all that this venv can run")
    asked = parser.parse_args(arguments)
    text = json.loads(asked.tokens.read_text())
    told = json.loads(asked.out.read_text()) if asked.out.exists() else {}
    if told.get("digest") != text["digest"]:
        told = {"digest": text["digest"], "models": {}}
    for folder in sorted(path.parent for path in asked.folder.glob("*/config.json")):
        producer = json.loads((folder / "made.json").read_text())["producer"]
        package = PRODUCERS.get(producer, ("", "transformers"))[1]
        if (asked.names and folder.name not in asked.names) or importlib.util.find_spec(package) is None:
            continue
        began = time.monotonic()
        versions = {name: version(name).partition("+")[0] for name in ("torch", "transformers")}
        told["models"][folder.name] = found = of(folder, producer, text["windows"]) | {"versions": versions}
        asked.out.write_text(json.dumps(told) + "\n")
        print(f"{folder.name}: {time.monotonic() - began:.0f} s", found.get("reason", ""), flush=True)


if __name__ == "__main__":
    main()

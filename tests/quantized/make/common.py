"""What every producer's script shares: the tiny models, the calibration tokens, and how a fixture is laid down."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.quantized.make import reading

CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"
# 96, 160 and 64 columns: none but the last is a multiple of 64, so groups of 64 and 128 end short.
NARROW: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# For recipes that treat layers unlike.
DEEP = NARROW | {"num_hidden_layers": 2}
# For those who refuse a short last group of 64 or 128 columns.
WIDE = NARROW | {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
TOKENS = [1, 17, 42, 5, 58, 33, 9, 61, 28, 50, 3, 44]
SECOND = "tests/quantized/make/reading.py"
# A fixture keeps the expected values of k_proj and down_proj: those of all would be more than all the rest of it.
KEPT = re.compile(r"layers\.0\.self_attn\.k_proj|lm_head")


@dataclass(frozen=True)
class Reference:
    """How a producer's own code reads the checkpoint in `path`, as (weights or None, logits or None).

    weights: of each quantized module, float32 [N, K] under "x.weight"; None where the producer has no dequantizer.
    logits: float32 [T, vocab]; None where the producer's library does not run the file on a CPU.
    `dequantizer` and `runner` say in words what made them.
    """

    weights: dict[str, torch.Tensor] | None
    dequantizer: str
    logits: torch.Tensor | None
    runner: str


def model(
    shape: Mapping[str, Any], dtype: torch.dtype = torch.float16, positive: bool = False, seed: int = 7
) -> LlamaForCausalLM:
    """Random, with a few loud input columns and output rows, whose groups and channels need scales of their own.

    positive: no weight of k_proj is negative, nor of some rows of o_proj: their asymmetric zero points are all 0.
    """
    torch.manual_seed(seed)
    built: Any = LlamaForCausalLM(LlamaConfig(**shape, dtype=dtype))
    with torch.no_grad():
        for name, weight in built.named_parameters():
            if name.endswith("norm.weight"):
                weight.add_(0.2 * torch.randn_like(weight))
                continue
            weight.copy_(torch.randn_like(weight) * weight.shape[-1] ** -0.5)
            if "proj" in name:
                rows, columns = weight.shape
                weight[:, torch.randperm(columns)[: columns // 24]] *= 4
                weight[torch.randperm(rows)[: rows // 24]] *= 3
            if positive and "k_proj" in name:
                weight.abs_()
            if positive and "o_proj" in name:
                weight[3::7] = weight[3::7].abs()
    whole: LlamaForCausalLM = built.to(dtype)
    return whole


def save(built: LlamaForCausalLM) -> Path:
    """The model and its tokenizer as a producer is given them: a folder, `tiny` where we are."""
    built.save_pretrained("tiny")
    tokenizer(built.config.to_dict()).save_pretrained("tiny")
    return Path("tiny")


def calibration(shape: Mapping[str, Any], samples: int = 16, length: int = 32) -> list[torch.Tensor]:
    """int64 [1, length] each."""
    made = torch.Generator().manual_seed(11)
    return [torch.randint(3, shape["vocab_size"], (1, length), generator=made) for _ in range(samples)]


def tokenizer(shape: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """One word a token: the producers ask for a tokenizer, and none of them has a text to read here."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, shape["vocab_size"])}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapper: Any = PreTrainedTokenizerFast
    wrapped: PreTrainedTokenizerFast = wrapper(
        tokenizer_object=plain, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    return wrapped


@torch.no_grad()
def run(loaded: Any) -> torch.Tensor:
    """Logits float32 [T, vocab] of TOKENS."""
    whole: torch.Tensor = loaded(input_ids=torch.tensor([TOKENS]), use_cache=False).logits[0].float()
    return whole.contiguous()


def plain_logits(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Of transformers' own Llama in float32 with the weights given: nothing of it is quantized any more."""
    shape = {name: config[name] for name in NARROW}
    rebuilt = LlamaForCausalLM(LlamaConfig(**shape, dtype=torch.float32))
    rebuilt.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=True)
    return run(rebuilt)


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Root mean square of the difference over that of what is wanted."""
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def judged(
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    original: Mapping[str, torch.Tensor],
    told: Reference,
    mistaken: str,
) -> tuple[Reference, dict[str, float]]:
    """What is to be expected, and how far it is: the weights from the `original` ones, the logits from plain ones.

    Raises AssertionError where the two readings differ, or are far from what was quantized or from what was computed.
    """
    weights, rest = reading.read(config, tensors)
    theirs = told.weights or {}
    apart = {key: relative(theirs[key], weights[key]) for key in theirs if not torch.equal(theirs[key], weights[key])}
    if mistaken:
        assert apart, "the producer reads this file rightly"
        told = Reference(None, f"{SECOND}: {mistaken}", None, f"none: {mistaken}")
    else:
        assert not apart, apart
        assert told.weights is None or set(theirs) == set(weights), set(theirs) ^ set(weights)
    far = {"weights": max(relative(weight, original[key]) for key, weight in weights.items())}
    if told.logits is not None:
        far["logits"] = relative(told.logits, plain_logits(config, rest | weights))
    assert far["weights"] < 0.8, far
    assert far.get("logits", 0) < 0.2, far
    return Reference(weights, told.dequantizer, told.logits, told.runner), far


def fixture(
    name: str,
    producer: str,
    packages: list[str],
    recipe: Mapping[str, Any],
    built: LlamaForCausalLM,
    write: Callable[[Path], Path],
    reference: Callable[[Path], Reference],
    also: str = r"$^",
    mistaken: str = "",
) -> None:
    """Has a producer write a checkpoint of what was `built` and lays it down as the fixture `name`.

    `write` is called in an empty folder with the one the model is in, and answers with the one that it wrote
    config.json and model.safetensors to. `also` picks more weights to keep, by name.
    mistaken: why the producer reads its own file wrongly; then it must, and the second reading alone is kept.
    Raises AssertionError as `judged` does, and where a file names a path of this machine.
    """
    original = {key: tensor.float().clone() for key, tensor in built.state_dict().items()}
    home = CHECKPOINTS / name
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        written = write(save(built))
        assert [path.name for path in written.glob("*.safetensors")] == ["model.safetensors"]
        config = json.loads((written / "config.json").read_text())
        tensors = load_file(written / "model.safetensors")
        expected, far = judged(config, tensors, original, reference(written), mistaken)
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        for file in ("config.json", "model.safetensors"):
            shutil.copyfile(written / file, home / file)
    print(name, far, flush=True)
    last = f"layers.{config['num_hidden_layers'] - 1}.mlp.down"
    keep = {
        key: weight.contiguous()
        for key, weight in (expected.weights or {}).items()
        if KEPT.search(key) or last in key or re.search(also, key)
    }
    logits = {} if expected.logits is None else {"logits": expected.logits}
    save_file(keep | logits | {"tokens": torch.tensor(TOKENS)}, home / "expected.safetensors")
    with safe_open(home / "model.safetensors", framework="pt") as opened:
        header = json.dumps(opened.metadata())
    for text in ((home / "config.json").read_text(), header):
        assert not re.search(r'"[^"]*(/tmp|/work|/root|/home)', text), text
    made = {
        "producer": producer,
        "versions": {package: version(package).partition("+")[0] for package in [*packages, "torch", "transformers"]},
        "recipe": recipe,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "dequantizer": expected.dequantizer,
        "logits": expected.runner,
        "weights_beside_original": float(f"{far['weights']:.3g}"),
        "logits_beside_float32": float(f"{far['logits']:.3g}") if "logits" in far else None,
    }
    (home / "made.json").write_text(json.dumps(made, indent=2) + "\n")

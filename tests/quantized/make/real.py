"""A real model quantized by the producers: SmolLM2-135M-Instruct, for `python -m benchmarks.quantized`.

    python -m tests.quantized.make.real base FOLDER               in Pagewire's venv: the model that is quantized
    python -m tests.quantized.make.real auto_round FOLDER [NAME ...]      in README.md's llmc venv
    python -m tests.quantized.make.real llm_compressor FOLDER [NAME ...]  in the same
    python -m tests.quantized.make.real gptqmodel FOLDER [NAME ...]       in its gptq venv

All from the root of the repository, with HF_HUB_OFFLINE=1. Each writes FOLDER/NAME, as a producer leaves it, with a
made.json that says how.

What there is of this model in a package index is a GGUF of Q4_1, so that is where FOLDER/base comes from, in bfloat16:
its weights have been quantized once before, and what a producer loses comes on top of that.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

BASE = "base"
SAMPLES, LENGTH = 16, 128  # of text to calibrate by: whole tokens, of the repository's own documents
# 576 columns: 64 divides them, 128 does not.
G64 = {"group_size": 64}
ASYM = {"sym": False}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64}


def linear(**scheme: Any) -> dict[str, Any]:
    """One group of all linear layers."""
    return {"config_groups": {"group_0": {"targets": ["Linear"]} | scheme}}


def scheme(name: str) -> dict[str, Any]:
    return {"targets": "Linear", "scheme": name}


# One of q, k, v and one of gate, up are unlike their neighbours in some layers, and one layer stays as it was.
MIXED: dict[str, Any] = {f"model.layers.{i}.self_attn.v_proj": {"bits": 8, "group_size": 64} for i in range(0, 30, 3)}
MIXED |= {f"model.layers.{i}.mlp.up_proj": {"bits": 2, "group_size": 32} for i in (10, 20)}
MIXED |= {f"model.layers.0.mlp.{name}_proj": {"bits": 16} for name in ("gate", "up", "down")}

# producer: {name: arguments of its module's `write`, after the model's folder}
RECIPES: dict[str, dict[str, tuple[Any, ...]]] = {
    "auto_round": {
        "auto_round_gptq_w4_g64": ("auto_gptq", "W4A16", G64),
        "auto_round_gptq_w8_g64": ("auto_gptq", "W8A16", G64),
        "auto_round_awq_w4_g32_asym": ("auto_awq", "W4A16", {"group_size": 32} | ASYM),
        "auto_round_awq_w4_g64_asym": ("auto_awq", "W4A16", G64 | ASYM),
        "auto_round_own_mixed": ("auto_round", "W4A16", G64 | {"layer_config": MIXED}),
        "auto_round_fp8_block": ("fp8", "FP8_BLOCK", {}),
    },
    "llm_compressor": {
        "llm_compressor_w4a16_g64": ("GPTQModifier", linear(weights=INT4 | {"symmetric": True})),
        "llm_compressor_w4a16_g64_asym": ("QuantizationModifier", linear(weights=INT4 | {"symmetric": False})),
        "llm_compressor_w8a16": (
            "QuantizationModifier",
            linear(weights={"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}),
        ),
        "llm_compressor_w8a8": ("QuantizationModifier", scheme("W8A8")),
        "llm_compressor_fp8_dynamic": ("QuantizationModifier", scheme("FP8_DYNAMIC")),
        "llm_compressor_fp8_block": ("QuantizationModifier", scheme("FP8_BLOCK")),
    },
    "gptqmodel": {
        "gptqmodel_w4_g64_desc_act": ({"bits": 4, "desc_act": True} | G64,),
        "gptqmodel_v2_w4_g64_asym": ({"bits": 4, "format": "gptq_v2"} | G64 | ASYM,),
    },
}
PRODUCERS = {
    "auto_round": ("AutoRound", ["auto-round", "compressed-tensors"]),
    "llm_compressor": ("LLM Compressor", ["llmcompressor", "compressed-tensors"]),
    "gptqmodel": ("GPTQModel", ["gptqmodel"]),
}


@torch.no_grad()
def base(home: Path) -> None:
    """Writes the model in transformers' layout. Raises AssertionError where transformers and Pagewire differ on it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from benchmarks.readers import Float32
    from client import store
    from protos import gguf_header
    from scheduler_svc.frontend import gguf_tokenizer
    from worker_svc.models.loader import open_model

    source = store.pull(store.DEFAULT)
    opened = open_model(source)
    assert opened is not None
    spec = opened.spec
    config = LlamaConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        max_position_embeddings=spec.max_model_len,
        rms_norm_eps=spec.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": spec.rope.theta},
        tie_word_embeddings=spec.tied,
        bos_token_id=1,
        eos_token_id=2,
        dtype=torch.bfloat16,
    )
    built: Any = LlamaForCausalLM(config)
    state = built.state_dict()
    roles = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    roles |= {role: f"self_attn.{role}_proj" for role in "qkvo"}
    roles |= {role: f"mlp.{role}_proj" for role in ("gate", "up", "down")}
    heads = {"q": spec.num_heads, "k": spec.num_kv_heads}  # whose rows GGUF keeps in an order of its own
    names = [("model.embed_tokens.weight", opened.top("embed"), 0), ("model.norm.weight", opened.top("final_norm"), 0)]
    for i in range(spec.num_layers):
        names += [(f"model.layers.{i}.{n}.weight", opened.layer(i, r), heads.get(r, 0)) for r, n in roles.items()]
    for name, tensor, split in names:
        state[name].copy_(torch.from_numpy(opened.read(tensor, tuple(state[name].shape), "float32", split).copy()))
    folder = home / BASE
    built.to(torch.bfloat16).save_pretrained(folder)
    metadata = gguf_header.read(source).metadata
    gguf_tokenizer.build(metadata).save(str(folder / "tokenizer.json"))
    ends = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": metadata["tokenizer.chat_template"]} | ends
    (folder / "tokenizer_config.json").write_text(json.dumps(said, indent=2) + "\n")
    tokens = calibration(folder)[0]
    loaded: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = loaded(input_ids=tokens, use_cache=False).logits[0]
    for path in (folder, source):
        ours = torch.from_numpy(Float32(path, tokens.shape[1]).read(tokens[0].numpy(), 0))
        apart = float((ours - theirs).norm() / theirs.norm())
        print(f"{path.name}: logits of Pagewire in float32 beside transformers': {apart:.2g}", flush=True)
        assert apart < (1e-5 if path == folder else 0.02)  # the GGUF's weights are not rounded to bfloat16
    made_by(folder, "Pagewire", ["torch", "transformers"], {"from": source.name, "dtype": "bfloat16"})


def calibration(model: Path) -> list[torch.Tensor]:
    """Text of the repository's documents in the model's tokens: int64 [1, LENGTH], SAMPLES of them."""
    root = Path(__file__).parents[3]
    files = [root / "README.md", root / "CONTRIBUTING.md", *sorted((root / "docs").rglob("*.md"))]
    text = "\n\n".join(file.read_text() for file in files)
    tokens = torch.tensor(Tokenizer.from_file(str(model / "tokenizer.json")).encode(text).ids)
    return list(tokens[: SAMPLES * LENGTH].view(SAMPLES, 1, LENGTH))


def made_by(folder: Path, producer: str, packages: list[str], recipe: Any) -> None:
    said = {
        "producer": producer,
        "versions": {package: version(package).partition("+")[0] for package in packages},
        "recipe": recipe,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    (folder / "made.json").write_text(json.dumps(said, indent=2) + "\n")


def quantize(home: Path, producer: str, name: str) -> None:
    """Has `producer` write home/name of what is in home/base."""
    arguments, folder, source = list(RECIPES[producer][name]), home / name, home / BASE
    if producer == "llm_compressor":
        arguments[1] = {"ignore": ["lm_head"]} | arguments[1]
    write: Callable[..., Path] = import_module(f"tests.quantized.make.{producer}").write
    tokens, began = calibration(source), time.monotonic()
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        written = write(source, *arguments, tokens)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(written, folder)
    for file in source.glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)  # some writers leave them out
    called, packages = PRODUCERS[producer]
    made_by(folder, called, [*packages, "torch", "transformers"], arguments)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    print(f"{name}: {size / 1e6:.1f} MB in {time.monotonic() - began:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("producer", choices=[BASE, *RECIPES])
    parser.add_argument("folder", type=Path, help="where models are, and go")
    parser.add_argument("names", nargs="*", help="default: all of this producer")
    arguments = parser.parse_args()
    home = arguments.folder.resolve()
    home.mkdir(parents=True, exist_ok=True)
    if arguments.producer == BASE:
        base(home)
        return
    for name in arguments.names or RECIPES[arguments.producer]:
        quantize(home, arguments.producer, name)


if __name__ == "__main__":
    main()

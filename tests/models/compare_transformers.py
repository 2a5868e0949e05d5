"""The real model, float32, greedy, against transformers: `python -m tests.models.compare_transformers --prompts N`.

Prints how many tokens were compared, and every difference with the oracle's gap between its two likeliest tokens: one
is allowed only where that gap is under 1e-4, which float32 does not decide. After an allowed difference the oracle's
token is taken, and the comparison goes on. The oracle's weights are those that transformers itself dequantizes from the
GGUF (for which it needs the package `gguf`); its shapes and constants are the published facts.
"""

from __future__ import annotations

import argparse
import functools
import random
import sys
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from client import english as prose
from client import store
from protos.wire import Admit, Epoch, Row, Sampling, Setup, StepPlan
from scheduler_svc.frontend.model import load_model
from worker_svc.backends.torch import TorchBackend
from worker_svc.models.loader import Model, open_model

ALLOWED_GAP = 1e-4
EPOCH = Epoch(1, 1)
BLOCK = 32


@dataclass(frozen=True)
class Difference:
    prompt: int  # its length
    position: int
    ours: int
    theirs: int
    gap: float  # between the oracle's two largest logits

    @property
    def allowed(self) -> bool:
        return self.gap < ALLOWED_GAP


@functools.cache
def oracle(path: Path) -> Any:
    """transformers' model from transformers' own dequantization."""
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    model: Any = LlamaForCausalLM(config)
    model.eval()
    load: Any = load_gguf_checkpoint
    tensors = load(str(path), return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], []), "which is the embedding"
    return model


def weight_differences(ours: Model, theirs: Any) -> Iterator[tuple[str, float]]:
    """(name, largest difference) of every weight of the oracle against what our loader reads for the same role."""
    state, spec = theirs.state_dict(), ours.spec
    heads = {"q": spec.num_heads, "k": spec.num_kv_heads}
    roles = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    roles |= {role: f"self_attn.{role}_proj" for role in "qkvo"}
    roles |= {role: f"mlp.{role}_proj" for role in ("gate", "up", "down")}
    names = [("model.embed_tokens.weight", ours.top("embed"), 0), ("model.norm.weight", ours.top("final_norm"), 0)]
    for i in range(spec.num_layers):
        for role, name in roles.items():
            names.append((f"model.layers.{i}.{name}.weight", ours.layer(i, role), heads.get(role, 0)))
    for name, source, split in names:
        mine = ours.read(source, tuple(state[name].shape), "float32", split)
        yield name, float((torch.from_numpy(mine.copy()) - state[name]).abs().max())


def stream(
    backend: TorchBackend, steps: Iterator[int], prompt: list[int], count: int, chunk: int
) -> Generator[int, int | None, None]:
    """Our greedy tokens; send() replaces the last one, by admitting the sequence anew."""
    known, sent = list(prompt), 0
    while len(known) < len(prompt) + count:
        length = len(prompt) + count
        admit = [Admit(1, known, len(prompt), [list(range(1, 2 + length // BLOCK))], Sampling(count, temperature=0.0))]
        for start in range(0, len(known), chunk):
            end = min(start + chunk, len(known))
            backend.forward(
                StepPlan(EPOCH, next(steps), [], admit, [], [Row(1, start, end - start, sample=end == len(known))])
            )
            results, admit = backend.sample(None), []
        sent = len(known)
        while True:
            known += results[0].token_ids
            replaced = yield known[-1]
            if replaced is not None:
                known[-1] = replaced
                break
            if len(known) == length:
                break
            backend.forward(StepPlan(EPOCH, next(steps), [], [], [], [Row(1, -1, 1, sample=True)]))
            results = backend.sample(None)
        backend.forward(StepPlan(EPOCH, next(steps), [1], [], [], []))
        backend.sample(None)
        assert len(known) > sent


@torch.no_grad()
def compare(path: Path, lengths: list[int], count: int, seed: int = 0) -> tuple[int, list[Difference]]:
    """Tokens compared, and all differences, over one passage of each length."""
    theirs = oracle(path)
    backend = TorchBackend(threads=torch.get_num_threads())
    setup = Setup(EPOCH, str(path), dtype="float32", block_size=BLOCK, max_slots=2, kv_bytes=1 << 28)
    backend.load(setup, lambda what, share: None)
    rng, compared, differences = random.Random(seed), 0, []
    steps = iter(range(1, sys.maxsize))
    for prompt in english(path, lengths, rng):
        length = len(prompt)
        ours = stream(backend, steps, prompt, count, chunk=rng.choice([64, 100, 512, 2048]))
        token = next(ours)
        for i, (right, gap) in enumerate(greedy(theirs, prompt, count)):
            compared += 1
            if token != right:
                differences.append(Difference(length, length + i, token, right, gap))
                token = ours.send(right) if i + 1 < count else token
            elif i + 1 < count:
                token = next(ours)
        ours.close()
        backend.reset(setup)
    return compared, differences


def english(path: Path, lengths: list[int], rng: random.Random) -> list[list[int]]:
    """A passage of each length from real text, each from a place of its own."""
    text = load_model(path).tokenizer.encode(prose.text(rng.randrange(1 << 30)), False)
    starts = [rng.randrange(len(text) - length) for length in lengths]
    return [text[start : start + length] for start, length in zip(starts, lengths, strict=True)]


def greedy(model: Any, prompt: list[int], count: int) -> Iterator[tuple[int, float]]:
    """The oracle's tokens, each with the gap between the two likeliest."""
    ids, past = torch.tensor([prompt]), None
    for _ in range(count):
        out = model(ids, past_key_values=past, use_cache=True, logits_to_keep=1)
        past = out.past_key_values
        best = out.logits[0, -1].float().topk(2)
        yield int(best.indices[0]), float(best.values[0] - best.values[1])
        ids = best.indices[None, :1]


def spread(count: int, longest: int) -> list[int]:
    """Prompt lengths from 1 to `longest`, evenly on a logarithmic scale, odd ones among them."""
    return sorted({round(longest ** (i / max(count - 1, 1))) for i in range(count)})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--longest", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=64, help="compared after each prompt")
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    path = args.model or store.pull(store.DEFAULT)
    ours = open_model(path)
    assert ours is not None
    worst = max(weight_differences(ours, oracle(path)), key=lambda pair: pair[1])
    print(f"largest difference of any weight: {worst[1]:.3g} ({worst[0]})")
    lengths = spread(args.prompts, args.longest)
    compared, differences = compare(path, lengths, args.tokens, args.seed)
    print(f"{compared} tokens compared after {len(lengths)} prompts of {lengths[0]} to {lengths[-1]} tokens")
    for d in differences:
        mark = "allowed" if d.allowed else "WRONG"
        print(f"prompt of {d.prompt}, position {d.position}: ours {d.ours}, theirs {d.theirs}, gap {d.gap:.3g}: {mark}")
    print(f"{len(differences)} differences, {sum(not d.allowed for d in differences)} of them not allowed")
    return int(worst[1] > 0 or any(not d.allowed for d in differences))


if __name__ == "__main__":
    sys.exit(main())

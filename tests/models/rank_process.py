"""One rank of a group that splits a model: `python -m tests.models.rank_process RANK SIZE MEETING OUT CHECKPOINT …`.

Writes what it computed of each checkpoint to OUT, a file of safetensors: what all ranks must agree on, bit by bit.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.models.session import Session, ids, setup
from tests.models.stepping import Sequence, cuts, run, tokens
from worker_svc.backends.base import DeviceBackend
from worker_svc.backends.torch import TorchBackend
from worker_svc.layers.linear import Linear
from worker_svc.layers.moe import MoE
from worker_svc.model_runner import ModelRunner

PROMPTS = (150, 1, 67)  # tokens


def computed(path: Path, rank: int = 0, size: int = 1, meeting: str = "") -> dict[str, Tensor]:
    """Streams by the backend's seam, and logits [T, vocab] of prompts: "whole" each alone, "cut" all at once."""
    backend: DeviceBackend = TorchBackend(threads=1, patience=60.0)
    asked = setup(path, dtype="float32", kv_bytes=1 << 24, tp_rank=rank, tp_size=size, tp_address=meeting)
    session = Session(asked, backend)
    runner = session.backend._runner  # type: ignore[attr-defined]
    assert isinstance(runner, ModelRunner)
    prompt = tokens(70, 151, seed=1)
    streams = [
        session.greedy(prompt, 16),
        session.greedy(prompt[:33], 16, slot=3, chunk=7),
        session.greedy(prompt[5:], 16, seed=11, temperature=1.3, top_k=20, prompt_logprobs=1, logprobs=2),
    ]
    prompts = [tokens(n, 151, seed=n) for n in PROMPTS]
    whole = [run(runner, [Sequence(prompt, [len(prompt)])])[0] for prompt in prompts]
    cut = run(runner, [Sequence(prompt, cuts(len(prompt), seed=i)) for i, prompt in enumerate(prompts)], seed=3)
    scores = [score.logprob for result in streams[2] for score in (*result.prompt_logprobs, *result.logprobs)]
    done = {
        "tokens": torch.tensor([ids(stream) for stream in streams]),
        "scores": torch.tensor(scores, dtype=torch.float64),
        "exact": torch.tensor(session.capacity.exact),
        "held": torch.tensor(_held(runner)),
        "whole": torch.cat(whole),
        "cut": torch.cat(cut),
    }
    backend.close()
    return done


def _held(runner: ModelRunner) -> list[int]:
    """Weights in attention, in MLPs and in lm_head; without routers, of which every rank has the whole."""
    each: list[list[Linear]] = [[], [], [runner._lm_head]]
    for layer in runner.layers:
        mlp = layer.mlp.linears()
        each[0] += [layer.qkv, layer.o]
        each[1] += mlp[1:] if isinstance(layer.mlp, MoE) else mlp
    return [sum(linear.in_features * linear.out_features for linear in linears) for linears in each]


def main() -> None:
    rank, size, meeting, out, *paths = sys.argv[1:]
    results = {}
    for i, path in enumerate(paths):
        for name, value in computed(Path(path), int(rank), int(size), f"{meeting}-{i}").items():
            results[f"{Path(path).name}/{name}"] = value.contiguous()
    save_file(results, out)


if __name__ == "__main__":
    main()

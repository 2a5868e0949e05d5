"""Trains a small EAGLE-3 head: `python -m tests.speculation.train_eagle3 --out DIR`, some minutes on two cores.

The model writes on from passages of English, as a service with int4 weights; the head learns to say what it says, fed
with the model's own states for the first token and with its own for the next ones (the paper's training-time test).
What comes of it is no product, and shows that the whole works: it drafts for one model, from little text.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from pagewire.v1 import inference_pb2 as pb
from torch import Tensor
from torch.nn import functional

from client import english, store
from scheduler_svc.frontend.model import load_model
from tests.e2e.service import Service, service
from tests.models.compare_transformers import oracle
from tests.speculation.eagle3_head import Head, taps

LENGTH = 128  # tokens of a sequence
OURS = 32  # of them that are given
AHEAD = 3  # drafts that it learns to make of its own states


async def _write(running: Service, prompt: list[int], seed: int) -> list[int]:
    sampling = pb.SamplingParams(temperature=0.7 * (seed % 2), seed=seed, max_tokens=LENGTH - OURS, ignore_eos=True)
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling=sampling)
    said = [token async for response in running.inference.Generate(request) for token in response.delta.token_ids]
    return prompt + said


async def texts(model: str, count: int, rng: random.Random) -> list[list[int]]:
    """[count][LENGTH] tokens that the model wrote, behind OURS that it was given."""
    tokens = load_model(model).tokenizer.encode(english.in_order())
    starts = [rng.randrange(len(tokens) - OURS) for _ in range(count)]
    door = asyncio.Semaphore(32)
    async with service(model, "--device", "cpu", "--quantization", "int4", "--max-num-seqs", "32") as running:

        async def one(seed: int, start: int) -> list[int]:
            async with door:
                return await _write(running, tokens[start : start + OURS], seed)

        return list(await asyncio.gather(*(one(i, start) for i, start in enumerate(starts))))


def loss_of(head: Head, states: Tensor, embedded: Tensor, labels: Tensor) -> tuple[Tensor, list[float]]:
    """`labels` [B, T] of what follows the pairs, as the head's ids, −1 where it has none. And how often it is right, by
    place.

    A pass computes every place of every sequence at once; the k-th one goes on from what the one before made, a place
    to the left. (The paper keeps the true states of the places before in sight of it; this does not.)
    """
    total, right = torch.zeros(()), []
    for ahead in range(AHEAD):
        out = head.layer(states, embedded)
        logits = head.logits(out)
        known = labels >= 0
        total = total + 0.8**ahead * functional.cross_entropy(logits[known], labels[known])
        right.append(float((logits.argmax(-1) == labels).float().mean()))
        states, embedded, labels = out[:, :-1], embedded[:, 1:], labels[:, 1:]
    return total, right


def train(model: str, written: list[list[int]], draft_vocab: int, epochs: int, rng: random.Random) -> Head:
    target = oracle(Path(model))
    counts = Counter(token for text in written for token in text)
    targets = torch.tensor(sorted(token for token, _ in counts.most_common(draft_vocab)))
    layers = target.config.num_hidden_layers
    head = Head(target.config, (2, layers // 2, layers - 3), targets)
    embed = target.get_input_embeddings().weight.detach()
    head.lm_head.weight.data.copy_(embed[targets])
    own = torch.full((target.config.vocab_size,), -1)
    own[targets] = torch.arange(len(targets))
    batches = torch.tensor(written).split(8)
    begun = time.monotonic()
    inputs = [taps(target, batch, head.layers).bfloat16() for batch in batches]
    print(f"states of {len(written)} texts, {time.monotonic() - begun:.0f} s", flush=True)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, epochs * len(batches), pct_start=0.1)
    for epoch in range(epochs):
        order, seen = list(range(len(batches))), []
        rng.shuffle(order)
        for i in order:
            batch = batches[i]
            states = head.fc(inputs[i][:, OURS - 8 : -2].float())
            embedded, labels = embed[batch[:, OURS - 7 : -1]], own[batch[:, OURS - 6 :]]
            loss, right = loss_of(head, states, embedded, labels)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            seen.append(right)
        shares = [sum(place) / len(seen) for place in zip(*seen, strict=True)]
        told = ", ".join(f"{share:.0%}" for share in shares)
        print(f"epoch {epoch + 1}: right {told}; {time.monotonic() - begun:.0f} s", flush=True)
    return head


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default=store.DEFAULT)
    parser.add_argument("--texts", type=int, default=600)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--draft-vocab", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    torch.manual_seed(arguments.seed)
    model = str(store.resolve(arguments.model))
    written = asyncio.run(texts(model, arguments.texts, rng))
    train(model, written, arguments.draft_vocab, arguments.epochs, rng).save(arguments.out)
    print(f"wrote {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

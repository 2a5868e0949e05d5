"""R2 on the cpu backend: the same bits however a sequence is cut, cached, batched, placed, and on however many threads;
for every form of weights and KV, and every instruction set of this host (a cross-section, unless marked `full`).
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import PretrainedConfig

from tests.models import checkpoints
from tests.models.cpu_stepping import Logits, Runner, packed
from tests.models.stepping import Sequence, cuts, tokens
from tests.models.test_cpu_families import ISAS, SHAPES

MODES = [(mode, kv) for mode in ("", "int8", "int4") for kv in ("bf16", "int8")]
NAMES = ("llama-9-3-64", "llama-odd-16", "qwen3-80", "gemma3")  # the last: norms before sums, two ropes


def _by_default(name: str, mode: str, kv: str, best: bool) -> bool:
    """Every mode on this host's best instructions; of the others, and of the wide model, one form of KV for each;
    two of gemma3.
    """
    one = (mode == "") == (kv == "bf16")
    return {
        "llama-9-3-64": best and one,
        "llama-odd-16": best or one,
        "qwen3-80": best,
        "gemma3": best and mode != "int4" and one,
    }[name]


CASES = [
    pytest.param(
        *(name, mode, kv, isa),
        marks=[] if _by_default(name, mode, kv, isa == ISAS[0]) else pytest.mark.full,
        id=f"{name}-{mode or 'bf16'}-{kv}-{isa}",
    )
    for name in NAMES
    for mode, kv in MODES
    for isa in ISAS
]
LENGTHS = (300, 129, 128, 67, 5, 1)


class Alone:
    """A model, and the logits of prompts that were computed alone, whole, on one thread."""

    def __init__(self, config: PretrainedConfig, mode: str, kv: str, isa: str, path: Path) -> None:
        checkpoints.save(path, config)
        self.vocab: int = config.vocab_size
        self.model = packed(path, mode, path)
        self.kv, self.isa = kv, isa
        self.prompts = [tokens(n, self.vocab, seed=n) for n in LENGTHS]
        runner = self.runner(1)
        self.expected = [runner.run([Sequence(p, [len(p)])], seed=i)[0] for i, p in enumerate(self.prompts)]

    def runner(self, threads: int, block_size: int = 32) -> Runner:
        blocks = 6400 // block_size
        options = {"threads": threads, "block_size": block_size, "num_blocks": blocks}
        return Runner(self.model, kv=self.kv, isa=self.isa, **options)

    def check(self, got: list[Logits], which: list[int] | None = None) -> None:
        for logits, i in zip(got, which or range(len(got)), strict=True):
            assert np.array_equal(logits, self.expected[i][-len(logits) :]), f"the prompt of {LENGTHS[i]} tokens"


@pytest.mark.parametrize(("name", "mode", "kv", "isa"), CASES)
def test_the_same_bits(name: str, mode: str, kv: str, isa: str, tmp_path: Path) -> None:
    alone = Alone(SHAPES[name], mode, kv, isa, tmp_path)
    for threads in (1, 2, 3):
        runner = alone.runner(threads)
        _chunks_of_any_size(alone, runner)
        _any_number_of_rows(alone, runner)
        _over_a_cached_prefix(alone, runner)
        for seed, block_size in enumerate((32, 64, 96, 32)):
            _random_chunks_and_blocks(alone, alone.runner(threads, block_size), seed)


def _chunks_of_any_size(alone: Alone, runner: Runner) -> None:
    for chunk in (1, 2, 3, 5, 8, 16, 31, 32, 33, 63, 64, 65, 128, 256):
        which = 1 if chunk < 3 else 0
        prompt = alone.prompts[which]
        alone.check(runner.run([Sequence(prompt, [*range(chunk, len(prompt), chunk), len(prompt)])], chunk), [which])


def _any_number_of_rows(alone: Alone, runner: Runner) -> None:
    """M = 1 … 64: the last token of a sequence, decoded beside others of other lengths."""
    prompt = alone.prompts[3]
    for rows in (*range(1, 18), 24, 31, 32, 33, 48, 63, 64):
        rng = random.Random(rows)
        others = [tokens(rng.randint(2, 40), alone.vocab, seed=i) for i in range(rows - 1)]
        sequences = [Sequence(p, [len(p) - 1, len(p)]) for p in [prompt, *others]]
        alone.check(runner.run(sequences, seed=rows)[:1], [3])


def _over_a_cached_prefix(alone: Alone, runner: Runner) -> None:
    """Its first blocks were filled by somebody else, who is still there and goes on beside it."""
    prompt = alone.prompts[0]
    for cached in (32, 64, 160, 288):
        leader = Sequence(prompt[: cached + 1], [cached + 1])
        runner.run([leader], seed=cached)
        shared = leader.blocks[: cached // 32]
        follower = Sequence(prompt, cuts(300, seed=cached, start=cached), cached=cached, blocks=shared)
        other = replace(leader, tokens=prompt[:300], cuts=[cached + 2, 300], cached=cached + 1)
        alone.check(runner.run([follower, other], seed=cached), [0, 0])


def _random_chunks_and_blocks(alone: Alone, runner: Runner, seed: int) -> None:
    sequences = [
        Sequence(prompt, cuts(len(prompt), seed=10 * seed + i, longest=90)) for i, prompt in enumerate(alone.prompts)
    ]
    alone.check(runner.run(sequences, seed=seed))


@pytest.mark.parametrize(("mode", "kv"), MODES)
def test_the_real_model_is_exact(mode: str, kv: str, model_path: Path, tmp_path: Path) -> None:
    model = packed(model_path, mode, tmp_path)
    prompt = np.random.default_rng(3).integers(3, 49152, 150).tolist()
    whole = Runner(model, kv=kv).run([Sequence(prompt, [150])])[0]
    sequences = [Sequence(prompt, [31, 32, 100, 147, 148, 149, 150]), Sequence(prompt[:70], [69, 70])]
    cut, shorter = Runner(model, kv=kv, threads=2).run(sequences, seed=5)
    assert np.array_equal(cut, whole)
    assert np.array_equal(shorter, whole[:70])

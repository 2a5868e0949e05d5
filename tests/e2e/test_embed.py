"""Embeddings and scores of whole services: their workers are killed, and what comes is what would have come."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pagewire.v1 import inference_pb2 as pb

from client import aio, api
from tests.e2e.service import ROOT, Service, service
from worker_svc.backends.fake import pooled

REAL = ("--device", "cpu", "--max-num-seqs", "16")
KINDS = ("last", "mean", "cls")
TEXTS = ["The sky is blue.", "The sky is blue. Grass is green, and the sea is deep.", "Ein Satz auf Deutsch.", "x"]


def token_ids(length: int, seed: int) -> api.TokenIds:
    return api.TokenIds(ids=[(31 * i + 7 * seed) % 500 for i in range(length)])


def unit(vector: bytes) -> list[float]:
    values = np.frombuffer(vector, "<f4").astype(np.float64)
    whole: list[float] = (values / np.linalg.norm(values)).astype(np.float32).tolist()
    return whole


async def test_embeddings_outlive_a_dead_worker_beside_streams() -> None:
    """Prompts in chunks, a depth of 2, a few blocks: whoever was in the middle begins again."""
    flags = ("--depth", "2", "--block-size", "8", "--max-step-tokens", "64", "--max-num-seqs", "8")
    async with service("fake:delay_ms=5,blocks=120", *flags) as running, aio.Client(running.address) as client:
        prompts = [[token_ids(length, length) for length in (200, 90, 64, 1)] for _ in KINDS]
        calls = [
            asyncio.ensure_future(client.embed(inputs, pooling=kind))
            for inputs, kind in zip(prompts, KINDS, strict=True)
        ]
        stream = asyncio.ensure_future(_count(running))
        await running.until_stats(lambda stats: stats.steps > 5, "steps")
        await running.kill_worker()
        for kind, inputs, response in zip(KINDS, prompts, await asyncio.gather(*calls), strict=True):
            expected = [unit(pooled(list(one.ids), kind)) for one in inputs]
            assert [list(one.values) for one in response.embeddings] == expected
        assert await stream == 60
        stats = await running.until_quiet()
        assert stats.recoveries == 1
        assert stats.finished >= 13


async def _count(running: Service) -> int:
    request = pb.GenerateRequest(text="beside", sampling=pb.SamplingParams(max_tokens=60, ignore_eos=True))
    return sum([len(response.delta.token_ids) async for response in running.inference.Generate(request)])


async def _prompt_logprobs(running: Service, ids: list[int]) -> list[float]:
    sampling = pb.SamplingParams(max_tokens=1, prompt_logprobs=0)
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=ids), sampling=sampling)
    return [
        entry.logprob
        async for response in running.inference.Generate(request)
        for entry in response.delta.prompt_logprobs
    ]


async def test_the_real_models_scores_are_those_of_generate_and_its_vectors_the_same(model_path: Path) -> None:
    """Each alone, in a batch, in chunks, and after its worker's death."""
    flags = (*REAL, "--quantization", "int4", "--max-step-tokens", "64")
    async with service(str(model_path), *flags) as running, aio.Client(running.address) as client:
        candidates = [" Paris.", " London, I think.", " a"]
        prefix = 20 * await client.tokenize("The capital of France is")  # some blocks of it are shared
        response = await client.score(api.TokenIds(ids=prefix), candidates)
        assert response.usage.cached_tokens > 0
        for candidate, score in zip(candidates, response.scores, strict=True):
            assert list(score.token_ids) == await client.tokenize(candidate, add_special_tokens=False)
            whole = await _prompt_logprobs(running, prefix + list(score.token_ids))
            assert list(score.logprobs) == whole[len(prefix) - 1 :]
            assert score.sum == pytest.approx(sum(score.logprobs), rel=1e-6)
            assert score.mean == score.sum / len(score.token_ids)

        together = {kind: await client.embed(TEXTS * 2, pooling=kind) for kind in KINDS}
        alone = [(await client.embed([text], pooling="mean")).embeddings[0] for text in TEXTS]
        assert list(together["mean"].embeddings) == alone * 2
        again = asyncio.ensure_future(client.embed([text * 12 for text in TEXTS], pooling="mean"))
        before = (await running.stats()).steps
        await running.until_stats(lambda stats: stats.steps > before + 1, "a step of it")
        await running.kill_worker()
        await again
        assert await client.embed([text * 12 for text in TEXTS], pooling="mean") == await again
        assert {kind: await client.embed(TEXTS * 2, pooling=kind) for kind in KINDS} == together

        similar = np.array([list(one.values) for one in together["mean"].embeddings[:3]])
        assert similar[0] @ similar[1] > similar[0] @ similar[2]
        await running.until_quiet()
        await _command_line(running, list(together["last"].embeddings[0].values))


async def _command_line(running: Service, expected: list[float]) -> None:
    async def told(*arguments: str) -> Any:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "client.cli", *arguments, "--address", running.address),
            cwd=ROOT,
            stdout=asyncio.subprocess.PIPE,
        )
        out, _ = await process.communicate()
        assert process.returncode == 0
        return json.loads(out)

    embedded = await told("embed", TEXTS[0], "--pooling", "last")
    assert embedded["embeddings"] == [expected]
    scored = await told("score", "One, two,", " three", " apple")
    first, second = scored["scores"]
    assert first["sum"] > second["sum"]
    assert first["candidate"] == " three"

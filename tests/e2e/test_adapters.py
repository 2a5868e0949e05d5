"""Adapters of the real model, over gRPC: mixed, loaded and unloaded under traffic, through a worker's death."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from pagewire.v1 import admin_pb2
from pagewire.v1 import inference_pb2 as pb

from benchmarks.random_adapter import ALL, ATTENTION, write
from client.client import Client
from client.commands import adapters as command
from client.errors import FailedPreconditionError, InvalidRequestError, NotFoundError
from tests.e2e.service import Service, service
from worker_svc.models.loader import open_model

RANKS = (1, 4, 16, 8, 3, 16, 12, 2)
NAMES = [f"a{i}" for i in range(len(RANKS))]
FLAGS = ("--device", "cpu", "--max-adapters", "8", "--quantization", "int4")


@pytest.fixture(scope="module")
def files(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    model, path = open_model(model_path), tmp_path_factory.mktemp("adapters")
    assert model is not None
    return [
        write(path / name, model.spec, rank, i, ALL if i % 2 else ATTENTION, size=0.7)
        for i, (name, rank) in enumerate(zip(NAMES, RANKS, strict=True))
    ]


@dataclass
class Stream:
    token_ids: list[int]
    fingerprint: str


async def stream(running: Service, adapter: str, seed: int, tokens: int = 16, **fields: Any) -> Stream:
    sampling = pb.SamplingParams(temperature=0.8 * (seed % 2), seed=seed, max_tokens=tokens, ignore_eos=True)
    text = f"Number {seed}: a story about the sea, and the"
    request = pb.GenerateRequest(text=text, sampling=sampling, adapter=adapter, **fields)
    call = running.inference.Generate(request)
    made = Stream([], "")
    async for response in call:
        made.token_ids += response.delta.token_ids
    made.fingerprint = str(dict(await call.initial_metadata() or ())["fingerprint"])
    return made


async def test_eight_mixed_are_each_alone_also_over_a_dead_worker(model_path: Path, files: list[Path]) -> None:
    named = [flag for name, path in zip(NAMES, files, strict=True) for flag in ("--adapter", f"{name}={path}")]
    wanted = ["", *NAMES, "", *NAMES[:3]]
    async with service(str(model_path), *FLAGS, *named) as running:
        alone = [await stream(running, name, seed) for seed, name in enumerate(wanted)]
        assert len({one.fingerprint for one in alone}) == 9
        bare = [await stream(running, "", seed) for seed in range(len(wanted))]
        assert sum(one.token_ids != other.token_ids for one, other in zip(alone, bare, strict=True)) >= 8
        await running.admin.FlushCache(admin_pb2.FlushCacheRequest())
        mixed = [asyncio.create_task(stream(running, name, seed)) for seed, name in enumerate(wanted)]
        await running.until_stats(lambda stats: stats.generated_tokens > 2 * 16 * len(wanted) + 30, "some tokens")
        await running.kill_worker()
        assert await asyncio.gather(*mixed) == alone
        listed = (await running.admin.ListAdapters(admin_pb2.ListAdaptersRequest())).adapters
        assert [(one.name, one.rank) for one in listed] == list(zip(NAMES, RANKS, strict=True))
        # A stream that broke goes on under its own adapter's fingerprint, and under no other.
        had, rest = alone[1].token_ids[:5], alone[1].token_ids[5:]
        state = [pb.ResumeState(index=0, token_ids=had)]
        again: dict[str, Any] = {"resume_token_ids": state, "resume_fingerprint": alone[1].fingerprint}
        assert (await stream(running, "a0", 1, **again)).token_ids == rest
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stream(running, "a1", 1, **again)
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_scores_and_vectors_are_the_adapters(model_path: Path, files: list[Path]) -> None:
    """What a stream says of its own tokens is what they score; without the adapter they score less."""
    async with service(str(model_path), *FLAGS, "--adapter", f"a1={files[1]}") as running:
        sampling = pb.SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=0)
        said: list[tuple[int, float]] = []
        async for response in running.inference.Generate(
            pb.GenerateRequest(text="The sea", sampling=sampling, adapter="a1")
        ):
            said += [(one.token_id, one.logprob) for one in response.delta.logprobs]
        candidate = pb.ScoreCandidate(token_ids=pb.TokenIds(ids=[token for token, _ in said]))
        score, bare = [
            (
                await running.inference.Score(pb.ScoreRequest(text="The sea", candidates=[candidate], adapter=name))
            ).scores[0]
            for name in ("a1", "")
        ]
        assert score.logprobs == pytest.approx([logprob for _, logprob in said], abs=1e-4)
        assert bare.sum < score.sum - 1
        one, other, again = [
            (await running.inference.Embed(pb.EmbedRequest(inputs=[pb.EmbedInput(text="The sea")], adapter=name)))
            .embeddings[0]
            .values
            for name in ("a1", "", "a1")
        ]
        assert list(one) == list(again)
        assert sum(a * b for a, b in zip(one, other, strict=True)) < 0.99
        with pytest.raises(grpc.aio.AioRpcError, match="a9") as refused:
            await running.inference.Embed(pb.EmbedRequest(inputs=[pb.EmbedInput(text="The sea")], adapter="a9"))
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND


async def test_load_and_unload_under_traffic(
    model_path: Path, files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with service(str(model_path), *FLAGS) as running:
        with Client(running.address) as client:
            first, second = await asyncio.gather(stream(running, "", 2), stream(running, "", 3))
            busy = [asyncio.create_task(stream(running, "", seed, 40)) for seed in (2, 3)]
            with pytest.raises(grpc.aio.AioRpcError, match="'a0' is not loaded; loaded are: none"):
                await stream(running, "a0", 1)
            assert await asyncio.to_thread(_command, running, "load", "a0", str(files[0])) == 0
            assert await asyncio.to_thread(_command, running, "list") == 0
            assert "a0: rank 1" in capsys.readouterr().out
            one = await stream(running, "a0", 1)
            assert one != await stream(running, "", 1)
            long = asyncio.create_task(stream(running, "a0", 1, 100))
            while not (await asyncio.to_thread(client.adapters))[0].users:
                pass
            await asyncio.to_thread(client.unload_adapter, "a0")
            assert (await long).token_ids[:16] == one.token_ids
            with pytest.raises(NotFoundError):
                await asyncio.to_thread(client.unload_adapter, "a0")
            for path, error, reason in _bad(model_path, tmp_path):
                with pytest.raises(error, match=reason):
                    await asyncio.to_thread(client.load_adapter, "bad", str(path))
            done = await asyncio.gather(*busy)
            assert [each.token_ids[:16] for each in done] == [first.token_ids, second.token_ids]
            assert (await running.until_quiet()).recoveries == 0


def _command(running: Service, *arguments: str) -> int:
    return command.main("pagewire adapters", [*arguments, "--address", running.address])


def _bad(model_path: Path, path: Path) -> list[tuple[Path, type[Exception], str]]:
    model = open_model(model_path)
    assert model is not None
    return [
        (path / "missing", InvalidRequestError, "adapter_config.json: No such file"),
        (write(path / "large", model.spec, 17, 0), FailedPreconditionError, "rank 17, over max_adapter_rank 16"),
    ]

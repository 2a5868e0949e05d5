"""A model split between two processes, served: one that dies or hangs ends both, and no stream shows it."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
from pagewire.v1 import inference_pb2
from transformers import Qwen2Config

from scheduler_svc.frontend.tokenizer import byte_tokenizer
from tests.e2e.crash import crash_round, requests
from tests.e2e.service import Service, generate, service
from tests.e2e.test_lifecycle import _refusal
from tests.models import checkpoints
from tests.models.checkpoints import SMALL

SPLIT = ("--tensor-parallel-size", "2", "--dtype", "float32", "--kv-cache-gib", "0.02")


def checkpoint(path: Path) -> str:
    """A small random model of an odd vocabulary, with a tokenizer of bytes."""
    checkpoints.save(path, Qwen2Config(**{**SMALL, "vocab_size": 301}, tie_word_embeddings=True))
    (path / "tokenizer.json").write_bytes(byte_tokenizer(301).files["tokenizer.json"])
    return str(path)


@asynccontextmanager
async def split(path: Path, *flags: str) -> AsyncIterator[Service]:
    async with service(checkpoint(path), *SPLIT, *flags) as running:
        yield running


async def test_streams_outlive_the_death_of_either_rank(tmp_path: Path) -> None:
    async with split(tmp_path) as running:
        model = await running.inference.GetModel(inference_pb2.GetModelRequest())
        assert model.exact, "so the streams after a death are those without one"
        ranks = [psutil.Process(await running.worker_pid(rank)) for rank in (0, 1)]
        listening = [c.laddr.ip for p in ranks for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN]
        assert set(listening) == {"127.0.0.1"}
        done = await crash_round(running, 1, streams=12, kills=2, max_tokens=40, ranks=2)
        assert (done.different, done.damaged) == (0, 0)
        assert (await running.until_quiet()).recoveries == 2
        assert not any(rank.is_running() for rank in ranks)
        said = running.log.read_text()
        assert "lost: rank 1: it was killed by SIGKILL" in said
        assert "lost: rank 0: it was killed by SIGKILL" in said
        ranks = [psutil.Process(await running.worker_pid(rank)) for rank in (0, 1)]
        running.process.send_signal(signal.SIGTERM)
        assert await running.wait() == 0
        assert not any(rank.is_running() for rank in ranks)


async def test_streams_outlive_a_rank_that_hangs(tmp_path: Path) -> None:
    """The other one waits for it within a step, until the step's deadline."""
    async with split(tmp_path, "--step-deadline", "3") as running:
        (made,) = [r for r in requests(2, 400, random.Random(2)) if r.sampling.temperature]
        undisturbed = await generate(running, made)
        begun = asyncio.Event()
        stream = asyncio.ensure_future(generate(running, made, lambda count: begun.set()))
        await begun.wait()
        stopped = await running.kill_worker(1, signal.SIGSTOP)
        assert (await stream).token_ids == undisturbed.token_ids
        assert not psutil.pid_exists(stopped)
        assert "took longer than 3 s" in running.log.read_text()


def test_a_model_that_cannot_be_split_ends_the_service_with_the_numbers(tmp_path: Path) -> None:
    flags = ("--tensor-parallel-size", "3", "--dtype", "float32", "--port", "0")
    code, err = _refusal(checkpoint(tmp_path), *flags)
    assert code == 1
    assert "tp_size 3 does not divide the model's 4 attention heads" in err
    assert "Traceback" not in err

"""A service, or a worker, at which all of it is thrown; and that it is none the worse for it."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from pagewire.v1 import inference_pb2

from protos.wire import Setup
from tests.e2e.service import Service, generate, service
from tests.fuzz import links, rpcs
from tests.fuzz.rpcs import Findings, Gunner, Shot
from tests.worker.scheduler_end import worker

BATCH = 2000
CORPUS = Path(__file__).parent / "corpus"
FAKE = "fake:context=2048"
FLAGS = ("--max-num-seqs", "16", "--max-waiting", "256")


@dataclass(frozen=True)
class Told:
    """MiB of the scheduler after a tenth of the shots and after all."""

    findings: Findings
    early_mib: float
    late_mib: float


async def throw_at_rpcs(count: int, seed: int, say: Callable[[str], None], model: str = FAKE) -> Told:
    gunner, findings, early = Gunner(seed), Findings(), 0.0
    async with service(model, *FLAGS) as running:
        scheduler = psutil.Process(running.process.pid)
        while findings.total < count:
            shots = [gunner.shot() for _ in range(min(BATCH, count - findings.total))]
            found = await rpcs.fire(running.address, shots)
            for path, counter in found.counts.items():
                findings.counts.setdefault(path, Counter()).update(counter)
            findings.bad += found.bad
            await _unharmed(running)
            if not early or findings.total <= count // 10:
                early = _mib(scheduler)
            say(f"{findings.total} calls, {len(findings.bad)} bad, scheduler {_mib(scheduler):.0f} MiB")
        return Told(findings, early, _mib(scheduler))


async def _unharmed(running: Service) -> None:
    """The same process answers, the same worker too, and nothing is left of what was thrown."""
    assert running.process.poll() is None, running.log.read_text()
    stats = await running.until_quiet()
    assert stats.recoveries == 0, f"a worker died of it: {running.log.read_text()}"
    sampling = inference_pb2.SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    prompt = inference_pb2.TokenIds(ids=[300, 301])
    output = await generate(running, inference_pb2.GenerateRequest(token_ids=prompt, sampling=sampling))
    assert len(output.token_ids) == 5


async def throw_at_scheduler(count: int, seed: int, directory: Path) -> None:
    """Strangers at the workers' socket, while a stream runs."""
    rng = random.Random(seed)
    endpoint = f"ipc://{directory}/workers"
    async with service(FAKE, "--listen", endpoint, *FLAGS) as running:
        await asyncio.to_thread(links.whisper, endpoint, links.lies(rng, count), rng)
        await _unharmed(running)


async def throw_at_engine(count: int, seed: int) -> None:
    """Strangers at the frontends' socket, while two frontends serve."""
    rng = random.Random(seed)
    async with service(FAKE, "--frontends", "2", *FLAGS) as running:
        commands = [child.cmdline() for child in psutil.Process(running.process.pid).children(recursive=True)]
        command = next(each for each in commands if "scheduler_svc.frontend_process" in each)
        endpoint = command[command.index("--connect") + 1]
        await asyncio.to_thread(links.whisper, endpoint, links.lies(rng, count, links.SAID), rng)
        await _unharmed(running)


def throw_at_worker(count: int, seed: int, setup: Setup, *flags: str) -> links.PlanLiar:
    """One lying plan an epoch; the worker lives through all."""
    with worker("--mask-deadline", "0.2", *flags) as (end, process):
        liar = links.PlanLiar(end, process, setup, seed)
        for _ in range(count):
            liar.round()
        assert links.end_of(end, process) == 0
    return liar


def _mib(process: psutil.Process) -> float:
    return float(process.memory_info().rss) / (1 << 20)


def keep(bad: Sequence[tuple[Shot, str]]) -> None:
    """Into the corpus, which every test run throws again."""
    CORPUS.mkdir(exist_ok=True)
    for shot, status in bad:
        method = shot.path.strip("/").replace("/", "-")
        (CORPUS / f"{method}-{status}-{random.Random(shot.data).getrandbits(32):08x}.bin").write_bytes(shot.data)


def corpus() -> list[Shot]:
    """What once made trouble, from `SERVICE-METHOD-…` files."""
    files = sorted(CORPUS.glob("*.bin"))
    return [Shot("/{}/{}".format(*file.name.split("-")[:2]), file.read_bytes()) for file in files]

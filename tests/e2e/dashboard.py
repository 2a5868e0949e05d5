"""Every query of the Grafana board, asked of a real Prometheus that scrapes a loaded service.

`python -m tests.e2e.dashboard` prints what each returned. Prometheus is Debian's `prometheus`, from PATH or from where
PAGEWIRE_PROMETHEUS says.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
from pagewire.v1 import inference_pb2

from tests.e2e.service import ROOT, Service, free_port, service

BOARD = ROOT / "deploy/grafana/pagewire.json"
SCRAPES = 1  # seconds between two
WINDOW = "10s"  # what $__rate_interval is here
PATIENCE = 60.0  # seconds until all queries have data


@dataclass(frozen=True)
class Query:
    panel: str
    expression: str


@dataclass
class Answer:
    query: Query
    values: tuple[float, ...] = ()  # one a series

    @property
    def is_whole(self) -> bool:
        return bool(self.values) and not any(map(math.isnan, self.values))


def prometheus_path() -> str | None:
    return os.environ.get("PAGEWIRE_PROMETHEUS") or shutil.which("prometheus")


def queries() -> Iterator[Query]:
    for panel in json.loads(BOARD.read_text())["panels"]:
        for target in panel.get("targets", []):
            yield Query(panel["title"], target["expr"])


class Prometheus:
    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/api/v1/query"

    async def ask(self, expression: str) -> list[dict[str, Any]]:
        """Raises OSError where it does not answer, or refuses the expression."""
        query = urllib.parse.urlencode({"query": expression.replace("$__rate_interval", WINDOW)})
        text = await asyncio.to_thread(self._read, f"{self._url}?{query}")
        result: list[dict[str, Any]] = json.loads(text)["data"]["result"]
        return result

    async def until_all(self, asked: list[Query]) -> list[Answer]:
        """Each with data that are numbers, or as it is when patience ends."""
        deadline, answers = time.monotonic() + PATIENCE, [Answer(query) for query in asked]
        while time.monotonic() < deadline and any(not answer.is_whole for answer in answers):
            await asyncio.sleep(SCRAPES)  # there is nothing new before the next one
            for answer in answers:
                if not answer.is_whole:
                    with contextlib.suppress(ConnectionError):
                        result = await self.ask(answer.query.expression)
                        answer.values = tuple(float(series["value"][1]) for series in result)
        return answers

    @staticmethod
    def _read(url: str) -> str:
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                text: str = response.read().decode()
                return text
        except urllib.error.HTTPError as error:
            raise OSError(f"{url}: {error.read().decode()}") from error
        except urllib.error.URLError as error:
            raise ConnectionError(str(error)) from error


@contextlib.asynccontextmanager
async def scraping(metrics_port: int, directory: Path) -> AsyncIterator[Prometheus]:
    """By our own configuration, but for where the service is and how often it is asked."""
    text = (ROOT / "deploy/prometheus.yml").read_text()
    text = re.sub(r"pagewire:\d+", f"127.0.0.1:{metrics_port}", text)
    text = re.sub(r"scrape_interval: \S+", f"scrape_interval: {SCRAPES}s", text)
    config, port = directory / "prometheus.yml", free_port()
    config.write_text(text)
    path = prometheus_path()
    assert path, "no prometheus"
    flags = [f"--config.file={config}", f"--storage.tsdb.path={directory / 'data'}"]
    command = [path, *flags, f"--web.listen-address=127.0.0.1:{port}"]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield Prometheus(port)
    finally:
        process.kill()
        await asyncio.to_thread(process.wait)


async def load(running: Service) -> None:
    """Several tenants, long and short streams, shared prompts, bad requests, streams that are left."""
    number = 0
    while True:
        number += 1
        tenant = ("acme", "globex", "")[number % 3]
        sampling = inference_pb2.SamplingParams(max_tokens=20 + number % 40, seed=number, ignore_eos=True)
        text = "the same beginning, and long enough to fill a block or two " + str(number % 7)
        request = inference_pb2.GenerateRequest(text="" if number % 11 == 0 else text, sampling=sampling)
        call = running.inference.Generate(request, metadata=(("tenant", tenant),) if tenant else None)
        with contextlib.suppress(grpc.aio.AioRpcError):
            async for _ in call:
                if number % 13 == 0:
                    call.cancel()
                    break


async def check() -> list[Answer]:
    metrics_port = free_port()
    flags = ("--metrics-port", str(metrics_port), "--max-num-seqs", "4")
    with tempfile.TemporaryDirectory(prefix="pagewire-board-") as directory:
        async with (
            service("fake:delay_ms=10", *flags) as running,
            scraping(metrics_port, Path(directory)) as prometheus,
        ):
            loading = [asyncio.ensure_future(load(running)) for _ in range(8)]
            await running.until_stats(lambda stats: stats.finished > 8, "load")
            await running.kill_worker()
            try:
                return await prometheus.until_all(list(queries()))
            finally:
                for task in loading:
                    task.cancel()
                await asyncio.gather(*loading, return_exceptions=True)


def main() -> int:
    answers = asyncio.run(check())
    for answer in answers:
        values = ", ".join(f"{value:.4g}" for value in answer.values[:6])
        print(f"{answer.query.panel:32} {len(answer.values):3} series  {values:40.40}  {answer.query.expression}")
    return 0 if all(answer.is_whole for answer in answers) else 1


if __name__ == "__main__":
    sys.exit(main())

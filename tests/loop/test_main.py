"""How a service ends, in words and exit codes."""

from __future__ import annotations

import asyncio
import signal

import pytest

from protos.engine_wire import Answer, Ask, EngineStats, ServiceStatus, ToEngine
from scheduler_svc import logs
from scheduler_svc.__main__ import _until_ended
from scheduler_svc.frontend.core import FrontendConfig
from scheduler_svc.frontend.engine_link import EngineLink
from scheduler_svc.frontend.model import load_model
from scheduler_svc.frontend.server import Frontend


class Engine:
    """Answers a drain, or never does."""

    def __init__(self, link: EngineLink, *, drains: bool) -> None:
        self._link, self._drains = link, drains

    def send(self, message: ToEngine) -> None:
        if isinstance(message, Ask) and self._drains:
            self._link.deliver(Answer(message.token, ServiceStatus(False, "draining", None, [], EngineStats())))


@pytest.mark.parametrize(("drains", "code", "words"), [(True, 0, "drained"), (False, 1, "not drained within 0.05 s")])
async def test_a_drain_says_whether_it_finished(
    drains: bool, code: int, words: str, capsys: pytest.CaptureFixture[str], logging_restored: None
) -> None:
    logs.configure("text", "info")
    link = EngineLink()
    link.connect(Engine(link, drains=drains))
    frontend = Frontend(link, FrontendConfig(port=0, served_name="m"), load_model("fake:"))
    await frontend.start()
    signals: asyncio.Queue[int] = asyncio.Queue()
    signals.put_nowait(signal.SIGTERM)
    failed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    assert await _until_ended(frontend, signals, failed, 0.05) == code
    lines = capsys.readouterr().err.splitlines()
    assert words in lines[-1]
    assert len(lines) == 2

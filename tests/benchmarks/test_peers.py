"""The catalogue of peers, how an installation fails, and OpenVINO's thin server with a pipeline that is none."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.peers import catalogue, engine

SERVER = Path(engine.__file__).parent / "inside" / "openvino_server.py"


def test_every_peer_takes_a_port_and_threads_of_this_machine() -> None:
    for name, peer in catalogue.peers().items():
        assert peer.name == name
        assert "12345" in peer.command(12345)
        assert peer.engine in catalogue.engines()


def test_no_file_names_a_machine_or_a_registry() -> None:
    for file in SERVER.parents[1].rglob("*.py"):
        assert not re.search(r"https?://|/root|/home/|/work|/tmp", file.read_text()), file


def test_a_step_that_fails_says_where_its_words_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGEWIRE_HOME", str(tmp_path))
    steps = engine.Steps("some")
    with pytest.raises(engine.InstallError, match=r"^sources: exit 3; see .*install\.log$"):
        steps.run("sources", sys.executable, "-c", "print('alas'); raise SystemExit(3)")
    assert "alas" in (tmp_path / "peers" / "some" / "install.log").read_text()
    with pytest.raises(engine.InstallError, match=r"build: .*no-such-tool"):
        steps.run("build", "no-such-tool")


FAKE_OPENVINO = "class Tensor:\n    def __init__(self, array): self.array = array\n"
FAKE_GENAI = """
import enum, time
class GenerationFinishReason(enum.Enum):
    NONE, LENGTH = 0, 1
class SchedulerConfig: pass
class GenerationConfig:
    def __init__(self, **fields): self.__dict__ |= fields
class Output:
    def __init__(self, ids, reason): self.generated_ids, self.finish_reason = ids, reason
class Handle:
    def __init__(self, left): self.left, self.unread = left, []
    def can_read(self): return bool(self.unread)
    def read(self): return {0: self.unread.pop(0)}
class ContinuousBatchingPipeline:
    def __init__(self, path, scheduler, device, properties):
        assert device == "CPU" and scheduler.max_num_batched_tokens == 77, vars(scheduler)
        self.handles = []
    def add_request(self, number, tensor, config):
        assert tensor.array.shape[0] == 1 and config.ignore_eos
        self.handles.append(Handle(config.max_new_tokens))
        return self.handles[-1]
    def has_non_finished_requests(self): return any(h.left for h in self.handles)
    def step(self):
        for handle in self.handles:
            if handle.left:
                handle.left -= 1
                reason = GenerationFinishReason.NONE if handle.left else GenerationFinishReason.LENGTH
                handle.unread.append(Output([5], reason))
"""


@pytest.fixture
def line_server(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "openvino.py").write_text(FAKE_OPENVINO)
    (tmp_path / "openvino_genai.py").write_text(FAKE_GENAI)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    command = [sys.executable, str(SERVER), "model", str(port), "max_num_batched_tokens=77"]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    yield port
    process.terminate()
    assert process.wait(10) == 0


def test_openvinos_server_streams_token_by_token_to_each_connection(line_server: int) -> None:
    first, second = _connection(line_server), _connection(line_server)
    for sock, number in ((first, 7), (second, 7)):  # the same id: connections do not know of one another
        sock.sendall(json.dumps({"id": number, "prompt": [1, 2, 3], "tokens": 3}).encode() + b"\n")
    for sock in (first, second):
        lines = sock.makefile()
        assert [lines.readline() for _ in range(3)] == ["7 1\n"] * 3
    second.close()
    first.sendall(b'{"id": 8, "prompt": [1], "tok')  # a line in two pieces
    first.sendall(b'ens": 1}\n')
    assert first.makefile().readline() == "8 1\n"
    first.close()


def _connection(port: int) -> socket.socket:
    until = time.monotonic() + 20
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=20)
        except ConnectionRefusedError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)

"""Links over tcp with keys: real processes, real handshakes, and strangers of every kind at the port."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import msgspec
import pytest
import zmq
from zmq.utils.monitor import recv_monitor_message

from protos import curve
from protos.codec import encode
from protos.wire import PROTOCOL, Hello
from scheduler_svc.config import LoopConfig
from scheduler_svc.worker_socket import _LARGEST, WorkerSocket
from tests.loop.harness import Observer, assert_undisturbed, loop_config, running, submits

ROOT = Path(__file__).parents[2]
PATIENCE_MS = 30_000
FAILED = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL


def over_tcp(keys: Path | None, *, spawn: bool = False, model: str = "fake:delay_ms=1") -> LoopConfig:
    return loop_config(model, workers=int(spawn), listen="tcp://127.0.0.1:*", curve_keys=keys)


def made(directory: Path) -> Path:
    curve.scheduler_keys(directory, zmq.curve_keypair, zmq.curve_public)
    return directory


@contextmanager
def worker(endpoint: str, keys: Path | None) -> Iterator[subprocess.Popen[str]]:
    link = ["--curve-keys", str(keys)] if keys else []
    command = [sys.executable, "-m", "worker_svc", "--connect", endpoint, *link]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def said(process: subprocess.Popen[str]) -> str:
    """The next line that it says."""
    assert process.stderr
    return process.stderr.readline()


def serves(observer: Observer, seed: int) -> None:
    requests = [
        msgspec.structs.replace(submit, request_id=f"{seed}-{submit.request_id}")
        for submit in submits(8, random.Random(seed))
    ]
    for request in requests:
        observer.loop.send(request)
    observer.until_finished(requests)
    assert_undisturbed(observer, requests)


def test_a_worker_serves_over_tcp(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    with running(over_tcp(keys)) as observer, worker(observer.loop.endpoint, keys) as process:
        assert observer.loop.endpoint.startswith("tcp://")
        serves(observer, 1)
        assert observer.status.workers[0].pid == process.pid


def test_so_does_a_spawned_one(tmp_path: Path) -> None:
    with running(over_tcp(tmp_path / "keys", spawn=True)) as observer:
        serves(observer, 1)


def test_keys_may_come_later_than_the_worker(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    keys = tmp_path / "keys"
    with worker(endpoint, keys) as process:
        assert f"waits for keys in {keys}" in said(process)
        with running(replace(over_tcp(keys), listen=endpoint)) as observer:
            serves(observer, 1)


def test_who_has_another_key_gets_nowhere_until_it_is_let_in(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    keys, own = tmp_path / "keys", tmp_path / "own"
    public = curve.new_worker_pair(own, zmq.curve_keypair, zmq.curve_public)
    with running(over_tcp(keys)) as observer, worker(observer.loop.endpoint, keys) as first:
        observer.until_serving()
        (own / "scheduler.pub").write_bytes((keys / "scheduler.pub").read_bytes())
        with worker(observer.loop.endpoint, own) as second:
            assert "the handshake fails" in said(second)
            serves(observer, 1)
            assert observer.status.workers[0].pid == first.pid
            assert f"worker {public.read_text().strip()} was refused: its key is not known" in capfd.readouterr().err
            first.kill()
            observer.until(lambda: not observer.status.serving, "the loss")
            (keys / "workers/second.pub").write_bytes(public.read_bytes())
            serves(observer, 2)
            assert observer.status.workers[0].pid == second.pid


def test_a_worker_serves_no_other_scheduler(tmp_path: Path) -> None:
    """Prompts and plans of whoever took its address are not for it, and neither are its answers."""
    keys, other = tmp_path / "keys", made(tmp_path / "other")
    with running(over_tcp(keys)) as observer:
        for name in ("worker.key", "worker.pub"):  # it would be let in
            (other / name).write_bytes((keys / name).read_bytes())
            (other / name).chmod(0o600)
        with worker(observer.loop.endpoint, other) as process:
            assert "the handshake fails" in said(process)
            assert not observer.statuses or not observer.status.serving


def refused(endpoint: str, **options: bytes) -> bool:
    """Whether a peer with these socket options fails in the handshake."""
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.LINGER, 0)
    for name, value in options.items():
        dealer.setsockopt(getattr(zmq, name.upper()), value)
    monitor = dealer.get_monitor_socket(FAILED | zmq.EVENT_HANDSHAKE_SUCCEEDED)
    dealer.connect(endpoint)
    dealer.send(encode(Hello(0, "stranger", PROTOCOL)))
    try:
        assert monitor.poll(PATIENCE_MS), "neither let in nor refused"
        return bool(recv_monitor_message(monitor)["event"] & FAILED)
    finally:
        dealer.disable_monitor()
        monitor.close()
        dealer.close()
        context.term()


def test_a_handshake_needs_both_keys(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    with running(over_tcp(keys)) as observer, worker(observer.loop.endpoint, keys):
        observer.until_serving()
        server, (public, secret) = (keys / "scheduler.pub").read_bytes().strip(), zmq.curve_keypair()
        known = (keys / "worker.key").read_bytes().strip()
        pair = {"curve_publickey": public, "curve_secretkey": secret}
        assert refused(observer.loop.endpoint), "no keys"
        assert refused(observer.loop.endpoint, plain_username=b"worker", plain_password=b"key"), "another mechanism"
        assert refused(observer.loop.endpoint, curve_serverkey=server, **pair), "a stranger's pair"
        assert refused(observer.loop.endpoint, curve_serverkey=public, **pair), "not the scheduler's key"
        pair = {"curve_publickey": zmq.curve_public(known), "curve_secretkey": known}
        assert not refused(observer.loop.endpoint, curve_serverkey=server, **pair), (
            "the test itself: this one is let in"
        )
        serves(observer, 3)


GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"%s" + b"\0" + bytes(31)  # of ZMTP 3.1, as a client
HUGE = b"\x02" + (_LARGEST + 1).to_bytes(8, "big")  # a frame begins that is too large


def strange(rng: random.Random) -> list[bytes]:
    null, curved = (GREETING.replace(b"%s", name.ljust(20, b"\0")) for name in (b"NULL", b"CURVE"))
    ready = b"\x04\x26\x05READY" + b"\x0bSocket-Type\0\0\0\x06DEALER" + b"\x08Identity\0\0\0\0"
    return [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00",
        null,
        curved,
        null + HUGE,
        curved + HUGE,
        null + ready + HUGE,
        curved + b"\x04\xc8\x05HELLO" + rng.randbytes(194),
        *(null[:n] + rng.randbytes(100) for n in (1, 9, 11, 32, 64)),
        *(rng.randbytes(rng.randrange(1, 300)) for _ in range(100)),
    ]


@pytest.mark.parametrize("with_keys", [True, False])
def test_raw_strangers_at_the_port_do_nothing(with_keys: bool, tmp_path: Path) -> None:
    keys = tmp_path / "keys" if with_keys else None
    rng = random.Random(7)
    with running(over_tcp(keys)) as observer, worker(observer.loop.endpoint, keys):
        observer.until_serving()
        host, _, port = observer.loop.endpoint.removeprefix("tcp://").rpartition(":")
        requests = submits(20, rng)
        for request in requests:
            observer.loop.send(request)
        with contextlib.ExitStack() as connections:
            for data in strange(rng):
                raw = connections.enter_context(socket.create_connection((host, int(port)), timeout=10))
                with contextlib.suppress(OSError):  # it may have been thrown out already
                    raw.sendall(data)
            observer.until_finished(requests)
            assert_undisturbed(observer, requests)
        assert all(status.serving for _, status in observer.statuses[1:] if status.ready)


@pytest.mark.parametrize("mechanism", [b"NULL", b"CURVE"])
def test_a_huge_frame_ends_its_connection(mechanism: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scheduler_svc.worker_socket._HANDSHAKE_MS", 20 * PATIENCE_MS)  # that is not what ends it
    keys = tmp_path / "keys" if mechanism == b"CURVE" else None
    with running(over_tcp(keys)) as observer:
        host, _, port = observer.loop.endpoint.removeprefix("tcp://").rpartition(":")
        with socket.create_connection((host, int(port)), timeout=PATIENCE_MS / 1000) as raw:
            raw.sendall(GREETING.replace(b"%s", mechanism.ljust(20, b"\0")) + HUGE)
            with contextlib.suppress(ConnectionResetError):
                while raw.recv(4096):
                    pass


def _make(directory: str) -> bytes:
    return curve.scheduler_keys(Path(directory), zmq.curve_keypair, zmq.curve_public).secret


def test_several_who_start_at_once_have_one_pair(tmp_path: Path) -> None:
    with ProcessPoolExecutor(4, get_context("spawn")) as pool:
        assert len(set(pool.map(_make, [str(tmp_path / "keys")] * 8))) == 1


def test_keys_are_made_once_and_for_their_owner_alone(tmp_path: Path) -> None:
    keys = made(tmp_path / "keys")
    modes = {path.name: path.stat().st_mode & 0o777 for path in [keys, *keys.iterdir()]}
    assert modes == {
        "keys": 0o700,
        "workers": 0o700,
        **dict.fromkeys(("scheduler.key", "scheduler.pub", "worker.key", "worker.pub"), 0o600),
    }
    before = {path: path.read_bytes() for path in keys.glob("*.*")}
    made(keys)
    assert {path: path.read_bytes() for path in keys.glob("*.*")} == before
    own = curve.worker_keys(keys, zmq.curve_public)
    assert own
    assert not any(secret in repr(own) for secret in (own.secret.decode(), str(own.secret)))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda keys: (keys / "scheduler.key").chmod(0o644), "scheduler.key is open to others (mode 0644)"),
        (lambda keys: (keys / "worker.key").chmod(0o620), "worker.key is open to others"),
        (lambda keys: keys.chmod(0o770), "others may write to"),
        (lambda keys: (keys / "scheduler.pub").write_bytes(zmq.curve_keypair()[0]), "does not belong to"),
        (lambda keys: (keys / "scheduler.key").write_text("short"), "scheduler.key holds no key"),
        (lambda keys: (keys / "worker.pub").write_text("é" * 40), "worker.pub holds no key"),
    ],
)
def test_keys_that_cannot_be_trusted_are_refused(spoil: Callable[[Path], object], words: str, tmp_path: Path) -> None:
    keys = made(tmp_path / "keys")
    spoil(keys)
    with pytest.raises(curve.CurveError) as caught:
        made(keys)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_spoiled_file_lets_nobody_in(tmp_path: Path) -> None:
    keys = made(tmp_path / "keys")
    public = (keys / "worker.pub").read_bytes().strip()
    assert curve.is_let_in(keys, public)
    assert not curve.is_let_in(keys, zmq.curve_keypair()[0])
    (keys / "worker.pub").write_text("nothing")
    with pytest.raises(curve.CurveError):
        curve.is_let_in(keys, public)


def test_no_port_is_open_to_others_without_keys() -> None:
    with pytest.raises(curve.CurveError, match="needs keys"):
        WorkerSocket("tcp://0.0.0.0:*")


@pytest.mark.parametrize("mode", [0o770, 0o777, 0o1777])
def test_no_socket_lies_where_others_may_write(mode: int, tmp_path: Path) -> None:
    tmp_path.chmod(mode)
    with pytest.raises(curve.CurveError, match="others may write"):
        WorkerSocket(f"ipc://{tmp_path}/workers")


def test_a_socket_is_for_its_owner_alone(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    before = os.umask(0)
    try:
        made_socket = WorkerSocket(f"ipc://{tmp_path}/workers")
        assert os.umask(0) == 0, "the process's own mask is as before"
    finally:
        os.umask(before)
    try:
        assert (tmp_path / "workers").stat().st_mode & 0o077 == 0
    finally:
        made_socket.close()


def test_a_process_of_this_host_finds_a_socket_of_every_interface() -> None:
    assert curve.from_this_host("tcp://0.0.0.0:5") == "tcp://127.0.0.1:5"
    assert curve.from_this_host("tcp://[::]:5") == "tcp://[::1]:5"
    assert curve.from_this_host("tcp://127.0.0.1:5") == "tcp://127.0.0.1:5"

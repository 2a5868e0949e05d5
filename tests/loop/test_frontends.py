"""Frontends as processes: one port, the link to the engine, and whose calls end when one of them goes."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import zmq

from protos.codec import decode_to_engine, decode_to_frontend, encode
from protos.engine_wire import (
    Abort,
    Answer,
    Ask,
    EngineStats,
    FinishReason,
    FrontendBeat,
    FrontendHello,
    FrontendLost,
    FrontendStats,
    FrontendStop,
    Histogram,
    KvBlock,
    KvEvents,
    Observed,
    Outputs,
    Question,
    ServiceStatus,
    Submit,
    ToFrontend,
    TokenDelta,
    WatchKv,
    WorkerStatus,
)
from protos.wire import Epoch, Ready, Sampling, TokenLogprobs
from scheduler_svc import config
from scheduler_svc.config import LoopConfig
from scheduler_svc.engine_socket import EngineSocket
from scheduler_svc.frontend.model import load_model
from scheduler_svc.frontend.server import Frontend, PortInUseError
from scheduler_svc.frontend_process import Place, _serve
from scheduler_svc.frontend_socket import FrontendSocket, Listening, Lost, Notice
from scheduler_svc.loop import EngineLoop
from scheduler_svc.ports import PortGuard
from tests.loop.harness import PATIENCE, loop_config
from worker_svc.backends.fake import expected

STATUS = ServiceStatus(
    True, "", Ready(Epoch(1, 2), 0, 9), [WorkerStatus("serving", 7, "cpu")], EngineStats(running=1, draining=True)
)


# ------------------------------------------------------------ messages


@pytest.mark.parametrize(
    "message",
    [
        FrontendHello("f"),
        FrontendLost("f"),
        FrontendBeat("f"),
        Submit("r", [1, 2], 2, Sampling(3, stop_token_ids=(4,)), tenant="t", deadline=1.5, frontend="f"),
        Abort("r", FinishReason.STOP, 1, "f"),
        Ask(1, Question.CANCEL, "r", "f"),
        WatchKv(3, "f"),
    ],
)
def test_what_a_frontend_says_crosses_a_socket(message: Submit) -> None:
    assert decode_to_engine(encode(message)) == message


@pytest.mark.parametrize(
    "message",
    [
        Outputs([TokenDelta("r", 0, [5], [TokenLogprobs(5, -1.0, 1)], FinishReason.STOP, 5)], "f"),
        STATUS,
        FrontendStop(2.5),
        Answer(1, STATUS, False, 3, "f"),
        KvEvents(4, [KvBlock(b"digest", b"parent", b"root", b"tokens"), b"another"], True, 3, "f"),
    ],
)
def test_what_a_frontend_hears_crosses_a_socket(message: Outputs) -> None:
    assert decode_to_frontend(encode(message)) == message


# ------------------------------------------------------------ the port


def _listener(port: int, *, shared: bool) -> socket.socket:
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC does
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(shared))
    try:
        made.bind(("127.0.0.1", port))
        made.listen()
    except OSError:
        made.close()
        raise
    return made


@pytest.mark.parametrize("shared", [False, True])
def test_a_port_that_somebody_listens_on_is_in_use_even_if_he_would_share_it(shared: bool) -> None:
    with _listener(0, shared=shared) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"cannot listen on 127\.0\.0\.1:{port}: Address already in use"):
            PortGuard("127.0.0.1", port)


def test_a_guarded_port_is_for_those_who_share_it_and_for_no_second_guard() -> None:
    guard = PortGuard("127.0.0.1", 0)
    try:
        assert guard.port
        with pytest.raises(OSError, match="in use"):
            PortGuard("127.0.0.1", guard.port)
        with pytest.raises(OSError, match="in use"):
            _listener(guard.port, shared=False)
        with _listener(guard.port, shared=True), _listener(guard.port, shared=True):
            with pytest.raises(OSError, match="in use"):
                PortGuard("127.0.0.1", guard.port)
            with socket.create_connection(("127.0.0.1", guard.port), timeout=PATIENCE):
                pass
    finally:
        guard.close()


def test_connections_that_have_ended_keep_nobody_from_a_port() -> None:
    with _listener(0, shared=True) as before:
        port = before.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            accepted, _ = before.accept()
            accepted.close()  # first to close: TIME_WAIT stays on this side
    guard = PortGuard("127.0.0.1", port)
    guard.close()


def test_a_name_of_several_addresses_is_held_at_one_port() -> None:
    guard = PortGuard("localhost", 0)
    try:
        assert {each.getsockname()[1] for each in guard._sockets} == {guard.port}
    finally:
        guard.close()


def test_an_address_of_another_machine_is_an_error_in_words() -> None:
    with pytest.raises(OSError, match=r"cannot listen on 192\.0\.2\.1:0: "):
        PortGuard("192.0.2.1", 0)


# ------------------------------------------------------------ the link


class Hall:
    """An engine loop with its frontends' socket, and what the keeper of their processes was told."""

    def __init__(self, config: LoopConfig, directory: Path, silence: float = PATIENCE) -> None:
        self.notices: list[Notice] = []
        self.link = FrontendSocket(f"ipc://{directory}/engine", self.notices.append, silence)
        self.loop = EngineLoop(config, time.monotonic, self.link)
        self.loop.start()
        self.loop.attach(self.link.post)


class Desk:
    """A frontend without gRPC: what it was sent, and the streams among it."""

    def __init__(self, hall: Hall, name: str) -> None:
        self.name = name
        self.heard: list[ToFrontend] = []
        self._arrived = asyncio.Event()
        self.socket = EngineSocket(hall.link.endpoint, name, self._take, asyncio.get_running_loop())
        self.socket.begin()
        self._closed = False

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self.socket.close()

    def _take(self, batch: list[ToFrontend]) -> None:
        self.heard += batch
        self._arrived.set()

    def submit(self, request_id: str, max_tokens: int, prompt: int = 300) -> Submit:
        made = Submit(request_id, [prompt, 301], 2, Sampling(max_tokens), frontend=self.name)
        self.socket.send(made)
        return made

    def deltas(self, request_id: str) -> list[TokenDelta]:
        batches = [message.items for message in self.heard if isinstance(message, Outputs)]
        return [delta for items in batches for delta in items if delta.request_id == request_id]

    def tokens(self, request_id: str) -> list[int]:
        return [token for delta in self.deltas(request_id) for token in delta.token_ids]

    async def until_tokens(self, request_id: str) -> None:
        await self._until(lambda: bool(self.tokens(request_id)))

    async def end(self, request_id: str) -> FinishReason:
        ends: list[FinishReason] = []

        def ended() -> bool:
            ends[:] = [d.finish_reason for d in self.deltas(request_id) if d.finish_reason is not None]
            return bool(ends)

        await self._until(ended)
        return ends[0]

    async def ask(self, question: Question, request_id: str = "") -> Answer:
        token = 1 + sum(isinstance(message, Answer) for message in self.heard)
        self.socket.send(Ask(token, question, request_id, self.name))
        answers: list[Answer] = []

        def answered() -> bool:
            answers[:] = [m for m in self.heard if isinstance(m, Answer) and m.token == token]
            return bool(answers)

        await self._until(answered)
        return answers[0]

    async def _until(self, condition: object) -> None:
        assert callable(condition)
        async with asyncio.timeout(PATIENCE):
            while not condition():
                await self._arrived.wait()
                self._arrived.clear()


@asynccontextmanager
async def opened(
    directory: Path, *names: str, config: LoopConfig | None = None
) -> AsyncIterator[tuple[Hall, list[Desk]]]:
    hall = Hall(config or loop_config("fake:delay_ms=2"), directory)
    desks = [Desk(hall, name) for name in names]
    try:
        yield hall, desks
    finally:
        for desk in desks:
            desk.close()
        await asyncio.to_thread(hall.loop.stop)


async def test_each_frontend_gets_its_own_streams_and_all_get_the_status(tmp_path: Path) -> None:
    async with opened(tmp_path, "f", "g") as (_, (f, g)):
        made = [(desk, desk.submit(f"{desk.name}{i}", 10, 300 + i)) for i in range(5) for desk in (f, g)]
        for desk, submit in made:
            assert await desk.end(submit.request_id) is FinishReason.LENGTH
            assert desk.tokens(submit.request_id) == expected(submit.token_ids, submit.sampling)
        for desk, other in ((f, g), (g, f)):
            assert {m.frontend for m in desk.heard if isinstance(m, Outputs)} == {desk.name}
            assert not any(other.deltas(submit.request_id) for owner, submit in made if owner is desk)
            assert any(isinstance(m, ServiceStatus) and m.serving for m in desk.heard)
        assert (await f.ask(Question.STATS)).status.stats.finished == len(made)


async def test_who_watches_the_blocks_is_told_and_nobody_else(tmp_path: Path) -> None:
    async with opened(tmp_path, "f", "g") as (_, (f, g)):
        f.socket.send(WatchKv(1, "f"))
        f.submit("r", 20)
        assert await f.end("r") is FinishReason.LENGTH
        await f.ask(Question.STATS)
        assert any(message.changes for message in f.heard if isinstance(message, KvEvents))
        await g.ask(Question.STATS)
        assert not any(isinstance(message, KvEvents) for message in g.heard)


async def test_a_frontend_that_goes_takes_its_own_sequences_along_and_no_others(tmp_path: Path) -> None:
    async with opened(tmp_path, "f", "g") as (hall, (f, g)):
        f.submit("lost", 8000)
        kept = g.submit("kept", 60)
        await f.until_tokens("lost")
        await g.until_tokens("kept")
        f.close()
        assert await g.end("kept") is FinishReason.LENGTH
        assert g.tokens("kept") == expected(kept.token_ids, kept.sampling)
        await g.ask(Question.DRAIN)  # answered when nothing is left, of `lost` either
        stats = (await g.ask(Question.STATS)).status.stats
        assert (stats.aborted, stats.owned_blocks, stats.fenced_blocks) == (1, 0, 0)
        assert Lost("f", "its connection broke") in hall.notices


async def test_an_id_is_one_over_all_frontends(tmp_path: Path) -> None:
    async with opened(tmp_path, "f", "g") as (_, (f, g)):
        f.submit("r", 8000)
        await f.until_tokens("r")
        g.submit("r", 5)
        assert await g.end("r") is FinishReason.DUPLICATE
        g.socket.send(Abort("r", frontend="g"))  # of a call that was given up before it heard of that
        g.submit("s", 5)
        assert await g.end("s") is FinishReason.LENGTH
        assert not [d for d in f.deltas("r") if d.finish_reason], "it is another's request"
        assert (await g.ask(Question.CANCEL, "r")).found, "but whoever names it cancels it, from anywhere"
        assert await f.end("r") is FinishReason.ABORTED


async def test_the_queue_is_one_over_all_frontends(tmp_path: Path) -> None:
    config = loop_config("fake:delay_ms=2")
    engine = replace(config.engine, max_num_seqs=1, max_waiting=1)
    async with opened(tmp_path, "f", "g", config=replace(config, engine=engine)) as (_, (f, g)):
        f.submit("runs", 8000)
        await f.until_tokens("runs")
        f.submit("waits", 5)
        assert (await f.ask(Question.STATS)).status.stats.waiting == 1
        g.submit("refused", 5)
        assert await g.end("refused") is FinishReason.REJECTED


async def test_a_frontend_that_says_nonsense_is_lost(tmp_path: Path) -> None:
    async with opened(tmp_path, "f", "g") as (hall, (f, g)):
        f.submit("r", 8000)
        await f.until_tokens("r")
        f.socket._dealer.send(b"\xc1 no message")
        await g.ask(Question.DRAIN)
        (notice,) = (each for each in hall.notices if isinstance(each, Lost))
        assert notice.frontend == "f"
        assert notice.reason.startswith("it sent 12 bytes that are no message: ")


async def test_a_frontend_whose_counts_cannot_be_added_up_is_lost(tmp_path: Path) -> None:
    async with opened(tmp_path, "f", "g") as (hall, (f, g)):
        f.socket.send(Observed("f", FrontendStats(queue=Histogram((1.0,), (1, 2), 3.0))))
        answer = await g.ask(Question.STATS)
        assert answer.status.frontends == FrontendStats()
        await g.ask(Question.DRAIN)
        (notice,) = (each for each in hall.notices if isinstance(each, Lost))
        assert (notice.frontend, "`queue` has not this service's bounds" in notice.reason) == ("f", True)


async def test_all_are_told_to_stop(tmp_path: Path) -> None:
    async with opened(tmp_path, "f", "g") as (hall, desks):
        for desk in desks:
            await desk.ask(Question.STATS)  # it is known
        hall.loop.send(FrontendStop(1.5))
        async with asyncio.timeout(PATIENCE):
            assert [await desk.socket.ended for desk in desks] == [FrontendStop(1.5)] * 2


async def test_a_frontend_hears_that_the_engine_is_gone(tmp_path: Path) -> None:
    async with opened(tmp_path, "f") as (hall, (f,)):
        await f.ask(Question.STATS)
        await asyncio.to_thread(hall.loop.stop)
        async with asyncio.timeout(PATIENCE):
            assert await f.socket.ended == "the engine is gone"


class Receiver:
    """A call's tokens."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.ended = asyncio.Event()

    def take(self, deltas: Sequence[TokenDelta]) -> None:
        for delta in deltas:
            self.token_ids += delta.token_ids
            if delta.finish_reason is not None:
                self.ended.set()

    def wake(self) -> None:
        pass


async def test_a_call_is_served_that_comes_before_the_server_knows_that_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients of a frontend that died wait for the next one, and are there with its first moment."""
    receiver, submit = Receiver(), Submit("r", [300, 301], 2, Sampling(5), frontend="f")

    async def start(frontend: Frontend) -> int:
        frontend._core.link.submit([submit], receiver)
        await receiver.ended.wait()
        raise PortInUseError("enough")

    monkeypatch.setattr(Frontend, "start", start)
    async with opened(tmp_path) as (hall, _), asyncio.timeout(PATIENCE):
        place = Place("f", hall.link.endpoint, 0, 0, 0)
        assert await _serve(config.parse(["fake:"]), place, load_model("fake:")) == 1
    assert receiver.token_ids == expected(submit.token_ids, submit.sampling)


class Peer:
    """A frontend that says what the test wants."""

    def __init__(self, link: FrontendSocket) -> None:
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(link.endpoint)

    def say(self, message: FrontendHello | FrontendBeat | Submit) -> None:
        self.socket.send(encode(message))

    def close(self) -> None:
        self.socket.close()
        self._context.term()


def test_silence_is_a_loss_and_a_beat_is_not_silent(tmp_path: Path) -> None:
    """By a clock of its own: `hung` says nothing after its hello, `alive` beats, a stranger never said who it is."""
    notices: list[Notice] = []
    link = FrontendSocket(f"ipc://{tmp_path}/engine", notices.append, silence=10.0)
    hung, alive, stranger = Peer(link), Peer(link), Peer(link)

    def hear(count: int, now: float) -> list[object]:
        """Until so many messages have come, beats aside."""
        heard: list[object] = []
        while len(heard) < count:
            assert link._socket.router.poll(30_000)
            heard += link.hear({link._socket.router}, now)
        return heard

    try:
        hung.say(FrontendHello("hung"))
        assert hear(1, 100.0) == [FrontendHello("hung")]
        alive.say(FrontendHello("alive"))
        assert hear(1, 101.0) == [FrontendHello("alive")]
        assert link.deadline == 110.0
        assert notices == [], "nobody said that he takes calls"
        stranger.say(FrontendBeat("alive"))
        alive.say(FrontendBeat("alive"))
        alive.say(Submit("r", [1], 1, Sampling(1), frontend="alive"))
        assert [type(message) for message in hear(1, 109.0)] == [Submit]
        assert list(link.hear(set(), 109.9)) == []
        assert list(link.hear(set(), 110.0)) == [FrontendLost("hung")]
        assert link.deadline == 119.0
        assert notices == [Listening("alive"), Lost("hung", "nothing was heard of it for 10 s")]
    finally:
        for peer in (hung, alive, stranger):
            peer.close()
        link.close()

"""Makes the messages in `docs/life_of_a_request.md`: one request, one killed worker, one cache hit, as they went.

`python -m tests.e2e.life_of_a_request --write` runs it on the real model and writes the page's blocks anew;
without `--write` it says whether they still hold, as the test does.
"""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import grpc
import msgspec
import zmq
from google.protobuf import text_format
from pagewire.v1 import inference_pb2 as pb
from pagewire.v1 import inference_pb2_grpc

from protos.codec import decode_from_worker, decode_to_worker
from protos.engine_wire import Outputs, Submit
from protos.wire import Hello, Ready, Setup, StepPlan, StepResult, Wire
from scheduler_svc.engine.scheduler import Scheduler
from scheduler_svc.record_format import read_log

PAGE = Path(__file__).parents[2] / "docs" / "life_of_a_request.md"
FATAL_STEP = 4  # of the first epoch: its plan finds a dead worker
MASKED = {"boot": 7, "pid": 4242, "fingerprint": "5eed…", "version": "0.1.0", "timings": None, "device": "cpu"}
_BLOCK = re.compile(r"(<!-- (?P<name>[\w-]+) -->\n```\w+\n)(?P<text>.*?)(```\n)", re.DOTALL)


class Tap:
    """A man in the middle between scheduler and workers, who writes down what they say, and kills one of them."""

    def __init__(self, scheduler: str, workers: str) -> None:
        self.messages: list[Wire] = []
        self._scheduler, self._workers = scheduler, workers
        self._worker: subprocess.Popen[bytes] | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
            router.bind(self._workers)
            while not self._stop.is_set():
                command = [sys.executable, "-m", "worker_svc", "--connect", self._workers]
                with context.socket(zmq.DEALER) as dealer, subprocess.Popen(command) as self._worker:
                    dealer.setsockopt(zmq.LINGER, 0)
                    dealer.connect(self._scheduler)
                    self._relay(router, dealer, self._worker)
                    self._worker.kill()

    def _relay(self, router: zmq.Socket[bytes], dealer: zmq.Socket[bytes], worker: subprocess.Popen[bytes]) -> None:
        """Until the worker is dead, or the story is over."""
        poller, peer = zmq.Poller(), b""
        poller.register(router, zmq.POLLIN)
        poller.register(dealer, zmq.POLLIN)
        while worker.poll() is None and not self._stop.is_set():
            ready = dict(poller.poll(50))
            if router in ready:
                peer, data = router.recv_multipart()
                self.messages.append(decode_from_worker(data))
                dealer.send(data)
            if dealer in ready:
                message = decode_to_worker(data := dealer.recv())
                self.messages.append(message)
                if isinstance(message, StepPlan) and (message.epoch.counter, message.step) == (1, FATAL_STEP):
                    worker.send_signal(signal.SIGKILL)
                    worker.wait()
                    return
                router.send_multipart([peer, data])


def tell(model: Path) -> dict[str, str]:
    """Runs the story. Returns the page's blocks by name."""
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "log"
        inner, outer = f"ipc://{directory}/scheduler", f"ipc://{directory}/workers"
        flags = ["--port", "0", "--workers", "0", "--listen", inner, "--record", str(log), "--block-size", "8"]
        flags += ["--dtype", "float32", "--kv-cache-gib", "0.05", "--max-model-len", "512", "--max-num-seqs", "4"]
        flags += ["--depth", "1", "--stream-interval", "0"]
        command = [sys.executable, "-m", "scheduler_svc", str(model), *flags]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as scheduler:
            tap = Tap(inner, outer)
            try:
                address = _address(scheduler)
                calls = [_call(address, "first"), _call(address, "second")]
            finally:
                scheduler.terminate()
                scheduler.wait()
                tap.close()
        return _blocks(calls, tap.messages, list(_instructions(log)))


def _address(scheduler: subprocess.Popen[str]) -> str:
    assert scheduler.stderr
    for line in scheduler.stderr:
        if found := re.search(r"ready: .* at (\S+), ", line):
            threading.Thread(target=scheduler.stderr.read, daemon=True).start()
            return found[1]
    raise RuntimeError("the scheduler ended before it served")


def _call(address: str, request_id: str) -> tuple[pb.GenerateRequest, list[pb.GenerateResponse]]:
    sampling = pb.SamplingParams(temperature=0, max_tokens=6, seed=11)
    request = pb.GenerateRequest(request_id=request_id, text="The capital of France is Paris. The capital of Italy is")
    request.sampling.CopyFrom(sampling)
    with grpc.insecure_channel(address) as channel:
        return request, list(inference_pb2_grpc.InferenceServiceStub(channel).Generate(request))


def _instructions(log: Path) -> Iterator[Any]:
    """What the engine heard and what it answered: a log is enough to hear it think again."""
    header, entries = read_log(log)
    engine = Scheduler(header.config)
    for entry in entries:
        yield entry.event
        yield from engine.handle(entry.event)


def _blocks(calls: list[tuple[Any, list[Any]]], wire: list[Wire], engine: list[Any]) -> dict[str, str]:
    request, responses = calls[0]

    def nth(kind: type, number: int, epoch: int = 0) -> str:
        found = [m for m in wire if isinstance(m, kind) and (not epoch or m.epoch.counter == epoch)]  # type: ignore[attr-defined]
        return show(found[number])

    outputs = [message for message in engine if isinstance(message, Outputs)]
    submits = [message for message in engine if isinstance(message, Submit)]
    before = sum(m.epoch.counter == 1 for m in wire if isinstance(m, StepPlan))
    again = [m for m in wire if isinstance(m, StepPlan) and m.epoch.counter == 2]
    second = next(i for i, plan in enumerate(again) if i and plan.admit)
    return {
        "request": text_format.MessageToString(request),
        "hello": nth(Hello, 0),
        "setup": nth(Setup, 0),
        "ready": nth(Ready, 0),
        "submit": show(submits[0]),
        "prefill-plan": nth(StepPlan, 0, 1),
        "prefill-result": nth(StepResult, 0, 1),
        "prefill-outputs": show(outputs[0]),
        "decode-plan": nth(StepPlan, 1, 1),
        "decode-result": nth(StepResult, 1, 1),
        "lost-plan": nth(StepPlan, before - 1, 1),
        "setup-again": nth(Setup, 1),
        "admit-again": nth(StepPlan, 0, 2),
        "result-again": nth(StepResult, 0, 2),
        "last-outputs": show(outputs[5]),
        "responses": _deltas(responses),
        "hit-plan": show(again[second]),
    }


def _deltas(responses: list[pb.GenerateResponse]) -> str:
    """The stream's text and its end; how many messages it took depends on the reader's pace."""
    text = "".join(response.delta.text for response in responses)
    finished = responses[-1].finished
    finished.ClearField("timings")
    ids = [token_id for response in responses for token_id in response.delta.token_ids]
    return f"delta … text {text!r}, token_ids {ids}\nfinished {{\n{text_format.MessageToString(finished, indent=2)}}}\n"


def show(message: Any) -> str:
    return _render(message, "") + "\n"


def _render(value: Any, indent: str, name: str = "") -> str:
    """A message as the call that would make it, without what is at its default; long ones over several lines."""
    if name in MASKED:
        value = MASKED[name]
    if isinstance(value, msgspec.Struct):
        fields = [
            (field.encode_name, getattr(value, field.name))
            for field in msgspec.structs.fields(value)
            if field.required or getattr(value, field.name) != _default(field)
        ]
        parts = [
            f"{name}={_render(part, indent + '    ', name)}"
            for name, part in fields
            if name not in MASKED or MASKED[name] is not None
        ]
        opening, closing = f"{type(value).__name__}(", ")"
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        inside = ", ".join(f"{part}={_render(getattr(value, part), indent, part)}" for part in value._fields)
        return f"{type(value).__name__}({inside})"
    elif isinstance(value, list | tuple):
        parts = [_render(part, indent + "    ") for part in value]
        opening, closing = ("[", "]") if isinstance(value, list) else ("(", ",)" if len(value) == 1 else ")")
    elif isinstance(value, Enum):
        return f"{type(value).__name__}.{value.name}"
    elif isinstance(value, str) and value.endswith(".gguf"):
        return repr(Path(value).name)
    else:
        return repr(value)
    line = opening + ", ".join(parts) + closing
    if len(indent) + len(line) <= 110 and "\n" not in line:
        return line
    inner = f",\n{indent}    ".join(parts)
    return f"{opening}\n{indent}    {inner},\n{indent}{closing}"


def _default(field: msgspec.structs.FieldInfo) -> Any:
    return field.default if field.default is not msgspec.NODEFAULT else field.default_factory()


def renew(page: str, blocks: dict[str, str]) -> str:
    """The page with its blocks replaced. Raises KeyError where page and blocks do not name the same."""
    named = {match["name"] for match in _BLOCK.finditer(page)}
    if named != blocks.keys():
        raise KeyError(f"only on one side: {sorted(named ^ blocks.keys())}")
    return _BLOCK.sub(lambda match: match[1] + blocks[match["name"]] + match[4], page)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    page = PAGE.read_text()
    new = renew(page, tell(args.model))
    if args.write:
        PAGE.write_text(new)
    elif new != page:
        print(f"{PAGE.name} tells another story than the run: --write renews it")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

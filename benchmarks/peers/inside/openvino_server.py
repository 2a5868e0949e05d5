"""Run inside OpenVINO's environment: `openvino_server.py MODEL_DIRECTORY PORT [NAME=VALUE…]`.

Lines of text over TCP, on as many connections as one likes. In: `{"id": 7, "prompt": [1, 2, 3], "tokens": 128}`. Out:
`7 1`, so many tokens more for request 7. One thread: what has come in between two steps joins the next one.
"""

from __future__ import annotations

import itertools
import json
import selectors
import signal
import socket
import sys
from typing import Any

import numpy as np
import openvino as ov  # type: ignore[import-not-found]
import openvino_genai as genai  # type: ignore[import-not-found]

SCHEDULER = {"cache_size": 4, "max_num_batched_tokens": 512, "max_num_seqs": 64, "enable_prefix_caching": True}
SCHEDULER |= {"dynamic_split_fuse": True}
PROPERTIES: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": 2}


class Connection:
    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.unread = b""
        self.outgoing: list[bytes] = []

    def lines(self) -> list[bytes] | None:
        """The whole lines that have come; None at the end."""
        data = self.sock.recv(1 << 20)
        if not data:
            return None
        *whole, self.unread = (self.unread + data).split(b"\n")
        return whole

    def flush(self) -> None:
        if self.outgoing:
            self.sock.sendall(b"".join(self.outgoing))
            self.outgoing.clear()


class Server:
    def __init__(self, pipeline: genai.ContinuousBatchingPipeline, listener: socket.socket) -> None:
        self.pipeline = pipeline
        self.listener = listener
        self.selector = selectors.DefaultSelector()
        self.selector.register(listener, selectors.EVENT_READ)
        self.numbers = itertools.count()  # the pipeline's ids are ours: clients may use the same ones
        self.streams: dict[int, tuple[Any, Connection, int]] = {}  # handle, whose, the client's id

    def run(self) -> None:
        while True:
            busy = self.pipeline.has_non_finished_requests()
            self.receive(wait=not busy)
            if self.pipeline.has_non_finished_requests():
                self.pipeline.step()
                self.send()

    def receive(self, wait: bool) -> None:
        for key, _ in self.selector.select(None if wait else 0):
            if key.fileobj is self.listener:
                sock, _ = self.listener.accept()
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.selector.register(sock, selectors.EVENT_READ, Connection(sock))
                continue
            lines = key.data.lines()
            if lines is None:
                self.selector.unregister(key.fileobj)
                continue
            for line in lines:
                self.submit(key.data, json.loads(line))

    def submit(self, connection: Connection, request: dict[str, Any]) -> None:
        config = genai.GenerationConfig(max_new_tokens=request["tokens"], ignore_eos=True, do_sample=False)
        number = next(self.numbers)
        prompt = ov.Tensor(np.array([request["prompt"]], dtype=np.int64))
        handle = self.pipeline.add_request(number, prompt, config)
        self.streams[number] = handle, connection, request["id"]

    def send(self) -> None:
        connections = set()
        for number, (handle, connection, name) in list(self.streams.items()):
            while handle.can_read():
                for output in handle.read().values():
                    connection.outgoing.append(b"%d %d\n" % (name, len(output.generated_ids)))
                    connections.add(connection)
                    if output.finish_reason != genai.GenerationFinishReason.NONE:
                        del self.streams[number]
        for connection in connections:
            connection.flush()


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    scheduler, properties = genai.SchedulerConfig(), dict(PROPERTIES)
    given = dict(argument.split("=", 1) for argument in sys.argv[3:])
    for name, value in SCHEDULER.items():
        setattr(scheduler, name, type(value)(json.loads(given.pop(name, json.dumps(value)))))
    properties |= {name: json.loads(value) for name, value in given.items()}
    pipeline = genai.ContinuousBatchingPipeline(sys.argv[1], scheduler, "CPU", properties)
    with socket.create_server(("127.0.0.1", int(sys.argv[2]))) as listener:
        Server(pipeline, listener).run()


if __name__ == "__main__":
    main()

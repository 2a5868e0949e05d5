"""A server with OpenAI's or llama-server's completions and no model: `fake_peer.py PORT DIRECTORY`.

It notes what it was asked. Its last event brings two tokens at once, as servers do that hold back half a character.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

DIRECTORY = Path(sys.argv[2])


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with (DIRECTORY / "requests").open("ab") as log:
            log.write(body + b"\n")
        request = json.loads(body)
        if request["prompt"] == [404]:
            self.send_error(400, "no such token")
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        if self.path == "/completion":
            self._llama(request["n_predict"])
        else:
            self._openai(request["max_tokens"])

    def _openai(self, tokens: int) -> None:
        for _ in range(max(1, tokens - 1)):
            self._event({"choices": [{"text": "a", "finish_reason": None}]})
        self._event({"choices": [{"text": "", "finish_reason": "length"}]})
        self._event({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": tokens}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _llama(self, tokens: int) -> None:
        for number in range(1, max(2, tokens)):
            self._event({"content": "a", "stop": False, "tokens_predicted": number})
        self._event({"content": "", "stop": True, "tokens_predicted": tokens, "tokens_evaluated": 9})

    def _event(self, event: object) -> None:
        self.wfile.write(f"data: {json.dumps(event, separators=(',', ':'))}\n\n".encode())

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    server.serve_forever()
    (DIRECTORY / "stopped").touch()

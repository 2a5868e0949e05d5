"""In smg's place, for tests of whoever starts it: `launch … --port PORT …` answers `/readiness`, or does what $STAND_IN
says: `ends` at once with code 3, `stays` on SIGTERM.
"""

from __future__ import annotations

import os
import signal
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

ENVIRONMENT = "PAGEWIRE_TEST_STAND_IN"


class Ready(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/readiness" else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def main() -> None:
    habit = os.environ.get(ENVIRONMENT, "")
    if habit == "ends":
        sys.exit(3)
    if habit == "stays":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    port = int(sys.argv[sys.argv.index("--port") + 1])
    HTTPServer(("127.0.0.1", port), Ready).serve_forever()


if __name__ == "__main__":
    main()

"""The page of a run that is still going, served on this machine alone and drawn again as the ledger grows.

A request for `/` draws the page from the ledger's whole lines, unless nothing was written since; the page asks for
`/version`, the ledger's length, every two seconds and loads itself anew when it has changed. Only the loopback
address is listened on, only these two paths are answered, and nothing is written into the run's folder.
"""

from __future__ import annotations

import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from fullweight.core.errors import CheckpointError, ConfigError, FullweightError
from fullweight.evidence.bundle import LEDGER
from fullweight.report.document import write_report
from fullweight.report.page import escaped
from fullweight.report.record import raw_lines, record

ADDRESS = "127.0.0.1"
_SOON = (
    '<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="2"><title>not yet</title>'
    "<p>Nothing to draw yet: {reason}</p>"
)


class Watch:
    """Serves the page of the run at `root`; `port` 0 takes a free one. Raises ConfigError when it is in use."""

    def __init__(self, root: Path, port: int) -> None:
        if not (root / LEDGER).is_file():
            raise CheckpointError(f"{root} is no run folder: it has no {LEDGER}; give the folder of a run")
        self.root, self._lock = root, threading.Lock()
        self._drawn: tuple[str, bytes] | None = None
        try:
            self._server = ThreadingHTTPServer((ADDRESS, port), _handler(self))
        except OSError as error:
            raise ConfigError(
                f"port {port} cannot be listened on: {error.strerror}; give another --port"
            ) from None

    @property
    def url(self) -> str:
        return f"http://{ADDRESS}:{self._server.server_address[1]}/"

    def serve(self) -> None:
        """Answer until `close` is called."""
        self._server.serve_forever()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def version(self) -> str:
        """What changes whenever a line was written."""
        return str((self.root / LEDGER).stat().st_size)

    def page(self) -> bytes:
        """The page as of now; of a run that has no step yet, one that comes again."""
        with self._lock:
            version = self.version()
            if self._drawn is None or self._drawn[0] != version:
                self._drawn = version, self._draw()
            return self._drawn[1]

    def _draw(self) -> bytes:
        try:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "page.html"
                write_report(path, [record(self.root)], [raw_lines(self.root)], live=True)
                return path.read_bytes()
        except FullweightError as error:
            return _SOON.format(reason=escaped(str(error))).encode()


def _handler(watch: Watch) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/":
                self._answer(watch.page(), "text/html; charset=utf-8")
            elif self.path == "/version":
                self._answer(watch.version().encode(), "text/plain")
            else:
                self.send_error(404)

        def _answer(self, content: bytes, kind: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *told: object) -> None:
            """Requests of the page itself are nobody's news."""

    return Handler

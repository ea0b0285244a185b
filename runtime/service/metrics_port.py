"""`/metrics` on an HTTP port of its own, on threads of its own.

It does not know what is measured.
Read first: only GET /metrics is answered; at most `MAX_THREADS` scrapes run at once, and one lasts `TIMEOUT_S` at most.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

from runtime.errors import InvalidInputError
from runtime.service.metrics import CONTENT_TYPE, Metrics

_log = logging.getLogger(__name__)

MAX_THREADS = 2
TIMEOUT_S = 10.0


@contextmanager
def metrics_port(metrics: Metrics, *, host: str, port: int) -> Iterator[int]:
    """Answer for the time of the block.

    Yields:
        the bound port; `port` 0 takes a free one.

    Raises:
        InvalidInputError: the address cannot be bound.
    """

    class Scrape(BaseHTTPRequestHandler):
        timeout = TIMEOUT_S

        def do_GET(self) -> None:
            found = self.path.partition("?")[0] == "/metrics"
            body = metrics.exposition() if found else b"only /metrics is here\n"
            self.send_response(200 if found else 404)
            self.send_header("Content-Type", CONTENT_TYPE if found else "text/plain")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:  # noqa: ANN401 - as the base class has it
            """Say nothing."""

    try:
        server = _PooledServer((host, port), Scrape)
    except OSError as error:
        raise InvalidInputError("metrics.port", f"{host}:{port}", f"cannot be bound: {error.strerror}") from error
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, name="metrics", daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _PooledServer(HTTPServer):
    """Answers on a few threads; those that wait are few, too."""

    request_queue_size = 8

    def __init__(self, address: tuple[str, int], answerer: type[BaseHTTPRequestHandler]) -> None:
        self._threads = ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="metrics")
        super().__init__(address, answerer)

    def process_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 - as the base class has it
        """Answer on a thread of the pool."""
        self._threads.submit(self._answer, request, client_address)

    def _answer(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 - a socket and where it leads
        try:
            self.finish_request(request, client_address)
        except OSError as error:
            _log.debug("whoever asked for metrics has gone: %s", error)
        except Exception:  # noqa: BLE001 - a defect is logged, and the next scrape may work
            _log.exception("the metrics cannot be told")
        finally:
            self.shutdown_request(request)

    def server_close(self) -> None:
        """Close the port and wait for answers that are under way."""
        super().server_close()
        self._threads.shutdown(cancel_futures=True)

"""A proxy in front of a store, to make it slow, rude or silent, and to count what is asked of it.

    with proxied("http://127.0.0.1:8333", latency=0.02) as proxy:
        proxy.fault = every(3, Fault.UNAVAILABLE)
        ... AWS_ENDPOINT_URL=proxy.endpoint ...
        proxy.requests["GET"]

`python -P -m tests.stores.proxy http://127.0.0.1:8333 0.02` is one in a process of its own, which prints where it
listens and, for each line it reads, what it has counted.
"""

from __future__ import annotations

import http.client
import json
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum, auto
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
PASSED_ON_BY_EACH = {"connection", "keep-alive", "transfer-encoding", "expect"}
"""Headers that are between two neighbours, and not for the other end."""


class Fault(Enum):
    """What may happen to a request."""

    UNAVAILABLE = auto()  # 503 SlowDown, as a bucket says that is asked too much
    RESET = auto()  # the connection is reset before an answer
    CUT = auto()  # half of the answer, then the connection is closed
    SILENCE = auto()  # no answer, for as long as the proxy stays


def every(number: int, fault: Fault) -> Callable[[int], Fault | None]:
    """That fault to every `number`th request, the first ones being fine."""
    return lambda request: fault if request % number == 0 else None


@dataclass
class Proxy:
    """`fault` is told the number of a request, from 1, and says what happens to it; it may be set at any time."""

    upstream: str
    latency: float = 0.0  # seconds before each answer
    fault: Callable[[int], Fault | None] = lambda request: None
    endpoint: str = ""
    requests: Counter[str] = field(default_factory=Counter)  # by method
    faults: Counter[Fault] = field(default_factory=Counter)
    sent: int = 0  # bytes of answers
    over: threading.Event = field(default_factory=threading.Event)
    clients: set[socket.socket] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, method: str) -> Fault | None:
        with self.lock:
            self.requests[method] += 1
            fault = self.fault(self.requests.total())
            if fault is not None:
                self.faults[fault] += 1
            return fault


@contextmanager
def proxied(upstream: str, latency: float = 0.0) -> Iterator[Proxy]:
    """A proxy on a free port of the loopback, served by threads of this process."""
    proxy = Proxy(upstream, latency)

    class Handler(_Handler):
        ours = proxy

    class Server(ThreadingHTTPServer):
        request_queue_size = 256
        daemon_threads = False  # so that all of them have ended when the server has

        def handle_error(self, request: object, client_address: object) -> None:
            """A client that went away is none of our business."""

    with Server(("127.0.0.1", 0), Handler) as server:
        proxy.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            proxy.over.set()
            server.shutdown()
            thread.join()
            for client in list(proxy.clients):  # they keep their connections for another request
                with suppress(OSError):
                    client.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    """One connection of a client, with one to the store behind it."""

    ours: Proxy
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16
    behind: http.client.HTTPConnection | None = None

    def setup(self) -> None:
        super().setup()
        self.ours.clients.add(self.connection)

    def finish(self) -> None:
        self.ours.clients.discard(self.connection)
        if self.behind is not None:
            self.behind.close()
        with suppress(OSError):  # what was cut off cannot be flushed
            super().finish()

    def handle_expect_100(self) -> bool:
        super().handle_expect_100()
        self.wfile.flush()  # the client waits for it before it sends what it has
        return True

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.ours.count(self.command)
        time.sleep(self.ours.latency)
        match fault:
            case Fault.UNAVAILABLE:
                self._answer(503, [("Content-Type", "application/xml"), ("Retry-After", "1")], SLOW_DOWN)
            case Fault.RESET:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self._hang_up()
            case Fault.SILENCE:
                self.ours.over.wait()
                self._hang_up()
            case _:
                self._pass_on(body, cut=fault is Fault.CUT)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815 - named by the library

    def _pass_on(self, body: bytes, cut: bool) -> None:
        try:
            if self.behind is None:
                to = urlsplit(self.ours.upstream)
                self.behind = http.client.HTTPConnection(str(to.hostname), to.port, timeout=60)
            headers = {n: v for n, v in self.headers.items() if n.lower() not in PASSED_ON_BY_EACH}
            self.behind.request(self.command, self.path, body, headers)  # the Host stays: it is part of the signature
            answer = self.behind.getresponse()
            data = answer.read()
        except (OSError, http.client.HTTPException):  # the store is gone: a client would see its connection refused
            if self.behind is not None:
                self.behind.close()
                self.behind = None
            self._hang_up()
            return
        self._answer(answer.status, answer.getheaders(), data, cut)

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes, cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in PASSED_ON_BY_EACH | {"content-length"}:
                self.send_header(name, value)
        length = {n.lower(): v for n, v in headers}.get("content-length", "0")
        self.send_header("Content-Length", length if self.command == "HEAD" else str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)
        self.wfile.flush()
        with self.ours.lock:
            self.ours.sent += len(data)
        if cut:
            self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.close()


if __name__ == "__main__":
    with proxied(sys.argv[1], float(sys.argv[2])) as running:
        print(running.endpoint, flush=True)
        for _ in sys.stdin:
            print(json.dumps({"requests": running.requests.total(), "bytes": running.sent}), flush=True)

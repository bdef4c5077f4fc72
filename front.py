"""The HTTP front: greenlets read whole requests and write answers, native threads run the WSGI app in between.

A connection costs a greenlet and nothing else until its request has arrived completely, so slow clients take neither
a thread nor a place in the queue. Everything that a client can draw out has its time, everything that it can swell has
its size.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import gevent
import gevent.socket
from gevent.event import Event
from gevent.pool import Pool
from gevent.pywsgi import MAX_REQUEST_LINE, Input, WSGIHandler, WSGIServer
from werkzeug.test import run_wsgi_app

from ticket import Ticket

log = logging.getLogger("keras_server")

IDLE_SECONDS = 30  # a kept-alive connection may be silent between two requests
HEAD_SECONDS = 10  # from a request's first line to the end of its head
HEAD_BYTES = 32 * 1024
LINGER_SECONDS = 5  # in which a refused body is still read away, so that the client gets to read the answer
STALL_SECONDS = 30  # in which a client takes nothing of its answer
CONNECTIONS = 8192  # more wait in the kernel
BODIES = 32  # of the largest size, that all connections together may have sent; past it bodies are refused

OVERLOADED = "The server has more to do than it can: try again in a moment."
TOO_LATE = "The answer was not ready in time: try again, or with fewer images."
TOO_LARGE = "The request is larger than the {:g} MiB that this server takes: send a smaller picture."

Answer = tuple[list[bytes], str, list[tuple[str, str]]]  # chunks of the body, status line, headers


def error_body(path: str, sentence: str) -> bytes:
    """Return the JSON of an error; on the paths of other protocols in the shape that their clients read."""
    foreign = path.startswith(("/v1", "/v2"))
    return json.dumps({"error": sentence} if foreign else {"success": False, "error": sentence}).encode() + b"\n"


@dataclass(frozen=True)
class Limits:
    """What the front needs to know of the settings."""

    body: int  # bytes
    seconds: float  # from a request's arrival to its answer
    requests: int  # that have arrived and are not answered
    threads: int
    grace: float  # seconds in which a server that stops still takes connections


class Refusal(Exception):
    """A request that the app never sees, with the status and the sentence of its answer."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status, self.sentence = status, sentence


class Handler(WSGIHandler):
    """A connection: reads one whole request after the other, each within its time, and writes the answers."""

    server: Front
    environ: dict[str, Any] | None

    def __init__(self, sock: Any, address: Any, server: Front):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # pywsgi writes head and body apart
        sock.settimeout(STALL_SECONDS)
        self.ticket = Ticket(server.limits.seconds)
        self.held = 0  # bytes of the current request's body
        super().__init__(sock, address, server)

    def handle_one_request(self) -> Any:
        """Wait for a request and serve it. Returns None where the connection is to be closed."""
        self.server.idle.add(self)
        try:
            return super().handle_one_request()
        except Refusal as refusal:
            return self.refuse(refusal)
        finally:
            self.server.idle.discard(self)
            self.server.held -= self.held
            self.held = 0

    def read_requestline(self) -> str:
        """Wait for a request's first line, which starts its clock."""
        with gevent.Timeout(IDLE_SECONDS, OSError("idle")):  # pywsgi closes the connection on OSError
            line = super().read_requestline()
        self.server.idle.discard(self)
        self.ticket, self.environ = Ticket(self.server.limits.seconds), None
        if len(line) >= MAX_REQUEST_LINE:
            raise Refusal(414, "The address is too long.")
        return line

    def MessageClass(self, *_: Any) -> Any:
        """Read and parse the fields of the head."""
        lines, size = [], 0
        while (line := self.rfile.readline(HEAD_BYTES)) not in (b"\r\n", b"\n", b""):
            lines.append(line)
            size += len(line)
            if size > HEAD_BYTES:
                raise Refusal(431, f"The request's head is larger than {HEAD_BYTES} bytes.")
        return super().MessageClass(io.BytesIO(b"".join(lines)), 0)

    def read_request(self, raw_requestline: str) -> bool:
        """Read the head. Raises ValueError or Refusal where it is malformed, late, or unclear about the body."""
        with gevent.Timeout(HEAD_SECONDS, Refusal(408, "The request's head did not arrive in time.")):
            super().read_request(raw_requestline)
        lengths = self.headers.get_all("content-length", [])
        codings = self.headers.get_all("transfer-encoding", [])
        if self.request_version == "HTTP/0.9" or len(lengths) > 1 or not all(n.isdecimal() for n in lengths):
            raise ValueError
        if codings and [coding.lower() for coding in codings] != ["chunked"]:
            raise Refusal(501, "The only transfer encoding that this server understands is chunked.")
        return True

    def _handle_client_error(self, ex: Exception) -> None:
        self.refuse(ex if isinstance(ex, Refusal) else Refusal(400, "This is not a well-formed HTTP request."))

    def run_application(self) -> None:
        """Read the body, have the app answer, and write that."""
        try:
            body = self.read_body()
        except Refusal as refusal:
            return self.refuse(refusal)
        environ = self.environ or {}
        environ.pop("HTTP_TRANSFER_ENCODING", None)
        environ |= {"wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body)), "ticket": self.ticket}
        # What has no body costs little and is to be answered under any load: health, metrics, the page.
        answer = self.run_in_thread if self.command == "POST" else self.server.run
        chunks, status, headers = answer(environ)
        self.start_response(status, headers)
        for chunk in chunks or [b""]:
            self.write(chunk)
        return None

    def read_body(self) -> bytes:
        """Return the whole body. Raises Refusal for one that is too large, late or broken off."""
        server, limit = self.server, self.server.limits.body
        if (self.content_length or 0) > limit:
            raise Refusal(413, TOO_LARGE.format(limit / 2**20))
        late = Refusal(408, "The request's body did not arrive in time: send a smaller picture.")
        parts = []
        try:
            with gevent.Timeout(max(self.ticket.left, 0.001), late):
                while part := self.wsgi_input.read(65536):
                    parts.append(part)
                    self.held += len(part)
                    server.held += len(part)
                    if self.held > limit:
                        raise Refusal(413, TOO_LARGE.format(limit / 2**20))
                    if server.held > BODIES * max(limit, 2**20):
                        raise Refusal(503, OVERLOADED)
        except OSError:
            raise Refusal(400, "The request's body broke off, or is not in the chunks that HTTP asks for.") from None
        return b"".join(parts)

    def run_in_thread(self, environ: dict[str, Any]) -> Answer:
        """Run the app on a native thread, while this greenlet watches the clock and the client."""
        server, ticket = self.server, self.ticket
        if server.admitted >= server.limits.requests:
            return self.plain(503, OVERLOADED)
        done = Event()
        server.admitted += 1
        future = server.workers.submit(server.run, environ)
        future.add_done_callback(lambda _: server.loop.run_callback_threadsafe(done.set))
        watch = gevent.spawn(self.watch_client, done)
        try:
            done.wait(max(ticket.left, 0.001))
        finally:
            server.admitted -= 1
            watch.kill(block=False)
        if future.done():
            return future.result()
        future.cancel()
        status = 499 if ticket.gone else 504
        ticket.gone = True
        return self.plain(status, TOO_LATE)

    def watch_client(self, done: Event) -> None:
        """Give the request up when its client closes the connection."""
        with contextlib.suppress(OSError):
            gevent.socket.wait_read(self.socket.fileno())
            if self.socket.recv(1, socket.MSG_PEEK):
                return  # the next request, sent early
        self.ticket.gone = True
        done.set()

    def plain(self, status: int, sentence: str) -> Answer:
        """Return and record an answer that the app does not know of."""
        body = error_body(self.path or "", sentence)
        self.ticket.describe(self.environ or {"REQUEST_METHOD": self.command or "", "PATH_INFO": self.path or ""})
        self.ticket.close(status)
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
        headers += [("X-Request-ID", self.ticket.id), ("X-Content-Type-Options", "nosniff")]
        headers += [("Retry-After", "1")] if status == 503 else []
        headers += [("Connection", "close")] if self.server.draining.is_set() else []
        phrase = HTTPStatus(status).phrase if status != 499 else "Client Closed Request"  # nginx's number
        return [body], f"{status} {phrase}", headers

    def refuse(self, refusal: Refusal) -> None:
        """Answer a request that cannot be read to its end, read away what still comes, and close."""
        (body,), status, headers = self.plain(refusal.status, refusal.sentence)
        lines = [f"HTTP/1.1 {status}", *(f"{k}: {v}" for k, v in headers if k != "Connection"), "Connection: close"]
        self.close_connection = True
        self.wsgi_input = Input(self.rfile, 0)  # or pywsgi would read the body to its end, however long
        with contextlib.suppress(OSError), gevent.Timeout(LINGER_SECONDS, False):
            self.socket.sendall("\r\n".join([*lines, "", ""]).encode() + body)
            self.socket.shutdown(socket.SHUT_WR)
            while self.socket.recv(65536):
                pass

    def log_request(self) -> None:
        """Leave the log to the ticket."""


class Front(WSGIServer):
    """The listening socket, its connections, and the threads behind them."""

    def __init__(self, listener: Any, app: Callable[..., Any], limits: Limits, draining: threading.Event):
        """Take a listening gevent socket; `draining` is set when the server begins to stop."""
        name = {"SERVER_NAME": listener.getsockname()[0]}  # or gevent would ask the DNS for it
        options = {"spawn": Pool(CONNECTIONS), "log": None, "error_log": log, "environ": name}
        super().__init__(listener, app, handler_class=Handler, **options)
        self.limits, self.draining = limits, draining
        self.workers = ThreadPoolExecutor(limits.threads, "web")
        self.idle: set[Handler] = set()  # connections between two requests
        self.admitted = 0  # requests that have arrived and are not answered
        self.held = 0  # bytes of bodies
        self.status = 0

    def run(self, environ: dict[str, Any]) -> Answer:
        """Run the app on a request that is in memory."""
        chunks, status, headers = run_wsgi_app(self.application, environ, buffered=True)
        return [*chunks], status, [*headers]

    def stop_softly(self) -> None:
        """On a signal: tell the probes, take connections for the grace period, answer what was accepted, end."""
        if self.draining.is_set():
            log.warning("Stopped at once, on a second signal.")
            os._exit(1)
        log.info("Stopping: connections are taken for %g s more, then what is accepted is answered.", self.limits.grace)
        self.draining.set()
        gevent.spawn(self.drain, self.limits.grace)

    def die(self) -> None:
        """Callable from any thread: answer what can be answered, then end with a status that asks for a restart."""

        def end() -> None:
            log.critical("The model's thread has ended, so the process ends too: a supervisor should restart it.")
            self.status = 1
            self.draining.set()
            gevent.spawn(self.drain, 0)

        self.loop.run_callback_threadsafe(end)

    def drain(self, grace: float) -> None:
        """Close the port after the grace period, and end once the last accepted request is answered."""
        gevent.sleep(grace)
        self._do_read()  # who stands in the kernel's queue has been promised an answer
        self.stop_accepting()
        self.socket.close()
        for handler in [*self.idle]:  # they wake up; one whose request has just come still serves it
            with contextlib.suppress(OSError):
                handler.socket.shutdown(socket.SHUT_RD)
        self.pool.join(timeout=self.limits.seconds + LINGER_SECONDS)
        self.stop(0)

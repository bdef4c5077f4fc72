"""A request's ticket: its id, when its answer is due, and whether anybody still waits for it."""

from __future__ import annotations

import contextlib
import random
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from http import HTTPStatus

from keras_server import spans, telemetry
from keras_server.clients import client_address, trace_of

ID = re.compile("[A-Za-z0-9._-]{1,64}")  # that a client may choose
LENGTH = re.compile("[0-9]{1,18}")  # of a body
DESCRIBED = {  # headers that describe() reads, and what WSGI calls them
    "host": "HTTP_HOST",
    "origin": "HTTP_ORIGIN",
    "x-request-id": "HTTP_X_REQUEST_ID",
    "x-forwarded-for": "HTTP_X_FORWARDED_FOR",
    "traceparent": "HTTP_TRACEPARENT",
}
LOOK_SECONDS = 0.02  # between two looks whether a client has left; each lets another thread take Python's lock
PEEK = socket.MSG_PEEK | getattr(socket, "MSG_DONTWAIT", 0)  # the front's sockets never block anyway


class Ticket:
    """One request, from its first byte to its answer."""

    def __init__(self, seconds: float, client: socket.socket | None = None):
        """Take the seconds to the answer, and where it is known the client's socket, until release()."""
        self.client, self.looking = client, threading.Lock()
        self.arrived = time.monotonic()
        self.due = self.arrived + seconds
        self.gone = False  # the client left
        self.looked = self.arrived  # when it was looked whether it has
        self.closed = False
        self.images = self.pixels = 0
        self.seconds = 0.0  # of a processor that its pictures take
        self.large = False  # it has a turn among the large ones
        self.method = self.path = self.id = self.origin = self.address = self.host = self.trace = ""
        self.size = 0
        self.stages: list[spans.Stage] = []  # where spans are sent

    @property
    def left(self) -> float:
        """Seconds until the answer is due."""
        return self.due - time.monotonic()

    @property
    def over(self) -> bool:
        """Whether an answer would be work for nobody, as far as known; who has left may be known LOOK_SECONDS later."""
        now = time.monotonic()
        return now >= self.due or self.gone or (now > self.looked + LOOK_SECONDS and self.client_left())

    def client_left(self) -> bool:
        """Look whether the client has closed the connection, even if only its half of it. Never waits; any thread."""
        with self.looking:
            if self.client and not self.gone:
                try:
                    self.gone = not self.client.recv(1, PEEK)
                except BlockingIOError:
                    pass  # nothing has come: it waits
                except OSError:
                    self.gone = True
                self.looked = time.monotonic()
        return self.gone

    def release(self) -> None:
        """Forget the socket, which is about to be closed, or to serve the next request."""
        with self.looking:
            self.client = None

    def describe(self, environ: Mapping[str, object], proxies: Sequence[str] = ()) -> None:
        """Note what the log will say, with the client's address as trusted `proxies` tell it.

        An id and a trace that the client chose are kept where they are well-formed.
        """
        self.method, self.path = str(environ["REQUEST_METHOD"]), str(environ["PATH_INFO"])
        size = str(environ.get("CONTENT_LENGTH") or "0")
        self.size = int(size) if LENGTH.fullmatch(size) else 0
        self.origin = str(environ.get("HTTP_ORIGIN", ""))
        self.host = str(environ.get("HTTP_HOST", ""))
        peer, forwarded = str(environ.get("REMOTE_ADDR", "")), str(environ.get("HTTP_X_FORWARDED_FOR", ""))
        self.address = client_address(peer, forwarded, proxies)
        self.trace = trace_of(str(environ.get("HTTP_TRACEPARENT", "")))
        chosen = str(environ.get("HTTP_X_REQUEST_ID", ""))
        # Not of os.urandom(), for which another thread may take Python's lock: an id is a name, no secret.
        self.id = self.id or (chosen if ID.fullmatch(chosen) else f"{random.getrandbits(128):032x}")

    def close(self, status: int, route: str = "other") -> None:
        """Count and log the answer, once: the front may have answered before the app did."""
        if not self.closed:
            self.closed = True
            seconds = time.monotonic() - self.arrived
            more = {"images": self.images, "bytes": self.size, "client": self.address, "id": self.id}
            more |= {"traceparent": self.trace} if self.trace else {}
            more |= {"host": telemetry.quoted(self.host[:200])} if status == HTTPStatus.MISDIRECTED_REQUEST else {}
            telemetry.record(status, route, self.method, self.path, seconds, more)
            if spans.current and route not in telemetry.PROBES:
                self.send_spans(spans.current, status, route)

    def note(self, name: str, started: float, ended: float) -> None:
        """Note a stage of the request, by time.monotonic(), where spans are sent."""
        if spans.current:
            self.stages.append(spans.Stage(name, started, ended))

    def send_spans(self, exporter: spans.Exporter, status: int, route: str) -> None:
        """Send the request's span and those of its stages."""
        known = self.method in telemetry.METHODS
        name = self.method if known else "HTTP"
        attributes: dict[str, str | int] = {
            "http.request.method": self.method if known else "_OTHER",
            "http.response.status_code": status,
            "http.request.body.size": self.size,
            "url.path": telemetry.quoted(self.path[:200]),
            "client.address": self.address,
            "keras_server.request_id": self.id,
            "keras_server.images": self.images,
        }
        if route != "other":
            name, attributes["http.route"] = f"{name} {route}", route
        exporter.record(name, (self.arrived, time.monotonic()), self.stages, self.trace, status, attributes)


TICKET: ContextVar[Ticket | None] = ContextVar("ticket", default=None)  # of the request that this thread serves


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """Note what is done within as a stage of the request that this thread serves, if it serves one."""
    started = time.monotonic()
    try:
        yield
    finally:
        if ticket := TICKET.get():
            ticket.note(name, started, time.monotonic())

"""The HTTP front: greenlets read whole requests and write answers, native threads run the WSGI app in between.

A connection costs a greenlet and nothing else until its request has arrived completely, so slow clients take neither
a thread nor a place in the queue. Everything that a client can draw out has its time, everything that it can swell has
its size. pywsgi speaks HTTP; where it is more lenient than the standard, this module is not, because where two readers
of a request disagree about its end somebody smuggles another.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import logging
import os
import re
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.utils import formatdate
from http.client import responses
from typing import Any

import gevent
from gevent.event import Event
from gevent.pool import Pool
from gevent.pywsgi import Input, OldMessage, WSGIHandler, WSGIServer

from keras_server.errors import FAILED, OVERLOADED, TOO_LARGE, TOO_LATE, Cors, error_body, json_headers
from keras_server.ticket import LENGTH, Ticket

log = logging.getLogger("keras_server")

IDLE_SECONDS = 30  # a connection may be silent before and between requests
HEAD_SECONDS = 10  # from a request's first byte to the end of its head
HEAD_BYTES = 32 * 1024
LINE_BYTES = 8 * 1024  # of the head's first line
STALL_SECONDS = 10  # in which a client takes nothing of its answer
LINGER_SECONDS = 30  # in which what follows a last answer is read away, so that the client gets to read the answer
SILENT_SECONDS = 3  # that the client may be silent meanwhile
TICK_SECONDS = 0.25  # between two looks at whose time is up
STEPS = 16  # reads, or small requests, that a client may have at once while others wait
CONNECTIONS = 8192  # more wait in the kernel
BODIES = 32  # of the largest size, that all connections together may have sent and not had answered
PAGE_THREADS = 2  # for what is no prediction: the page, documents, metrics
PAGES = 66  # such requests at once
DEATH_SECONDS = 5  # for the last answers once the model's thread has ended
FRAMING_BYTES = 128 * 1024  # that a chunked body may have over its content: a byte a chunk would cost much for little

BROKEN_OFF = "The request's body broke off, or is not in the chunks that HTTP asks for."
SLOW_BODY = "The request's body did not arrive in time: send a smaller picture."

TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
REQUEST_LINE = re.compile(rf"{TOKEN} [!-~\x80-\xff]+ HTTP/1\.[01]\r\n")
FIELD = re.compile(rf"({TOKEN}):([\t -~\x80-\xff]*)\r\n")
# What the clients of today send; Handler.turn_away() leaves every other head to pywsgi.
USUAL_POST = re.compile(rf"POST (/[!-$&-~]*) HTTP/1\.1\r\n((?:{TOKEN}:[\t -~]*\r\n)+)\r\n".encode())
USUAL_FIELD = re.compile(FIELD.pattern.encode())
UNUSUAL = {b"transfer-encoding", b"expect", b"upgrade"}

AWAY = bytearray(256 * 1024)  # for what nobody wants to read
DISCARD = socket.MSG_TRUNC if sys.platform == "linux" else 0  # the kernel does not even copy it

Probe = Callable[[], tuple[int, bytes]]  # a status and a body of JSON
Answer = tuple[str, list[tuple[str, str]], bytes]  # status line, headers, body


@functools.lru_cache(64)
def usual_post(head: bytes) -> dict[str, str] | None:
    """Return what the log wants to know of a POST of which only the body is to come; else, or if unclear, None.

    Overload comes from clients that ask over and over, with one and the same head.
    """
    post = USUAL_POST.fullmatch(head)
    if not post:
        return None
    fields = {name.lower(): value.strip().decode() for name, value in USUAL_FIELD.findall(post[2])}
    length = fields.get(b"content-length", "")
    if (
        len(fields) < post[2].count(b"\n")  # a name came twice
        or b"host" not in fields
        or fields.keys() & UNUSUAL
        or fields.get(b"connection", "keep-alive").lower() != "keep-alive"
        or not LENGTH.fullmatch(length)
    ):
        return None
    environ = {"REQUEST_METHOD": "POST", "PATH_INFO": post[1].decode().partition("?")[0], "CONTENT_LENGTH": length}
    return environ | {"HTTP_X_REQUEST_ID": fields.get(b"x-request-id", "")}


@functools.lru_cache(1)
def date(seconds: int) -> str:
    """Return a time as HTTP writes it."""
    return formatdate(seconds, usegmt=True)


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

    def __init__(self, status: int = 400, sentence: str = "This is not a well-formed HTTP request."):
        super().__init__(sentence)
        self.status, self.sentence = status, sentence


class Reader(io.RawIOBase):
    """What a client sends; each read ends with a TimeoutError when its time is up."""

    def __init__(self, sock: Any, waiting: set[Reader]):
        self.socket = sock
        self.waiting = waiting  # Front.look_at_the_clock() ends the reads of those in it
        self.greenlet = gevent.getcurrent()
        self.until = 0.0
        self.count = 0  # bytes
        self.turn, self.steps = 0.0, 0

    def readable(self) -> bool:
        """Tell the buffer around it that it can be read."""
        return True

    def readinto(self, buffer: Any, flags: int = 0) -> int:
        """Read what has come, at least one byte unless the client has ended."""
        self.waiting.add(self)
        try:
            size = self.socket.recv_into(buffer, 0, flags)
        finally:
            self.waiting.discard(self)
        self.count += size
        self.breathe()
        return size

    def breathe(self) -> None:
        """Let the others have their turn: a client that sends faster than it is read would keep them waiting."""
        turn = gevent.get_hub().loop.now()  # stands still until the loop has its turn
        self.steps = self.steps + 1 if turn == self.turn else 0
        self.turn = turn
        if self.steps >= STEPS:
            gevent.sleep(0)


class Handler(WSGIHandler):
    """A connection: reads one whole request after the other, each within its time, and writes the answers."""

    server: Front
    command: str
    path: str

    def __init__(self, sock: Any, address: Any, server: Front):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.reader = Reader(sock, server.waiting)
        # For threads: a plain socket of the same number, which never waits in gevent. Detached before the number ends.
        self.plain_socket = socket.socket(sock.family, sock.type, sock.proto, fileno=sock.fileno())
        super().__init__(sock, address, server, io.BufferedReader(self.reader))

    def handle(self) -> None:
        """Serve the connection to its end."""
        try:
            super().handle()
        finally:
            self.plain_socket.detach()

    def handle_one_request(self) -> bool | None:
        """Wait for a request and serve it. Returns True where another may follow, else None."""
        self.environ: dict[str, Any] | None = None
        self.command = self.path = ""
        self.close_connection = self.headers_sent = self.evicted = False
        self.size = 0  # bytes that have come of the body
        self.held = 0  # and that are kept
        self.ticket = Ticket(self.server.limits.seconds)
        try:
            self.wait()
            goes_on = not self.close_connection if self.turn_away() else super().handle_one_request()
            if goes_on:
                self.reader.breathe()
                return True
            if self.ticket.closed:
                self.linger()
        except Refusal as refusal:
            with contextlib.suppress(OSError):
                self.refuse(refusal)
                self.linger()
        except OSError:
            pass  # the client has left, or is silent, or takes nothing
        finally:
            self.ticket.release()  # before the socket closes, and its number is another's
            self.server.headless.pop(self, None)
            self.server.held -= self.held
        return None

    def wait(self) -> None:
        """Wait for a request's first bytes, which start its clock. Raises OSError where none come."""
        self.server.headless[self] = self.reader.count
        self.reader.until = time.monotonic() + (SILENT_SECONDS if self.server.closing else IDLE_SECONDS)
        if not self.rfile.peek(1):
            raise ConnectionAbortedError
        self.ticket = Ticket(self.server.limits.seconds, self.plain_socket)
        self.reader.until = self.ticket.arrived + HEAD_SECONDS

    def turn_away(self) -> bool:
        """Refuse a usual POST where the queue is full, at half of what it costs by way of pywsgi; else return False.

        Ten times the load that the model can bear would else take a fifth of two processors from it.
        """
        if not self.server.full_queue:
            return False
        start = self.rfile.peek(1)
        head = start[: start.find(b"\r\n\r\n") + 4]
        environ = usual_post(head)
        if not environ or int(environ["CONTENT_LENGTH"]) > self.server.limits.body:
            return False
        self.server.headless.pop(self, None)
        self.command, self.path, self.request_version = "POST", environ["PATH_INFO"], "HTTP/1.1"
        self.environ = dict(environ)  # the cache keeps its own
        self.size = int(environ["CONTENT_LENGTH"])
        self.reader.until = self.ticket.due
        left = len(head) + self.size
        left -= len(self.rfile.read1(left))  # of which some has come with the head
        while left:
            try:
                came = self.reader.readinto(memoryview(AWAY)[:left], DISCARD)
            except TimeoutError:
                raise Refusal(408, SLOW_BODY) from None
            if not came:
                raise Refusal(400, BROKEN_OFF)
            left -= came
        self.respond(*self.plain(503, OVERLOADED))
        return True

    def read_requestline(self) -> str:
        """Read a request's first line."""
        try:
            line = self.rfile.readline(LINE_BYTES)
            if line == b"\r\n":  # some clients end a body with one too many
                line = self.rfile.readline(LINE_BYTES)
        except TimeoutError:
            raise self.late from None
        if len(line) == LINE_BYTES:
            raise Refusal(414, "The address is too long.")
        if not line.endswith(b"\n"):
            raise ConnectionAbortedError
        return line.decode("latin-1")

    def read_request(self, raw_requestline: str) -> bool:
        """Read the head. Raises Refusal or ValueError where it is malformed, late, or unclear about the body."""
        if not REQUEST_LINE.fullmatch(raw_requestline):
            raise Refusal
        super().read_request(raw_requestline)
        self.server.headless.pop(self, None)
        if not self.path.startswith("/"):  # as to a proxy, http://host/path
            self.path = "/" + re.sub("^https?://[^/?#]*/?", "", self.path, flags=re.IGNORECASE)
        return True

    def MessageClass(self, *_: Any) -> Any:
        """Read the fields of the head, which say where the request ends."""
        fields, size = OldMessage(), 0
        while (line := self.rfile.readline(HEAD_BYTES).decode("latin-1")) != "\r\n":
            size += len(line)
            if not line:
                raise ConnectionAbortedError
            if size >= HEAD_BYTES:
                raise Refusal(431, f"The request's head is larger than {HEAD_BYTES} bytes.")
            if not (field := FIELD.fullmatch(line)):
                raise Refusal
            fields[field[1]] = field[2].strip("\t ")
        modern = self.request_version == "HTTP/1.1"
        hosts, lengths, codings = (fields.get_all(name, []) for name in ("host", "content-length", "transfer-encoding"))
        if len(hosts) > 1 or (modern and not hosts):
            raise Refusal(400, "HTTP/1.1 asks for exactly one Host field.")
        if len(lengths) > 1 or not all(LENGTH.fullmatch(length) for length in lengths):
            raise Refusal
        if codings and (lengths or not modern):
            raise Refusal
        if codings and [coding.lower() for coding in codings] != ["chunked"]:
            raise Refusal(501, "The only transfer encoding that this server understands is chunked.")
        return fields

    def _handle_client_error(self, ex: Exception) -> None:
        """Raise what is wrong with the head, as Refusal, or as OSError where nobody waits for an answer."""
        if isinstance(ex, TimeoutError):
            raise self.late from None
        raise ex if isinstance(ex, Refusal | OSError) else Refusal() from None

    @property
    def late(self) -> Refusal:
        """What a head that takes too long is answered."""
        return Refusal(408, "The request's head did not arrive in time.")

    def run_application(self) -> None:
        """Read the body, have the app answer, and write that."""
        try:
            try:
                self.respond(*self.answer(self.read_body()))
            except Refusal as refusal:
                self.wsgi_input = Input(self.rfile, 0)  # or pywsgi would read the body to its end, however long
                self.refuse(refusal)
        except OSError:  # nobody waits for the answer any more
            self.close_connection = True

    def handle_error(self, *error: Any) -> None:
        """Log an error outside the app, which is one of this module."""
        self.close_connection = True
        if not issubclass(error[0], gevent.GreenletExit):  # by which stop() ends it
            log.error("A connection failed", exc_info=error)

    def read_body(self) -> bytes | None:
        """Return the whole body, or None under overload. Raises Refusal for one that is too large, late or broken."""
        server, limit = self.server, self.server.limits.body
        too_large = Refusal(413, TOO_LARGE.format(limit / 2**20))
        if (self.content_length or 0) > limit:
            raise too_large
        wanted = self.command != "POST" or not server.full_queue  # else it is read, and not kept
        if not wanted and self.wsgi_input.socket:  # the client asks before it sends
            raise Refusal(503, OVERLOADED)
        server.bodies[self] = None
        self.reader.until, before = self.ticket.due, self.reader.count
        parts = []
        try:
            while part := self.wsgi_input.read(65536):
                self.size += len(part)
                if self.size > limit:
                    raise too_large
                if self.reader.count - before > 2 * self.size + FRAMING_BYTES:
                    raise Refusal(400, "The request's body comes in chunks that are too small.")
                if wanted:
                    parts.append(part)
                    self.held += len(part)
                    server.held += len(part)
                    server.make_room()
        except TimeoutError:
            raise Refusal(408, SLOW_BODY) from None
        except (OSError, ValueError):  # ValueError comes from a chunk's size
            if not self.evicted:
                raise Refusal(400, BROKEN_OFF) from None
        finally:
            del server.bodies[self]
        if self.evicted:
            raise Refusal(503, OVERLOADED)
        return b"".join(parts) if wanted else None

    def answer(self, body: bytes | None) -> Answer:
        """Return the answer to a request that has arrived. Raises ConnectionAbortedError where nobody waits for it."""
        server, ticket, environ = self.server, self.ticket, self.environ or {}
        if self.command in ("GET", "HEAD") and (probe := server.probes.get(environ["PATH_INFO"])):
            return self.answer_probe(probe)
        if body is None:
            return self.plain(503, OVERLOADED)
        environ.pop("HTTP_TRANSFER_ENCODING", None)
        environ |= {"wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body)), "ticket": ticket}
        lane = server.lanes[self.command == "POST"]
        if lane.full:
            return self.plain(503, OVERLOADED)
        work = Work(environ, ticket)
        lane.submit(work)
        work.settled.wait(max(ticket.left, 0.001))
        lane.leave(work)
        if work.finished:
            return work.answer or self.plain(500, FAILED.format(ticket.id))
        if ticket.client_left():
            self.plain(499, TOO_LATE)
            raise ConnectionAbortedError
        ticket.gone = True
        return self.plain(504, TOO_LATE)

    def answer_probe(self, probe: Probe) -> Answer:
        """Return the answer to a probe, which is the only one made on the event loop."""
        ticket, (status, body) = self.ticket, probe()
        ticket.describe(self.environ or {})
        ticket.close(status, ticket.path)
        return f"{status} {responses[status]}", json_headers(ticket, status, self.server.cors), body

    def plain(self, status: int, sentence: str) -> Answer:
        """Return and record an answer that the app does not know of."""
        ticket = self.ticket
        path, _, _ = self.path.partition("?")
        ticket.describe(self.environ or {"REQUEST_METHOD": self.command, "PATH_INFO": path})
        ticket.size = self.size
        ticket.close(status)
        phrase = responses.get(status, "Client Closed Request")  # 499, nginx's number
        return f"{status} {phrase}", json_headers(ticket, status, self.server.cors), error_body(ticket.path, sentence)

    def refuse(self, refusal: Refusal) -> None:
        """Answer a request that cannot be read to its end."""
        self.close_connection = True
        self.respond(*self.plain(refusal.status, refusal.sentence))

    def respond(self, status: str, headers: list[tuple[str, str]], body: bytes) -> None:
        """Write an answer."""
        if self.server.draining.is_set():
            self.close_connection = True
        text = f"HTTP/1.1 {status}\r\nDate: {date(int(time.time()))}\r\n"
        if self.close_connection or self.request_version == "HTTP/1.0":
            text += f"Connection: {'close' if self.close_connection else 'keep-alive'}\r\n"
        for name, value in headers:
            if name != "Connection":
                text += f"{name}: {value}\r\n"
        if "\nContent-Length: " not in text and not status.startswith(("204", "304")):
            text += f"Content-Length: {len(body)}\r\n"
        data = f"{text}\r\n".encode("latin-1") + (b"" if self.command == "HEAD" else body)  # pywsgi sends them apart
        try:
            sent = self.socket.send(data, 0, 0.0)
        except BlockingIOError:
            sent = 0
        if sent < len(data):  # seldom, and what it takes is much: a timer, and asking for the size of the buffer
            self.socket.settimeout(STALL_SECONDS)
            self.socket.sendall(data[sent:])
            self.socket.settimeout(None)

    def linger(self) -> None:
        """Read away what the client still sends: closed at once, the kernel would take the answer back with a reset."""
        self.socket.shutdown(socket.SHUT_WR)
        until = time.monotonic() + LINGER_SECONDS
        while time.monotonic() < until:
            self.reader.until = min(until, time.monotonic() + SILENT_SECONDS)
            if not self.reader.readinto(AWAY, DISCARD):
                break

    def dismiss(self) -> None:
        """Close the connection if nothing has come on it: its greenlet wakes up and ends."""
        self.socket.settimeout(0)
        try:
            self.socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            self.cut()
        except OSError:
            pass
        self.socket.settimeout(None)

    def cut(self) -> None:
        """Let the greenlet see the connection's end."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RD)

    def log_request(self) -> None:
        """Leave the log to the ticket."""


class Work:
    """A request on its way through a native thread."""

    def __init__(self, environ: dict[str, Any], ticket: Ticket):
        self.environ, self.ticket = environ, ticket
        self.answer: Answer | None = None
        self.finished = False
        self.settled = Event()  # answered, or given up


class Lane:
    """Threads of its own for one kind of requests, and those that wait for one."""

    def __init__(self, name: str, threads: int, limit: int, run: Callable[[dict[str, Any]], Answer | None]):
        self.threads, self.limit, self.run = threads, limit, run
        self.workers = ThreadPoolExecutor(threads, name)
        self.hub = gevent.get_hub()
        self.queue: deque[Work] = deque()  # requests that wait for a thread
        self.running = 0  # requests that have one
        self.works: set[Work] = set()  # requests whose clients wait

    @property
    def full(self) -> bool:
        """Whether no more requests are taken."""
        return len(self.works) >= self.limit

    def submit(self, work: Work) -> None:
        """Have a thread run the app on a request, in turn."""
        self.works.add(work)
        self.queue.append(work)
        self.dispatch()

    def dispatch(self) -> None:
        """Give waiting requests to free threads."""
        while self.queue and self.running < self.threads:
            self.running += 1
            self.workers.submit(self.run_in_thread, self.queue.popleft())

    def leave(self, work: Work) -> None:
        """Forget a request that is answered or that nobody waits for."""
        self.works.discard(work)
        with contextlib.suppress(ValueError):
            self.queue.remove(work)

    def look_for_clients(self) -> None:
        """Give up what clients have left: it would keep its place and its memory until a thread takes it."""
        for work in [work for work in self.works if work.ticket.client_left()]:
            work.settled.set()

    def run_in_thread(self, work: Work) -> None:
        """Answer a request, on a native thread."""
        if not work.ticket.over:
            work.answer = self.run(work.environ)
            work.finished = True
        self.hub.loop.run_callback_threadsafe(self.finish, work)

    def finish(self, work: Work) -> None:
        """Wake the connection whose answer is ready, and use the thread for another."""
        work.settled.set()
        self.running -= 1
        self.dispatch()


class Front(WSGIServer):
    """The listening socket, its connections, and the threads behind them."""

    def __init__(
        self,
        listener: Any,
        app: Callable[..., Any],
        limits: Limits,
        draining: threading.Event,
        probes: Mapping[str, Probe],
        cors: Cors,
    ):
        """Take a listening gevent socket; `draining` is set when the server begins to stop.

        `probes` answers their paths on the event loop.
        """
        environ = {"SERVER_NAME": listener.getsockname()[0]}  # or gevent would ask the DNS for it
        environ |= {"wsgi.multithread": True}
        options = {"spawn": Pool(connections()), "log": None, "error_log": log, "environ": environ}
        super().__init__(listener, app, handler_class=Handler, **options)
        self.limits, self.draining = limits, draining
        self.probes, self.cors = probes, cors
        self.lanes = {  # whether it is a POST
            True: Lane("web", limits.threads, limits.requests, self.run),
            False: Lane("pages", PAGE_THREADS, PAGES, self.run),
        }
        self.waiting: set[Reader] = set()
        self.headless: dict[Handler, int] = {}  # connections without a whole head, the oldest first
        self.bodies: dict[Handler, None] = {}  # connections that send a body
        self.held = 0  # bytes of all bodies that are not answered
        self.closing = False  # the port is closed
        self.status = 0
        self.clock = self.loop.timer(TICK_SECONDS, TICK_SECONDS, ref=False)
        self.clock.start(self.look_at_the_clock)

    def handle(self, sock: Any, address: Any) -> None:
        """Serve a new connection. Where there is room for no other, the one that has dallied longest is cut."""
        if self.pool.full() and self.headless:
            oldest = next(iter(self.headless))
            del self.headless[oldest]
            oldest.cut()
        super().handle(sock, address)

    def make_room(self) -> None:
        """Where bodies take too much memory, give up the largest of those that are still being sent."""
        leaving = sum(handler.held for handler in self.bodies if handler.evicted)
        if self.held - leaving > BODIES * max(self.limits.body, 2**20):
            largest = max(self.bodies, key=lambda handler: 0 if handler.evicted else handler.held)
            largest.evicted = True
            largest.cut()

    def look_at_the_clock(self) -> None:
        """End the reads whose time is up. A timer for each of them would cost more than the reading."""
        now = time.monotonic()
        for reader in [reader for reader in self.waiting if reader.until < now]:
            if reader in self.waiting:  # another that was thrown out may have ended its connection
                reader.greenlet.throw(TimeoutError)
        for lane in self.lanes.values():
            lane.look_for_clients()

    @property
    def full_queue(self) -> bool:
        """Whether no more requests are taken."""
        return self.lanes[True].full

    def run(self, environ: dict[str, Any]) -> Answer | None:
        """Return the app's answer to a request that is in memory, or None where it failed to give one."""
        head: list[Any] = []
        try:
            chunks = self.application(environ, lambda status, headers, exc_info=None: head.extend((status, headers)))
            try:
                return head[0], head[1], b"".join(chunks)
            finally:
                getattr(chunks, "close", lambda: None)()
        except Exception:
            log.exception("The app failed")
            return None

    def stop_softly(self) -> None:
        """On a signal: tell the probes, take connections for the grace period, answer what was accepted, end."""
        if self.draining.is_set():
            log.warning("Stopped at once, on a second signal.")
            os._exit(1)
        log.info("Stopping: connections are taken for %g s more, then what is accepted is answered.", self.limits.grace)
        self.draining.set()
        gevent.spawn(self.drain, self.limits.grace, self.limits.seconds + STALL_SECONDS)

    def die(self) -> None:
        """Callable from any thread: answer what can be answered, then end with a status that asks for a restart."""

        def end() -> None:
            log.critical("The model's thread has ended, so the process ends too: a supervisor should restart it.")
            self.status = 1
            self.draining.set()
            gevent.spawn(self.drain, 0, DEATH_SECONDS)

        self.loop.run_callback_threadsafe(end)

    def drain(self, grace: float, patience: float) -> None:
        """Close the port after the grace period, and end once the last accepted request is answered."""
        gevent.sleep(grace)
        self.closing = True
        while connection := self.do_read():  # who stands in the kernel's queue believes to be connected
            self.do_handle(*connection)
        self.stop_accepting()
        self.socket.close()
        for handler, count in [*self.headless.items()]:
            if handler.reader.count > count:  # a request has begun to come
                continue
            if count:
                handler.dismiss()
            else:  # its first request may be on its way
                handler.reader.until = min(handler.reader.until, time.monotonic() + SILENT_SECONDS)
        self.pool.join(timeout=patience)
        self.stop(0)


def give_memory_back() -> None:
    """Have glibc return large blocks once they are free: else each thread keeps those of the largest image it saw.

    Called before there are threads: the heaps that they have by then stay.
    """
    mmap_threshold, size = -3, 8 * 2**20  # smaller ones, as for most photos, cost less when they are kept
    arena_max, arenas = -8, 2  # of small ones: with one for each thread, each keeps the most that it ever had
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).mallopt(mmap_threshold, size)
        ctypes.CDLL(None).mallopt(arena_max, arenas)


def connections() -> int:
    """Return how many connections there may be: each is an open file, and some are needed for other things."""
    try:
        import resource
    except ImportError:
        return CONNECTIONS
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return CONNECTIONS if files == resource.RLIM_INFINITY else max(1, min(CONNECTIONS, files - 128))

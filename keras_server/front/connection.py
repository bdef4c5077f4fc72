"""One connection: reads one whole request after the other, each within its time, and writes the answers."""

from __future__ import annotations

import contextlib
import io
import logging
import socket
import time
from http.client import responses
from typing import TYPE_CHECKING

import gevent
import gevent.socket

from keras_server import telemetry
from keras_server.clients import address, client_address, is_trusted, owner_of
from keras_server.errors import FAILED, OTHER_HOST, OVERLOADED, TOO_LARGE, TOO_LATE, error_body, json_headers
from keras_server.front import http, limits
from keras_server.front.http import Answer, Head, Refusal
from keras_server.front.reader import Reader
from keras_server.hosts import allows
from keras_server.ticket import DESCRIBED, Ticket

if TYPE_CHECKING:
    from keras_server.front.server import Front


CROWDED = "This address has {} connections, and may have no more: close some, or use them for several requests."
BUSY = "This address has {} requests under way, and may have no more: wait for their answers."
SLOW_HEAD = "The request's head did not arrive in time."
SLOW_BODY = "The request's body did not arrive in time: send a smaller picture, or send it faster."

log = logging.getLogger("keras_server")

AWAY = bytearray(256 * 1024)  # for what nobody wants to read


class Connection:
    """A client's connection, in a greenlet of its own, which alone reads, writes and closes the socket."""

    def __init__(self, sock: gevent.socket.socket, peer: tuple[object, ...], front: Front):
        self.socket, self.front = sock, front
        self.address = str(peer[0])
        self.environ = front.environ | {"REMOTE_ADDR": self.address}
        self.owner = owner_of(self.address, front.limits.proxies)
        self.proxied = is_trusted(address(self.address), front.limits.proxies)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, limits.UNSENT_BYTES)
        # For a ticket's look from other threads, which must not wait in gevent. It never outlives the other.
        self.plain_socket = socket.socket(sock.family, sock.type, sock.proto, fileno=sock.fileno())
        self.reader = Reader(sock)
        self.stream: http.Stream = io.BufferedReader(self.reader)
        self.kept = False  # it has had an answer
        self.idle = True  # nothing has come of a next request
        self.begin()

    def begin(self) -> None:
        """Forget the last request."""
        self.head = Head()
        self.ticket = Ticket(self.front.limits.seconds, self.plain_socket)
        self.closing = False
        self.evicted = False  # to make room for other bodies
        self.size = self.held = 0  # bytes of the body that have come, and that are kept
        self.asker = ""  # whose the request is, where a proxy passes it on

    def serve(self) -> None:
        """Answer request after request, and close the socket."""
        try:
            while self.serve_one():
                if self.head.method != "POST" and self.front.predicting:
                    gevent.sleep(limits.PAUSE_SECONDS)
                self.reader.let_others()
            self.linger()
        except OSError:
            pass  # the client has left, or is silent, or takes nothing
        finally:
            self.plain_socket.detach()
            self.socket.close()

    def turn_away(self, sentence: str) -> None:
        """Answer 429 at once, whatever the client asks for, and close the socket."""
        self.closing = True
        with contextlib.suppress(OSError):
            self.socket.settimeout(0)
            with contextlib.suppress(BlockingIOError):
                self.socket.recv_into(AWAY)  # what was not read would take the answer back
            self.socket.send(http.render(self.error(429, sentence), self.head, 0))
            self.socket.shutdown(socket.SHUT_WR)
        self.ticket.release()
        self.plain_socket.detach()
        self.socket.close()

    def serve_one(self) -> bool:
        """Wait for a request and answer it; returns whether another may follow.

        Raises OSError where the client has left, says nothing, or takes nothing.
        """
        self.begin()
        try:
            self.wait()
            try:
                self.send(self.answer())
            except Refusal as refusal:
                self.closing = True
                self.send(self.error(refusal.status, refusal.sentence))
        finally:
            self.ticket.release()
            self.front.headless.pop(self, None)
            self.front.held -= self.held
            self.front.leave(self.asker)
        self.kept = True
        return not self.closing

    def wait(self) -> None:
        """Wait for a request's first byte, which starts its clock. Raises OSError where none comes."""
        self.idle = True
        self.front.headless[self] = None
        idle = limits.SILENT_SECONDS if self.front.closing else self.front.limits.keep_alive
        self.reader.until = time.monotonic() + idle
        if not self.stream.peek(1):
            raise ConnectionAbortedError
        self.idle = False
        self.ticket = Ticket(self.front.limits.seconds, self.plain_socket)
        self.reader.until = self.ticket.arrived + limits.HEAD_SECONDS

    def answer(self) -> Answer:
        """Read a request and return its answer. Raises Refusal, or OSError where nobody waits for an answer."""
        front, head, ticket = self.front, self.head, self.ticket
        try:
            http.read_head(self.stream, head)
        except TimeoutError:
            raise Refusal(408, SLOW_HEAD) from None
        finally:
            front.headless.pop(self, None)
        if not allows(front.limits.hosts, head.host, head.path in front.probes):
            raise Refusal(421, OTHER_HOST)
        if self.proxied:
            self.enter_asker(head.fields.get("x-forwarded-for", ""))
        self.closing = not head.keep_alive
        lane = front.lane(head.method, head.target)
        body = self.read_body(keep=not lane.full)
        if head.method in ("GET", "HEAD") and (probe := front.probes.get(head.path)):
            self.describe()
            status, content = probe()
            ticket.close(status, head.path)
            return f"{status} {responses[status]}", json_headers(ticket, status, front.cors), content
        if body is None or lane.full:
            return self.error(503, OVERLOADED)
        if lane is front.pages:  # cheap, and a client may end its half of the connection after a GET
            ticket.release()
        work = lane.compute(self.environ | head.environ(), body, ticket)
        if work.computed:
            return work.answer or self.error(500)
        if ticket.client_left():
            self.error(499, TOO_LATE)
            raise ConnectionAbortedError
        return self.error(504, TOO_LATE)

    def enter_asker(self, forwarded: str) -> None:
        """Count the request for the client for which a proxy asks. Raises Refusal where that one has too many."""
        proxies = self.front.limits.proxies
        asker = owner_of(client_address(self.address, forwarded, proxies), proxies)
        if self.front.is_crowded(asker):
            raise Refusal(429, BUSY.format(self.front.limits.per_address))
        self.front.enter(asker)
        self.asker = asker

    def read_body(self, keep: bool) -> bytes | None:
        """Return the whole body, or None where it is not kept. Raises Refusal where it is too large, late or broken."""
        front, head, limit = self.front, self.head, self.front.limits.body
        too_large = Refusal(413, TOO_LARGE.format(front.limits.mebibytes))
        if head.length > limit:
            raise too_large
        if head.expects:
            if not keep:
                raise Refusal(503, OVERLOADED)
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        started, due = time.monotonic(), self.ticket.due
        self.reader.until = min(due, started + limits.STALL_SECONDS)
        pieces = list[bytes]()
        front.bodies.add(self)
        try:
            for piece in http.read_body(self.stream, head):
                self.size += len(piece)
                if self.size > limit:
                    raise too_large
                self.reader.until = min(due, started + limits.STALL_SECONDS + self.size / limits.LEAST_RATE)
                if keep:
                    pieces.append(piece)
                    self.held += len(piece)
                    front.held += len(piece)
                    front.make_room()
        except TimeoutError:
            raise Refusal(408, SLOW_BODY) from None
        except (OSError, Refusal) as error:
            if not self.evicted:
                raise error if isinstance(error, Refusal) else Refusal(400, http.BROKEN_OFF) from None
        finally:
            front.bodies.discard(self)
        if self.evicted:
            raise Refusal(503, OVERLOADED)
        return b"".join(pieces) if keep else None

    def describe(self) -> None:
        """Note in the ticket what the log will say."""
        environ = {variable: self.head.fields.get(name, "") for name, variable in DESCRIBED.items()}
        environ |= {"REQUEST_METHOD": self.head.method, "PATH_INFO": self.head.path, "REMOTE_ADDR": self.address}
        environ |= {"HTTP_HOST": self.head.host}  # which the target may name instead of the field
        self.ticket.describe(environ, self.front.limits.proxies)
        self.ticket.size = self.size

    def error(self, status: int, sentence: str = "") -> Answer:
        """Return and record an error that the app does not know of."""
        ticket = self.ticket
        self.describe()
        ticket.close(status)
        phrase = responses.get(status, "Client Closed Request")  # 499, nginx's number
        body = error_body(ticket.path, sentence or FAILED.format(ticket.id))
        return f"{status} {phrase}", json_headers(ticket, status, self.front.cors), body

    def send(self, answer: Answer) -> None:
        """Write an answer. Raises OSError where the client takes it too slowly, or has left."""
        self.closing = self.closing or self.front.draining.is_set()
        self.write(http.render(answer, self.head, 0 if self.closing else self.front.limits.keep_alive))

    def write(self, data: bytes) -> None:
        """Write bytes. Raises OSError where the client stalls, takes them slower than LEAST_RATE, or has left.

        A steady client has as long as it needs: no time bounds the whole.
        """
        started, sent = time.monotonic(), 0
        try:
            while sent < len(data):
                late = started + limits.STALL_SECONDS + sent / limits.LEAST_RATE
                left = min(limits.STALL_SECONDS, late - time.monotonic())
                if left <= 0:
                    raise TimeoutError
                self.socket.settimeout(left)
                sent += self.socket.send(memoryview(data)[sent:])
        except OSError as error:
            telemetry.UNSENT.inc()
            why = "takes no more" if isinstance(error, TimeoutError) else "has left"
            log.warning("Not sent whole: %d of %d bytes, id=%s; the client %s.", sent, len(data), self.ticket.id, why)
            raise

    def linger(self) -> None:
        """Read away what the client still sends: closed at once, the kernel would take the answer back with a reset."""
        self.socket.shutdown(socket.SHUT_WR)
        ended = now = time.monotonic()
        while now < (until := ended + (limits.SILENT_SECONDS if self.front.closing else limits.LINGER_SECONDS)):
            self.reader.until = min(until, now + limits.SILENT_SECONDS)
            if not self.reader.readinto(AWAY):
                break
            now = time.monotonic()

    def hang_up(self) -> None:
        """Let the greenlet see the connection's end, as if the client had ended; called by others than it."""
        with contextlib.suppress(OSError):  # closed in the meantime
            self.socket.shutdown(socket.SHUT_RD)

    def hang_up_if_idle(self) -> None:
        """Likewise, unless the kernel already has something of a request."""
        with contextlib.suppress(OSError):
            try:
                self.plain_socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            except BlockingIOError:
                self.hang_up()

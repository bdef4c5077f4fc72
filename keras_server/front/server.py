"""The HTTP front: greenlets read whole requests and write answers, native threads run the WSGI app in between.

A connection costs a greenlet and nothing else until its request has arrived completely, so slow clients take neither
a thread nor a place in the queue. Everything that a client can draw out has its time, everything that it can swell has
its size. On the event loop only probes are answered, which take microseconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from wsgiref.types import WSGIApplication

import gevent
import gevent.socket
from gevent.event import Event
from gevent.pool import Pool
from gevent.server import StreamServer

from keras_server.errors import Cors
from keras_server.front import limits as constants
from keras_server.front.connection import CROWDED, Connection
from keras_server.front.lanes import Lane
from keras_server.front.limits import Limits
from keras_server.front.listener import connections, refuse_new

log = logging.getLogger("keras_server")


Probe = Callable[[], tuple[int, bytes]]  # a status and a body of JSON
# Whose threads a target of POST is for: "" for most, or a name, of which there are few.
Group = Callable[[str], str]


class Front:
    """The listening sockets, their connections, and the threads behind them."""

    def __init__(
        self,
        listeners: Sequence[gevent.socket.socket],
        app: WSGIApplication,
        limits: Limits,
        draining: threading.Event,
        probes: Mapping[str, Probe],
        cors: Cors,
        shared: bool = False,
        group: Group = lambda target: "",
    ):
        """Take listening gevent sockets; `draining` is set when the server begins to stop.

        `probes` answers GET and HEAD of its paths, without the app. Sockets that are `shared` are another process's
        too, such as systemd's: who connects while the server stops waits in the kernel for the next one. Requests of
        one `group` neither wait behind those of another nor hold them up.
        """
        self.app, self.group = app, group
        self.listeners, self.limits, self.draining, self.probes, self.cors = listeners, limits, draining, probes, cors
        self.shared = shared
        self.pool = Pool(connections())
        self.servers = [StreamServer(listener, self.handle, spawn=self.pool) for listener in listeners]
        self.loop = gevent.get_hub().loop
        host, port = listeners[0].getsockname()[:2]
        self.environ = {
            "SERVER_NAME": host,
            "SERVER_PORT": str(port),
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "http",
            "wsgi.errors": sys.stderr,
            "wsgi.multithread": True,
            "wsgi.multiprocess": False,
            "wsgi.run_once": False,
        }
        self.predictions = Lane("web", app, limits.threads, limits.requests)
        self.others: dict[str, Lane] = {}  # of further groups
        self.pages = Lane("pages", app, constants.PAGE_THREADS, constants.PAGES)
        self.headless: dict[Connection, None] = {}  # connections without a whole head, the oldest first
        self.bodies: set[Connection] = set()  # connections that send a body
        self.held = 0  # bytes of all bodies that are not answered
        self.owners = Counter[str]()  # of connections, or of requests by way of proxies, by clients' addresses
        self.closing = False  # no further connection is taken
        self.status = 0
        self.stopped = Event()
        self.clock = self.loop.timer(constants.LOOK_SECONDS, constants.LOOK_SECONDS, ref=False)

    def start(self) -> None:
        """Take connections."""
        self.clock.start(self.look_for_clients)
        for server in self.servers:
            server.start()

    def serve_forever(self) -> None:
        """Return once the server has stopped."""
        self.stopped.wait()

    def lane(self, method: str, target: str) -> Lane:
        """Return the threads for a request: GETs neither wait behind predictions nor hold them up."""
        if method != "POST":
            return self.pages
        if not (group := self.group(target)):
            return self.predictions
        if group not in self.others:
            self.others[group] = Lane("web", self.app, self.limits.threads, self.limits.requests)
        self.others[group].used = time.monotonic()
        return self.others[group]

    @property
    def predicting(self) -> bool:
        """Whether predictions are under way."""
        return bool(self.predictions.works) or any(lane.works for lane in self.others.values())

    def look_for_clients(self) -> None:
        """Give up what nobody waits for or uses, and make a place where none comes that would."""
        self.make_place()
        for lane in (self.predictions, self.pages, *self.others.values()):
            lane.give_up_abandoned()
        unused = time.monotonic() - self.limits.seconds - constants.UNUSED_SECONDS
        for group, lane in [*self.others.items()]:
            if not lane.works and not lane.running and lane.used < unused:
                self.others.pop(group).close()

    def handle(self, sock: gevent.socket.socket, address: tuple[object, ...]) -> None:
        """Serve a new connection, and make a place for the next.

        Where an address has too many, one of its own that is silent gives way, or the new one is turned away.
        """
        connection = Connection(sock, address, self)
        if self.is_crowded(connection.owner) and not self.cut_silent(connection.owner):
            connection.turn_away(CROWDED.format(self.limits.per_address))
            return
        self.make_place()
        self.enter(connection.owner)
        try:
            connection.serve()
        finally:
            self.leave(connection.owner)

    def is_crowded(self, owner: str) -> bool:
        """Return whether an owner has all the connections, or requests by way of proxies, that it may have."""
        return owner != "" and 0 < self.limits.per_address <= self.owners[owner]

    def enter(self, owner: str) -> None:
        """Count one more of an owner."""
        if owner:
            self.owners[owner] += 1

    def leave(self, owner: str) -> None:
        """Count one less."""
        if owner:
            self.owners[owner] -= 1
            if not self.owners[owner]:
                del self.owners[owner]

    def cut_silent(self, owner: str = "") -> bool:
        """Cut the connection that has no request for longest, of all or of an owner; returns whether there was one."""
        mine = (connection for connection in self.headless if owner in ("", connection.owner))
        if oldest := next(mine, None):
            del self.headless[oldest]
            oldest.hang_up()
        return oldest is not None

    def make_place(self) -> None:
        """Where there is room for no other connection, cut a silent one, else one whose body comes too slowly."""
        if not self.pool.full() or self.cut_silent():
            return
        now = time.monotonic()
        lags = {  # seconds by which bodies are behind LEAST_RATE
            each: now - each.ticket.arrived - each.size / constants.LEAST_RATE
            for each in self.bodies
            if not each.evicted
        }
        last = max(lags, key=lambda each: lags[each], default=None)
        if last and lags[last] > constants.LAG_SECONDS:
            self.evict(last)

    def evict(self, connection: Connection) -> None:
        """Give up a body that is still being sent."""
        connection.evicted = True
        connection.hang_up()

    def make_room(self) -> None:
        """Where bodies take too much memory, give up the largest of those that are still being sent."""
        leaving = sum(connection.held for connection in self.bodies if connection.evicted)
        if self.held - leaving > self.limits.held:
            self.evict(max(self.bodies, key=lambda connection: 0 if connection.evicted else connection.held))

    def stop_softly(self) -> None:
        """On a signal: tell the probes, take connections for the grace period, answer what was accepted, end."""
        if self.draining.is_set():
            return
        log.info("Stopping: connections are taken for %g s more, then what is accepted is answered.", self.limits.grace)
        self.draining.set()
        gevent.spawn(self.drain, self.limits.grace, self.limits.seconds + constants.STALL_SECONDS)

    def die(self) -> None:
        """Callable from any thread: answer what can be answered, then end with a status that asks for a restart."""

        def end() -> None:
            log.critical("The model's thread has ended, so the process ends too: a supervisor should restart it.")
            self.status = 1
            self.draining.set()
            gevent.spawn(self.drain, 0, constants.DEATH_SECONDS)

        self.loop.run_callback_threadsafe(end)

    def drain(self, grace: float, patience: float) -> None:
        """Close the port after the grace period, and end once the last accepted request is answered."""
        gevent.sleep(grace)
        if not self.shared:
            for listener in self.listeners:
                refuse_new(listener)
            gevent.sleep(constants.SHAKE_SECONDS)
        self.closing = True
        self.close_port()
        with gevent.Timeout(patience, False):
            self.pool.join(timeout=min(constants.KEPT_SECONDS, constants.SILENT_SECONDS))
            for connection in [*self.headless]:
                if connection.kept and connection.idle:
                    connection.hang_up_if_idle()
            self.pool.join(timeout=max(constants.SILENT_SECONDS - constants.KEPT_SECONDS, 0))
            for connection in [*self.headless]:  # whose first request may have been on its way
                if connection.idle:
                    connection.hang_up_if_idle()
            self.pool.join()
        self.pool.kill()
        self.stopped.set()

    def close_port(self) -> None:
        """Take no more connections but those that the kernel has: their clients believe to be connected."""
        late = list[tuple[gevent.socket.socket, tuple[object, ...]]]()
        for listener, server in zip(self.listeners, self.servers, strict=True):
            if not self.shared:
                listener.settimeout(0)
                with contextlib.suppress(OSError):
                    while True:
                        late.append(listener.accept())
            server.close()
        for sock, address in late:
            self.pool.spawn(self.handle, sock, address)


def give_memory_back() -> None:
    """Have glibc return large blocks once they are free: else each thread keeps those of the largest image it saw.

    Called before there are threads: the heaps that they have by then stay.
    """
    mmap_threshold, size = -3, 8 * 2**20  # smaller ones, as for most photos, cost less when they are kept
    arena_max, arenas = -8, 2  # of small ones: with one for each thread, each keeps the most that it ever had
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).mallopt(mmap_threshold, size)
        ctypes.CDLL(None).mallopt(arena_max, arenas)

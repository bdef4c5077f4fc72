"""Native threads that run the app on whole requests, while the event loop goes on."""

from __future__ import annotations

import contextlib
import io
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from wsgiref.types import WSGIApplication

import gevent
from gevent.event import Event

from keras_server.errors import Headers
from keras_server.front.http import Answer
from keras_server.ticket import LOOK_SECONDS, Ticket

log = logging.getLogger("keras_server")


class Work:
    """A request on its way through a native thread."""

    def __init__(self, environ: dict[str, object], body: bytes, ticket: Ticket):
        self.environ = environ | {"wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body)), "ticket": ticket}
        self.ticket = ticket
        self.answer: Answer | None = None
        self.computed = False
        self.ended = Event()  # computed, or given up


class Lane:
    """Threads for one kind of requests, started as they are needed, and the queue before them."""

    def __init__(self, name: str, app: WSGIApplication, threads: int, limit: int):
        """Take the WSGI app, how many threads run it, and how many requests there may be at once."""
        self.name, self.app, self.threads, self.limit = name, app, threads, limit
        self.started = 0  # of its threads
        self.given = queue.SimpleQueue[Work | None]()  # for the next free thread; None ends one
        self.loop = gevent.get_hub().loop
        self.queue: deque[Work] = deque()  # requests that wait for a thread
        self.running = 0  # requests that have one
        self.works: set[Work] = set()  # requests whose clients wait
        self.used = 0.0  # when it was asked for last
        self.looked = 0.0  # when it was looked which clients have left

    @property
    def full(self) -> bool:
        """Whether no more requests are taken, even once those have gone that their clients have left."""
        if len(self.works) >= self.limit and time.monotonic() > self.looked + LOOK_SECONDS:
            self.give_up_abandoned()
        return len(self.works) >= self.limit

    def compute(self, environ: dict[str, object], body: bytes, ticket: Ticket) -> Work:
        """Have a thread run the app on a request, in turn; returns once it has, its time is up, or its client left."""
        work = Work(environ, body, ticket)
        self.works.add(work)
        self.queue.append(work)
        self.dispatch()
        try:
            work.ended.wait(max(ticket.left, 0.001))
        finally:
            self.works.discard(work)
            with contextlib.suppress(ValueError):
                self.queue.remove(work)
        return work

    def dispatch(self) -> None:
        """Give waiting requests to free threads."""
        while self.queue and self.running < self.threads:
            self.running += 1
            if self.running > self.started:
                self.started += 1
                threading.Thread(target=self.run_all, name=self.name, daemon=True).start()
            self.given.put(self.queue.popleft())

    def close(self) -> None:
        """End the threads, once they have answered what they have."""
        for _ in range(self.started):
            self.given.put(None)

    def give_up_abandoned(self) -> None:
        """End what clients have left: it would keep its place and its memory until a thread takes it."""
        self.looked = time.monotonic()
        for work in [*self.works]:
            if work.ticket.client_left():
                self.works.discard(work)
                work.ended.set()

    def run_all(self) -> None:
        """Answer request after request, on a native thread."""
        while work := self.given.get():
            if not work.ticket.over:
                work.answer = run(self.app, work.environ)
                work.computed = True
            self.loop.run_callback_threadsafe(self.finish, work)

    def finish(self, work: Work) -> None:
        """Wake the connection whose answer is ready, and use the thread for another."""
        work.ended.set()
        self.running -= 1
        self.dispatch()


def run(app: WSGIApplication, environ: dict[str, object]) -> Answer | None:
    """Return the app's answer to a request, or None where it failed to give one."""
    started: list[tuple[str, Headers]] = []
    written: list[bytes] = []  # by WSGI's old way

    def start_response(status: str, headers: Headers, exc_info: object = None) -> Callable[[bytes], object]:
        started.append((status, headers))
        return written.append

    try:
        chunks = app(environ, start_response)
        try:
            body = b"".join([*written, *chunks])
        finally:
            getattr(chunks, "close", lambda: None)()
        return *started[-1], body
    except BaseException:  # also sys.exit() in what somebody has written: the thread has further requests
        log.exception("The app failed")
        return None

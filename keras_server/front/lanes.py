"""Native threads that run the app on whole requests, while the event loop goes on."""

from __future__ import annotations

import contextlib
import io
import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from wsgiref.types import WSGIApplication

import gevent
from gevent.event import Event

from keras_server.errors import Headers
from keras_server.front.http import Answer
from keras_server.ticket import Ticket

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
    """Threads for one kind of requests, and the queue before them."""

    def __init__(self, name: str, app: WSGIApplication, threads: int, limit: int):
        """Take the WSGI app, how many threads run it, and how many requests there may be at once."""
        self.app, self.threads, self.limit = app, threads, limit
        self.workers = ThreadPoolExecutor(threads, name)
        self.loop = gevent.get_hub().loop
        self.queue: deque[Work] = deque()  # requests that wait for a thread
        self.running = 0  # requests that have one
        self.works: set[Work] = set()  # requests whose clients wait
        self.used = 0.0  # when it was asked for last

    @property
    def full(self) -> bool:
        """Whether no more requests are taken."""
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
            self.workers.submit(self.run_in_thread, self.queue.popleft())

    def give_up_abandoned(self) -> None:
        """End what clients have left: it would keep its place and its memory until a thread takes it."""
        for work in [*self.works]:
            if work.ticket.client_left():
                work.ended.set()

    def run_in_thread(self, work: Work) -> None:
        """Answer a request, on a native thread."""
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
    except Exception:
        log.exception("The app failed")
        return None

"""What all requests together may take, of memory and of the processors: each is charged what it costs.

Small requests are never kept behind large ones: these have turns, memory and a queue of their own, and past the queue
they are answered 503, so that they never hold all of the front's threads.
"""

from __future__ import annotations

import contextlib
import functools
import heapq
import itertools
import math
import sys
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple
from weakref import WeakKeyDictionary

from keras_server.api.tensors import TensorError
from keras_server.models.batcher import Overdue, QueueFull
from keras_server.models.served import Served
from keras_server.pictures.limits import ImageError
from keras_server.pictures.work import Work
from keras_server.ticket import TICKET, Ticket

MIB = 2**20
LIGHT_SECONDS = 0.05  # of a processor that any request may take ahead of large ones,
SECONDS_A_MIB = 0.5  # and in addition for each MiB that it brings
LIGHT_BYTES = 2 * MIB  # that a request has without waiting
MAP_SECONDS = 0.2  # of a processor that a heat map takes, about
AGEING = 20  # a second of work waits like one that came so many seconds later
PICTURES = 4  # of the largest size that are allowed, in pixels, in one request
LOOK_SECONDS = 0.25  # between two looks whether anybody still waits
LEAST = 256 * MIB  # for all requests, where the model leaves less of --memory


class Waiting(NamedTuple):
    """Work that waits for its turn, in this order."""

    rank: float
    number: int
    work: Work
    changed: threading.Condition


class Turns:
    """Turns to work, the cheapest and oldest work first, and the memory for it."""

    def __init__(self, slots: int, memory: int, waiting: int, patience: float, first: Turns | None = None):
        """Take how many work at once, in how many bytes; past `waiting` of them, or so many seconds, none wait.

        A slot that worked while others had turns of `first` rests as long as it worked.
        """
        self.memory = self.left = memory
        self.most, self.patience, self.first = waiting, patience * slots, first
        self.free = [0.0] * slots  # from when on each slot is
        self.waiting: list[Waiting] = []
        self.numbers = itertools.count()
        self.taken = 0
        self.lock = threading.Lock()

    @contextlib.contextmanager
    def turn(self, work: Work, rank: float) -> Iterator[None]:
        """Wait for a turn. Raises QueueFull at once, or Overdue where nobody waits for the answer any more."""
        ticket, entry = TICKET.get(), Waiting(rank, next(self.numbers), work, threading.Condition(self.lock))
        with self.lock:
            if len(self.waiting) >= self.most or sum(other.work.seconds for other in self.waiting) > self.patience:
                raise QueueFull
            self.waiting.append(entry)
            try:
                while (seconds := self.seconds_to(entry)) > 0:
                    if ticket and ticket.over:
                        raise Overdue
                    entry.changed.wait(seconds)
                heapq.heappop(self.free)
                self.left -= work.bytes
                self.taken += not (ticket and ticket.large)
            finally:
                self.waiting.remove(entry)
                self.wake()
        since, before = time.monotonic(), self.first.taken if self.first else 0
        outer = ticket.large if ticket else False
        if ticket:
            ticket.large = outer or self.first is not None
        try:
            if ticket and ticket.over:
                raise Overdue
            yield
        finally:
            if ticket:
                ticket.large = outer
            now = time.monotonic()
            with self.lock:
                heapq.heappush(self.free, now + (now - since if self.first and self.first.taken > before else 0))
                self.left += work.bytes
                self.wake()

    def pass_by(self) -> None:
        """Note work that is too small to wait for a turn: large work rests for it as for what had one."""
        self.taken += 1

    def wake(self) -> None:
        """Have the next in turn look anew; all others would only take Python's lock from those that work."""
        if self.waiting:
            min(self.waiting).changed.notify()

    def seconds_to(self, entry: Waiting) -> float:
        """Return how long to wait at least until it is the turn of one that waits; 0: it is."""
        if not self.free or entry.work.bytes > self.left or min(self.waiting) is not entry:
            return LOOK_SECONDS
        return min(max(self.free[0] - time.monotonic(), 0), LOOK_SECONDS)


class Memory:
    """Bytes that requests hold until they are answered: unpacked bodies, objects of JSON, rows for the model."""

    def __init__(self, size: int, waiting: int):
        """Take the bytes in all; past `waiting` requests no large one waits for them."""
        self.size = self.left = size
        self.waiting, self.most = 0, waiting
        self.changed = threading.Condition()

    def change(self, held: int, wanted: int) -> None:
        """Give back what a request holds, and wait for what it wants in its place; a small one does not wait.

        Raises QueueFull, or Overdue where nobody waits for the answer any more; then the request holds nothing.
        """
        ticket = TICKET.get()
        with self.changed:
            self.left += held
            self.changed.notify_all()
            if self.left < wanted and wanted > LIGHT_BYTES:
                if self.waiting >= self.most:
                    raise QueueFull
                self.waiting += 1
                try:
                    while self.left < wanted:
                        if ticket and ticket.over:
                            raise Overdue
                        self.changed.wait(LOOK_SECONDS)
                finally:
                    self.waiting -= 1
            self.left -= wanted


class Budget:
    """The shares of one server: an eighth for small pictures, three for large ones, a quarter for requests.

    What is left, a quarter, is the front's, for bodies.
    """

    def __init__(self, memory: int, decoders: int, waiting: int, patience: float, max_megapixels: float):
        """Take the bytes in all, how many pictures are decoded at once, and how many large requests wait for each.

        `patience` is how long a request may take, in seconds.
        """
        self.pixels = int(PICTURES * max_megapixels * 1e6)
        self.light = Turns(decoders, memory // 8, sys.maxsize, math.inf)
        self.heavy = Turns(max(1, decoders // 2), 3 * memory // 8, waiting, patience, self.light)
        # Of each model: where one is stuck, the others' maps are drawn all the same.
        self.maps = WeakKeyDictionary[Served, Turns]()
        self.mapping = threading.Lock()
        self.map_turns = functools.partial(Turns, max(1, decoders // 2), 0, waiting, patience, self.light)
        self.requests = Memory(memory // 4, waiting)

    def charge(self, held: int, more: int) -> int:
        """Have a request, which is charged `held` bytes, charged some more; returns how many it is charged then.

        Raises TensorError where it takes more than there is, else as Memory.change().
        """
        wanted = held + more
        if wanted > self.requests.size:
            self.requests.change(held, 0)
            raise TensorError(
                f"The request takes {wanted // MIB} MiB of memory, more than the {self.requests.size // MIB} MiB that "
                "this server has for it: send less at once.",
                413,
            )
        self.requests.change(held, wanted)
        return wanted

    def map_turn(self, served: Served) -> contextlib.AbstractContextManager[None]:
        """Return the turn for a heat map of a model: these take what predictions leave."""
        ticket = TICKET.get()
        with self.mapping:
            maps = self.maps.get(served) or self.maps.setdefault(served, self.map_turns())
        return maps.turn(Work(0, MAP_SECONDS, 0), ticket.arrived if ticket else 0)

    def turn(self, work: Work) -> contextlib.AbstractContextManager[None]:
        """Return the turn for work, such as on a picture, of the request that this thread serves.

        Raises ImageError where the picture, or the request with it, takes more than there is.
        """
        ticket = TICKET.get() or Ticket(LIGHT_SECONDS)
        if work.bytes > self.heavy.memory:
            raise ImageError(
                f"It takes {work.bytes // MIB} MiB to decode the image, more than the {self.heavy.memory // MIB} MiB "
                "that this server has for it: shrink it, or send it as a JPEG."
            )
        if ticket.pixels + work.pixels > self.pixels:
            raise ImageError(
                f"The request's images have more than {self.pixels / 1e6:g} million pixels in all: send fewer at once."
            )
        ticket.pixels += work.pixels
        ticket.seconds += work.seconds
        small = ticket.seconds <= LIGHT_SECONDS + SECONDS_A_MIB * ticket.size / MIB and work.bytes <= self.light.memory
        return (self.light if small else self.heavy).turn(work, ticket.arrived + AGEING * ticket.seconds)

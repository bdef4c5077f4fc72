"""What a thread is asked to do, one thing after the other, by others that may wait for it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from keras_server.models.batcher import Overdue
from keras_server.ticket import TICKET

Order = Callable[[], None]


class Orders:
    """The queue before a thread."""

    def __init__(self) -> None:
        self.queue = queue.SimpleQueue[Order | None]()

    def give(self, order: Order | None) -> None:
        """Have something done, or with None the thread end. Never waits; any thread."""
        self.queue.put(order)

    def have_done(self, order: Order) -> None:
        """Have something done, and wait for it as long as the request may. Raises what it raises, or Overdue.

        Done by a request's own thread, it would keep the process from ending for as long as it takes.
        """
        ended, errors = threading.Event(), list[Exception]()

        def carry_out() -> None:
            try:
                order()
            except Exception as error:  # noqa: BLE001 - who waits gets it
                errors.append(error)
            finally:
                ended.set()

        self.give(carry_out)
        ticket = TICKET.get()
        if not ended.wait(ticket.left if ticket else None):
            raise Overdue
        if errors:
            raise errors[0]

    def take(self, seconds: float | None) -> Order | None:
        """Return the next thing, for which it waits. Raises queue.Empty where none comes in time."""
        return self.queue.get(timeout=seconds)

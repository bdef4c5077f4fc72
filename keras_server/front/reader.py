"""What a client sends, read within its time and without keeping others waiting."""

from __future__ import annotations

import io
import time
from typing import TYPE_CHECKING

import gevent
import gevent.socket

from keras_server.front import limits

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


class Reader(io.RawIOBase):
    """What a client sends; a read raises TimeoutError once `until` has passed."""

    def __init__(self, sock: gevent.socket.socket):
        self.socket = sock
        self.until = 0.0
        self.turn, self.steps = 0.0, 0

    def readable(self) -> bool:
        """Tell the buffer around it that it can be read."""
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Read what has come, at least one byte unless the client has ended."""
        self.socket.settimeout(max(self.until - time.monotonic(), 0.001))
        size: int = self.socket.recv_into(buffer)
        self.let_others()
        return size

    def let_others(self) -> None:
        """Let others have their turn: a client that sends faster than it is read would keep them waiting."""
        turn = gevent.get_hub().loop.now()  # stands still until the loop has its turn
        self.steps = self.steps + 1 if turn == self.turn else 0
        self.turn = turn
        if self.steps >= limits.STEPS:
            gevent.sleep(0)

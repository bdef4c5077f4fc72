"""Versions that are served no more: closed once no request has them, and their memory given back to the system."""

from __future__ import annotations

import gc
import time
import weakref

from keras_server.machine import trim
from keras_server.models.served import Served


class Leaving:
    """What has been retired, and is not gone yet."""

    def __init__(self, patience: float):
        """Take for how many seconds what is stuck in a batch is waited for."""
        self.patience = patience
        self.waiting: list[tuple[weakref.ref[Served], float]] = []  # and until when

    def add(self, served: Served) -> None:
        """Retire a version: nobody may be given it any more."""
        self.waiting.append((weakref.ref(served), time.monotonic() + self.patience))
        served.retire()

    def tidy(self) -> None:
        """Give back the memory of what has gone since."""
        if self.waiting:
            gc.collect()  # Keras' own models know each other
            now = time.monotonic()
            self.waiting = [(served, until) for served, until in self.waiting if served() and now < until]
            trim()

"""The signals that stop a server: the first one lets it drain, the second one is the system's to obey."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import gevent

STOPPING = (signal.SIGTERM, signal.SIGINT)


def on_signals(stop: Callable[[], None], hang_up: Callable[[], None]) -> None:
    """Have the loop call `stop` on the first SIGTERM or SIGINT, and `hang_up` on each SIGHUP, unless nohup ignores it.

    Called on the main thread. A handler of Python's is run there also in the midst of a call that waits, so that the
    second signal is obeyed even where the loop no longer turns.
    """
    loop = gevent.get_hub().loop

    def first(*_: object) -> None:
        end_at_once()
        loop.run_callback_threadsafe(stop)

    for number in STOPPING:
        signal.signal(number, first)
    on_hang_up(lambda: loop.run_callback_threadsafe(hang_up))


def on_hang_up(do: Callable[[], object]) -> None:
    """Have it done on each SIGHUP, unless nohup ignores it."""
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: do())


def end_at_once() -> None:
    """Let the next SIGTERM or SIGINT end the process, whatever it does.

    For the first process of a container the system ignores what is not handled: it ends once it next runs Python.
    """
    for number in STOPPING:
        signal.signal(number, exit_by if os.getpid() == 1 else signal.SIG_DFL)


def exit_by(number: int, _: object) -> None:
    """End the process with the status that a shell shows of one that a signal has ended."""
    os._exit(128 + number)

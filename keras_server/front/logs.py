"""Where the server's words go: a thread of its own writes the log, so that who reads it slowly holds up nobody."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import select
import stat
import sys
import threading

from keras_server import telemetry
from keras_server.models.errors import StartupError

LINES = 4096  # that wait to be written; further ones are dropped
LAST_SECONDS = 1.0  # in which those that wait are written, as the process ends
STREAMS = 2  # the last number of a standard stream
PATIENCE = 1.0  # seconds in which what the start says has to be read
DROPPED = telemetry.counter("log_lines_dropped", "Lines of the log that were not written")
MISSING = "%d lines of the log are missing here: they came faster than they could be written."

log = logging.getLogger("keras_server")


class Log(logging.Handler):
    """Queues lines for a thread that writes them to standard error; whoever logs never waits for it."""

    def __init__(self) -> None:
        super().__init__()
        # How many are missing before it, and a line, or what is to be told once all before it are written.
        self.lines = queue.SimpleQueue[tuple[int, str | threading.Event]]()
        self.missing = 0  # lines that were dropped since the last one that was queued
        threading.Thread(target=self.write_all, args=[stderr()], name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a line, or drop it where too many wait. The handler's lock lets one in at a time."""
        try:
            if self.lines.qsize() >= LINES:
                self.missing += 1
                DROPPED.inc()
                return
            self.lines.put((self.missing, self.format(record)))
            self.missing = 0
        except Exception:  # noqa: BLE001 - a message and arguments that do not fit each other
            self.handleError(record)

    def write_all(self, descriptor: int) -> None:
        """Write lines as they come, and where some are missing, how many; on the thread, for ever."""
        missing = 0
        while True:
            before, line = self.lines.get()
            missing += before
            if missing:
                words = logging.LogRecord(log.name, logging.WARNING, "", 0, MISSING, (missing,), None)
                with contextlib.suppress(OSError):
                    write(descriptor, self.format(words))
                    missing = 0
            if isinstance(line, threading.Event):
                line.set()
                continue
            try:
                write(descriptor, line)
            except OSError:  # a full disk, or nobody at the pipe's other end
                missing += 1
                DROPPED.inc()

    def flush(self) -> None:
        """Have what waits written, as far as it is taken in time; logging itself calls it as the process ends."""
        written = threading.Event()
        self.lines.put((self.missing, written))
        self.missing = 0
        written.wait(LAST_SECONDS)


def stderr() -> int:
    """Return a descriptor of standard error for a thread that may wait; where it is a pipe, nobody else then does.

    The libraries that decode pictures write to it, too, past Python, and would keep their threads.
    """
    while (nowhere := os.open(os.devnull, os.O_RDWR)) <= STREAMS:
        pass  # The number of a standard stream that is closed would become a client's, who would get what they write.
    if sys.stderr is None:  # closed
        return nowhere
    os.close(nowhere)
    descriptor = sys.stderr.fileno()
    ours = os.dup(descriptor)
    with contextlib.suppress(OSError):
        if sys.platform == "linux" and stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            # Opened anew, for its mode would otherwise be that of all processes that have the pipe.
            opened = os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK)
            os.dup2(opened, descriptor)
            os.close(opened)
    return ours


def write(descriptor: int, line: str, patience: float | None = None) -> None:
    """Write a line, past Python's buffers, whose locks would keep the process from ending. Raises OSError.

    Where the descriptor does not wait by itself, waits for `patience` seconds, None for as long as it takes.
    """
    rest = memoryview(f"{line}\n".encode(errors="backslashreplace"))
    while rest:
        try:
            rest = rest[os.write(descriptor, rest) :]
        except BlockingIOError:
            if not select.select([], [descriptor], [], patience)[1]:
                raise


def say(*lines: str) -> None:
    """Print lines to standard output, unless nobody reads it. Raises StartupError where it cannot be written."""
    if sys.stdout is None:
        return
    try:
        # On Windows only sockets can be asked.
        if sys.platform != "win32" and not select.select([], [sys.stdout], [], PATIENCE)[1]:
            log.warning("Nobody reads standard output: %s", " ".join(lines))
            return
        print(*lines, sep="\n", flush=True)
    except OSError as error:
        raise StartupError(
            f"Standard output cannot be written to ({error.strerror}): make room, or send it elsewhere, as with "
            "> /dev/null."
        ) from None


def stop(sentence: str) -> int:
    """Say why the server does not start, after the log; returns the exit status."""
    for handler in log.handlers:
        handler.flush()
    if sys.stderr:
        with contextlib.suppress(OSError):
            write(sys.stderr.fileno(), f"error: {sentence}", PATIENCE)
    return 1

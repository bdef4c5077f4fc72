"""What a process that works for the server does besides its work: it reads its job, tells what happens, and ends.

The job comes as JSON on its input, and what it tells goes, a JSON object a line, to its output: see child.py.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from keras_server.models.errors import DownloadError, StartupError

log = logging.getLogger("keras_server")

Stage = Callable[[str], None]  # is told what is being done, in a few words


class Job(Protocol):
    """What is to be done, a dataclass of what JSON knows."""

    @property
    def elsewhere(self) -> str:
        """An empty folder, for what is made and kept nowhere else."""


J = TypeVar("J", bound=Job)


class Messages(logging.Handler):
    """Tells the server what happens: a JSON object a line."""

    def __init__(self, descriptor: int):
        super().__init__()
        self.file = os.fdopen(descriptor, "w", encoding="utf-8")

    def send(self, **message: Any) -> None:
        """Tell one thing."""
        print(json.dumps(message), file=self.file, flush=True)

    def emit(self, record: logging.LogRecord) -> None:
        """Pass a line of the log on."""
        self.send(level=record.levelno, log=record.getMessage())


def perform(kind: Callable[..., J], do: Callable[[J, Stage], Path]) -> int:
    """Do one job of this kind. Returns the exit status: 0 with the path of an export told, 1 with why there is none."""
    messages = Messages(os.dup(1))
    os.dup2(2, 1)  # what libraries print is none of our messages
    log.handlers, log.propagate = [messages], False
    log.setLevel(logging.INFO)
    job = kind(**json.loads(sys.stdin.readline()))
    server = os.dup(0)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)  # which is what a user's program finds there
    threading.Thread(target=end_with_the_server, args=[server, Path(job.elsewhere)], daemon=True).start()
    try:
        messages.send(folder=str(do(job, lambda words: messages.send(stage=words))))
    except DownloadError as error:
        messages.send(error=str(error), download=error.reason)
    except StartupError as error:
        messages.send(error=str(error))
    else:
        return 0
    return 1


def end_with_the_server(server: int, elsewhere: Path) -> None:
    """End the process once the server has, which can no longer remove the folder that it made for the export.

    Then nobody holds the other end of the pipe that the job came through.
    """
    os.read(server, 1)
    shutil.rmtree(elsewhere, ignore_errors=True)
    os._exit(1)

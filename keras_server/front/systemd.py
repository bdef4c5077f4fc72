"""Sockets that systemd holds, so that a restart refuses nobody: sd_listen_fds(3), and readiness: sd_notify(3)."""

from __future__ import annotations

import contextlib
import os
import socket
from dataclasses import dataclass, field

import gevent.socket

from keras_server.models.errors import StartupError

FIRST = 3  # file descriptor that is handed over: SD_LISTEN_FDS_START
VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")
REMEDY = "have ListenStream= name a port, with Accept=no"


@dataclass
class Systemd:
    """What systemd has handed over."""

    listeners: list[gevent.socket.socket] = field(default_factory=list)  # empty: the server takes a port of its own
    told: str = ""  # the socket at which it waits for READY=1; empty: it does not wait

    def ready(self) -> None:
        """Tell it that requests are answered, for which `systemctl restart` waits."""
        if self.told:
            name = "\0" + self.told[1:] if self.told.startswith("@") else self.told
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.sendto(b"READY=1", name)


def taken_over() -> Systemd:
    """Take what systemd hands over out of the environment, so that no child has it too. Raises StartupError."""
    told = os.environ.pop("NOTIFY_SOCKET", "")
    process, count, *_ = (os.environ.pop(variable, "") for variable in VARIABLES)
    if process != str(os.getpid()):  # meant for whoever has started this process, or for nobody
        return Systemd(told=told)
    if not count.isdecimal():
        raise StartupError(f"LISTEN_FDS is {count!r}, which is no number of sockets: leave it to systemd.")
    return Systemd([take(number) for number in range(FIRST, FIRST + int(count))], told)


def take(number: int) -> gevent.socket.socket:
    """Return the listening socket with this file descriptor. Raises StartupError."""
    what = f"File descriptor {number}, which systemd hands over,"
    try:
        listener = gevent.socket.socket(fileno=number)
    except OSError as error:
        raise StartupError(f"{what} is no socket ({error.strerror}): {REMEDY}.") from None
    listener.set_inheritable(False)
    wrong = ""
    if listener.family not in (socket.AF_INET, socket.AF_INET6) or listener.type != socket.SOCK_STREAM:
        wrong = "is no socket of TCP"
    elif not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        wrong = "does not listen"
    if wrong:
        listener.close()
        raise StartupError(f"{what} {wrong}: {REMEDY}.")
    return listener

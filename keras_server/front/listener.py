"""The port: taken early, opened late."""

from __future__ import annotations

import contextlib
import socket
import sys

import gevent.socket

from keras_server.models.errors import StartupError


def bind(host: str, port: int) -> gevent.socket.socket:
    """Take the port without listening yet, so that a mistake shows at once and nobody is answered too early.

    Raises StartupError.
    """
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = addresses[0]
        listener = gevent.socket.socket(family, kind, protocol)
        if sys.platform != "win32":  # where it would let two servers share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        return listener
    except OSError as error:
        raise StartupError(f"Cannot listen on {host} port {port} ({error.strerror}): choose another --port.") from None


def url_of(listener: gevent.socket.socket) -> str:
    """Return the address under which a person on this machine reaches a listening socket."""
    host, port = listener.getsockname()[:2]
    host = "localhost" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return f"http://{host}:{port}"


def raise_file_limit() -> None:
    """Allow this process as many open files as the system lets it have: each connection is one."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)

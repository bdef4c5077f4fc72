"""The port: taken early, opened late, on one address or on both of the machine's own."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import ipaddress
import logging
import socket
import struct
import sys

import gevent.socket

from keras_server.front import limits
from keras_server.models.errors import StartupError

log = logging.getLogger("keras_server")

LOOPBACKS = ("127.0.0.1", "::1")
ABSENT = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT)  # where a machine has one kind of IP only


def bind(host: str, port: int) -> list[gevent.socket.socket]:
    """Take the port without listening yet, so that a mistake shows at once and nobody is answered too early.

    For localhost it is taken on both of the machine's own addresses, or on the one that there is. Raises StartupError.
    """
    both = host == "localhost"
    listeners = list[gevent.socket.socket]()
    for address in LOOPBACKS if both else (host,):
        try:
            listeners.append(bind_one(address, listeners[0].getsockname()[1] if listeners else port))
        except OSError as error:
            if both and error.errno in ABSENT and (listeners or address != LOOPBACKS[-1]):
                continue
            taken = error.errno in (errno.EADDRINUSE, errno.EACCES)
            for listener in listeners:
                listener.close()
            if taken and listeners and port == 0:  # what is free on the one is not free on the other
                return bind(host, port)
            remedy = "choose another --port" if taken else "choose another --host"
            raise StartupError(f"Cannot listen on {address} port {port} ({error.strerror}): {remedy}.") from None
    return listeners


def bind_one(host: str, port: int) -> gevent.socket.socket:
    """Take the port on one address. Raises OSError."""
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = gevent.socket.socket(family, kind, protocol)
    try:
        if sys.platform == "win32":  # where SO_REUSEADDR would let two servers share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:  # :: takes IPv4 as well, whatever the system would do by itself
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, address[0] != "::")
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


def is_local(listener: gevent.socket.socket) -> bool:
    """Return whether only this machine reaches a listening socket."""
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


# Of a TCP header the byte with the flags, and of them SYN and ACK: SYN alone asks for a connection, and is dropped; all
# else is let through. In the kernel's classic BPF (Documentation/networking/filter.rst): code, jumps, operand.
NO_NEW_CONNECTIONS = (
    (0x30, 0, 0, 13),
    (0x54, 0, 0, 0x12),
    (0x15, 0, 1, 0x02),
    (0x06, 0, 0, 0),
    (0x06, 0, 0, 2**32 - 1),
)
SO_ATTACH_FILTER = 26


def refuse_new(listener: gevent.socket.socket | socket.socket) -> None:
    """Have Linux drop what asks for further connections; those that it has can still be accepted.

    A port that is simply closed resets those that came since the last accept. Who is dropped here asks again a second
    later, and is then refused, or served by whoever has the port by then.
    """
    if sys.platform == "linux":
        program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in NO_NEW_CONNECTIONS))
        header = struct.pack("HP", len(NO_NEW_CONNECTIONS), ctypes.addressof(program))
        with contextlib.suppress(OSError):  # a sandbox may not have it
            listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, header)


def url_of(listener: gevent.socket.socket) -> str:
    """Return the address under which a person on this machine reaches a listening socket."""
    host, port = listener.getsockname()[:2]
    host = "localhost" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return f"http://{host}:{port}"


def raise_file_limit() -> None:
    """Allow this process as many open files as the system lets it have, and warn where these are few."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    if (most := connections()) < limits.FEW_CONNECTIONS:
        log.warning("There is room for %d connections only: allow more open files (ulimit -n 4096).", most)


def connections() -> int:
    """Return how many connections there may be: each is an open file, and some are needed for other things."""
    try:
        import resource
    except ImportError:
        return limits.CONNECTIONS
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files == resource.RLIM_INFINITY:
        return limits.CONNECTIONS
    return max(1, min(limits.CONNECTIONS, files - min(limits.OTHER_FILES, files // 2)))

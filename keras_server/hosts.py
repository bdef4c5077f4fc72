"""For which names a server answers. A page of another site can have its own name lead to this machine, and would then
read every answer as one of its own (DNS rebinding): it is known by the name, which browsers send as Host.
"""

from __future__ import annotations

import functools
import re

from keras_server.clients import Address, address, network

LOOPBACK = (".localhost", "127.0.0.0/8", "[::1]")
HOST = re.compile(r"(\[[0-9A-Fa-f:.]{2,45}\]|[^\[\]:/?#@\\\s]{1,255}?)\.?(?::([0-9]{0,5}))?")


@functools.lru_cache
def allows(allowed: tuple[str, ...], host: str, probe: bool = False) -> bool:
    """Return whether a request with this Host is answered; one without comes from no browser.

    Allowed are names, as in "example.org", ".example.org" for those below it as well, addresses, networks, and "*" for
    all. Load balancers and container platforms send a `probe` to the machine itself, by its address.
    """
    if not host or "*" in allowed:
        return True
    if not (found := split(host)):
        return False
    name, port = found
    ip = address(name)
    if probe and (ip or name == "localhost"):
        return True
    return any(matches(name, port or "80", ip, text) for text in allowed)


def matches(name: str, port: str, ip: Address | None, allowed: str) -> bool:
    """Return whether a name, or its address, and a port are as allowed."""
    if "/" in allowed:
        return ip is not None and ip in network(allowed)
    wanted, wanted_port = split(allowed) or ("", "")
    below = wanted.startswith(".") and f".{name}".endswith(wanted)
    return (below or wanted == name) and wanted_port in ("", port) and not name.startswith(".")


def split(host: str) -> tuple[str, str] | None:
    """Return the name of a Host, in small letters, or its address, and the port; None where it is none."""
    if not (match := HOST.fullmatch(host)):
        return None
    name = match[1].lower().strip("[]")
    return str(address(name) or name), match[2] or ""

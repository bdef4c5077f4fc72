"""Who asks: a client's address, also behind proxies, and the trace that its request is a part of."""

from __future__ import annotations

import functools
import ipaddress
import re
from collections.abc import Sequence

LONGEST = 100  # characters of an address, its zone and its port
HOPS = 16  # proxies that a request may have passed
WITH_PORT = re.compile(r"\[([0-9A-Fa-f:.]+)\](?::\d+)?|([\d.]+):\d+")
# W3C Trace Context, 3.2: neither id is all zeros; a later version than 00 may have more behind the flags.
TRACEPARENT = re.compile("(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def client_address(peer: str, forwarded: str, trusted: Sequence[str]) -> str:
    """Return the address of the client, as far as it is known.

    `peer` is who has connected, `forwarded` the X-Forwarded-For. Each proxy has written at its end who had connected to
    it, so it is read from there, for as long as who wrote is in one of the `trusted` networks.
    """
    current = address(peer)
    if not current:
        return peer
    for text in reversed(forwarded.split(",")[-HOPS:]):
        if not is_trusted(current, trusted):
            break
        before = address(text.strip('\t "'))
        if not before or "%" in text:  # a zone's name may hold anything
            break
        current = before
    return str(current)


def is_trusted(peer: Address | None, trusted: Sequence[str]) -> bool:
    """Return whether an address is in one of the trusted networks."""
    return peer is not None and any(peer in network(each) for each in trusted)


def owner_of(client: str, trusted: Sequence[str]) -> str:
    """Return who is counted for an address: itself, or its /64 of IPv6, which one client has.

    Nobody, "", for this machine's own, and for a trusted proxy, which asks for many.
    """
    found = address(client.partition("%")[0])
    if not found or found.is_loopback or is_trusted(found, trusted):
        return ""
    return str(ipaddress.ip_network((found, 64), strict=False)) if found.version == 6 else str(found)


def address(text: str) -> Address | None:
    """Return an address that may have a port, one of IPv4 within IPv6 as itself; None where it is none."""
    if len(text) > LONGEST:
        return None
    if match := WITH_PORT.fullmatch(text):
        text = match[1] or match[2]
    try:
        found = ipaddress.ip_address(text)
    except ValueError:
        return None
    return (found.ipv4_mapped or found) if isinstance(found, ipaddress.IPv6Address) else found


@functools.lru_cache
def network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    """Return a network, or a lone address as one. Raises ValueError."""
    return ipaddress.ip_network(text, strict=False)


def trace_of(header: str) -> str:
    """Return what is known of a traceparent that is well-formed, else nothing."""
    known, more = header[:55], header[55:]
    later = more.startswith("-") and not known.startswith("00")
    return known if TRACEPARENT.fullmatch(known) and (later or not more) else ""

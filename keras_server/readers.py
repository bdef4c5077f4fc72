"""What reads the text of a setting, or refuses it with a sentence."""

from __future__ import annotations

import contextlib
import ipaddress
import re
from collections.abc import Callable
from typing import Any, TypeVar

import click
from PIL import ImageColor

T = TypeVar("T")


def one_of(*words: str) -> Callable[[str], Any]:
    """Return a reader that takes one of `words` and nothing else."""

    def read(text: str) -> str:
        if text not in words:
            raise click.BadParameter(f"{text!r} is none of {', '.join(words)}.")
        return text

    return read


def number(kind: type[T], least: float, most: float) -> Callable[[str], T]:
    """Return a reader of numbers of `kind`, int or float, from `least` to `most`; neither NaN nor infinite."""

    def read(text: str) -> T:
        with contextlib.suppress(ValueError, OverflowError):
            if least <= float(value := kind(text)) <= most:  # type: ignore[call-arg, arg-type]
                return value
        whole = "whole " if kind is int else ""
        raise click.BadParameter(f"{text[:40]!r} is not a {whole}number from {least:g} to {most:g}.")

    return read


def switch(text: str) -> bool:
    """Read on, true, yes, 1 and their opposites."""
    if text.lower() not in ("1", "on", "true", "yes", "0", "off", "false", "no"):
        raise click.BadParameter(f"{text!r} is neither on nor off.")
    return text.lower() in ("1", "on", "true", "yes")


def colour(text: str) -> str:
    """Read a colour, by its name in CSS or as #rrggbb."""
    try:
        ImageColor.getrgb(text)
    except ValueError:
        raise click.BadParameter(f"{text!r} is no colour, such as white or #e0e0e0.") from None
    return text


def origin(text: str) -> str:
    """Read an origin as browsers write it (RFC 6454), such as https://example.org; or *, or null."""
    scheme, _, host = text.strip().lower().removesuffix("/").partition("://")
    if not host:
        if scheme in ("*", "null"):
            return scheme
    elif re.fullmatch("[a-z][a-z0-9+.-]*", scheme) and re.fullmatch(r"[^\s/?#@,\\]+", host) and host.isascii():
        return f"{scheme}://" + host.removesuffix({"http": ":80", "https": ":443"}.get(scheme, ""))
    raise click.BadParameter(f"{text!r} is no origin as browsers send it, such as https://example.org, nor * or null.")


def network(text: str) -> str:
    """Read an address or a network of them, such as 10.0.0.0/8."""
    try:
        return str(ipaddress.ip_network(text.strip(), strict=False))
    except ValueError:
        raise click.BadParameter(f"{text[:80]!r} is no address and no network, such as 10.0.0.0/8.") from None


class Several(click.types.FuncParamType):  # type: ignore[type-arg]  # which it has from click 8.4
    """What may be repeated on the command line, and stand with commas in the environment."""

    envvar_list_splitter = ","


def checksum(text: str) -> str:
    """Read a SHA-256, as sha256sum prints it."""
    if not re.fullmatch(r"(?i)[0-9a-f]{64}|", text):
        raise click.BadParameter(f"{text[:80]!r} is no SHA-256, which has 64 digits from 0 to f.")
    return text.lower()

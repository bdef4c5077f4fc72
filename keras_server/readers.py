"""What reads the text of a setting, or refuses it with a sentence."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

import click
from PIL import ImageColor

from keras_server.hosts import split

T = TypeVar("T")
PREFIX = "KERAS_SERVER_"  # of variables


def stop(sentence: str) -> NoReturn:
    """End the process with status 2 and one line."""
    print("error:", " ".join(sentence.split()), file=sys.stderr)
    sys.exit(2)


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


def host_name(text: str) -> str:
    """Read what may stand in a request's Host: a name, also as .example.org, an address or a network, or *."""
    text = text.strip().lower()
    with contextlib.suppress(ValueError):
        if "/" in text or text.count(":") > 1:
            found = ipaddress.ip_network(text, strict=False)
            return str(found) if "/" in text else f"[{found.network_address}]"
    known = split(text)
    if text == "*" or (known and (re.fullmatch(r"\.?[a-z0-9_-]+(\.[a-z0-9_-]+)*", known[0]) or ":" in known[0])):
        return text
    raise click.BadParameter(
        f"{text[:80]!r} is no host, such as example.org, .example.org with all below it, 10.0.0.5 or [::1]:8000."
    )


class Several(click.types.FuncParamType):  # type: ignore[type-arg]  # which it has from click 8.4
    """What may be repeated on the command line, and stand in the environment with a character between."""

    def __init__(self, read: Callable[[str], Any], between: str = ","):
        super().__init__(read)
        self.between = between

    def split_envvar_value(self, rv: str) -> Sequence[str]:
        """Return the parts of a variable, unless a file or folder has the whole as its name."""
        return [rv] if os.path.exists(rv) else [part.strip() for part in rv.split(self.between)]


@dataclass(frozen=True)
class ModelOption:
    """A model as --model asks for it: NAME=MODEL,KEY=VALUE,..."""

    text: str  # as it was written
    model: str
    name: str = ""  # empty: the model's own
    values: Mapping[str, str] = field(default_factory=dict, hash=False)  # settings of its own


def model_option(text: str) -> ModelOption:
    """Read a model with its name and settings; a file or folder that is there may have any name itself."""
    named = re.match(r"(?!\.+=)([\w.-]+)=(?=.)", text) if not os.path.exists(text) else None
    rest = text[named.end() :] if named else text
    # The model is what comes before the settings; where several divisions are possible, one that is there.
    ends = [found.start() for found in re.finditer(r",(?=\w+=)", rest)]
    there = [end for end in (len(rest), *reversed(ends)) if os.path.exists(rest[:end])]
    end = there[0] if there else min(ends, default=len(rest))
    model, settings = rest[:end], rest[end + 1 :]
    if text and not model:
        raise click.BadParameter(f"{text!r} names no model: write NAME=MODEL, such as cats=cats.keras.")
    values = dict(part.split("=", 1) for part in re.split(r",(?=\w+=)", settings) if part)
    return ModelOption(text, model, named[1] if named else "", values)


def checksum(text: str) -> str:
    """Read a SHA-256, as sha256sum prints it."""
    if not re.fullmatch(r"(?i)[0-9a-f]{64}|", text):
        raise click.BadParameter(f"{text[:80]!r} is no SHA-256, which has 64 digits from 0 to f.")
    return text.lower()

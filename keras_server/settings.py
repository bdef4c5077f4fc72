"""Settings: what a row of their table is, and how the command line and the environment are read by the table."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any


def one_of(*names: str) -> Callable[[str], str]:
    """Return a converter that takes one of `names` and nothing else."""

    def convert(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(names)}")
        return text

    return convert


def number(kind: type, least: float, most: float) -> Callable[[str], Any]:
    """Return a converter to `kind` (int or float) that takes `least` to `most`."""

    def convert(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if least <= kind(text) <= most:
                return kind(text)
        whole = "whole " if kind is int else ""
        raise argparse.ArgumentTypeError(f"{text!r} is not a {whole}number from {least:g} to {most:g}")

    return convert


def switch(text: str) -> bool:
    """Read on, true, yes, 1 and their opposites."""
    if text.lower() not in {"1", "on", "true", "yes", "0", "off", "false", "no"}:
        raise argparse.ArgumentTypeError(f"{text!r} is neither on nor off")
    return text.lower() in {"1", "on", "true", "yes"}


@dataclass(frozen=True)
class Setting:
    """A row of the table. --name and KERAS_SERVER_NAME set it; `read` turns their text into the value."""

    name: str
    default: Any
    help: str
    read: Callable[[str], Any] = str
    metavar: str | None = None

    @property
    def option(self) -> str:
        """The command line's spelling."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """The environment's spelling."""
        return "KERAS_SERVER_" + self.name.upper()


def shown_default(setting: Setting) -> str:
    """Return a default as help and README show it."""
    return "off" if setting.default is False else str(setting.default) if setting.default != () else ""


def parser_of(table: Iterable[Setting]) -> argparse.ArgumentParser:
    """Return the parser of a command line, whose defaults are what the environment says.

    Exits with status 2 and a sentence where the environment cannot be read.
    """
    parser = argparse.ArgumentParser(
        description="Serve a Keras model as a REST API: POST an image to /predict, get its labels as JSON.",
        epilog="Each option may stand in the environment instead: --port 8000 is KERAS_SERVER_PORT=8000.",
    )
    for setting in table:
        value, more = setting.default, dict[str, Any]()
        if given := os.environ.get(setting.variable):
            try:
                value = setting.read(given)
            except argparse.ArgumentTypeError as error:
                parser.error(f"{setting.variable}: {error}")
        if isinstance(setting.default, tuple):  # may be repeated
            value, more = [part.strip() for part in given.split(",")] if given else [], {"action": "append"}
        elif isinstance(setting.default, bool):  # --unsafe-model alone is on
            more = {"nargs": "?", "const": True}
        default = shown_default(setting)
        parser.add_argument(
            setting.option,
            default=value,
            type=setting.read,
            help=setting.help + (f" (default: {default})" if default else ""),
            metavar=setting.metavar or setting.name.rpartition("_")[2].upper(),
            **more,
        )
    return parser

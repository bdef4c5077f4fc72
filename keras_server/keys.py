"""The keys of clients, of the command line, the environment and a file. What would open the door to all is refused."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from click.core import ParameterSource

from keras_server.readers import PREFIX, stop


def read_keys(typed: Sequence[str]) -> Iterator[str]:
    """Yield the keys of the environment and those of the command line. Exits where one would open the door to all."""
    kept = os.environ.get(f"{PREFIX}API_KEY")
    for where, keys in ((f"{PREFIX}API_KEY", () if kept is None else kept.split(",")), ("--api-key", typed)):
        for key in keys:
            if "," in key:
                stop(f"{where}: a key with a comma can only stand in an --api-key-file.")
            yield usable(key.strip(), where)


def read_key_file(path: str, source: ParameterSource | None) -> Iterator[str]:
    """Yield the keys of a file: each line is one, with its spaces, unless it is blank or begins with #."""
    where = f"{PREFIX}API_KEY_FILE" if source is ParameterSource.ENVIRONMENT else "--api-key-file"
    if not path:
        if os.environ.get(f"{PREFIX}API_KEY_FILE") == "" and source is ParameterSource.DEFAULT:
            where = f"{PREFIX}API_KEY_FILE"
        elif source is ParameterSource.DEFAULT:
            return
        stop(f"{where} is empty: give a file with a key, or leave it out.")
    try:
        text = Path(path).expanduser().read_bytes().decode("ascii")
    except UnicodeDecodeError:
        stop(f"{where}: {path} holds other characters than ASCII, which a key cannot.")
    except (OSError, ValueError, RuntimeError) as error:
        stop(f"{where}: {path} cannot be read ({getattr(error, 'strerror', None) or error}).")
    lines = [line.strip() for line in text.splitlines()]
    keys = [usable(line, where) for line in lines if line and not line.startswith("#")]
    if not keys:
        stop(f"{where}: {path} holds no key.")
    yield from keys


def read_metrics_key(key: str, source: ParameterSource | None) -> str:
    """Return the key for the metrics, or nothing where none was given. Exits where it is none that can be sent."""
    variable = f"{PREFIX}METRICS_KEY"
    if source is ParameterSource.COMMANDLINE:
        return usable(key.strip(), "--metrics-key")
    return usable(key.strip(), variable) if variable in os.environ else ""


def usable(key: str, where: str) -> str:
    """Return a key. Exits where no client could send it, or any could; it is not shown."""
    if not key:
        stop(f"{where}: a key is empty, which would open the door to all.")
    if not (key.isascii() and key.isprintable()):
        stop(f"{where}: a key holds other characters than those of ASCII, which no header carries.")
    return key

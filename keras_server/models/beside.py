"""The settings that stand beside a model: what belongs to it, whoever serves it.

flowers.keras         --model flowers.keras
flowers.toml          preprocess = "tf", and what else of the README's table belongs to a model; and where it has
                      versions, names for them: [version_labels] stable = 3
flowers.labels.txt    the names of its classes, in any form that --labels takes

In an export of this server and in an archive of Teachable Machine they stand inside.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from keras_server.models.addresses import fetch
from keras_server.models.errors import StartupError
from keras_server.models.export import Export, ExportError
from keras_server.models.kinds import is_export, teachable
from keras_server.settings import SETTINGS, Beside, Settings

ROWS = {row.name: row for row in SETTINGS if row.of_model}
KEYS = {name: name for name in ROWS} | {"threads": "engine_threads"}  # as they are written, and what they set
LABELS = "version_labels"


def locate(options: Mapping[str, Any]) -> Beside:
    """Return where the model is that the options name, downloaded if need be, and what stands beside it.

    Raises click.UsageError.
    """
    try:
        model = fetch(options["model"], options["sha256"], options["cache_dir"])
    except StartupError as error:
        raise click.UsageError(str(error)) from None
    return replace(beside(model), model=model)


def beside(model: str) -> Beside:
    """Return what stands beside a model on this machine. Raises click.UsageError."""
    if model in ("", "bundled") or not os.path.exists(model):
        return Beside()
    path = Path(model)
    if path.name in ("", ".."):
        path = Path(os.path.abspath(model))
    if is_export(path):
        return of_export(path)
    is_folder = path.is_dir()
    name = path.name if is_folder else path.stem  # a folder's name may well have a dot in it
    folders = (path.parent, path) if is_folder else (path.parent,)
    labels = only([folder / f"{name}.labels.txt" for folder in folders])
    file = only([folder / f"{name}.toml" for folder in folders])
    content = read_toml(file) if file else {}
    names = read_version_labels(file, content.pop(LABELS)) if file and LABELS in content else {}
    read = {KEYS.get(key, key): read_value(file, key, value) for key, value in content.items()} if file else {}
    values = of_teachable(path) | ({"labels": str(labels)} if labels else {}) | read
    return Beside(values, str(file or labels or ""), version_labels=names)


def settings_for(settings: Settings, found: Beside, own: Mapping[str, str]) -> Settings:
    """Return the server's settings as they are for one of several models.

    `own` is what follows it on the command line, which comes before all others. Raises StartupError.
    """
    texts = {name: (found.where, text) for name, text in found.values.items() if name not in settings.given}
    values: dict[str, Any] = {}
    try:
        for key, text in own.items():
            check_key("--model", key)
            texts[KEYS[key]] = "--model", text
        for name, (where, text) in texts.items():
            try:
                values[name] = ROWS[name].read(text)
            except click.BadParameter as error:
                raise StartupError(f"{where}: {name}: {error.message}") from None
    except click.UsageError as error:
        raise StartupError(error.message) from None
    return replace(settings, **values)


def only(candidates: list[Path]) -> Path | None:
    """Return the one that is there, if any. Raises click.UsageError where two are."""
    found = [path for path in candidates if path.is_file()]
    if len(found) > 1:
        raise click.UsageError(f"{found[0]} and {found[1]} are both there: which is meant? Remove one.")
    return found[0] if found else None


def read_toml(file: Path) -> dict[str, Any]:
    """Return what is in a file beside a model. Raises click.UsageError."""
    try:
        return tomllib.loads(file.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise click.UsageError(f'{file} is no TOML ({error}): write preprocess = "tf", say.') from None
    except UnicodeDecodeError:
        raise click.UsageError(f"{file} is not UTF-8: save it as UTF-8.") from None
    except OSError as error:
        raise click.UsageError(f"{file} cannot be read ({error.strerror}).") from None


def read_version_labels(file: Path, table: object) -> dict[str, int]:
    """Return the names of versions. Raises click.UsageError."""
    if isinstance(table, dict) and all(type(number) is int and number > 0 for number in table.values()):
        return table
    raise click.UsageError(f"{file}: {LABELS} has to be a table of names and versions: write [{LABELS}] stable = 3.")


def read_value(file: Path, key: str, value: object) -> str:
    """Return a setting's text; the name of a file counts from the folder that it is read in.

    Raises click.UsageError.
    """
    if isinstance(value, dict):
        raise click.UsageError(f'{file}: {key!r} is a table: write its settings without one, as preprocess = "tf".')
    check_key(file, key)
    row = ROWS[KEYS[key]]
    if isinstance(row.default, int):
        if type(value) is not int:
            raise click.UsageError(f"{file}: {key} has to be a whole number, and {value!r} is none.")
        return str(value)
    if isinstance(row.default, float) and isinstance(value, int | float):
        return str(value)
    if not isinstance(value, str):
        wanted = "the name of a file" if row.metavar == "FILE" else "a text"
        raise click.UsageError(f"{file}: {key} has to be {wanted} in quotes, and {value!r} is none.")
    if row.metavar in ("FILE", "PATH") and value:
        return str(file.parent / value)
    return value


def check_key(where: object, key: str) -> None:
    """Raise click.UsageError for what is no setting of a model."""
    if key in KEYS:
        return
    if row := next((row for row in SETTINGS if row.name.rstrip("_") == key.replace("-", "_")), None):
        raise click.UsageError(
            f"{where}: {key} belongs to the server and not to the model: give it as {row.option}. "
            f"Here stand {', '.join(KEYS)}."
        )
    near = difflib.get_close_matches(key, KEYS, 1, cutoff=0)[0]
    raise click.UsageError(f"{where}: {key!r} is no setting of a model: did you mean {near}?")


def of_teachable(archive: Path) -> dict[str, str]:
    """Return what Teachable Machine's own lines of Python do to pictures, for an archive that it has exported."""
    if not (inside := teachable(archive)):
        return {}
    labels = archive / Path(inside).parent / "labels.txt"
    return {"labels": str(labels), "preprocess": "tf", "crop": "centre", "interpolation": "lanczos"}


def of_export(folder: Path) -> Beside:
    """Return the options that an export was made with. Raises click.UsageError."""
    file = folder / "about.json"
    with contextlib.suppress(ExportError):  # what is wrong with it is said once it is to be served
        return Beside(
            {key: read_value(file, key, text) for key, text in Export.read(folder).settings.items()}, str(file)
        )
    return Beside()

"""The names of a model's classes, read from the forms of file that people have them in.

What a file holds is told by its content, never by its name:

    cat                                  a line each: blank lines at the end do not count
    0 cat                                likewise, numbered 0, 1, 2, ...: Teachable Machine, TensorFlow Lite
    ["cat", "dog"]                       a JSON list
    {"0": "cat", "1": "dog"}             JSON, by number
    {"0": ["n02124075", "cat"], ...}     Keras' class index
    {"cat": 0, "dog": 1}                 the class_indices of Keras' generators
"""

from __future__ import annotations

import codecs
import json
import re
import stat
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keras_server.models.errors import StartupError

MAX_BYTES = 16 * 2**20  # ImageNet's 21,841 names take half a megabyte
FORMS = 'a line a class, a JSON list, {"0": "cat"}, {"cat": 0}, or Keras\' class index'
HEADER = re.compile(
    r"|(class|label|display)?[_ ]?(id|idx|index|no|number|names?)|class|category|label|labels|mid|wnid|synset"
)


def read_labels(path: Path) -> tuple[str, ...]:
    """Return the classes' names, in the order of the model's output. Raises StartupError."""
    text = decode(read_file(path), path)
    if not text.strip():
        raise StartupError(f"{path} is empty: it should hold {FORMS}.")
    names = from_json(text, path) if is_json(text) else from_lines(text, path)
    return tuple(names)


def check_labels(labels: Sequence[str], file: str, classes: int | None, name: str) -> None:
    """Raise StartupError unless a file has one label for each of the `classes` that the model `name` tells apart.

    `classes` is None, or 0, where the model has no output of a fixed number of classes.
    """
    if not classes:
        raise StartupError(f"{file}: {name} has no output with a fixed number of classes to name: leave it out.")
    if len(labels) != classes:
        are = "name is" if len(labels) == 1 else "names are"
        raise StartupError(
            f"{file}: {len(labels)} {are} in the file for the {classes} classes of {name}: it needs one for each."
        )


def read_file(path: Path) -> bytes:
    """Return the file's bytes. Raises StartupError for what is missing, no file, unreadable or too large.

    It may stand in a zip archive: converted_keras.zip/labels.txt.
    """
    try:
        if archive := next((parent for parent in path.parents if parent.is_file()), None):
            return read_packed(archive, path)
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise StartupError(f"{path} is a folder: --labels takes a file.")
        if not stat.S_ISREG(status.st_mode):
            raise StartupError(f"{path} is a device or a pipe: --labels takes a file.")
        if status.st_size > MAX_BYTES:
            raise StartupError(f"{path} is larger than {MAX_BYTES >> 20} MiB, which no list of labels is.")
        return path.read_bytes()
    except FileNotFoundError:
        raise StartupError(f"There is no file {path}.") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        raise StartupError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error}).") from None


def read_packed(archive: Path, path: Path) -> bytes:
    """Return the bytes of a file in a zip archive. Raises StartupError, or OSError where it is no archive."""
    try:
        with zipfile.ZipFile(archive) as opened:
            about = opened.getinfo(path.relative_to(archive).as_posix())
            if about.file_size > MAX_BYTES:
                raise StartupError(f"{path} is larger than {MAX_BYTES >> 20} MiB, which no list of labels is.")
            return opened.read(about)
    except KeyError:
        raise StartupError(f"There is no file {path}.") from None
    except (zipfile.BadZipFile, RuntimeError) as error:
        raise OSError(str(error)) from None


def decode(data: bytes, path: Path) -> str:
    """Return the text in UTF-8, or in UTF-16 that says so by its byte order mark. Raises StartupError."""
    if data.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        raise StartupError(f"{path} is in UTF-32: save it as UTF-8.")
    marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if marked else "utf-8-sig")
    except UnicodeDecodeError as error:
        if marked:
            raise StartupError(f"{path} begins as UTF-16 and is damaged: save it as UTF-8.") from None
        head = data[:1024]
        if re.search(rb"[\x01-\x06\x0e-\x1a\x7f]", head) or (b"\0" in head and not in_utf16(head)):
            raise StartupError(f"{path} is no text file: it should hold {FORMS}.") from None
        if in_utf16(head):
            raise StartupError(f"{path} is in UTF-16 without a byte order mark: save it as UTF-8.") from None
        line = data.count(b"\n", 0, error.start) + 1
        raise StartupError(
            f"{path} is not UTF-8 (0x{data[error.start]:02X} in line {line}; perhaps Latin-1 or Windows-1252): "
            "save it as UTF-8."
        ) from None
    if "\0" in text:
        if in_utf16(data[:1024]):
            raise StartupError(f"{path} is in UTF-16 without a byte order mark: save it as UTF-8.")
        raise StartupError(f"{path} is no text file: it should hold {FORMS}.")
    return text


def in_utf16(data: bytes) -> bool:
    """Return whether bytes without a mark look like Latin letters in UTF-16: every other one is zero."""
    halves = data[::2], data[1::2]
    return any(half.count(0) > 0.8 * len(half) and 0 not in other for half, other in (halves, halves[::-1]))


# ----------------------------------------------------------------------------------------------------------
# Lines
# ----------------------------------------------------------------------------------------------------------


def from_lines(text: str, path: Path) -> list[str]:
    """Return the names that stand a line each, without numbers that only count the lines. Raises StartupError."""
    lines = [line.strip() for line in re.split(r"\r\n|\n|\r", text.rstrip())]
    for number, line in enumerate(lines, 1):
        if not line:
            raise StartupError(f"Line {number} of {path} is blank: which class has no name?")
    refuse_tables(lines, path)
    numbered = [re.fullmatch(r"([0-9]{1,9})(?:\s*[:,;]\s*(.*)|\s+(.*))?", line) for line in lines]
    if not all(numbered):
        return lines
    numbers = [int(match[1]) for match in numbered if match]
    names = [match[2] or match[3] or "" for match in numbered if match]
    if not any(names) or sorted(numbers) != [*range(len(lines))]:  # digits, or euros: 5 euros, 10 euros
        return lines
    if numbers != sorted(numbers):
        raise StartupError(f"The lines of {path} are numbered from 0 and out of order: sort them by their numbers.")
    for number, name in zip(numbers, names, strict=True):
        if not name:
            raise StartupError(f"Line {number + 1} of {path} has a number and no name.")
    return names


def refuse_tables(lines: list[str], path: Path) -> None:
    """Raise StartupError for CSV: a header of several columns, or the class's number behind each name."""
    for mark, title in ((",", "CSV"), (";", "CSV"), ("\t", "tabs")):
        header = [field.strip().strip('"').lower() for field in lines[0].split(mark)]
        if len(header) > 1 and all(map(HEADER.fullmatch, header)) and all(mark in line for line in lines):
            raise StartupError(f"{path} is a table ({title}) with the header {lines[0]!r}: keep the names alone.")
        last = [line.rpartition(mark)[2].strip() for line in lines]
        numbered = all(re.match(rf"[0-9]+\s*{mark}", line) for line in lines)
        if not numbered and last == [str(i) for i in range(len(lines))] and all(mark in line for line in lines):
            raise StartupError(f"{path} is a table ({title}) of names with numbers: keep the names alone.")


# ----------------------------------------------------------------------------------------------------------
# JSON
# ----------------------------------------------------------------------------------------------------------


class Repeated(ValueError):
    """A key that stands twice in a JSON object."""


def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dict. Raises Repeated."""
    result: dict[str, Any] = {}
    for key, value in items:
        if key in result:
            raise Repeated(key)
        result[key] = value
    return result


def is_json(text: str) -> bool:
    """Return whether a text is meant as JSON: a list or an object, of which the first item has begun.

    A list of words may begin with "[PAD]", and that is a name.
    """
    return bool(re.match(r"""\s*(\[\s*(["'\[{\]0-9-]|(true|false|null|NaN)\s*[,\]])|\{\s*(["'}]|[0-9]+\s*:))""", text))


def from_json(text: str, path: Path) -> list[str]:
    """Return the names in a JSON list or object. Raises StartupError."""
    try:
        content = json.loads(text, object_pairs_hook=pairs)
    except Repeated as error:
        raise StartupError(f"{path} has {str(error)!r} twice.") from None
    except RecursionError:
        raise StartupError(f"{path} holds no labels: it should hold {FORMS}.") from None
    except ValueError as error:
        if re.match(r"\s*[\[{]\s*('|[0-9]+\s*:)", text):
            raise StartupError(f"{path} is written as Python prints it: write it with json.dump.") from None
        where = f"line {error.lineno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else "a number too long"
        raise StartupError(f"{path} begins as JSON and is damaged ({where}).") from None
    if not content:
        raise StartupError(f"{path} is an empty {'list' if isinstance(content, list) else 'object'}.")
    if isinstance(content, list):
        names = content
    elif all(isinstance(value, (int, float)) for value in content.values()):  # bool, too, which is refused below
        names = by_number(turned(content, path), path)
    else:
        numbers = {number_of(key, path): name for key, name in content.items()}
        if all(is_class_index(entry) for entry in numbers.values()):
            numbers = {number: entry[1] for number, entry in numbers.items()}
        names = by_number(numbers, path)
    for number, name in enumerate(names):
        if not isinstance(name, str):
            raise StartupError(f"Class {number} of {path} is {kind_of(name)}, not a name: it should hold {FORMS}.")
        if not name.strip():
            raise StartupError(f"Class {number} of {path} has an empty name.")
        if re.search("[\ud800-\udfff]", name):  # which no answer could carry
            raise StartupError(
                f"The name of class {number} of {path} holds half a character of UTF-16: write it whole."
            )
    return [name.strip() for name in names]


def is_class_index(entry: Any) -> bool:
    """Return whether this is an entry of Keras' class index: WordNet's number and the name."""
    return isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry)


def turned(indices: dict[str, Any], path: Path) -> dict[int, str]:
    """Return class_indices, names with numbers, as numbers with names. Raises StartupError."""
    names: dict[int, str] = {}
    for name, value in indices.items():
        if (number := number_of(value, path)) in names:
            raise StartupError(f"{path} gives the number {number} to {names[number]!r} and to {name!r}.")
        names[number] = name
    return names


def number_of(value: Any, path: Path) -> int:
    """Return the class's number that a JSON key or value is. Raises StartupError."""
    if isinstance(value, str) and re.fullmatch(r"0|[1-9][0-9]{0,8}", value):
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise StartupError(f"{path} has {json.dumps(value)} where a class's number should stand: it should hold {FORMS}.")


def by_number(names: dict[int, Any], path: Path) -> list[Any]:
    """Return the names in the order of their numbers. Raises StartupError unless these are 0 to n - 1."""
    for number in range(len(names)):
        if number not in names:
            raise StartupError(f"{path} has {len(names)} names, and none of them has the number {number}.")
    return [names[number] for number in range(len(names))]


def kind_of(value: Any) -> str:
    """Return what a JSON value is, in words."""
    kinds = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds.get(type(value), "null")

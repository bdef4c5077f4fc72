"""The file that `keras-server predict` writes: a line a photo, CSV or JSON Lines by its ending.

However the process ends, the file can be gone on with: a line is written at once, and half a last one is cut off.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from simple_request import Answer

COLUMNS = ("filename", "label", "probability", "values", "model", "error")


class ResultsError(Exception):
    """The file cannot be written, or gone on with; the message is a sentence."""


class Format(Protocol):
    """How results stand in a file."""

    head: bytes

    def line(self, result: Answer) -> bytes:
        """Return a result, as `simple_request.py --json` has it, as one line."""

    def whole(self, data: bytes) -> int:
        """Return how many bytes of a file, which may be cut anywhere, are whole lines."""

    def read(self, data: bytes) -> Iterator[Answer]:
        """Yield the results in whole lines. Raises ValueError or LookupError."""


class JsonLines:
    """A line is what `simple_request.py --json` prints for a photo."""

    head = b""

    def line(self, result: Answer) -> bytes:
        """Return a result as JSON."""
        return json.dumps(result).encode() + b"\n"

    def whole(self, data: bytes) -> int:
        """Return how many bytes are whole lines: JSON has no line break in it."""
        return data.rfind(b"\n") + 1

    def read(self, data: bytes) -> Iterator[Answer]:
        """Yield the results."""
        for line in data.splitlines():
            result = json.loads(line)
            if not isinstance(result, dict) or not isinstance(result["filename"], str):
                raise ValueError
            yield result


class Csv:
    """A row has the first label only, or the values of a regression: for a spreadsheet."""

    def __init__(self) -> None:
        self.head = self.row(COLUMNS)

    def row(self, fields: tuple[str, ...]) -> bytes:
        """Return fields as a row of CSV (RFC 4180)."""
        text = io.StringIO(newline="")
        csv.writer(text).writerow(fields)
        return text.getvalue().encode("utf-8", "surrogateescape")  # a file's name is bytes, and stays as it is

    def line(self, result: Answer) -> bytes:
        """Return a result as a row."""
        label = probability = error = ""
        if not result["success"]:
            error = result["error"] or "no reason given"
        elif best := next(iter(result.get("predictions", ())), None):
            label, probability = best["label"], f"{best['probability']:.6f}"
        values = " ".join(f"{value:.9g}" for value in result.get("values", ()))
        texts = (label, probability, values, result["model"] or "", error)
        return self.row((result["filename"], *(text.encode("utf-8", "replace").decode() for text in texts)))

    def whole(self, data: bytes) -> int:
        """Return how many bytes are whole rows: a line break within quotes is none, and quotes come in pairs."""
        end = data.rfind(b"\n") + 1
        while end and data.count(b'"', 0, end) % 2:
            end = data.rfind(b"\n", 0, end - 1) + 1
        return end

    def read(self, data: bytes) -> Iterator[Answer]:
        """Yield the results, with the first label only."""
        rows = csv.reader(io.StringIO(data.decode("utf-8-sig", "surrogateescape"), newline=""))
        if tuple(next(rows)) != COLUMNS:
            raise ValueError
        for name, label, probability, values, model, error in rows:
            result: dict[str, Any] = {"filename": name, "success": not error, "model": model or None}
            if error:
                result["error"] = error
            elif values:
                result["values"] = [*map(float, values.split())]
            else:
                result["predictions"] = [{"label": label, "probability": float(probability)}]
            yield result


FORMATS: dict[str, Format] = {".csv": Csv(), ".jsonl": JsonLines()}


class Results:
    """A file of results that is written to, by one thread."""

    def __init__(self, path: Path, resume: bool):
        """Open a new or empty file, or with `resume` any; `done` are the photos in it. Raises ResultsError."""
        self.path, self.format = path, FORMATS[path.suffix.lower()]
        self.done: set[str] = set()
        if path.exists() and not path.is_file():
            raise ResultsError(f"{path} is no file that can be written: give another name.")
        try:
            self.file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise self.refusal(error) from None
        try:
            self.begin(resume)
        except ResultsError:
            self.file.close()
            raise

    def begin(self, resume: bool) -> None:
        """Read what is there, and cut off half a last line. Raises ResultsError."""
        lock(self.file)
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise self.refusal(error) from None
        if data and data != self.format.head and not resume:
            raise ResultsError(f"{self.path} is there already: go on with it by --resume, or give another name.")
        whole = self.format.whole(data)
        try:
            self.done = {key(result["filename"]) for result in self.format.read(data[:whole])} if whole else set()
        except (ValueError, LookupError, RecursionError):
            raise ResultsError(f"{self.path} is no file that this command wrote: give another name.") from None
        if whole < len(data):
            self.file.truncate(whole)
        if not whole:
            self.write(self.format.head)

    def refusal(self, error: OSError) -> ResultsError:
        """Return the sentence for a file that cannot be written."""
        return ResultsError(f"{self.path} cannot be written: {error.strerror or error}.")

    def write(self, line: bytes) -> None:
        """Write a line, whole and at once. Raises ResultsError."""
        try:
            if self.file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise self.refusal(error) from None

    def add(self, result: Answer) -> None:
        """Write a result. Raises ResultsError."""
        self.write(self.format.line(result))
        self.done.add(key(result["filename"]))

    def read(self) -> Iterator[Answer]:
        """Yield all that is in the file."""
        data = self.path.read_bytes()
        return self.format.read(data) if data else iter(())

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def lock(file: io.FileIO) -> None:
    """Keep other processes from writing the same photos into a file, where the system can. Raises ResultsError."""
    try:
        import fcntl
    except ImportError:  # on Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ResultsError(f"{file.name} is being written by another process: wait for its end.") from None


def key(name: str) -> str:
    """Return what tells a photo from others, however its path is written."""
    return os.path.abspath(name)

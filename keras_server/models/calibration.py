"""The rows that calibrate a model and those that it is judged by: a folder of pictures, or a file of arrays.

photos/        any pictures, in folders of any depth, read as /predict reads them
rows.npz       an array for each input, by its name, with the rows as first axis
rows.jsonl     a row a line, as in the "instances" of TensorFlow Serving's REST API
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from keras_server import images
from keras_server.models.errors import StartupError
from keras_server.models.export import digest
from keras_server.models.kinds import HEAD, readable
from keras_server.models.spec import Spec, Tensor, numpy_type
from keras_server.settings import Settings

log = logging.getLogger("keras_server")

MOST = 300  # rows that calibrate, as many as NNCF takes by default
HELD = 300  # rows at most that are kept out
LEAST = 100  # rows in all: two thirds calibrate, and of the others one that differs is three percent
MEMORY = 2**30  # bytes that all rows take at most, unless these are the least
KINDS = "a folder of pictures, an .npz file with an array for each input, or a .jsonl file with a row a line"
ENOUGH = (
    f"{LEAST} different ones are needed at least, and some {MOST + MOST // 2} of the kind that will be sent are best"
)

Row = list[np.ndarray]  # an array for each input, with one row as its first axis


@dataclass(frozen=True)
class Samples:
    """Rows for a model, none of which is on both sides."""

    calibrating: list[Row]
    held: list[Row]


def look(path: Path) -> str:
    """Return the checksum of what --calibrate names. Raises StartupError where it is none of its kinds, or too little.

    It is the same for the same contents, whatever the files are called.
    """
    if not path.exists():
        raise StartupError(f"--calibrate: there is neither a folder nor a file {path}: it takes {KINDS}.")
    with readable(path):
        files = pictures_in(path) if path.is_dir() else [path]
        if not path.is_dir():
            check_kind(path)
        sums = sorted({digest(file) for file in files})
    if path.is_dir() and len(sums) < LEAST:
        raise StartupError(f"--calibrate: {path} holds {len(sums) or 'no'} different pictures: {ENOUGH}.")
    return hashlib.sha256("".join(sums).encode()).hexdigest()


def check_kind(path: Path) -> None:
    """Raise StartupError for a file that holds no rows, by its beginning and its ending. Raises OSError."""
    with path.open("rb") as content:
        head = content.read(HEAD)
    if images.begins_as_picture(head):
        raise StartupError(f"--calibrate: {path} is a single picture: it takes {KINDS}.")
    if path.suffix not in (".npz", ".jsonl"):
        raise StartupError(f"--calibrate: {path} is no such file: it takes {KINDS}.")


def pictures_in(folder: Path) -> list[Path]:
    """Return the pictures in a folder that are used, in an order that has nothing to do with their names.

    Folders of one class each would else calibrate with the first classes only. Raises OSError.
    """
    found: list[tuple[str, Path]] = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            file = Path(place, name)
            if not name.startswith(".") and file.is_file():
                order = hashlib.sha256(os.fsencode(file.relative_to(folder).as_posix())).hexdigest()
                found.append((order, file))
    pictures = []
    for _, file in sorted(found):
        with file.open("rb") as content:
            if images.begins_as_picture(content.read(HEAD)):
                pictures.append(file)
        if len(pictures) == MOST + HELD:
            break
    return pictures


def read_samples(settings: Settings, spec: Spec) -> Samples:
    """Return the rows that --calibrate names, as the model takes them. Raises StartupError."""
    path = Path(settings.calibrate)
    with readable(path):
        if path.is_dir():
            rows = from_pictures(path, settings, spec)
        else:
            check_kind(path)
            rows = from_npz(path, spec) if path.suffix == ".npz" else from_jsonl(path, spec)
        different = {hashlib.sha256(b"".join(array.tobytes() for array in row)).digest(): row for row in rows}
    if len(different) < LEAST:
        raise StartupError(f"--calibrate: {path} has {len(different)} different rows: {ENOUGH}.")
    size = max(sum(array.nbytes for array in row) for row in different.values())
    chosen = [different[key] for key in sorted(different)][: max(LEAST, min(MOST + HELD, MEMORY // size))]
    calibrating = min(MOST, 2 * len(chosen) // 3)
    return Samples(chosen[:calibrating], chosen[calibrating:])


# ----------------------------------------------------------------------------------------------------------
# Pictures
# ----------------------------------------------------------------------------------------------------------


def from_pictures(folder: Path, settings: Settings, spec: Spec) -> Iterator[Row]:
    """Yield the row of each picture in a folder, without those that cannot be read. Raises StartupError, OSError."""
    if not spec.image or spec.inputs[0].dtype == "int8":
        raise StartupError(
            f"--calibrate: {folder} is a folder of pictures, and {spec.name} takes none from /predict: it needs an "
            ".npz file with an array for each input, or a .jsonl file with a row a line."
        )
    refused: list[str] = []
    for file in pictures_in(folder):
        try:
            image = images.Picture(file.read_bytes(), settings.max_megapixels).image()
            yield [prepared(image, spec, settings)]
        except images.ImageError as error:
            refused.append(f"{file}: {error}")
    if refused:
        log.warning("--calibrate: %d pictures are passed over, such as %s", len(refused), refused[0])


def prepared(image: Any, spec: Spec, settings: Settings) -> np.ndarray:
    """Return an opened picture as the model takes it: what prepare_image of run_keras_server.py does as it comes.

    Float32 or what else the model's input is, shape (1, height, width, channels), or with the channels first. Raises
    ImageError.
    """
    side = images.least_side(spec.target, settings.interpolation)
    image = images.decode(image, side, spec.mode, settings.background)
    image = images.resize(image, spec.target, settings.crop, settings.interpolation)
    array = images.to_array(image, spec.preprocess)
    if spec.image and spec.image[3]:
        array = np.ascontiguousarray(np.moveaxis(array, -1, 0))
    return array[np.newaxis].astype(numpy_type(spec.inputs[0].dtype), copy=False)


# ----------------------------------------------------------------------------------------------------------
# Files of rows
# ----------------------------------------------------------------------------------------------------------


def from_npz(path: Path, spec: Spec) -> Iterator[Row]:
    """Yield the rows of arrays that numpy.savez has saved. Raises StartupError."""
    try:
        with np.load(path) as content:
            arrays = {name: content[name] for name in content.files}
    except (ValueError, EOFError, zipfile.BadZipFile, KeyError):
        raise StartupError(f"--calibrate: {path} is no file of numpy.savez, or a damaged one.") from None
    check_names(path, arrays.keys(), spec)
    counts = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if len({*counts.values()}) > 1:
        said = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise StartupError(f"--calibrate: {path} has not the same number of rows for each input: {said}.")
    for number in range(min(counts.values())):
        yield [as_input(arrays[tensor.name][number], tensor, str(path)) for tensor in spec.inputs]


def from_jsonl(path: Path, spec: Spec) -> Iterator[Row]:
    """Yield the rows of a file with one a line: a list, or an object with one for each input. Raises StartupError."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                raise StartupError(f"--calibrate: {where} is no JSON: a row a line is wanted.") from None
            if isinstance(value, dict):
                check_names(where, value.keys(), spec)
                columns = [value[tensor.name] for tensor in spec.inputs]
            elif len(spec.inputs) == 1:
                columns = [value]
            else:
                names = ", ".join(tensor.name for tensor in spec.inputs)
                raise StartupError(f"--calibrate: {where} has to be an object with {names}.")
            yield [as_input(column, tensor, where) for column, tensor in zip(columns, spec.inputs, strict=True)]


def check_names(where: object, names: Any, spec: Spec) -> None:
    """Raise StartupError where a file has not the inputs of the model by their names."""
    wanted = [tensor.name for tensor in spec.inputs]
    if sorted(names) != sorted(wanted):
        there = ", ".join(sorted(names)) or "nothing"
        raise StartupError(f"--calibrate: {where} has {there}, and {spec.name} takes {', '.join(wanted)}.")


def as_input(value: Any, tensor: Tensor, where: str) -> np.ndarray:
    """Return the array of one row of an input. Raises StartupError where it is none."""
    dtype = np.dtype(numpy_type(tensor.dtype))
    came = "lists of different lengths, or no numbers"
    array: np.ndarray | None = None
    try:
        raw = np.asarray(value)
        if raw.dtype.kind in "biuf":
            array, came = raw.astype(dtype), f"shape {list(raw.shape)}"
            if dtype.kind in "biu" and not np.array_equal(array, raw):
                array, came = None, f"numbers that are not {dtype.name}"
            elif not np.isfinite(array).all():
                array, came = None, "numbers that are not finite"
    except (ValueError, OverflowError):
        pass
    fits = array is not None and len(array.shape) == len(tensor.shape) and 0 not in array.shape
    if array is None or not fits or any(e not in (None, s) for s, e in zip(array.shape, tensor.shape, strict=True)):
        shape = ", ".join("any" if size is None else str(size) for size in tensor.shape)
        raise StartupError(
            f"--calibrate: {where}: a row of {tensor.name} is {tensor.dtype} of shape [{shape}], and {came} came."
        )
    return array[np.newaxis]

"""The contact sheet: one HTML file, complete in itself, with a thumbnail of each photo by label and certainty."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import jinja2
from PIL import Image

from keras_server import images
from keras_server.machine import processors
from simple_request import Answer

SIDE = 160  # pixels of a thumbnail's longer side
AT_ONCE = 256  # thumbnails held in memory


class Photo(NamedTuple):
    """A photo as the sheet shows it."""

    name: str
    link: str  # from the sheet to the file
    words: str  # how certain the label is, the values, or why there are none
    picture: str  # a data URI, or nothing where the file cannot be shown


class Group(NamedTuple):
    """The photos under one heading."""

    title: str
    size: int
    photos: Iterator[Photo]


def write_sheet(path: Path, results: Iterable[Answer], max_megapixels: float) -> None:
    """Write the sheet of results. Raises OSError."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
    with ThreadPoolExecutor(processors()) as pool:
        groups = [
            Group(title, len(members), photos(members, path.parent, max_megapixels, pool))
            for title, members in grouped(results)
        ]
        total = sum(group.size for group in groups)
        page = environment.get_template("sheet.html").generate(groups=groups, total=total, side=SIDE)
        with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(page)


def grouped(results: Iterable[Answer]) -> Iterator[tuple[str, list[Answer]]]:
    """Yield the labels in alphabetical order with their photos, the surest first; then values, then what failed."""
    labels: dict[str, list[Answer]] = {}
    values: list[Answer] = []
    failed: list[Answer] = []
    for result in results:
        if not result["success"]:
            failed.append(result)
        elif "values" in result:
            values.append(result)
        else:
            labels.setdefault(result["predictions"][0]["label"], []).append(result)
    for label in sorted(labels, key=str.casefold):
        yield label, sorted(labels[label], key=lambda result: -result["predictions"][0]["probability"])
    if values:
        yield "Values", sorted(values, key=lambda result: result["values"])
    if failed:
        yield "Failed", failed


def photos(results: list[Answer], folder: Path, max_megapixels: float, pool: ThreadPoolExecutor) -> Iterator[Photo]:
    """Yield results as they are shown, of which only few are in memory."""
    for first in range(0, len(results), AT_ONCE):
        yield from pool.map(lambda result: photo(result, folder, max_megapixels), results[first : first + AT_ONCE])


def photo(result: Answer, folder: Path, max_megapixels: float) -> Photo:
    """Return a result as it is shown."""
    name = result["filename"]
    if not result["success"]:
        words = result["error"]
    elif "values" in result:
        words = " ".join(f"{value:.6g}" for value in result["values"])
    else:
        words = f"{result['predictions'][0]['probability']:.1%}"
    link = quote(os.path.relpath(name, folder).replace(os.sep, "/").encode("utf-8", "surrogateescape"))
    return Photo(name, link, words, thumbnail(name, max_megapixels))


def thumbnail(name: str, max_megapixels: float) -> str:
    """Return a small JPEG of a photo as a data URI, or nothing where it cannot be read any more."""
    try:
        image = images.open_image(Path(name).read_bytes(), max_megapixels)
        image = images.decode(image, SIDE, "RGB")
    except (OSError, images.ImageError):
        return ""
    image.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC, reducing_gap=2.0)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=75)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()

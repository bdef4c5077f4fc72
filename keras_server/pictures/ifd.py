"""The directories of a TIFF: which tags they hold, and how many values each has (TIFF 6.0, section 2, and BigTIFF)."""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

import numpy as np

from keras_server.pictures import limits
from keras_server.pictures.limits import ImageError, refuse

SIZES = {
    1: 1,
    2: 1,
    3: 2,
    4: 4,
    5: 8,
    6: 1,
    7: 1,
    8: 2,
    9: 4,
    10: 8,
    11: 4,
    12: 8,
    13: 4,
    16: 8,
    17: 8,
    18: 8,
}  # of types
INTEGERS = {1: "u1", 3: "u2", 4: "u4", 6: "i1", 8: "i2", 9: "i4", 13: "u4", 16: "u8", 17: "i8", 18: "u8"}
WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, SAMPLES, ROWS, PLANAR = 256, 257, 258, 259, 262, 277, 278, 284
STRIPS, STRIP_SIZES, TILES, TILE_SIZES, TILE_WIDTH, TILE_HEIGHT, BELOW = 273, 279, 324, 325, 322, 323, 330
# The marker of a frame, and its length and bits, that TIFF's own kinds of JPEG have not (Technical Note 2 of 1995).
PROGRESSIVE = re.compile(rb"\xff[\xc2\xc6\xc9-\xcb\xcd-\xcf]\0[\x0b\x0e\x11\x14]\x08")
UNCOMPRESSED, LZMA, JPEGS = 1, 34925, (6, 7)


class Entry(NamedTuple):
    """A tag of a directory."""

    type: int
    number: int  # of values
    place: int  # where the values stand


class Directory:
    """One directory of a TIFF, of which nothing is read but what is asked for."""

    def __init__(self, data: bytes, at: int | None = None):
        """Take a file that says that it is a TIFF, and where the directory stands; else it is the first.

        Raises ImageError for too many tags, or the same twice, and struct.error where the file ends before it.
        """
        self.data, self.order = data, "<" if data[:1] == b"I" else ">"
        self.big = data[2:4] in (b"+\0", b"\0+")
        word, entry = ("Q", "HHQ") if self.big else ("I", "HHI")
        if at is None:
            (at,) = self.unpack(word, 8 if self.big else 4)
        (count,) = self.unpack("Q" if self.big else "H", at)
        if count > limits.PARTS:
            raise refuse("TIFF", "tags", limits.PARTS)
        at += 8 if self.big else 2
        head, length, room = (12, 20, 8) if self.big else (8, 12, 4)
        self.entries: dict[int, Entry] = {}
        for place in range(at, min(at + count * length, len(data) - length + 1), length):
            tag, kind, values = self.unpack(entry, place)
            inside = SIZES.get(kind, 1) * values <= room
            where = place + head if inside else self.unpack(word, place + head)[0]
            if tag in self.entries:  # of which one reader takes the first, another the last
                raise ImageError(f"The TIFF has its tag {tag} twice: save it anew.")
            self.entries[tag] = Entry(kind, values, where)

    def unpack(self, form: str, at: int) -> tuple[int, ...]:
        """Return numbers of the file, in its byte order."""
        return struct.unpack_from(self.order + form, self.data, at)

    def values(self, tag: int, most: int = 1) -> list[int]:
        """Return at most so many of a tag's whole numbers; those that lie outside of the file are none."""
        entry = self.entries.get(tag)
        if not entry or entry.type not in INTEGERS:
            return []
        dtype = np.dtype(self.order + INTEGERS[entry.type])
        there = max(len(self.data) - entry.place, 0) // dtype.itemsize
        return np.frombuffer(self.data, dtype, min(entry.number, most, there), entry.place).tolist() if there else []

    def value(self, tag: int, default: int) -> int:
        """Return a tag's first whole number."""
        return (self.values(tag) or [default])[0]

    def below(self) -> list[Directory]:
        """Return the directories that this one names below it."""
        return [Directory(self.data, at) for at in self.values(BELOW, limits.DIRECTORIES)]


def is_modest(exif: bytes) -> bool:
    """Return whether EXIF data, a TIFF without pixels, are short enough to be looked into."""
    try:
        return len(exif) <= limits.EXIF and bool(Directory(exif.removeprefix(b"Exif\0\0")).entries)
    except (ImageError, struct.error):
        return False


def check(first: Directory) -> int:
    """Return how many pixels a decoder of a TIFF's first directory goes through, those of tiles that jut out included.

    Raises ImageError for more strips or tiles than a picture needs, or ones that name the same bytes again and again.
    """
    data = first.data
    width, height = first.value(WIDTH, 0), first.value(HEIGHT, 0)
    tiled = TILES in first.entries
    places, sizes = (TILES, TILE_SIZES) if tiled else (STRIPS, STRIP_SIZES)
    named = [first.entries[tag].number for tag in (places, sizes) if tag in first.entries]
    if max(named, default=0) > limits.PIECES:
        raise refuse("TIFF", "strips or tiles", limits.PIECES)
    if BELOW in first.entries and first.entries[BELOW].number > limits.DIRECTORIES:
        raise refuse("TIFF", "pictures below its first", limits.DIRECTORIES)
    across, down = (
        (first.value(TILE_WIDTH, 1), first.value(TILE_HEIGHT, 1)) if tiled else (width, first.value(ROWS, height))
    )
    across, down = max(across, 1), max(min(down, height) if not tiled else down, 1)
    planes = first.value(SAMPLES, 1) if first.value(PLANAR, 1) == 2 else 1
    pieces = -(-width // across) * -(-height // down)
    if pieces * planes > limits.PIECES:
        raise refuse("TIFF", "strips or tiles", limits.PIECES)
    compression = first.value(COMPRESSION, UNCOMPRESSED)
    if compression == LZMA:  # whose decoder takes as much memory as the file tells it to
        raise ImageError("This is a TIFF compressed by LZMA, which is not read: save it with another compression.")
    if compression in JPEGS and PROGRESSIVE.search(data):
        raise ImageError("This is a TIFF of progressive or arithmetic JPEGs, which TIFFs must not hold: save it anew.")
    lengths = first.values(sizes, limits.PIECES) or [len(data)] * max(pieces, *named, 1)
    if len(lengths) > 1 and compression != UNCOMPRESSED and sum(lengths) > limits.OVERLAP * len(data):
        raise ImageError("The strips of the TIFF name its bytes again and again: save it anew.")
    return pieces * across * down

"""What a picture may ask for, and the error of one that asks for more or is none."""

from __future__ import annotations

PARTS = 256  # segments of a JPEG, chunks of a PNG or WebP, blocks of a GIF, tags of a TIFF
PIECES = 20_000  # in which pixels come: IDAT chunks, frames, sub-blocks of a GIF's comments, strips and tiles
SCANS = 50  # of a component of a JPEG; libjpeg's own script for progressive ones has 6
DIRECTORIES = 16  # of a TIFF, below its first
RUNS = 2**20  # bytes of a BMP in run lengths, which Pillow decodes in Python
RUN_PIXELS = 2_000_000  # and pixels
EXIF = 2**17  # bytes of EXIF that are looked into, more than the 64 KiB that a JPEG's has
OVERLAP = 2  # how often the strips of a TIFF may name each of its bytes


class ImageError(ValueError):
    """An upload that is no acceptable image; the message is a sentence for the client."""


def refuse(kind: str, what: str, most: float) -> ImageError:
    """Return the error for a file of more parts than a picture needs."""
    return ImageError(f"The {kind} has more than {most:,} {what}, which no picture needs: save it anew.")

"""What decoding a picture takes of a processor and of memory, estimated from above.

Measured with benchmarks/decoding.py on photographs, noise and single colours of 25 million pixels.
"""

from __future__ import annotations

from typing import NamedTuple

from keras_server.pictures.parts import Jpeg

# By Pillow's name of the format: nanoseconds a pixel, and bytes a pixel at the moment when they are most. Run lengths
# Pillow decodes in Python.
COSTS = {
    "JPEG": (2, 5), "PNG": (30, 9), "GIF": (15, 9), "BMP": (5, 9), "TIFF": (20, 9), "WEBP": (35, 21), "AVIF": (30, 17),
    "HEIF": (50, 13), "BMP in runs": (300, 9),
}  # fmt: skip
BYTE = 10  # nanoseconds for each of the file
IDCT = 10  # for each pixel of a JPEG that comes out
COEFFICIENTS = 3  # for each that a scan goes through, where they are buffered, and coded by Huffman
ARITHMETIC = 10  # likewise, coded arithmetically
COPIED = 2**21  # pixels that a picture has at most whose copies are resized
COPIES = 12  # bytes for each, with the copies


class Work(NamedTuple):
    """What a picture takes while it is decoded."""

    pixels: int
    seconds: float  # of one processor
    bytes: int


def estimate(format: str, pixels: int, length: int) -> Work:
    """Return the work for a picture of this format whose file has this length."""
    each, memory = COSTS[format]
    return Work(pixels, (each * pixels + BYTE * length) / 1e9, at_least_copied(memory * pixels, pixels))


def at_least_copied(memory: int, pixels: int) -> int:
    """Return the bytes at the moment when they are most, which may be when a small picture is resized."""
    return max(memory, COPIES * min(pixels, COPIED))


def estimate_jpeg(jpeg: Jpeg, length: int, side: int, whole: bool) -> Work:
    """Return the work for a JPEG that is decoded to at least `side` pixels a side, where it is `whole`.

    Where its end is missing, it is decoded at its full size several times.
    """
    pixels = jpeg.width * jpeg.height
    scale = min(jpeg.width, jpeg.height) // max(side, 1)
    decoded = pixels // max(size for size in (1, 2, 4, 8) if size <= max(scale, 1)) ** 2
    each, memory = COSTS["JPEG"]
    seconds, buffer = each * pixels + IDCT * decoded + BYTE * length, memory * decoded
    buffer = at_least_copied(buffer, decoded)
    if jpeg.buffered:
        buffer += 2 * jpeg.samples
    seconds += (ARITHMETIC if jpeg.arithmetic else COEFFICIENTS if jpeg.buffered else 0) * jpeg.scanned
    if not whole:
        seconds, buffer = 3 * (seconds + IDCT * pixels), buffer + 11 * pixels
    return Work(pixels, seconds / 1e9, buffer)

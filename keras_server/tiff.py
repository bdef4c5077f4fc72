"""TIFFs of more than 8 bits a channel, brought to 8 by what their own tags say, or refused by the kind's name.

Tags and their values are those of TIFF 6.0 (Adobe, 1992), and of its supplement for alpha.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import struct
from typing import Any

import numpy as np
from PIL import Image

from keras_server.pictures import ifd
from keras_server.pictures.limits import ImageError
from keras_server.pictures.work import BYTE, Work

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB = 0, 1, 2
KINDS = {3: "a palette", 4: "a mask", 5: "CMYK", 6: "YCbCr", 8: "CIELAB", 9: "ICCLAB", 10: "ITULAB"}
ORIENTATION = 0x0112
ROWS = 64
COLOUR_FILTER = (32803, 34892)  # the photometrics of what a camera's sensor saw
DEEP = 25  # nanoseconds for a sample of more than 8 bits
JUTTING = 4_000_000  # pixels of tiles that a small picture may have beside its own
FORMATS = {2: "with a sign", 5: "of complex integers", 6: "of complex numbers"}

logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what is wrong with a file is said to its sender


class TiffError(ValueError):
    """A TIFF of a kind that is not read; the message names the kind."""


def is_tiff(data: bytes) -> bool:
    """Return whether a file says that it is a TIFF."""
    return data.startswith(MAGIC)


class Tiff:
    """What the first directory of a TIFF says of it; a file that has none that can be read is an empty one."""

    def __init__(self, data: bytes):
        """Look at a file. Raises ImageError for more parts than a picture needs."""
        self.length, self.pixels = len(data), 0  # pixels that a decoder goes through
        self.first: ifd.Directory | None = None
        self.below: list[ifd.Directory] = []
        with contextlib.suppress(struct.error):
            self.first = ifd.Directory(data)
            self.pixels = ifd.check(self.first)
            self.below = self.first.below()

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return (self.first.value(ifd.WIDTH, 0), self.first.value(ifd.HEIGHT, 0)) if self.first else (0, 0)

    def is_raw(self) -> bool:
        """Return whether it is a camera's raw photograph, whose first picture is often but a small preview."""
        directories = [self.first, *self.below] if self.first else []
        return any(50706 in each.entries or each.value(ifd.PHOTOMETRIC, 0) in COLOUR_FILTER for each in directories)

    def check(self, max_megapixels: float) -> None:
        """Raise ImageError for more pixels than are allowed, with those of tiles that jut out."""
        if self.first and self.pixels > max_megapixels * 1e6 + JUTTING:
            raise ImageError(
                f"The tiles of the TIFF have {self.pixels / 1e6:.0f} million pixels, more than the "
                f"{max_megapixels:g} million allowed: shrink it."
            )

    def work(self) -> Work:
        """Return what it takes to bring it to 8 bits."""
        assert self.first
        samples, bits = self.first.value(ifd.SAMPLES, 1), self.first.value(ifd.BITS, 1)
        pixels = max(self.pixels, math.prod(self.size))
        return Work(pixels, (DEEP * samples * pixels + BYTE * self.length) / 1e9, pixels * (samples * bits // 4 + 10))


def is_deep(image: Image.Image) -> bool:
    """Return whether Pillow would not bring an opened TIFF to 8 bits, or not by its tags."""
    tags: Any = getattr(image, "tag_v2", {})
    return bool(max(tags.get(258, (1,))) > 8 or {*tags.get(339, (1,))} - {1, 4})


def read(data: bytes, opened: Image.Image | None) -> Image.Image:
    """Return the first picture of a deep TIFF in L, LA, RGB or RGBA, with its orientation.

    `opened` is what Pillow made of it, if anything. Raises TiffError, or whatever a damaged file trips over.
    """
    import tifffile

    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page: Any = file.pages[0]
        tags = page.tags

        def tag(code: int, default: Any) -> Any:
            return tags[code].value if code in tags else default

        bits, samples = int(page.bitspersample), int(page.samplesperpixel)
        bits_only = int(page.sampleformat) == 1
        if bits <= 8 and bits_only:
            raise unreadable(page, len(data))
        if samples == 1 and opened is not None:
            pixels = np.asarray(opened)[..., np.newaxis]  # Pillow unpacks 12 bits, and knows more compressions
            if opened.mode == "I":
                pixels = pixels.view(np.uint32)
        else:
            planar = page.planarconfig == 2 and samples > 1
            try:
                packed = bits in (10, 12, 14) and not planar and page.compression == 1 and not page.is_tiled
                pixels = unpack(page, data, bits, samples) if packed else page.asarray()
            except Exception:  # noqa: BLE001 - of compressions that it does not know it raises several kinds
                if (
                    opened is not None
                    and opened.mode in ("RGB", "RGBA")
                    and bits_only
                    and not planar
                    and page.photometric == RGB
                ):
                    return opened  # Pillow takes the high byte of 16 bits
                raise unreadable(page, len(data)) from None
            pixels = np.moveaxis(pixels, 0, -1) if planar else pixels.reshape(*pixels.shape[:2], samples)
        photometric, orientation, alpha = int(page.photometric), int(tag(ORIENTATION, 1)), tag(338, ())
        alpha = alpha if isinstance(alpha, tuple) else (alpha,)
        bands = [  # few rows at a time, for between 0 and 1 they take several times the memory
            to_bytes(scale(pixels[row : row + ROWS], bits, int(page.sampleformat), tag), photometric, bits, alpha)
            for row in range(0, len(pixels), ROWS)
        ]
    image = Image.fromarray(np.concatenate(bands))
    image.getexif()[ORIENTATION] = orientation
    return image


def unreadable(page: Any, length: int) -> Exception:
    """Return why a picture cannot be decoded: its kind, if all of it is there."""
    ends = [start + size for start, size in zip(page.dataoffsets, page.databytecounts, strict=True)]
    if not ends or max(ends) > length:
        return ValueError("it is cut off")
    packing = page.compression.name.replace("NONE", "no compression")
    return TiffError(f"a TIFF of {page.samplesperpixel} x {page.bitspersample} bits with {packing}")


def unpack(page: Any, data: bytes, bits: int, samples: int) -> np.ndarray:
    """Return the samples of an uncompressed picture that are packed without gaps, in rows of whole bytes; uint16."""
    width, height = int(page.imagewidth), int(page.imagelength)
    size = (width * samples * bits + 7) // 8  # bytes a row
    packed = b"".join(
        data[start : start + length] for start, length in zip(page.dataoffsets, page.databytecounts, strict=True)
    )
    rows = np.frombuffer(packed, np.uint8, size * height).reshape(height, size)
    pixels, weights = np.empty((height, width * samples), np.uint16), 1 << np.arange(bits, dtype=np.uint16)[::-1]
    for row, out in zip(rows, pixels, strict=True):
        np.matmul(np.unpackbits(row)[: width * samples * bits].reshape(-1, bits), weights, out=out)
    return pixels.reshape(height, width, samples)


def scale(pixels: np.ndarray, bits: int, sample_format: int, tag: Any) -> np.ndarray:
    """Return samples between 0 and 1, float32. Raises TiffError where the tags do not say where white is."""
    if sample_format == 1:
        return pixels.astype(np.float32) / np.float32(2.0**bits - 1)
    if sample_format != 3:
        raise TiffError(f"a TIFF of {bits} bits {FORMATS.get(sample_format, 'of another kind')}")
    least, most = np.ravel(tag(340, 0))[0], np.ravel(tag(341, 1))[0]
    if not np.isfinite(pixels).all() or pixels.min() < least or pixels.max() > most or most <= least:
        raise TiffError("a TIFF of fractions whose range it does not name")
    return np.asarray((pixels - least) / (most - least), np.float32)


def to_bytes(values: np.ndarray, photometric: int, bits: int, alpha: tuple[int, ...]) -> np.ndarray:
    """Return the pixels, uint8, of samples between 0 and 1, shape (height, width, channels). Raises TiffError."""
    colours = {WHITE_IS_ZERO: 1, BLACK_IS_ZERO: 1, RGB: 3}.get(photometric)
    if not colours:
        raise TiffError(f"a TIFF of {bits} bits a channel in {KINDS.get(photometric, 'colours of another kind')}")
    if values.shape[-1] < colours:
        raise TiffError(f"a TIFF of {bits} bits with {values.shape[-1]} channels")
    picture = values[..., :colours]
    if photometric == WHITE_IS_ZERO:
        picture = 1 - picture
    if values.shape[-1] > colours and alpha and alpha[0] in (1, 2):
        opacity = values[..., colours : colours + 1]
        if alpha[0] == 1:  # the colours are multiplied by it already
            picture = np.divide(picture, opacity, out=np.zeros_like(picture), where=opacity > 0)
        picture = np.concatenate([picture, opacity], -1)
    bytes_ = np.rint(255 * picture.clip(0, 1)).astype(np.uint8)
    return np.asarray(bytes_[..., 0] if bytes_.shape[-1] == 1 else bytes_)

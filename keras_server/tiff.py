"""TIFFs of more than 8 bits a channel, brought to 8 by what their own tags say, or refused by the kind's name.

Tags and their values are those of TIFF 6.0 (Adobe, 1992), and of its supplement for alpha.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB = 0, 1, 2
KINDS = {3: "a palette", 4: "a mask", 5: "CMYK", 6: "YCbCr", 8: "CIELAB", 9: "ICCLAB", 10: "ITULAB"}
ORIENTATION = 0x0112


class TiffError(ValueError):
    """A TIFF of a kind that is not read; the message names the kind."""


def is_tiff(data: bytes) -> bool:
    """Return whether a file says that it is a TIFF."""
    return data.startswith(MAGIC)


def size(data: bytes) -> tuple[int, int, int]:
    """Return width, height and bits a channel of the first picture. Raises whatever a damaged file trips over."""
    import tifffile

    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page: Any = file.pages[0]
        return int(page.imagewidth), int(page.imagelength), int(page.bitspersample)


def is_deep(image: Image.Image) -> bool:
    """Return whether Pillow would not bring an opened TIFF to 8 bits, or not by its tags."""
    tags: Any = getattr(image, "tag_v2", {})
    return bool(max(tags.get(258, (1,))) > 8)


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
        if samples == 1 and opened is not None:
            pixels = np.asarray(opened)[..., np.newaxis]  # Pillow unpacks 12 bits, and knows more compressions
            if opened.mode == "I":
                pixels = pixels.view(np.uint32)
        else:
            try:
                pixels = page.asarray()
            except ValueError as error:
                if "imagecodecs" not in str(error):  # which would be needed for this compression
                    raise
                raise TiffError(f"a TIFF of {bits} bits a channel, compressed with {page.compression.name}") from None
            planar = page.planarconfig == 2 and samples > 1
            pixels = np.moveaxis(pixels, 0, -1) if planar else pixels.reshape(*pixels.shape[:2], samples)
        photometric, orientation = int(page.photometric), int(tag(ORIENTATION, 1))
        values = scale(pixels, bits, int(tag(339, (1,))[0] if isinstance(tag(339, 1), tuple) else tag(339, 1)), tag)
        alpha = tag(338, ())
    image = to_image(values, photometric, bits, alpha if isinstance(alpha, tuple) else (alpha,))
    image.getexif()[ORIENTATION] = orientation
    return image


def scale(pixels: np.ndarray, bits: int, sample_format: int, tag: Any) -> np.ndarray:
    """Return samples between 0 and 1, float32. Raises TiffError where the tags do not say where white is."""
    if sample_format == 1:
        return pixels.astype(np.float32) / np.float32(2.0**bits - 1)
    if sample_format != 3:
        raise TiffError(f"a TIFF of {bits} bits with a sign")
    least, most = np.ravel(tag(340, 0))[0], np.ravel(tag(341, 1))[0]
    if not np.isfinite(pixels).all() or pixels.min() < least or pixels.max() > most or most <= least:
        raise TiffError("a TIFF of fractions whose range it does not name")
    return np.asarray((pixels - least) / (most - least), np.float32)


def to_image(values: np.ndarray, photometric: int, bits: int, alpha: tuple[int, ...]) -> Image.Image:
    """Return the picture of samples between 0 and 1, shape (height, width, channels). Raises TiffError."""
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
    return Image.fromarray(bytes_[..., 0] if bytes_.shape[-1] == 1 else bytes_)

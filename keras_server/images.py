"""Pictures: open, decode, bring to the model's channels, turn into numbers."""

from __future__ import annotations

import contextlib
import io

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's names, by number of channels

# What the preprocess_input of keras.applications does to pixels in 0..255, as (pixels - mean) / deviation with the
# channels in this order. In figures, for a start from the cache has no Keras; a test holds them against Keras' own.
PREPROCESS: dict[str, tuple[str, tuple[float, ...], tuple[float, ...]]] = {
    "none": ("RGB", (0, 0, 0), (1, 1, 1)),
    "caffe": ("BGR", (103.939, 116.779, 123.68), (1, 1, 1)),
    "tf": ("RGB", (127.5, 127.5, 127.5), (127.5, 127.5, 127.5)),
    "torch": ("RGB", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
}

Image.MAX_IMAGE_PIXELS = None  # open_image has the limit, and Pillow's own would only warn
PngImagePlugin.MAX_TEXT_MEMORY = 2**20  # bytes of all comments in a PNG, unpacked; Pillow's own limit is 64 MiB


class ImageError(ValueError):
    """An upload that is no acceptable image; the message is a sentence for the client."""


def open_image(data: bytes, max_megapixels: float) -> Image.Image:
    """Open an encoded image of at most so many million pixels; only its header is read yet. Raises ImageError."""
    if not data:
        raise ImageError("The file is empty.")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception:  # noqa: BLE001 - Pillow's readers raise whatever a mutilated header trips over
        raise ImageError(f"This is not an image that the server reads ({', '.join(FORMATS)}).") from None
    if image.width * image.height > max_megapixels * 1e6:
        raise ImageError(
            f"The image has {image.width} x {image.height} pixels, more than the {max_megapixels:g} "
            "million allowed: shrink it."
        )
    # A JPEG has a bit at least for each 8 x 8 pixels; what is missing of them Pillow would paint grey.
    if image.format in ("JPEG", "MPO") and image.width * image.height > 64 * 8 * len(data):
        raise ImageError("The image is damaged or cut off: it cannot be decoded.")
    return image


def decode(image: Image.Image, side: int, mode: str) -> Image.Image:
    """Return the opened image in `mode`, upright, of its full size or, from a JPEG, at least `side` pixels a side.

    Raises ImageError.
    """
    try:
        image.draft("RGB", (side, side))
        image.load()
        with contextlib.suppress(Exception):  # EXIF data that cannot be read says nothing about the pixels
            ImageOps.exif_transpose(image, in_place=True)
        return convert_mode(image, mode)
    except Exception:  # noqa: BLE001 - as in open_image
        raise ImageError("The image is damaged or cut off: it cannot be decoded.") from None


def convert_mode(image: Image.Image, mode: str) -> Image.Image:
    """Return the image in `mode` (L, RGB or RGBA), whatever its own. Alpha is dropped as Keras' load_img drops it."""
    if image.mode.startswith("I") or image.mode == "F":  # 16 or 32 bits a pixel, which Pillow would clip at 255
        pixels = np.nan_to_num(np.asarray(image, np.float32))
        highest = pixels.max(initial=0)
        if image.mode == "F":
            pixels *= 255 if highest <= 1 else 1
        elif image.mode != "I" or highest > 255:
            pixels /= 257
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    if image.mode == "P":  # by way of RGBA, or Pillow warns of transparent palettes
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return a picture's width and height once its EXIF orientation is followed."""
    try:
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    except Exception:  # noqa: BLE001 - as in decode: EXIF that cannot be read says nothing
        turned = False
    return (image.height, image.width) if turned else (image.width, image.height)


def to_array(image: Image.Image, preprocess: str) -> np.ndarray:
    """Return an L, RGB or RGBA image as the model takes it: float32, shape (height, width, channels).

    `preprocess` is a key of PREPROCESS: what is done to the pixels, which are 0..255.
    """
    order, mean, deviation = PREPROCESS[preprocess]
    width, channels = image.width, len(image.getbands())
    # As rows of width x channels, in which numpy computes several times faster than in triples.
    pixels = np.frombuffer(image.tobytes("raw", order if channels == 3 else image.mode), np.uint8)
    rows = pixels.reshape(image.height, -1).astype(np.float32)
    if preprocess != "none":
        rows -= np.tile(np.array(mean[:channels], np.float32), width)
        rows /= np.tile(np.array(deviation[:channels], np.float32), width)
    return rows.reshape(image.height, width, channels)

"""Bicubic resizing: as Pillow does it or, where cykooz-resizer is installed, with SIMD, to the same within rounding."""

from __future__ import annotations

from importlib.metadata import version

import PIL
from PIL import Image

from keras_server.pictures.work import COPIED

try:  # the choice is made here, once
    import cykooz_resizer as simd
except ImportError:  # it is optional: requirements-resize.txt
    simd = None

RESIZER = f"cykooz-resizer {version('cykooz-resizer')}" if simd else f"Pillow {PIL.__version__}"  # what people are told

GAP = 3.0  # a picture of over twice as many times the target is roughly reduced by Pillow beforehand

Box = tuple[float, float, float, float]  # left, top, right and bottom, in pixels


def bicubic(image: Image.Image, target: tuple[int, int], box: Box) -> Image.Image:
    """Return the part of an image in the box at the target's size, (width, height)."""
    if simd and is_alike(image, target, box):
        return with_simd(image, target, box)
    return image.resize(target, Image.Resampling.BICUBIC, box, GAP)


def is_alike(image: Image.Image, target: tuple[int, int], box: Box) -> bool:
    """Return whether with_simd() makes of the picture what Pillow does: two values in 255 lie between them at most."""
    (width, height), (wide, high) = image.size, target
    if image.mode not in ("L", "RGB") or width * height > COPIED:
        return False
    if box[2] - box[0] >= 2 * GAP * wide or box[3] - box[1] >= 2 * GAP * high:
        return False
    # Pillow 13 changes the height first where it shrinks by so much more, and edges of black and white then differ.
    return high >= height or height - high <= 2 * (width - wide)


def with_simd(image: Image.Image, target: tuple[int, int], box: Box) -> Image.Image:
    """Return what bicubic() does, of an image in L or RGB.

    Width first, as Pillow does: values are cut off at 0 and 255 in between. Python's lock is free while it computes;
    the pixels are copied with it. A resizer has a lock of its own, too, so each call makes one, which costs nothing.
    """
    kind = simd.PixelType.U8 if image.mode == "L" else simd.PixelType.U8x3
    (width, height), (wide, high) = image.size, target
    source = simd.ImageData(width, height, kind, image.tobytes())
    narrow, small = simd.ImageData(wide, height, kind), simd.ImageData(wide, high, kind)
    resizer, algorithm = simd.Resizer(), simd.ResizeAlg.convolution(simd.FilterType.catmull_rom)
    across = simd.CropBox(box[0], 0, box[2] - box[0], height)
    down = simd.CropBox(0, box[1], wide, box[3] - box[1])
    resizer.resize(source, narrow, simd.ResizeOptions(algorithm, crop_box=across))
    resizer.resize(narrow, small, simd.ResizeOptions(algorithm, crop_box=down))
    return Image.frombytes(image.mode, target, small.get_buffer())

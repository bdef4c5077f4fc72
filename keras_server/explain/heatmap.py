"""The picture of a map: heat over the photo."""

from __future__ import annotations

import functools

import numpy as np
from PIL import Image

SIDE = 1024  # most pixels of an overlay's longer side
STRENGTH = 0.75  # how much of the photo the strongest spot hides


@functools.cache
def ramp(steps: int = 256) -> np.ndarray:
    """Return the colours from nothing to most, shape (steps, 3), uint8.

    They rise evenly in lightness, violet over red to yellow, so that they read alike in grey and to the colour-blind.
    Each is as colourful as a screen can show, up to a limit: OKLCh by Bjoern Ottosson.
    """
    t = np.linspace(0, 1, steps)[:, np.newaxis]
    lightness, hue = 0.32 + 0.6 * t, np.radians(290 + 175 * t)
    chroma = np.linspace(0.19, 0, 256)  # shape (steps, 256): the first that the screen can show is taken
    a, b = chroma * np.cos(hue), chroma * np.sin(hue)
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    middle = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    cones = np.stack([long, middle, short], axis=-1)
    to_rgb = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear = cones @ to_rgb.T  # (steps, 256, 3)
    first = ((linear > -1e-4) & (linear < 1 + 1e-4)).all(axis=-1).argmax(axis=1)
    linear = linear[np.arange(steps), first].clip(0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    colours: np.ndarray = np.rint(255 * encoded).astype(np.uint8)
    return colours


def overlay(picture: Image.Image, heat: np.ndarray, box: tuple[float, float, float, float]) -> Image.Image:
    """Return the RGB picture under its map: the more a spot speaks for the label, the more of it is coloured.

    The map is of what the model has seen, which is the part of the picture in the box: left, top, right, bottom.
    """
    left, top, right, bottom = map(round, box)
    size = max(right - left, 1), max(bottom - top, 1)
    smooth = Image.fromarray(heat.astype(np.float32)).resize(size, Image.Resampling.BICUBIC)
    whole = Image.new("F", picture.size)
    whole.paste(smooth, (left, top))
    values = np.asarray(whole).clip(0, 1)
    colours = Image.fromarray(ramp()[np.rint(255 * values).astype(np.uint8)])
    mask = Image.fromarray(np.rint(255 * STRENGTH * values).astype(np.uint8))
    return Image.composite(colours, picture, mask)

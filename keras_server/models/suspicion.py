"""Whether a model's preprocessing looks wrong: it then answers photos of different things alike, and surely."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from keras_server import images
from keras_server.models.served import Served
from keras_server.models.spec import probabilities
from keras_server.settings import Settings

PHOTOS = [Path(__file__).resolve().parents[1] / "bundled" / f"{name}.webp" for name in ("cat", "coffee", "rocket")]
MODES = ("none", "unit", "tf")  # what people train with, and forget to say
SURE = 0.999  # a probability that a thousandfold of what the model knows leads to
APART = 0.05  # by which probabilities differ where the model sees different things


def suspicion(served: Served, settings: Settings) -> str:
    """Return a sentence where another preprocessing tells photos apart that all have the same answer, or nothing.

    Raises what the model does.
    """
    spec = served.spec
    if spec.kind != "classes" or not spec.image or spec.inputs[0].dtype != "float32":
        return ""
    rows = answers(served, settings, spec.preprocess)
    best = rows.argmax(axis=1)
    if len({*best}) > 1 or rows.max(axis=1).min() < SURE:
        return ""
    better = [mode for mode in MODES if mode != spec.preprocess and tells_apart(answers(served, settings, mode))]
    if not better:
        return ""
    return (
        f"A cat, a cup of coffee and a rocket are all {spec.names(rows.shape[1])[best[0]]} to {spec.name}, and surely: "
        f"the preprocessing is probably wrong, for with --preprocess {' or '.join(better)} it tells them apart. "
        f"Compare it with your own photos: keras-server check {settings.model} --expect PHOTO=LABEL"
    )


def tells_apart(rows: np.ndarray) -> bool:
    """Return whether the probabilities, shape (photos, classes), differ from photo to photo."""
    return bool(np.ptp(rows, axis=0).max() > APART)


def answers(served: Served, settings: Settings, mode: str) -> np.ndarray:
    """Return the probabilities of the photos, float32, shape (photos, classes), with a key of PREPROCESS."""
    spec = served.spec
    pictures = []
    for photo in PHOTOS:
        with Image.open(photo) as image:
            picture = images.decode(image, max(image.size), spec.mode, settings.background)
        picture = images.resize(picture, spec.target, settings.crop, settings.interpolation)
        pictures.append(images.to_array(picture, mode))
    batch = np.stack(pictures)
    if spec.image and spec.image[3]:
        batch = np.ascontiguousarray(np.moveaxis(batch, -1, 1))
    return probabilities(served.predict(batch), spec)

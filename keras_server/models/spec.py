"""What a model takes and gives, and what its numbers mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from keras_server.images import MODES
from keras_server.models.agreement import Tested
from keras_server.models.labels import read_labels
from keras_server.settings import Precision

IMAGENET = Path(__file__).resolve().parents[1] / "bundled" / "imagenet_classes.json"  # Keras' class index

Kind = Literal["classes", "values", "none"]

# What the numbers of an output are: one probability a class; one score a class before softmax; one score a class, or of
# the second of two, before sigmoid; plain numbers; or nobody knows.
Meaning = Literal["probabilities", "logits", "binary logits", "values", "unknown"]


@dataclass(frozen=True)
class Tensor:
    """An input or output of the model; the shape is that of one row, without the batch."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str
    meaning: Meaning = "unknown"  # of an output


@dataclass(frozen=True)
class Spec:
    """What is served and how to speak to it. The defaults are ResNet50's."""

    name: str = "resnet50"
    inputs: tuple[Tensor, ...] = (Tensor("image", (224, 224, 3), "float32"),)
    outputs: tuple[Tensor, ...] = (Tensor("predictions", (1000,), "float32", "probabilities"),)
    preprocess: str = "caffe"  # a key of PREPROCESS
    activation: str = "none"  # what makes probabilities of the output: none, softmax or sigmoid
    labels: tuple[str, ...] = field(default_factory=lambda: read_labels(IMAGENET))
    engine: str = "none"
    precision: Precision = "float32"
    tested: Tested | None = None  # how that precision agrees with float32, where it was held against it
    kind: Kind = "classes"  # what /predict answers
    output: int = 0  # the one that /predict answers from
    reason: str = ""  # why it cannot, where kind is "none"
    batch: int | None = None  # rows that the model computes at once, where it takes no other number
    sizes: tuple[tuple[int, ...], ...] = ()  # shapes of a row, for each input, that it is known to compute

    @property
    def image(self) -> tuple[int, int, int, bool] | None:
        """Height, width, channels, and whether the channels come first; None where the model takes no pictures."""
        shape = self.inputs[0].shape
        if len(self.inputs) != 1 or len(shape) != 3 or self.inputs[0].dtype == "string":
            return None
        first = shape[2] not in MODES
        height, width, channels = shape[1:] + shape[:1] if first else shape
        return (height or 224, width or 224, channels, first) if channels in MODES else None

    @property
    def target(self) -> tuple[int, int]:
        """Width and height of the pictures that the model takes, as Pillow orders them."""
        height, width, *_ = self.image or (224, 224)
        return width, height

    @property
    def classes(self) -> int:
        """How many classes an answer can name: two where one output says how probable the second is."""
        return max(2, (self.outputs[self.output].shape or (0,))[-1] or 0)

    @property
    def mode(self) -> str:
        """Pillow's name for pictures with as many channels as the model takes."""
        return MODES[self.image[2] if self.image else 3]

    def names(self, count: int) -> Sequence[str]:
        """Return the labels of so many classes, which are their numbers where the model has none."""
        return self.labels if len(self.labels) == count else [str(i) for i in range(count)]


def numpy_type(dtype: str) -> str:
    """Return numpy's name for a type of Keras': bfloat16, which numpy lacks, is taken and answered as float32."""
    return {"bfloat16": "float32", "string": "object"}.get(dtype, dtype)


def probabilities(preds: np.ndarray, spec: Spec) -> np.ndarray:
    """Return the probabilities, float32, shape (n, classes), in the model's output, shape (n, classes or 1).

    Raises ValueError where the output is not finite, or is said to be probabilities and is none.
    """
    preds = np.asarray(preds, np.float32)
    if not np.isfinite(preds).all():
        raise ValueError(f"{spec.name} answered with numbers that are not finite")
    if spec.activation == "softmax":
        with np.errstate(over="ignore"):  # the least probable of huge logits
            exponentials = np.exp(preds - preds.max(-1, keepdims=True))
        preds = exponentials / exponentials.sum(-1, keepdims=True)
    elif spec.activation == "sigmoid":
        preds = 1 / (1 + np.exp(-preds.clip(-60, 60)))
    elif preds.min(initial=0) < -1e-3 or preds.max(initial=0) > 1 + 1e-3:  # bfloat16 may round beyond by a little
        raise ValueError(
            f"{spec.name} answered with numbers outside 0..1, which are no probabilities: see --activation"
        )
    preds = preds.clip(0, 1)
    return np.concatenate([1 - preds, preds], -1) if preds.shape[-1] == 1 else preds  # the second of two classes

"""What a model takes and gives, and what its numbers mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from keras_server.images import MODES
from keras_server.models.labels import read_labels

IMAGENET = Path(__file__).resolve().parents[1] / "bundled" / "imagenet_classes.json"  # Keras' class index

Kind = Literal["classes", "values", "none"]


@dataclass(frozen=True)
class Tensor:
    """An input or output of the model; the shape is that of one row, without the batch."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str


@dataclass(frozen=True)
class Spec:
    """What is served and how to speak to it. The defaults are ResNet50's."""

    name: str = "resnet50"
    inputs: tuple[Tensor, ...] = (Tensor("image", (224, 224, 3), "float32"),)
    outputs: tuple[Tensor, ...] = (Tensor("predictions", (1000,), "float32"),)
    preprocess: str = "caffe"  # a key of PREPROCESS
    activation: str = "none"  # what makes probabilities of the output: none, softmax or sigmoid
    labels: tuple[str, ...] = field(default_factory=lambda: read_labels(IMAGENET))
    engine: str = "none"
    precision: str = "float32"
    kind: Kind = "classes"  # what /predict answers
    output: int = 0  # the one that /predict answers from
    reason: str = ""  # why it cannot, where kind is "none"

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Spec:
        """Return the spec that asdict() and JSON made of one."""
        tensors = {
            key: tuple(Tensor(t["name"], tuple(t["shape"]), t["dtype"]) for t in found[key])
            for key in ("inputs", "outputs")
        }
        return cls(**found | tensors | {"labels": tuple(found["labels"])})

    @property
    def image(self) -> tuple[int, int, int, bool] | None:
        """Height, width, channels, and whether the channels come first; None where this is no image classifier."""
        shape = self.inputs[0].shape
        if len(self.inputs) != 1 or len(shape) != 3 or len(self.outputs[0].shape) != 1:
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
        return max(2, self.outputs[0].shape[-1] or 0)

    @property
    def mode(self) -> str:
        """Pillow's name for pictures with as many channels as the model takes."""
        return MODES[self.image[2] if self.image else 3]

    def names(self, count: int) -> Sequence[str]:
        """Return the labels of so many classes, which are their numbers where the model has none."""
        return self.labels if len(self.labels) == count else [str(i) for i in range(count)]


def probabilities(preds: np.ndarray, spec: Spec) -> np.ndarray:
    """Return the probabilities, float32, shape (n, classes), in the model's output, shape (n, classes or 1)."""
    preds = np.asarray(preds, np.float32)
    if not np.isfinite(preds).all():
        raise ValueError(f"{spec.name} answered with numbers that are not finite")
    if spec.activation == "softmax":
        with np.errstate(over="ignore"):  # the least probable of huge logits
            exponentials = np.exp(preds - preds.max(-1, keepdims=True))
        preds = exponentials / exponentials.sum(-1, keepdims=True)
    elif spec.activation == "sigmoid":
        preds = 1 / (1 + np.exp(-preds.clip(-60, 60)))
    return np.concatenate([1 - preds, preds], -1) if preds.shape[-1] == 1 else preds  # the second of two classes

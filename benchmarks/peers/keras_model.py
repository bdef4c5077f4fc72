"""What the servers under comparison share: the model, the preparation of a picture, the form of an answer.

Keras is imported where it is needed: a process that only deploys or answers then does without its memory.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

MAX_BATCH = 8
TARGET = (224, 224)
LABELS = Path(__file__).resolve().parents[2] / "keras_server" / "bundled" / "imagenet_classes.json"

takes_numbers = os.environ["BENCH_MODEL"] == "numbers"  # four of them, and three probabilities come back
is_resnet = os.environ["BENCH_MODEL"] == "resnet50"
route = "/v1/models/numbers:predict" if takes_numbers else "/predict"
class_index = json.loads(LABELS.read_text())


def load_model() -> Any:
    """Load the model of the benchmark; for ResNet50, a file of weights stands in for the download."""
    import keras

    path = os.environ["BENCH_WEIGHTS"]
    return keras.applications.ResNet50(weights=path) if is_resnet else keras.saving.load_model(path, compile=False)


def prepare_image(image: Image.Image) -> np.ndarray:
    """Return the picture as the model takes it, of shape (224, 224, 3)."""
    from keras.applications import imagenet_utils

    array = np.asarray(image.convert("RGB").resize(TARGET), dtype="float32")
    return imagenet_utils.preprocess_input(array) if is_resnet else array  # the bundled model scales its input itself


def prepare_numbers(instances: list[list[float]]) -> np.ndarray:
    """Return the one row of a request as the model takes it, of shape (4,)."""
    (row,) = instances
    return np.asarray(row, dtype="float32")


def answer_of(probabilities: np.ndarray) -> dict[str, Any]:
    """Return the answer to one row: its numbers, or of a picture the five best classes in the article's form."""
    if takes_numbers:
        return {"predictions": [probabilities.tolist()]}
    best = np.argsort(probabilities)[-5:][::-1]
    rows = [{"label": class_index[str(i)][1], "probability": float(probabilities[i])} for i in best]
    return {"success": True, "predictions": rows}

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

is_resnet = os.environ["BENCH_MODEL"] == "resnet50"
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


def top_five(probabilities: np.ndarray) -> dict[str, Any]:
    """Return the five most probable classes of one picture, in the article's form."""
    best = np.argsort(probabilities)[-5:][::-1]
    rows = [{"label": class_index[str(i)][1], "probability": float(probabilities[i])} for i in best]
    return {"success": True, "predictions": rows}

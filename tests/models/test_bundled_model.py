"""The files in bundled/: what they contain, and that the bundled model sees a dog in a photo of a dog."""

import hashlib
import json
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "keras_server" / "bundled" / "efficientnet_lite0.keras"
LABELS = ROOT / "keras_server" / "bundled" / "imagenet_classes.json"


@pytest.fixture(scope="module")
def model():
    import keras

    return keras.saving.load_model(MODEL, compile=False, safe_mode=True)


@pytest.fixture(scope="module")
def labels():
    return json.loads(LABELS.read_bytes())


@pytest.fixture(scope="module")
def dog():
    """dog.jpg as a batch of one: (1, 224, 224, 3), float32, 0..255."""
    with Image.open(ROOT / "dog.jpg") as image:
        pixels = image.convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)
    return np.asarray(pixels, "float32")[np.newaxis]


def test_file_is_the_documented_one():
    readme = (ROOT / "keras_server" / "bundled" / "README.md").read_text()
    (documented,) = re.findall(r"^\| SHA-256 \| `([0-9a-f]{64})` \|$", readme, re.MULTILINE)
    assert hashlib.sha256(MODEL.read_bytes()).hexdigest() == documented


def test_file_is_small_enough_for_git():
    assert MODEL.stat().st_size <= 20_000_000


def test_layers_are_all_of_keras():
    with zipfile.ZipFile(MODEL) as archive:
        layers = json.loads(archive.read("config.json"))["config"]["layers"]
    assert {layer["module"] for layer in layers} == {"keras.layers"}
    assert "Lambda" not in {layer["class_name"] for layer in layers}


def test_name_and_shapes(model):
    assert model.name == "efficientnet_lite0"
    assert model.input_shape == (None, 224, 224, 3)
    assert model.output_shape == (None, 1000)


def test_last_feature_map_can_be_reached(model):
    last = [layer for layer in model.layers if len(layer.output.shape) == 4][-1]
    assert (last.name, last.output.shape) == ("head", (None, 7, 7, 1280))


def test_outputs_are_probabilities(model, dog):
    batch = np.concatenate([dog, np.zeros_like(dog), np.full_like(dog, 255)])
    probabilities = model.predict_on_batch(batch)
    assert probabilities.shape == (3, 1000)
    assert probabilities.min() >= 0
    assert probabilities.sum(axis=1) == pytest.approx(1, abs=1e-5)


def test_dog_is_a_german_shepherd(model, labels, dog):
    (probabilities,) = model.predict_on_batch(dog)
    best = int(probabilities.argmax())
    assert labels[str(best)] == ["n02106662", "German_shepherd"]
    assert probabilities[best] > 0.9


def test_labels_are_those_of_keras():
    assert hashlib.md5(LABELS.read_bytes()).hexdigest() == "c2c37ea517e94d9795004a39431a14cb"


@pytest.mark.parametrize(
    ("number", "label"),
    [(0, "tench"), (166, "Walker_hound"), (215, "Brittany_spaniel"), (383, "Madagascar_cat")],
)
def test_labels_are_spelled_as_keras_spells_them(labels, number, label):
    assert len(labels) == 1000
    assert labels[str(number)][1] == label

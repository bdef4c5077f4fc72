"""The article's reader: its three functions, pasted over ours, serve; and a changed one holds on every route."""

import ast
import base64
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from conftest import DOG, ROOT, FakeModel, encode
from flask.testing import FlaskClient
from PIL import Image

import run_keras_server as server
from keras_server.models.labels import read_labels
from keras_server.models.served import Served
from keras_server.models.spec import IMAGENET
from keras_server.settings import Settings

# As printed at blog.keras.io in 2018, by Adrian Rosebrock, with the imports of today and the two lines whole that the
# page has lost (Image.open(io.BytesIO(image)), and the append of a row).
IMPORTS = """
from keras.applications import ResNet50
from keras.utils import img_to_array
from keras.applications import imagenet_utils
from PIL import Image
import numpy as np
import flask
import io
"""
ARTICLE = {
    "load_model": """
def load_model():
    # load the pre-trained Keras model (here we are using a model
    # pre-trained on ImageNet and provided by Keras, but you can
    # substitute in your own networks just as easily)
    global model
    model = ResNet50(weights="imagenet")
""",
    "prepare_image": """
def prepare_image(image, target):
    # if the image mode is not RGB, convert it
    if image.mode != "RGB":
        image = image.convert("RGB")

    # resize the input image and preprocess it
    image = image.resize(target)
    image = img_to_array(image)
    image = np.expand_dims(image, axis=0)
    image = imagenet_utils.preprocess_input(image)

    # return the processed image
    return image
""",
    "predict": """
@app.route("/predict", methods=["POST"])
def predict():
    # initialize the data dictionary that will be returned from the
    # view
    data = {"success": False}

    # ensure an image was properly uploaded to our endpoint
    if flask.request.method == "POST":
        if flask.request.files.get("image"):
            # read the image in PIL format
            image = flask.request.files["image"].read()
            image = Image.open(io.BytesIO(image))

            # preprocess the image and prepare it for classification
            image = prepare_image(image, target=(224, 224))

            # classify the input image and then initialize the list
            # of predictions to return to the client
            preds = model.predict(image)
            results = imagenet_utils.decode_predictions(preds)
            data["predictions"] = []

            # loop over the results and add them to the list of
            # returned predictions
            for (imagenetID, label, prob) in results[0]:
                r = {"label": label, "probability": float(prob)}
                data["predictions"].append(r)

            # indicate that the request was a success
            data["success"] = True

    # return the data dictionary as a JSON response
    return flask.jsonify(data)
""",
}

JSON = {"Accept": "application/json"}


def pasted(*names: str) -> str:
    """Return run_keras_server.py with the article's functions of these names in the place of ours."""
    text = (ROOT / "run_keras_server.py").read_text("utf-8")
    lines = text.splitlines()
    for node in reversed(ast.parse(text).body):
        if isinstance(node, ast.FunctionDef) and node.name in names:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            lines[first - 1 : node.end_lineno] = ARTICLE[node.name].strip().splitlines()
    future = lines.index("from __future__ import annotations")
    return "\n".join([*lines[: future + 1], IMPORTS, *lines[future + 1 :]])


def decode_predictions(preds: np.ndarray, top: int = 5) -> list[list[tuple[str, str, float]]]:
    """Do what Keras' function of this name does, which would fetch the labels from the internet."""
    labels = read_labels(IMAGENET)
    return [[("n0", labels[i], row[i]) for i in np.argsort(-row)[:top]] for row in preds]


@pytest.fixture
def resnet(monkeypatch: pytest.MonkeyPatch) -> Any:
    """In place of ResNet50, whose weights nobody has here, a small model of its shape under its name."""
    keras = pytest.importorskip("keras")
    keras.utils.set_random_seed(3)
    x = image = keras.Input((224, 224, 3))
    x = keras.layers.Conv2D(8, 16, strides=16, activation="relu", kernel_initializer="he_normal")(x)
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Rescaling(1 / 50)(x))
    small = keras.Model(image, keras.layers.Dense(1000, activation="softmax")(x), name="resnet50")

    def build(weights: str) -> Any:
        assert weights == "imagenet"
        return small

    build.__module__ = keras.applications.ResNet50.__module__
    monkeypatch.setattr(keras.applications, "ResNet50", build)
    monkeypatch.setattr(keras.applications.imagenet_utils, "decode_predictions", decode_predictions)
    return small


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Load a module from its text, and have it load its model."""
    modules: list[ModuleType] = []

    def run(text: str) -> Any:
        path = tmp_path / "edited_server.py"
        path.write_text(text, "utf-8")
        spec = importlib.util.spec_from_file_location("edited_server", path)
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "edited_server", module)
        spec.loader.exec_module(module)
        modules.append(module)
        monkeypatch.setattr(module, "settings", Settings(cache_dir=""))
        module.start_model()  # type: ignore[attr-defined]
        return module

    yield run
    for module in modules:
        module.model.close()


def expected(resnet: Any) -> np.ndarray:
    """Return what Keras itself gives for the dog, prepared as the article prepares it."""
    keras = pytest.importorskip("keras")
    pixels = np.asarray(Image.open(DOG).resize((224, 224)), np.float32)[np.newaxis]
    return resnet.predict(keras.applications.resnet50.preprocess_input(pixels), verbose=0)[0]


@pytest.mark.parametrize(
    "names", [("load_model", "prepare_image", "predict"), ("load_model",), ("load_model", "prepare_image")]
)
def test_the_articles_functions_serve(names: tuple[str, ...], resnet: Any, load: Any) -> None:
    edited = load(pasted(*names))
    right, labels = expected(resnet), read_labels(IMAGENET)
    with DOG.open("rb") as dog:
        answer = edited.app.test_client().post("/predict", data={"image": dog}).json
    assert answer["success"] is True
    best = np.argsort(-right)[:5]
    assert [row["label"] for row in answer["predictions"]] == [labels[i] for i in best]
    # Ours decodes large photos at a fraction, which moves a probability by a hundredth at most.
    tolerance = 1e-5 if "prepare_image" in names else 0.02
    assert [row["probability"] for row in answer["predictions"]] == pytest.approx(list(right[best]), abs=tolerance)
    assert isinstance(edited.model, Served), "batched"
    assert edited.model.spec.engine == "openvino", "and converted"


def test_the_articles_preparation_holds_on_every_route(resnet: Any, load: Any) -> None:
    edited = load(pasted("load_model", "prepare_image", "predict"))
    client, right = edited.app.test_client(), expected(resnet)
    text = base64.b64encode(DOG.read_bytes()).decode()
    (row,) = client.post("/v1/models/resnet50:predict", json={"instances": [{"b64": text}]}).json["predictions"]
    assert np.allclose(row, right, atol=1e-5)
    image = {"name": edited.model.spec.inputs[0].name, "shape": [1], "datatype": "BYTES", "data": [text]}
    (output,) = client.post("/v2/models/resnet50/infer", json={"inputs": [image]}).json["outputs"]
    assert np.allclose(output["data"], right, atol=1e-5)
    why = client.post("/explain", data=DOG.read_bytes(), content_type="image/jpeg", headers=JSON)
    assert why.json["probability"] == pytest.approx(right.max(), abs=1e-5)
    assert "resnet50" in client.get("/").text


def test_a_changed_preparation_holds_on_every_route(
    client: FlaskClient, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "prepare_image", lambda image, target: np.full((1, 224, 224, 3), 7, np.float32))
    picture = encode(Image.new("RGB", (8, 8)))
    text = base64.b64encode(picture).decode()
    image = {"name": "image", "shape": [1], "datatype": "BYTES", "data": [text]}
    for answer in (
        client.post("/predict", data=picture, content_type="image/png"),
        client.post("/v1/models/resnet50:predict", json={"instances": [{"b64": text}]}),
        client.post("/v2/models/resnet50/infer", json={"inputs": [image]}),
    ):
        assert answer.status_code == 200
    client.post("/explain", data=picture, content_type="image/png")
    assert len(model.batches) == 4
    assert all((batch == 7).all() for batch in model.batches)

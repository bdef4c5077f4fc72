"""Several models behind one app: every route finds the one that is meant, and says which has answered."""

import base64
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from conftest import encode
from flask.testing import FlaskClient
from PIL import Image

import run_keras_server as server
from keras_server import telemetry
from keras_server.api.context import group_of
from keras_server.models.registry import PredictorEngine, Registry
from keras_server.models.served import Served
from keras_server.models.spec import Spec, Tensor
from keras_server.settings import Settings

PICTURE = encode(Image.new("RGB", (8, 8), "white"))
PNG = {"data": PICTURE, "content_type": "image/png"}


class Sure:
    """Answers with one class, of two."""

    def __init__(self, best: int):
        self.best = best

    def predict(self, batch: np.ndarray) -> np.ndarray:
        return np.eye(2, dtype=np.float32)[[self.best] * len(batch)]


def made(name: str, version: int | None, best: int, settings: Settings | None = None) -> Served:
    spec = Spec(
        name,
        (Tensor("image", (4, 4, 3), "float32"),),
        (Tensor("y", (2,), "float32", "probabilities"),),
        "none",
        labels=("no", "yes"),
    )
    return Served(spec, PredictorEngine(Sure(best)), version=version, settings=settings)


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[FlaskClient]:
    """Cats, of which version 1 says no and 2 yes; dogs, which have no versions and say yes."""
    registry = Registry()
    registry.put("cats", 2, made("cats", 2, 1))
    registry.put("cats", 1, made("cats", 1, 0))
    registry.put("dogs", 1, made("dogs", None, 1))
    registry.models["cats"].labels = {"stable": 1}
    monkeypatch.setattr(server, "model", registry)
    yield server.app.test_client()
    registry.close()


@pytest.mark.parametrize(
    ("path", "title", "label"),
    [
        ("/predict", {"model": "cats", "version": "2"}, "yes"),
        ("/predict?model=cats", {"model": "cats", "version": "2"}, "yes"),
        ("/predict?model=dogs", {"model": "dogs"}, "yes"),
        ("/models/cats/predict", {"model": "cats", "version": "2"}, "yes"),
        ("/models/dogs/predict?top=1", {"model": "dogs"}, "yes"),
    ],
)
def test_predict_finds_the_model(client: FlaskClient, path: str, title: dict[str, str], label: str) -> None:
    answer = client.post(path, **PNG).json
    assert answer["predictions"][0] == {"label": label, "probability": 1}
    assert {key: answer[key] for key in answer if key in ("model", "version")} == title
    several = client.post(path, json={"images": 2 * [base64.b64encode(PICTURE).decode()]}).json
    assert {key: several[key] for key in several if key in ("model", "version")} == title


@pytest.mark.parametrize(
    ("path", "name"),
    [("/explain", "cats"), ("/explain?model=dogs", "dogs"), ("/models/dogs/explain", "dogs"),
     ("/models/cats/explain?model=dogs", "cats")],
)  # fmt: skip
def test_explain_finds_the_model(client: FlaskClient, path: str, name: str) -> None:
    answer = client.post(path, **PNG)
    assert answer.status_code == 422
    assert answer.json["error"] == f"{name} came from no file or architecture, so it cannot be explained."


@pytest.mark.parametrize(
    ("where", "row"),
    [("cats", [0, 1]), ("dogs", [0, 1]), ("cats/versions/1", [1, 0]), ("cats/versions/2", [0, 1]),
     ("cats/labels/stable", [1, 0]), ("dogs/versions/1", [0, 1])],
)  # fmt: skip
def test_tensorflow_servings_paths(client: FlaskClient, where: str, row: list[int]) -> None:
    body = {"instances": np.zeros((1, 4, 4, 3)).tolist()}
    assert client.post(f"/v1/models/{where}:predict", json=body).json == {"predictions": [row]}
    name, *rest = where.split("/")
    status = client.get(f"/v1/models/{where}").json
    versions = {"cats": ["2", "1"], "dogs": ["1"]}[name]
    one = {"cats/labels/stable": ["1"]}.get(where, rest[1:])
    assert [each["version"] for each in status["model_version_status"]] == (one if rest else versions)
    metadata = client.get(f"/v1/models/{where}/metadata").json
    assert metadata["model_spec"] == {"name": name, "signature_name": "", "version": (one if rest else versions)[0]}


def test_the_open_inference_protocols_paths(client: FlaskClient) -> None:
    tensor = {"name": "image", "shape": [1, 4, 4, 3], "datatype": "FP32", "data": [0] * 48}
    for where, version, row in (("cats", "2", [0, 1]), ("cats/versions/1", "1", [1, 0]), ("dogs", "1", [0, 1])):
        answer = client.post(f"/v2/models/{where}/infer", json={"inputs": [tensor]}).json
        assert (answer["model_name"], answer["model_version"]) == (where.split("/")[0], version)
        assert answer["outputs"][0]["data"] == row
        assert client.get(f"/v2/models/{where}/ready").json["ready"] is True
    assert client.get("/v2/models/cats").json["versions"] == ["1", "2"]
    assert client.get("/v2/models/dogs").json["versions"] == ["1"]
    assert client.get("/v1/models").json == {"models": ["cats", "dogs"]}


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("/predict?model=hats", 'There is no model "hats": this server has "cats", "dogs".'),
        ("/models/hats/predict", 'There is no model "hats": this server has "cats", "dogs".'),
        ("/explain?model=hats", 'There is no model "hats": this server has "cats", "dogs".'),
        ("/models/hats/explain", 'There is no model "hats": this server has "cats", "dogs".'),
        ("/v1/models/hats:predict", 'There is no model "hats": this server has "cats", "dogs".'),
        ("/v1/models/cats/versions/3:predict", 'There is no version "3" of cats: it has versions 1, 2.'),
        ("/v1/models/cats/labels/new:predict", 'There is no label "new" of cats: it has labels stable.'),
        ("/v2/models/hats/infer", 'There is no model "hats": this server has "cats", "dogs".'),
        ("/v2/models/dogs/versions/2/infer", 'There is no version "2" of dogs: it has version 1.'),
        ("/v2/models/cats/versions/01/infer", 'There is no version "01" of cats: it has versions 1, 2.'),
    ],
)
def test_what_is_not_there_is_404_with_what_is(client: FlaskClient, path: str, sentence: str) -> None:
    answer = client.post(path, **PNG)
    assert answer.status_code == 404
    own = {} if path.startswith(("/v1", "/v2")) else {"success": False}
    assert answer.json == {**own, "error": sentence}


def test_a_request_lets_its_model_go_however_it_ends(client: FlaskClient) -> None:
    registry = server.model
    assert isinstance(registry, Registry)
    for path in ("/predict", "/explain", "/v1/models/cats:predict", "/v2/models/cats/infer", "/models/dogs/predict"):
        client.post(path, **PNG)
        client.post(path, data=b"none", content_type="image/png")
        client.post(path, data=b"none", content_type="text/csv")
    for path in ("/", "/docs", "/openapi.json", "/v1/models/cats", "/v2/models/cats/ready", "/readyz"):
        client.get(path)
    assert [served.held for served in registry.all()] == [0, 0, 0]


def test_settings_are_the_models_own(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """What shows through what is transparent is red to one model and white to the others."""
    seen: dict[str, Any] = {}
    own = server.prepare_image

    def prepare(image: Image.Image, target: tuple[int, int]) -> np.ndarray:
        row = own(image, target)
        seen[server.app.current_model().spec.name] = row[0, 0, 0].tolist()
        return row

    monkeypatch.setattr(server, "prepare_image", prepare)
    assert isinstance(server.model, Registry)
    server.model.put("red", 1, made("red", None, 1, Settings(background="red")))
    clear = encode(Image.new("RGBA", (4, 4), (0, 0, 0, 0)))
    for name in ("red", "dogs"):
        assert client.post(f"/models/{name}/predict", data=clear, content_type="image/png").status_code == 200
    assert seen == {"red": [255, 0, 0], "dogs": [255, 255, 255]}


def test_the_documents_do_not_grow_with_models(client: FlaskClient) -> None:
    before = {path: len(client.get(path).data) for path in ("/openapi.json", "/docs")}
    assert isinstance(server.model, Registry)
    for number in range(20):
        server.model.put(f"model{number}", 1, made(f"model{number}", None, 1))
    assert {path: len(client.get(path).data) for path in before} == before


def test_metrics_have_the_model_and_its_version(client: FlaskClient) -> None:
    def series() -> set[str]:
        text = telemetry.prometheus.generate_latest(telemetry.METRICS).decode()
        return {line.split(" ")[0] for line in text.splitlines() if 'model="cats",version=' in line}

    client.post("/predict", **PNG)
    client.post("/v1/models/cats/versions/1:predict", json={"instances": np.zeros((1, 4, 4, 3)).tolist()})
    for version in "12":
        for name in ("images_total", "queue_length", "decode_seconds_count", "inference_seconds_count"):
            assert f'keras_server_{name}{{model="cats",version="{version}"}}' in series()
    assert isinstance(server.model, Registry)
    old = server.model.drop("cats", 1)
    assert old
    old.retire()
    assert series()
    assert all('version="2"' in each for each in series())


def test_series_stay_where_another_has_the_same_version() -> None:
    first, second = made("swapped", None, 0), made("swapped", None, 1)
    second.metrics.images.inc(3)
    first.close()
    first.close()
    assert telemetry.METRICS.get_sample_value("keras_server_images_total", {"model": "swapped", "version": "1"}) == 3
    second.close()
    assert telemetry.METRICS.get_sample_value("keras_server_images_total", {"model": "swapped", "version": "1"}) is None


def test_readiness_says_which_is_missing(client: FlaskClient) -> None:
    assert client.get("/readyz").json == {"status": "ready", "model": "cats"}
    assert isinstance(server.model, Registry)
    old = server.model.drop("dogs", 1)
    assert old
    old.retire()
    server.model.models["dogs"].missing = "It is no Keras model."
    for path in ("/readyz", "/v2/health/ready"):
        answer = client.get(path)
        assert answer.status_code == 503
        assert answer.json["error"] == "dogs: It is no Keras model."
    assert client.get("/v2/models/cats/ready").status_code == 200
    answer = client.post("/models/dogs/predict", **PNG)
    assert (answer.status_code, answer.json["error"]) == (503, "dogs is not served: It is no Keras model.")
    assert client.post("/predict", **PNG).status_code == 200


def test_the_page_has_a_choice_of_the_model(client: FlaskClient) -> None:
    text = client.get("/").text
    assert 'data-model="cats"' in text
    assert "<option selected>cats</option><option>dogs</option>" in text
    text = client.get("/?model=dogs").text
    assert 'data-model="dogs"' in text
    assert "<option>cats</option><option selected>dogs</option>" in text
    assert client.get("/?model=hats").status_code == 404


def test_the_page_of_one_model_has_none(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "model", Sure(1))
    text = client.get("/").text
    assert "data-model" not in text
    assert "<b>resnet50</b>" in text
    server.app.current_model().close()


def test_what_is_there_is_named_in_tritons_words(client: FlaskClient) -> None:
    rows = client.post("/v2/repository/index").json
    assert rows == [
        {"name": name, "version": version, "state": "READY", "reason": ""}
        for name, version in (("cats", "1"), ("cats", "2"), ("dogs", "1"))
    ]
    assert client.post("/v2/repository/index", data=json.dumps({"ready": True})).json == rows
    assert client.post("/v2/repository/index", data=b"[]").status_code == 400


def test_nothing_is_loaded_that_was_not_allowed(client: FlaskClient) -> None:
    for path in ("/v2/repository/models/cats/load", "/v2/repository/models/cats/unload"):
        answer = client.post(path)
        assert answer.status_code == 403
        assert answer.json["error"].endswith("start the server with --model-dir.")


@pytest.mark.parametrize(
    ("target", "group"),
    [
        ("/predict", ""),
        ("/predict?model=cats", ""),  # the default
        ("/predict?model=dogs", "dogs"),
        ("/predict?top=1&model=dogs", "dogs"),
        ("/predict?model=dogs&model=cats", "dogs"),
        ("/predict?model=cats&model=dogs", ""),
        ("/predict?model=&model=dogs", ""),
        ("/predict?%6dodel=%64ogs", "dogs"),
        ("/predict?x?model=dogs", ""),
        ("/explain?model=hats", ""),
        ("/models/dogs/predict?model=cats", "dogs"),
        ("/models/d%6fgs/explain", "dogs"),
        ("/v1/models/dogs:predict", "dogs"),
        ("/v1/models/dogs/versions/1:predict", "dogs"),
        ("/v2/models/dogs/infer?", "dogs"),
        ("/v2/models/na%C3%AFve/infer", "naïve"),
        ("/predict?model=na\xc3\xafve", "naïve"),  # as the front reads bytes beyond ASCII
        ("/v2/repository/models/cats/load", "/v2/repository/"),
    ],
)
def test_requests_are_grouped_by_the_model_that_answers_them(client: FlaskClient, target: str, group: str) -> None:
    """Else a stuck model's requests would wait among those of another."""
    assert isinstance(server.model, Registry)
    server.model.put("naïve", 1, made("naïve", None, 1))
    assert group_of(server.app, target) == group
    found = server.app.test_client().post(target, **PNG)
    if "predict" in target.partition("?")[0] and found.status_code == 200 and "v1" not in target:
        assert found.json["model"] == (group or "cats")

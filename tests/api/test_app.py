"""The app's factory: two apps in one process do not touch each other, and a request keeps the model that it took."""

import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from conftest import encode, serve_with
from flask.testing import FlaskClient
from PIL import Image
from werkzeug.datastructures import MultiDict

import run_keras_server as server
from keras_server import api
from keras_server.models.registry import Predictor, PredictorEngine
from keras_server.models.served import Served
from keras_server.models.spec import Spec, Tensor
from keras_server.settings import Settings
from keras_server.ticket import Ticket


class Times:
    """Answers with its input, multiplied."""

    def __init__(self, factor: float):
        self.factor = factor

    def predict(self, batch: np.ndarray) -> np.ndarray:
        return batch * self.factor


def serve(name: str, predictor: Predictor) -> Served:
    number = Tensor("x", (1,), "float32")
    return Served(Spec(name, inputs=(number,), outputs=(number,), kind="none"), PredictorEngine(predictor))


@pytest.fixture
def two() -> Iterator[tuple[api.App, api.App]]:
    """Two apps, the second of which asks for a key."""
    models = serve("two", Times(2)), serve("three", Times(3))
    first = api.create_app(lambda: Settings(), lambda: models[0], lambda *_: np.zeros(1))
    second = api.create_app(lambda: Settings(api_key=("secret",)), lambda: models[1], lambda *_: np.zeros(1))
    yield first, second
    for model in models:
        model.close()


def ask(client: FlaskClient, name: str, **headers: str) -> Any:
    return client.post(f"/v1/models/{name}:predict", json={"instances": [[5.0]]}, headers=headers)


def test_two_apps_in_one_process_do_not_touch_each_other(two: tuple[api.App, api.App]) -> None:
    first, second = (app.test_client() for app in two)
    key = {"Authorization": "Bearer secret"}
    assert ask(first, "two").json == {"predictions": [[10]]}
    assert ask(second, "three", **key).json == {"predictions": [[15]]}
    assert ask(second, "three").status_code == 401
    assert ask(first, "three").status_code == 404
    assert "two" in first.get("/docs").text
    assert "three" in second.get("/docs", headers=key).text
    two[0].draining.set()
    assert first.get("/readyz").status_code == 503
    assert second.get("/readyz").status_code == 200


def test_a_request_keeps_the_model_that_it_took() -> None:
    """A new version that comes while a request waits answers the next one, and no part of this one."""
    current = [serve("x", Times(2))]

    class Swaps(Times):
        def predict(self, batch: np.ndarray) -> np.ndarray:
            current[0] = new
            return super().predict(batch)

    old, new = serve("x", Swaps(2)), serve("x", Times(3))
    current[0].close()
    current[0] = old
    app = api.create_app(lambda: Settings(), lambda: current[0], lambda *_: np.zeros(1))
    client = app.test_client()
    assert ask(client, "x").json == {"predictions": [[10]]}
    assert ask(client, "x").json == {"predictions": [[15]]}
    old.close()
    new.close()


def test_what_has_no_predict_is_no_model() -> None:
    app = api.create_app(lambda: Settings(), lambda: "resnet50", lambda *_: np.zeros(1))
    assert ask(app.test_client(), "resnet50").status_code == 500
    with pytest.raises(TypeError, match="str is no model"):
        app.current_model()


def test_an_adapted_model_is_closed_when_another_takes_its_place() -> None:
    current: list[Predictor] = [Times(2)]
    app = api.create_app(lambda: Settings(), lambda: current[0], lambda *_: np.zeros(1))
    before = app.current_model()
    assert app.current_model() is before
    current[0] = Times(3)
    assert app.current_model() is not before
    for thread in before.batcher.threads:
        thread.join(20)
        assert not thread.is_alive()
    app.current_model().close()


def test_a_regression_is_answered_with_its_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """An age is 29.7 years, and no probability of one class of two."""

    class Age:
        def predict(self, batch: np.ndarray) -> np.ndarray:
            return batch[:, :1, 0, 0] * 100 + 29.7

    client = serve_with(
        monkeypatch, Age(), name="age", preprocess="none", kind="values", outputs=(Tensor("age", (1,), "float32"),)
    )
    black, white = (encode(Image.new("RGB", (8, 8), colour)) for colour in ("black", "white"))
    answer = client.post("/predict", data=black, content_type="image/png").json
    assert answer == {"success": True, "model": "age", "values": [pytest.approx(29.7, abs=1e-4)]}
    both = [("image", (io.BytesIO(data), name)) for data, name in ((black, "b.png"), (white, "w.png"))]
    results = client.post("/predict", data=MultiDict(both)).json["results"]
    assert [result["values"] for result in results] == [
        [pytest.approx(29.7, abs=1e-4)],
        [pytest.approx(25529.7, abs=1e-2)],
    ]
    assert all("predictions" not in result for result in results)
    why = client.post("/explain", data=black, content_type="image/png")
    assert why.status_code == 422
    assert "not with labels" in why.json["error"]


def test_values_that_are_not_finite_are_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def predict(self, batch: np.ndarray) -> np.ndarray:
            return np.full((len(batch), 1), np.nan)

    client = serve_with(monkeypatch, Broken(), kind="values", outputs=(Tensor("age", (1,), "float32"),))
    assert client.post("/predict", data=encode(Image.new("RGB", (8, 8))), content_type="image/png").status_code == 500


def test_why_there_are_no_labels_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    client = serve_with(monkeypatch, kind="none", reason="The output is no class list: ask /v2.")
    for path in ("/predict", "/explain"):
        answer = client.post(path, data=b"x", content_type="image/png")
        assert answer.status_code == 400
        assert answer.json["error"] == "The output is no class list: ask /v2."


@pytest.mark.parametrize(
    "answer",
    [np.zeros(()), np.zeros((0, 1000)), np.zeros((3, 1000)), np.zeros(1000), np.array(["a"]), np.array([{}]), None],
    ids=["scalar", "no rows", "more rows", "no batch", "text", "objects", "nothing"],
)
def test_no_answer_of_a_model_ends_its_thread(answer: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    class Odd:
        def predict(self, batch: np.ndarray) -> np.ndarray:
            return np.eye(1000, dtype=np.float32)[[3]] if (batch > 0).all() else answer

    client = serve_with(monkeypatch, Odd(), preprocess="none")
    black, white = (encode(Image.new("RGB", (8, 8), colour)) for colour in ("black", "white"))
    assert client.post("/predict", data=black, content_type="image/png").status_code == 500
    assert client.post("/predict", data=white, content_type="image/png").json["predictions"][0]["probability"] == 1
    assert client.get("/readyz").status_code == 200
    assert "failed" in caplog.text


def test_who_has_left_is_not_told_that_it_took_too_long(client: FlaskClient) -> None:
    ticket = Ticket(30)
    ticket.gone = True
    data = encode(Image.new("RGB", (8, 8)))
    answer = client.post("/predict", data=data, content_type="image/png", environ_overrides={"ticket": ticket})
    assert answer.status_code == 499
    assert "keep it open" in answer.json["error"]
    late = client.post("/predict", data=data, content_type="image/png", environ_overrides={"ticket": Ticket(0)})
    assert late.status_code == 504
    assert "not ready in time" in late.json["error"]


@pytest.mark.parametrize("path", ["/", "/docs", "/openapi.json"])
def test_a_document_is_made_once_and_anew_where_what_it_tells_has_changed(
    path: str, client: FlaskClient, setting: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    app = server.app
    app.documents.clear()
    first = client.get(path)
    (made,) = app.documents.values()
    again = client.get(path, headers={"If-None-Match": first.headers["ETag"]})
    assert (again.status_code, again.data) == (304, b"")
    assert client.get(path).data == first.data
    assert [*app.documents.values()] == [made]
    setting(max_upload_mb=3.5)
    changed = client.get(path, headers={"If-None-Match": first.headers["ETag"]})
    assert changed.status_code == 200
    assert changed.headers["ETag"] != first.headers["ETag"]
    assert len(app.documents) == 1
    other = serve_with(monkeypatch, name="other").get(path)
    assert b"other" in other.data
    assert [name for _, name in app.documents] == ["other"]  # nothing is kept of what is gone

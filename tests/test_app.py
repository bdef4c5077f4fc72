"""The app's factory: two apps in one process do not touch each other, and a request keeps the model that it took."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from flask.testing import FlaskClient

from keras_server import api
from keras_server.models.registry import Predictor, PredictorEngine
from keras_server.models.served import Served
from keras_server.models.spec import Spec, Tensor
from keras_server.settings import Settings


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
    second = api.create_app(lambda: Settings(api_key=["secret"]), lambda: models[1], lambda *_: np.zeros(1))
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

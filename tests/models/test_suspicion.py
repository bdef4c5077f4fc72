"""The warning at the start where a model seems to get other pixels than it was trained with."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import run_keras_server as server
from keras_server.models.registry import PredictorEngine
from keras_server.models.served import Served
from keras_server.models.spec import Spec, Tensor
from keras_server.models.suspicion import PHOTOS, answers, suspicion
from keras_server.settings import Settings

Setter = Callable[..., None]


class Bright:
    """Tells bright pictures from dark ones, as if trained on pixels that were scaled and shifted like this."""

    def __init__(self, scale: float, shift: float = 0, sure: float = 20):
        self.scale, self.shift, self.sure = scale, shift, sure

    def predict(self, batch: np.ndarray) -> np.ndarray:
        axes = (1, 2, 3)
        brightness = batch.mean(axis=axes) * self.scale + self.shift
        return np.stack([self.sure * brightness, np.full(len(batch), 0.45 * self.sure)], axis=1)


@pytest.fixture
def serve() -> Iterator[Callable[..., Served]]:
    kept: list[Served] = []

    def put(predictor: Any, preprocess: str, shape: tuple[int, ...] = (32, 32, 3), **more: Any) -> Served:
        outputs = (Tensor("scores", (2,), "float32", "logits"),)
        spec = Spec(
            "net", (Tensor("image", shape, "float32"),), outputs, preprocess, "softmax", ("day", "night"), **more
        )
        kept.append(Served(spec, PredictorEngine(predictor)))
        return kept[-1]

    yield put
    for served in kept:
        served.close()


@pytest.mark.parametrize("shape", [(32, 32, 3), (3, 32, 32), (40, 30, 1), (None, None, 3)])
def test_pixels_of_another_size_are_noticed(shape: tuple[int, ...], serve: Callable[..., Served]) -> None:
    """Trained on 0..1 or on -1..1, and served with 0..255."""
    for predictor, mode in ((Bright(1), "unit"), (Bright(0.5, 0.5), "tf")):
        words = suspicion(serve(predictor, "none", shape), Settings(model="my.keras"))
        assert words.startswith(
            "A cat, a cup of coffee and a rocket are all day to net, and surely: the preprocessing is"
        )
        assert f"with --preprocess {mode}" in words.replace("unit or tf", f"{mode}")
        assert "keras-server check my.keras --expect PHOTO=LABEL" in words
        assert not suspicion(serve(predictor, mode, shape), Settings(model="my.keras"))


def test_a_model_that_is_only_sure_is_not_suspected(serve: Callable[..., Served]) -> None:
    """Two of a kind: right pixels, and the same answer to all three; other pixels would be black to it."""

    class Sure(Bright):
        def predict(self, batch: np.ndarray) -> np.ndarray:
            return super().predict(batch) + np.array([[30, 0]])

    class Unsure(Bright):
        def predict(self, batch: np.ndarray) -> np.ndarray:
            scores = super().predict(batch)
            return scores.clip(scores.min(axis=1, keepdims=True), scores.min(axis=1, keepdims=True) + 6)

    assert not suspicion(serve(Unsure(1), "none"), Settings())
    assert not suspicion(serve(Sure(1 / 255), "none"), Settings())
    assert not suspicion(serve(Bright(1 / 255), "none"), Settings())


@pytest.mark.parametrize("more", [{"kind": "values"}, {"kind": "none"}])
def test_what_has_no_classes_is_not_asked(more: dict[str, Any], serve: Callable[..., Served]) -> None:
    assert not suspicion(serve(None, "none", **more), Settings())


def test_the_photos_are_different_things(serve: Callable[..., Served]) -> None:
    rows = answers(serve(Bright(1), "unit"), Settings(), "unit")
    assert rows.shape == (3, 2)
    assert np.ptp(rows[:, 0]) > 0.4
    assert sum(photo.stat().st_size for photo in PHOTOS) < 30_000


@pytest.mark.parametrize(("inside", "options", "warned"), [(False, {}, True), (True, {}, False),
                                                           (False, {"preprocess": "unit"}, False)])  # fmt: skip
def test_the_start_warns(
    inside: bool, options: dict[str, str], warned: bool, setting: Setter, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    keras = pytest.importorskip("keras")
    monkeypatch.setattr(server, "model", None)
    dense = keras.layers.Dense(2)
    scaling = [keras.layers.Rescaling(1 / 255)] if inside else []
    model = keras.Sequential([keras.Input((24, 24, 3)), *scaling, keras.layers.GlobalAveragePooling2D(), dense])
    dense.set_weights([np.array([[7, 0]] * 3, np.float32), np.array([0, 9], np.float32)])
    model.save(tmp_path / "net.keras")
    setting(model=str(tmp_path / "net.keras"), cache_dir="", **options)
    with caplog.at_level(logging.WARNING, "keras_server"):
        server.load_model()
    assert ("the preprocessing is probably wrong" in caplog.text) == warned


def test_the_bundled_model_is_not_asked(setting: Setter, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from keras_server.models import registry

    def asked(*_: Any) -> str:
        raise SystemExit("it was asked")

    monkeypatch.setattr(server, "model", None)
    monkeypatch.setattr(registry, "suspicion", asked)
    setting(model="bundled", cache_dir=cache)
    server.load_model()

"""The page of a server with several models: a person chooses one, and all that is asked is asked of it."""

from collections.abc import Iterator

import numpy as np
import pytest
from browsing import Visit, axe, cards, choose, file, own_app
from conftest import encode
from PIL import Image
from playwright.sync_api import expect

import run_keras_server as server
from keras_server.models.registry import PredictorEngine, Registry
from keras_server.models.served import Served
from keras_server.models.spec import Spec, Tensor


class Sure:
    """Answers with one class, of two."""

    def __init__(self, best: int):
        self.best = best

    def predict(self, batch: np.ndarray) -> np.ndarray:
        return np.eye(2, dtype=np.float32)[[self.best] * len(batch)]


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server whose cats are always no, and whose dogs are always yes."""
    registry = Registry()
    tensors = (Tensor("image", (4, 4, 3), "float32"),), (Tensor("y", (2,), "float32", "probabilities"),)
    for best, name in enumerate(("cats", "dogs&co")):
        spec = Spec(name, *tensors, "none", labels=("no", "yes"))
        registry.put(name, 1, Served(spec, PredictorEngine(Sure(best))))
    monkeypatch.setattr(server, "model", registry)
    with own_app() as address:
        yield address
    registry.close()


def test_a_person_chooses_the_model(visit: Visit, url: str) -> None:
    page = visit(url, axe=True)
    chooser = page.get_by_role("combobox", name="Model")
    expect(chooser).to_have_value("cats")
    axe(page, "with several models")
    picture = file("white.png", encode(Image.new("RGB", (8, 8), "white")), "image/png")
    choose(page, picture)
    expect(cards(page).locator(".rows .label").first).to_have_text("no")
    expect(cards(page).locator(".times")).to_contain_text("cats")
    chooser.select_option("dogs&co")
    page.wait_for_url("**/?model=dogs%26co")
    expect(chooser).to_have_value("dogs&co")
    expect(page.locator("header")).to_contain_text("knows 2 labels")
    choose(page, picture)
    expect(cards(page).locator(".rows .label").first).to_have_text("yes")
    expect(cards(page).locator(".codes code").first).to_contain_text("/models/dogs%26co/predict")

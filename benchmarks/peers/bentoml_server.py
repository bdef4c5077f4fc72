"""The same Keras model on BentoML, with its adaptive batching.

Started as `bentoml serve bentoml_server:KerasService`. In a trial, a service of its own for decoding, in front of
the model's, was no faster and answered some of 32 clients with errors.
"""

from typing import Any

import bentoml
import numpy as np
from keras_model import MAX_BATCH, answer_of, load_model, prepare_image, prepare_numbers, route, takes_numbers
from PIL.Image import Image


@bentoml.service(workers=1, traffic={"timeout": 60})
class KerasService:
    """One model; BentoML gathers the requests and passes them on as a list."""

    def __init__(self) -> None:
        self.model = load_model()

    def compute(self, rows: list[np.ndarray]) -> list[dict[str, Any]]:
        """Compute the rows that came together."""
        return [answer_of(output) for output in self.model.predict_on_batch(np.stack(rows))]

    if takes_numbers:

        @bentoml.api(batchable=True, max_batch_size=MAX_BATCH, route=route)
        def predict(self, instances: list[list[float]]) -> list[dict[str, Any]]:
            """Compute the rows of the requests that came together."""
            return self.compute([prepare_numbers([row]) for row in instances])

    else:

        @bentoml.api(batchable=True, max_batch_size=MAX_BATCH, route=route)
        def predict(self, image: list[Image]) -> list[dict[str, Any]]:
            """Classify the pictures that came together."""
            return self.compute([prepare_image(one) for one in image])

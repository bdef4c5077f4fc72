"""The same Keras model on BentoML, with its adaptive batching.

Started as `bentoml serve bentoml_server:KerasService`. In a trial, a service of its own for decoding, in front of
the model's, was no faster and answered some of 32 clients with errors.
"""

from typing import Any

import bentoml
import numpy as np
from keras_model import MAX_BATCH, load_model, prepare_image, top_five
from PIL.Image import Image


@bentoml.service(workers=1, traffic={"timeout": 60})
class KerasService:
    """One model; BentoML gathers the requests and passes them on as a list."""

    def __init__(self) -> None:
        self.model = load_model()

    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH)
    def predict(self, image: list[Image]) -> list[dict[str, Any]]:
        """Classify the pictures that came together."""
        batch = np.stack([prepare_image(one) for one in image])
        return [top_five(row) for row in self.model.predict_on_batch(batch)]

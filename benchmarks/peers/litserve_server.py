"""The same Keras model on LitServe, with its dynamic batching."""

import os
from typing import Any

import litserve
import numpy as np
from fastapi import Request
from keras_model import MAX_BATCH, answer_of, load_model, prepare_image, prepare_numbers, route, takes_numbers
from PIL import Image


class KerasAPI(litserve.LitAPI):
    """What becomes of a batch; LitServe calls the methods in this order, in a process beside its web server."""

    def setup(self, device: str) -> None:
        """Load the model."""
        self.model = load_model()

    def decode_request(self, request: Request) -> np.ndarray:
        """Decode one upload, or one row."""
        # LitServe hands the parsed form to a method whose argument is annotated as a request.
        if takes_numbers:
            return prepare_numbers(request["instances"])
        return prepare_image(Image.open(request["image"].file))

    def batch(self, inputs: list[np.ndarray]) -> np.ndarray:
        """Stack the rows that came together."""
        return np.stack(inputs)

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Classify them."""
        return self.model.predict_on_batch(x)

    def unbatch(self, output: np.ndarray) -> list[np.ndarray]:
        """Give each request its row."""
        return list(output)

    def encode_response(self, output: np.ndarray) -> dict[str, Any]:
        """Answer one row."""
        return answer_of(output)


if __name__ == "__main__":
    # In trials a wait of 10 ms gave the throughput of 50 ms, and a lone request its answer sooner, and a second worker
    # did not help on two cores. A wait of 0 makes the worker spin.
    api = KerasAPI(max_batch_size=MAX_BATCH, batch_timeout=0.01, api_path=route)
    server = litserve.LitServer(api, accelerator="cpu", timeout=60)
    port = int(os.environ["BENCH_PORT"])
    server.run(host="127.0.0.1", port=port, generate_client_file=False, log_level="warning")

"""The same Keras model on Ray Serve, with its dynamic request batching."""

import asyncio
import os
from typing import Any

import numpy as np
import ray
from keras_model import MAX_BATCH, answer_of, load_model, prepare_image, prepare_numbers, route, takes_numbers
from PIL import Image
from ray import serve
from starlette.requests import Request

PROCESSORS = len(os.sched_getaffinity(0))


class KerasDeployment:
    """One replica; what blocks goes to threads, as Serve's notes on asyncio say, so that requests are still read."""

    def __init__(self) -> None:
        self.model = load_model()

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=0.01)
    async def classify(self, rows: list[np.ndarray]) -> list[dict[str, Any]]:
        """Compute the rows that came together."""
        outputs = await asyncio.to_thread(self.model.predict_on_batch, np.stack(rows))
        return [answer_of(output) for output in outputs]

    async def __call__(self, request: Request) -> dict[str, Any]:
        """Decode one upload, or one row, and put it in a batch."""
        if takes_numbers:
            return await self.classify(prepare_numbers((await request.json())["instances"]))
        form = await request.form()
        image = await asyncio.to_thread(lambda: prepare_image(Image.open(form["image"].file)))
        return await self.classify(image)


if __name__ == "__main__":
    ray.init(num_cpus=PROCESSORS, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": int(os.environ["BENCH_PORT"])})
    # Ongoing requests: more than clients, so that they wait where the batches are made, not before.
    deployment = serve.deployment(max_ongoing_requests=256, ray_actor_options={"num_cpus": PROCESSORS})(KerasDeployment)
    serve.run(deployment.bind(), route_prefix=route, blocking=True)

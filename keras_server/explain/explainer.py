"""The thread that explains: it opens what computes heat maps at the first use."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np

from keras_server.explain.cam import Cam, Unexplainable
from keras_server.machine import step_back
from keras_server.models.batcher import Batcher
from keras_server.models.engines import NICENESS
from keras_server.models.spec import Spec
from keras_server.telemetry import ModelMetrics


class Explainer:
    """Explains one picture after the other.

    It shares nothing with the threads that predict but the processors.
    """

    def __init__(
        self, spec: Spec, explain: Callable[[], Cam] | None, queue_size: int, metrics: ModelMetrics | None = None
    ):
        """Take the spec of what is served; `explain` returns what computes its maps, or raises Unexplainable."""
        self.spec, self.explain, self.queue_size, self.metrics = spec, explain, queue_size, metrics
        self.lock = threading.Lock()
        self.batcher: Batcher | None = None
        self.cam: Cam | None = None

    def heat(self, picture: np.ndarray, label: int) -> np.ndarray:
        """Return the map of a prepared picture, between 0 and 1, shape (rows, columns).

        Raises Unexplainable, and what Batcher.compute does.
        """
        with self.lock:
            if not self.batcher:
                self.batcher = Batcher(self.run, 1, self.queue_size, metrics=self.metrics)
        (heat,) = self.batcher.compute([picture, np.array([label], np.int32)])[0]
        return np.asarray(heat)

    def close(self) -> None:
        """Let the thread end."""
        with self.lock:
            if self.batcher:
                self.batcher.close()

    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """Compute one map, as the Batcher calls it: with one row in, and one row out."""
        if not self.cam:
            if not self.explain:
                raise Unexplainable(f"{self.spec.name} came from no file or architecture, so it cannot be explained.")
            step_back(NICENESS)  # before Keras starts its threads, where it has to compute: they would go first
            self.cam = self.explain()
        heat = self.cam(inputs[0], int(inputs[1][0]))
        if not np.isfinite(heat).all():
            raise ValueError(f"{self.spec.name} has gradients that are not finite")
        return [(heat / (heat.max() or 1))[np.newaxis]]

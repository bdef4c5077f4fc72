"""The thread that explains: it loads the Keras model behind what is served at the first use."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from keras_server.explain.cam import Cam, Unexplainable, grad_cam
from keras_server.machine import step_back
from keras_server.models.batcher import Batcher
from keras_server.models.errors import StartupError
from keras_server.models.spec import Spec

NICENESS = 10  # of heat maps, like that of OpenVINO's threads; Keras' own would go before them

log = logging.getLogger("keras_server")


class Explainer:
    """Explains one picture after the other, with gradients, hence with the Keras model.

    It shares nothing with the threads that predict but the processors.
    """

    def __init__(self, spec: Spec, load: Callable[[], Any] | None, queue_size: int):
        """Take the spec of what is served; `load` returns its Keras model or raises StartupError."""
        self.spec, self.load, self.queue_size = spec, load, queue_size
        self.lock = threading.Lock()
        self.batcher: Batcher | None = None
        self.cam: Cam | None = None
        self.flaw = ""  # why the model cannot be explained

    def heat(self, picture: np.ndarray, label: int) -> np.ndarray:
        """Return the map of a prepared picture, between 0 and 1, shape (rows, columns).

        Raises Unexplainable, and what Batcher.compute does.
        """
        with self.lock:
            if not self.batcher:
                self.batcher = Batcher(self.run, 1, self.queue_size)
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
            if not self.flaw:
                self.prepare()
            if not self.cam:
                raise Unexplainable(self.flaw)
        heat = self.cam(inputs[0], int(inputs[1][0]))
        if not np.isfinite(heat).all():
            raise ValueError(f"{self.spec.name} has gradients that are not finite")
        return [(heat / (heat.max() or 1))[np.newaxis]]

    def prepare(self) -> None:
        """Load the Keras model and find its features, or else why it cannot be explained."""
        step_back(NICENESS)  # before Keras starts its threads
        name = self.spec.name
        try:
            if not self.spec.image or self.spec.image[3]:
                raise Unexplainable(f"{name} takes no pictures with their channels last, so it cannot be explained.")
            if not self.load:
                raise StartupError("it came from no file or architecture")
            self.cam = grad_cam(self.load(), name)
        except Unexplainable as error:
            self.flaw = str(error)
        except StartupError as error:
            log.warning("%s cannot be explained: %s", name, error)
            self.flaw = f"The Keras model of {name} cannot be loaded; the server's log says why."

"""The real server with three models: one that is fast, one that is stuck, and one that raises.

    python three_models.py --port 0 ...

A line on standard input lets go what is stuck. With STUCK_SECONDS in the environment a batch takes so long, instead.
"""

import os
import sys
import threading
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

import run_keras_server as server
from keras_server.models.registry import Registry
from keras_server.models.served import Served
from keras_server.models.spec import Spec, Tensor

released = threading.Event()


class Engine:
    """Doubles numbers."""

    lanes = 1

    def __call__(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        return [inputs[0] * 2]


class Stuck(Engine):
    """Takes its time."""

    def __call__(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        if "STUCK_SECONDS" in os.environ:
            time.sleep(float(os.environ["STUCK_SECONDS"]))
        else:
            released.wait()
        return super().__call__(inputs)


class Raises(Engine):
    """Fails each time."""

    def __call__(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        raise ArithmeticError("as the test wished")


def load_model() -> None:
    """Put all three into the place of the model."""
    registry, settings, tensors = Registry(), server.settings, (Tensor("x", (3,), "float32"),)
    for name, engine in (("first", Engine()), ("stuck", Stuck()), ("raises", Raises()), ("fast", Engine())):
        spec = Spec(name, tensors, tensors, kind="none")
        registry.put(name, 1, Served(spec, engine, settings.max_batch, settings.queue_size))
    server.model = registry


def obey() -> None:
    """Wait for the line."""
    sys.stdin.readline()
    released.set()


if __name__ == "__main__":
    threading.Thread(target=obey, daemon=True).start()
    server.load_model = load_model
    sys.exit(server.main(sys.argv[1:]))

"""The deployment with a model whose thread ends as soon as a file appears; for test_cluster.py."""

import os
from pathlib import Path
from typing import Any

import numpy as np

import run_keras_server as server
from keras_server.ray_app import deployment

POISON = "KERAS_TEST_POISON"  # names the file, which the first model to see it takes away


Base: Any = deployment.func_or_class


class Fragile(Base):
    """A replica that can be broken from outside."""

    async def __init__(self) -> None:  # type: ignore[misc]
        await super().__init__()
        batcher = server.app.current_model().batcher
        run = batcher.run

        def broken(inputs: list[np.ndarray]) -> Any:
            try:
                Path(os.environ[POISON]).unlink()
            except FileNotFoundError:
                return run(inputs)
            raise SystemExit  # no Exception, so the model's thread ends

        batcher.run = broken


fragile = deployment.options(func_or_class=Fragile)

"""The deployment with replicas that say who they are, and whose model can be broken from outside; for test_cluster.py.

Both happens in a folder: each replica that has loaded its model writes a file there, called as its process, with its
node; and the first model to see a file called `poison` takes it away, and its thread ends.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import ray

import run_keras_server as server
from keras_server.ray_app import deployment

FOLDER = "KERAS_TEST_FOLDER"  # names it
POISON = "poison"

Base: Any = deployment.func_or_class


class Watched(Base):
    """A replica that can be told from the others."""

    async def __init__(self) -> None:  # type: ignore[misc]
        await super().__init__()
        folder = Path(os.environ[FOLDER])
        batcher = server.app.current_model().batcher
        run = batcher.run

        def poisoned(inputs: list[np.ndarray]) -> Any:
            try:
                (folder / POISON).unlink()
            except FileNotFoundError:
                return run(inputs)
            raise SystemExit  # no Exception, so the model's thread ends

        batcher.run = poisoned
        unfinished = folder / f"{os.getpid()}.unfinished"
        unfinished.write_text(ray.get_runtime_context().get_node_id())
        unfinished.rename(folder / str(os.getpid()))


watched = deployment.options(func_or_class=Watched)

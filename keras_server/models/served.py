"""One model, ready: what it takes and gives, the queue before it, and what explains it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from keras_server.explain.cam import Cam
from keras_server.explain.explainer import Explainer
from keras_server.models.batcher import Batcher
from keras_server.models.engines import Engine
from keras_server.models.spec import Spec, probabilities
from keras_server.settings import Settings
from keras_server.telemetry import ModelMetrics


class Served:
    """Stands where the tutorial's model stood: predict() from any thread, computed in batches."""

    def __init__(
        self,
        spec: Spec,
        engine: Engine,
        max_batch: int = 8,
        queue_size: int = 128,
        explain: Callable[[], Cam] | None = None,
        *,
        version: int | None = None,
        settings: Settings | None = None,
    ):
        """Take a model's spec and engine. `explain` returns what computes heat maps, or raises Unexplainable.

        `version` is the model's, where it has several; `settings` are its own, where they are not the server's.
        """
        self.spec, self.version, self.settings = spec, version, settings
        self.metrics = ModelMetrics(spec.name, self.version_name)
        self.batcher = Batcher(engine, max_batch, queue_size, engine.lanes, self.metrics)
        # Who waits for a heat map holds one of the front's threads; this many leave the predictions enough of them.
        self.explainer = Explainer(spec, explain, min(max_batch, queue_size), self.metrics)
        self.holding = threading.Lock()
        self.held = 0  # requests that have it
        self.retired = self.closed = False

    @property
    def version_name(self) -> str:
        """The version as protocols spell it, in which each model has one."""
        return "1" if self.version is None else str(self.version)

    @property
    def title(self) -> dict[str, str]:
        """What an answer says of who gave it."""
        return {"model": self.spec.name} | ({} if self.version is None else {"version": self.version_name})

    def predict(self, batch: np.ndarray) -> np.ndarray:
        """Return the output that labels come from, for a batch of the only input, both with the batch as first axis.

        Raises what Batcher.compute raises.
        """
        return self.batcher.compute([batch])[self.spec.output]

    def compute(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """Return the outputs for an array for each input. Raises what Batcher.compute raises."""
        return self.batcher.compute(inputs)

    def answers(self, preds: np.ndarray, top: int) -> list[dict[str, Any]]:
        """Return what /predict says of each row of predict(): its `top` most probable labels, or its values."""
        if self.spec.kind == "values":
            if not np.isfinite(preds).all():
                raise ValueError(f"{self.spec.name} answered with numbers that are not finite")
            return [{"values": row.reshape(-1).astype(float).tolist()} for row in preds]
        return [
            {"predictions": [{"label": label, "probability": probability} for label, probability in row]}
            for row in decode_predictions(self.spec, probabilities(preds, self.spec), top)
        ]

    def problem(self, patience: float) -> str:
        """Return why no prediction would be taken, as a sentence, or nothing; a batch may take `patience` seconds."""
        if self.batcher.dead:
            return "The model's thread has ended."
        if self.batcher.busy_seconds() > patience:
            return "The model has been busy with one batch for too long."
        return ""

    def hold(self) -> None:
        """Keep it open for a request, until let_go()."""
        with self.holding:
            self.held += 1

    def let_go(self) -> None:
        """End a request's hold."""
        with self.holding:
            self.held -= 1
            last = self.retired and not self.held
        if last:
            self.close()

    def retire(self) -> None:
        """Close it once no request has it: whoever calls this gives it to no further one."""
        with self.holding:
            self.retired = True
            last = not self.held
        if last:
            self.close()

    def close(self) -> None:
        """Take no more requests; what waits is still computed."""
        with self.holding:
            closed, self.closed = self.closed, True
        if not closed:
            self.batcher.close()
            self.explainer.close()
            self.metrics.end()


def decode_predictions(spec: Spec, rows: np.ndarray, top: int) -> list[list[tuple[str, float]]]:
    """Return for each row of probabilities, shape (n, classes), its `top` most probable labels, best first."""
    labels = spec.names(rows.shape[-1])
    return [[(labels[i], float(row[i])) for i in np.argsort(-row, kind="stable")[:top]] for row in rows]

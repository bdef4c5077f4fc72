"""Medians over the rounds of one run of bench.py, by what they are of."""

from collections.abc import Callable
from statistics import median
from typing import Any

from plan import PEERS

Row = dict[str, Any]
Load = tuple[str, str, str, int]  # model, contestant, payload, clients

TITLES = {
    "tutorial": "the tutorial's",
    "ours-float32": "this one, float32",
    "ours-bfloat16": "this one, bfloat16",
    "ours-int8": "this one, int8",
    "fastapi": "FastAPI with a tf.function",
    "litserve": "LitServe",
    "bentoml": "BentoML",
    "ray": "Ray Serve",
}
MODEL_TITLES = {
    "resnet50": "ResNet50",
    "bundled": "EfficientNet-Lite0 (bundled)",
    "numbers": "Four numbers to three classes",
}


def fastest(engine: dict[str, float]) -> float:
    """Return the most images/s that the engine gave alone: with all threads on one batch, or a batch for each."""
    return max(engine["images_per_s"], engine.get("side_by_side_per_s", 0))


def if_measured(measure: Callable[[], float]) -> float | None:
    """Return what was measured, or None."""
    try:
        return measure()
    except (KeyError, ZeroDivisionError):
        return None


class Medians:
    """Medians over the rounds of a run. What was not measured raises KeyError."""

    def __init__(self, run: Row):
        self.run = run
        self.loads = {(row["model"], row["contestant"], row["payload"], row["clients"]) for row in run["loads"]}
        self.models = [model for model in MODEL_TITLES if any(load[0] == model for load in self.loads)]
        self.contestants = [name for name in TITLES if any(load[1] == name for load in self.loads)]

    def rows(self, table: str, **wanted: Any) -> list[Row]:
        """Return the rows that have the wanted values, one a round."""
        found = [row for row in self.run[table] if wanted.items() <= row.items()]
        if not found:
            raise KeyError(f"{table}: {wanted}")
        return found

    def rows_of(self, load: Load) -> list[Row]:
        """Return the rows of a load."""
        model, contestant, payload, clients = load
        return self.rows("loads", model=model, contestant=contestant, payload=payload, clients=clients)

    def load(self, what: str, *load: *Load) -> float:
        """Return the median of what was measured under a load."""
        return median(row[what] for row in self.rows_of(load))

    def rounds(self) -> int:
        """Return the most rounds that a load was measured in."""
        return max(len({row["round"] for row in self.rows_of(load)}) for load in self.loads)

    def errors(self, *load: *Load) -> int:
        """Return the errors of all rounds."""
        return sum(row["errors"] for row in self.rows_of(load))

    def start(self, what: str, model: str, contestant: str) -> float:
        """Return the median of "seconds" to the first answer, or of "memory_mb"."""
        return median(row[what] for row in self.rows("starts", model=model, contestant=contestant))

    def best_peer(self, model: str, payload: str, clients: int) -> float:
        """Return the most requests/s that a peer reached."""
        loads = [(model, peer, payload, clients) for peer in PEERS]
        rates = [self.load("rps", *load) for load in loads if load in self.loads]
        if not rates:
            raise KeyError("no peer was measured")
        return max(rates)

    def one_ms(self, model: str, precision: str) -> float:
        """Return the milliseconds of a batch of one of the engine alone."""
        return median(row["engine"][precision]["one_ms"] for row in self.rows("limits", model=model))

    def engine(self, model: str, precision: str) -> float:
        """Return the images/s of the engine alone."""
        return median(fastest(row["engine"][precision]) for row in self.rows("limits", model=model))

    def decoding_ms(self, payload: str, what: str = "decoding_ms") -> float:
        """Return the median time to decode and prepare a picture, as this server does it or plainly ("plain_ms")."""
        return median(row[what][payload] for row in self.rows("limits"))

    def possible(self, model: str, precision: str, payload: str) -> float:
        """Return the requests/s that engine and decoding leave possible on the same cores.

        A picture takes 1 / engine seconds of all cores, and its decoding so many of one of them.
        """
        decoding = self.decoding_ms(payload) / 1000 / self.run["cores"]
        return 1 / (1 / self.engine(model, precision) + decoding)

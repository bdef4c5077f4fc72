"""Holds the answers of one way of computing a model against another's, row by row: as labels, or as values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from keras_server.models.agreement import NEAR, SURE, Agreement
from keras_server.models.engines import Engine
from keras_server.models.spec import Spec, probabilities

Answers = list[list[np.ndarray]]  # for each row its outputs, each with one row as its first axis

ACTIVATIONS = {"probabilities": "none", "logits": "softmax", "binary logits": "sigmoid"}


def answers_of(engine: Engine, rows: Sequence[list[np.ndarray]]) -> Answers:
    """Return what a model answers to each row by itself, for rows may differ in their lengths."""
    return [engine(row) for row in rows]


def activation_of(spec: Spec, number: int) -> str:
    """Return what makes probabilities of an output; "" for one that is no list of labels."""
    if number == spec.output and spec.kind != "none":
        return spec.activation if spec.kind == "classes" else ""
    tensor = spec.outputs[number]
    return ACTIVATIONS.get(tensor.meaning, "") if len(tensor.shape) == 1 else ""


def compare(spec: Spec, expected: Answers, actual: Answers) -> Agreement:
    """Return how far answers to the same rows agree; a row does where all of its outputs do.

    Raises ValueError where an output is not finite, or is said to be probabilities and is none.
    """
    count = len(expected)
    same, sure = np.ones(count, bool), np.zeros(count, bool)
    of_labels, of_values = [], []  # by how much each row changes, for each output
    for number in range(len(spec.outputs)):
        a, b = ([row[number] for row in answers] for answers in (expected, actual))
        if activation := activation_of(spec, number):
            as_output = replace(spec, activation=activation)
            p, q = (probabilities(np.concatenate(each), as_output) for each in (a, b))
            best, rows = p.argmax(1), np.arange(count)
            same &= best == q.argmax(1)
            sure |= p[rows, best] > SURE
            of_labels.append(np.abs(p - q)[rows, best])
        else:
            change, near = changes(a, b, spec.name)
            same &= near
            of_values.append(change)
    change = np.max(of_labels or of_values, axis=0)
    if not of_labels:
        sure[:] = False
    return Agreement(
        "labels" if of_labels else "values",
        count,
        float(same.mean()),
        int(sure.sum()),
        float(same[sure].mean()) if sure.any() else 1.0,
        float(change.mean()),
        float(change.max()),
    )


def changes(expected: list[np.ndarray], actual: list[np.ndarray], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return by how much each row of values changes, and which rows count as the same. Raises as compare().

    The change is the root of the mean square over the row's values, as a share of the spread (standard deviation) that
    the output has in all rows: a value of its own may well be near zero. Whole numbers are the same or they are not.
    """
    flat = np.concatenate([array.ravel() for array in expected]).astype(float)
    if not all(np.isfinite(array).all() for array in (flat, *actual)):
        raise ValueError(f"{name} answered with numbers that are not finite")
    spread = flat.std() or np.abs(flat).max() or 1.0
    change = np.array(
        [
            np.sqrt(np.mean((a.astype(float) - b) ** 2)) / spread if a.shape == b.shape else np.inf
            for a, b in zip(expected, actual, strict=True)
        ]
    )
    return change, change <= (NEAR if expected[0].dtype.kind == "f" else 0)

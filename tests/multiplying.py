"""Models that multiply, in OpenVINO's own format: made in a moment, and known by their answers."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np

from keras_server.models.engines import openvino


def product(factor: float, size: int = 3) -> Any:
    """Return an OpenVINO model that multiplies its numbers, float32, shape (n, size)."""
    ops = importlib.import_module(f"{openvino().__name__}.opset13")
    x = ops.parameter([-1, size], np.float32, name="x")
    factors = ops.constant(np.full((1, size), factor, np.float32))
    result = ops.result(ops.multiply(x, factors))
    result.output(0).get_tensor().set_names({"y"})
    x.output(0).get_tensor().set_names({"x"})
    return openvino().Model([result], [x], "times")


def times(path: Path, factor: float, size: int = 3) -> Path:
    """Write such a model in OpenVINO's own format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    openvino().save_model(product(factor, size), path, compress_to_fp16=False)
    return path

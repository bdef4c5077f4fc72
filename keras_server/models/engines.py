"""What computes a batch: OpenVINO on a CPU, Keras itself elsewhere.

An engine is called with a list of arrays, one for each input of the model, and returns the list of its outputs, all
with the batch as their first axis. As many threads may call it at a time as it has lanes.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from keras_server.machine import step_back
from keras_server.models.tracing import import_keras, structures, trace
from keras_server.settings import Precision

log = logging.getLogger("keras_server")


# Of the threads that compute: who reads, decodes and answers goes first. Else these wait for a processor, and some of
# them hold Python's lock while they do: under overload /healthz then takes half a second in place of a tenth.
NICENESS = 10
HANDED = 0.0003  # seconds for a row below which handing over to a lane of OpenVINO's, some 0.1 ms, is not worth it
TRIED = 0.02  # seconds for which a row is computed again and again to see how long it takes


class Engine(Protocol):
    """What computes a batch."""

    lanes: int

    def __call__(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """Compute one batch."""


def accelerated() -> bool:
    """Return whether Keras computes on something that OpenVINO would not use. Imports Keras only if that may be."""
    if os.environ.get("KERAS_BACKEND", "tensorflow") != "tensorflow":
        return True  # a backend chosen by hand is to be used
    if not any(Path("/dev").glob("nvidia[0-9]*")) and not Path("/dev/kfd").exists():
        return False
    import tensorflow as tf

    return bool(tf.config.list_physical_devices("GPU"))


def openvino() -> Any:
    """Import OpenVINO without its telemetry package, which would report to its makers at import."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


def read_copied(path: Path, *weights: Path) -> Any:
    """Return the OpenVINO model in a file, with its weights in memory.

    Of a mapped file they would change with it, or the process would end, where somebody writes a new model into it.
    """
    core = openvino().Core()
    core.set_property({"ENABLE_MMAP": False})
    return core.read_model(path, *weights)


def has_bfloat16() -> bool:
    """Return whether this processor computes in bfloat16."""
    return "BF16" in openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def processor() -> str:
    """Return the processor's name, and what it computes with, as OpenVINO calls them."""
    core = openvino().Core()
    return " ".join(
        [core.get_property("CPU", "FULL_DEVICE_NAME"), *core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")]
    )


class OpenVINOEngine:
    """Runs a model on the CPU: a lone row with all threads, several batches at a time side by side on a part of them.

    Threads that share a computation wait for each other after every layer, and for the one whose core decoding took.
    With rows of its own each none waits: up to 15 % more images a second, for a second set of compiled weights. Of a
    quick model handing over to such a thread takes longer than computing, so it has one lane.
    """

    name = "openvino"

    def __init__(
        self, converted: Any, precision: Precision, threads: int, max_batch: int, row: Sequence[np.ndarray] = ()
    ):
        """Compile what convert() returned, or the .xml file of it. What int8 leaves unquantized is float32.

        `row` is what the model is tried on, where it may be a quick one.
        """
        core = openvino().Core()
        options = {
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bfloat16" else "f32",
            "INFERENCE_NUM_THREADS": threads,
            "ENABLE_CPU_PINNING": False,  # to the cores that other replicas on this machine are pinned to as well
        }

        def requests(streams: int) -> deque[Any]:
            compiled = core.compile_model(converted, "CPU", {**options, "NUM_STREAMS": streams})
            return deque(compiled.create_infer_request() for _ in range(streams))

        self.tensor = openvino().Tensor
        # OpenVINO's threads inherit the priority of the one that compiles.
        with ThreadPoolExecutor(1, initializer=lambda: step_back(NICENESS)) as background:
            self.free = background.submit(requests, 1).result()
            self.all_threads, self.lanes = self.free[0], 1
            self.types = [taken.element_type.to_dtype() for taken in self.all_threads.model_inputs]
            if min(threads, max_batch) > 1 and not (row and self.is_quick(row)):
                self.lanes = min(threads, max_batch)
                self.free = background.submit(requests, self.lanes).result()

    def is_quick(self, row: Sequence[np.ndarray]) -> bool:
        """Return whether a row takes less than HANDED, once at least. Raises what OpenVINO raises."""
        ended, until = time.monotonic(), time.monotonic() + TRIED
        while ended < until:
            started = time.monotonic()
            self([*row])
            ended = time.monotonic()
            if ended - started < HANDED:
                return True
        return False

    def __call__(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """Compute one batch."""
        lane = self.free.pop()
        try:
            alone = len(self.free) == self.lanes - 1 and len(inputs[0]) == 1
            request = self.all_threads if alone else lane
            # As a tensor has to be that shares an array's memory, which lives as long as this list.
            shared = [np.require(array, kind, ["C", "W"]) for array, kind in zip(inputs, self.types, strict=True)]
            for number, array in enumerate(shared):  # in a small model's time twice as fast as infer(inputs)
                request.set_input_tensor(number, self.tensor(array, shared_memory=True))
            return [plain(output) for output in request.infer().to_tuple()]
        finally:
            self.free.append(lane)


class KerasEngine:
    """Runs a model on whatever Keras' backend computes on: TensorFlow, JAX or PyTorch, with or without a GPU."""

    lanes = 1

    def __init__(self, keras_model: Any, max_batch: int, traced: bool = True):
        """Take a Keras model. Without `traced` it is called as it stands, which is slower (see Reference)."""
        keras = import_keras()
        self.model, self.tree, self.backend = keras_model, keras.tree, keras.backend.backend()
        self.structure, _ = structures(keras_model)
        self.name = f"keras/{self.backend}"
        self.traced = traced
        self.function = trace(keras_model) if traced and self.backend == "tensorflow" else None
        if self.backend == "jax":  # which compiles each size anew: only powers of two, up to max_batch now
            for size in (2**k for k in range((max_batch - 1).bit_length() + 1)):
                self([np.zeros((size, *(d or 1 for d in t.shape[1:])), t.dtype) for t in keras_model.inputs])

    def __call__(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """Compute one batch."""
        if self.function:
            return [plain(output.numpy()) for output in self.function(*inputs)]
        rows = len(inputs[0])
        if self.backend == "jax" and (padding := 2 ** (rows - 1).bit_length() - rows):
            inputs = [np.concatenate([a, np.repeat(a[-1:], padding, axis=0)]) for a in inputs]
        packed = self.tree.pack_sequence_as(self.structure, inputs)
        outputs = self.model.predict_on_batch(packed) if self.traced else self.model(packed, training=False)
        return [plain(np.asarray(output)[:rows]) for output in self.tree.flatten(outputs)]


def plain(array: np.ndarray) -> np.ndarray:
    """Return an array in a type that numpy itself has: bfloat16 becomes float32."""
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


def batched(engine: Engine, batch: int | None) -> Engine:
    """Return an engine that takes any number of rows, of one whose model may take batches of one size only."""
    return FixedBatch(engine, batch) if batch else engine


class FixedBatch:
    """Computes any number of rows with an engine whose model takes batches of one size only."""

    def __init__(self, engine: Engine, batch: int):
        self.engine, self.batch, self.lanes = engine, batch, engine.lanes

    def __call__(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """Compute one batch: piece by piece, the last one filled up with its last row."""
        rows = len(inputs[0])
        pieces = []
        for first in range(0, rows, self.batch):
            piece = [array[first : first + self.batch] for array in inputs]
            missing = self.batch - len(piece[0])
            pieces.append(self.engine([np.concatenate([a, np.repeat(a[-1:], missing, axis=0)]) for a in piece]))
        return [np.concatenate(parts)[:rows] for parts in zip(*pieces, strict=True)]

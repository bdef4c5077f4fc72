"""What computes a batch: OpenVINO on a CPU, Keras itself elsewhere.

An engine is called with a list of arrays, one for each input of the model, and returns the list of its outputs, all
with the batch as their first axis. As many threads may call it at a time as it has lanes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np

log = logging.getLogger("keras_server")


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


def has_bfloat16() -> bool:
    """Return whether this processor computes in bfloat16."""
    return "BF16" in openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def step_back() -> None:
    """Lower this thread's priority, and that of the threads it starts: who reads, decodes and answers goes first.

    Else these wait for a processor, and some of them hold Python's lock while they do: under overload /healthz then
    takes half a second in place of a tenth.
    """
    if sys.platform == "linux":  # elsewhere it would be the whole process's
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, 10)


class OpenVINOEngine:
    """Runs a model on the CPU: a lone row with all threads, several batches at a time side by side on a part of them.

    Threads that share a computation wait for each other after every layer, and for the one whose core decoding took.
    With rows of its own each none waits: up to 15 % more images a second, for a second set of compiled weights.
    """

    name = "openvino"

    def __init__(self, converted: Any, precision: str, threads: int, max_batch: int):
        """Compile what convert() returned, or the .xml file of it."""
        core = openvino().Core()
        options = {
            "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[precision],
            "INFERENCE_NUM_THREADS": threads,
            "ENABLE_CPU_PINNING": False,  # to the cores that other replicas on this machine are pinned to as well
        }

        def requests(streams: int) -> deque[Any]:
            compiled = core.compile_model(converted, "CPU", {**options, "NUM_STREAMS": streams})
            return deque(compiled.create_infer_request() for _ in range(streams))

        self.lanes = min(threads, max_batch)
        with ThreadPoolExecutor(1, initializer=step_back) as background:  # OpenVINO's threads inherit its priority
            self.free = background.submit(requests, self.lanes).result()
            self.all_threads = background.submit(requests, 1).result()[0] if self.lanes > 1 else self.free[0]

    def __call__(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """Compute one batch."""
        lane = self.free.pop()
        try:
            alone = len(self.free) == self.lanes - 1 and len(inputs[0]) == 1
            return [*(self.all_threads if alone else lane).infer(inputs, share_inputs=True).to_tuple()]
        finally:
            self.free.append(lane)


class KerasEngine:
    """Runs a model on whatever Keras' backend computes on: TensorFlow, JAX or PyTorch, with or without a GPU."""

    lanes = 1

    def __init__(self, keras_model: Any, max_batch: int):
        import keras

        self.model, self.tree, self.backend = keras_model, keras.tree, keras.backend.backend()
        self.input, _ = structures(keras_model)
        self.name = f"keras/{self.backend}"
        self.function = trace(keras_model) if self.backend == "tensorflow" else None
        if self.backend == "jax":  # which compiles each size anew: only powers of two, and all of them now
            for size in (2**k for k in range((max_batch - 1).bit_length() + 1)):
                self([np.zeros((size, *(d or 1 for d in t.shape[1:])), t.dtype) for t in keras_model.inputs])

    def __call__(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """Compute one batch."""
        if self.function:
            return [output.numpy() for output in self.function(*inputs)]
        rows = len(inputs[0])
        if self.backend == "jax" and (padding := 2 ** (rows - 1).bit_length() - rows):
            inputs = [np.concatenate([a, np.repeat(a[-1:], padding, axis=0)]) for a in inputs]
        packed = self.tree.pack_sequence_as(self.input, inputs)
        return [np.asarray(output)[:rows] for output in self.tree.flatten(self.model.predict_on_batch(packed))]


def convert(keras_model: Any) -> Any:
    """Return the model in OpenVINO's form, for any batch size.

    Raises whatever the converter does; RuntimeError where Keras runs on another backend than TensorFlow.
    """
    import keras

    if keras.backend.backend() != "tensorflow":
        raise RuntimeError(f"Keras runs on {keras.backend.backend()}, and OpenVINO converts from TensorFlow")
    # Not shared: TensorFlow frees the weights once the Keras model is gone, and the answers would turn to noise.
    converted = openvino().convert_model(trace(keras_model), share_weights=False)

    def number(result: Any) -> int:
        return int("0" + re.sub(r":0$|\D", "", result.get_friendly_name()))

    # Outputs come in the alphabetical order of TensorFlow's names for them: Identity:0, Identity_10:0, Identity_1:0.
    results = sorted(converted.get_results(), key=number)
    return openvino().Model(results, converted.get_sinks(), converted.get_parameters(), converted.get_friendly_name())


def trace(keras_model: Any) -> Any:
    """Return one TensorFlow function from flat inputs to flat outputs that holds for every batch size."""
    import keras
    import tensorflow as tf

    structure, _ = structures(keras_model)

    @tf.function(input_signature=[tf.TensorSpec((None, *t.shape[1:]), t.dtype) for t in keras_model.inputs])
    def forward(*inputs: Any) -> list[Any]:
        packed = keras.tree.pack_sequence_as(structure, inputs)
        return keras.tree.flatten(keras_model(packed, training=False))

    return forward.get_concrete_function()


def structures(keras_model: Any) -> tuple[Any, Any]:
    """Return how a model takes its inputs and gives its outputs: a tensor, or a list or dict of them."""
    import keras

    if isinstance(keras_model, keras.Sequential):  # which knows them only as lists
        return keras_model.inputs[0], keras_model.outputs[0]
    return keras_model.input, keras_model.output

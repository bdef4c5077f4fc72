"""Loads the model files that people have with the Keras that reads them, or says in a sentence why none does."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from keras_server.models.errors import StartupError
from keras_server.models.kinds import find_model, is_hdf5, is_saved_model, teachable
from keras_server.models.tracing import import_keras, reason_of

log = logging.getLogger("keras_server")


def load_teachable(path: Path, inside: str, unsafe: bool) -> Any:
    """Return the Keras model that an archive holds. Raises StartupError."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with zipfile.ZipFile(path) as archive:
                archive.extractall(folder)
        except (OSError, ValueError, RuntimeError, zipfile.BadZipFile) as error:
            raise StartupError(f"{path} cannot be unpacked: {reason_of(error)}") from None
        try:
            return load_file(find_model(Path(folder, inside)), unsafe)
        except StartupError as error:
            raise StartupError(str(error).replace(folder, str(path))) from None


def load_file(path: Path, unsafe: bool) -> Any:
    """Return the Keras model in a file or a folder. Raises StartupError."""
    if inside := teachable(path):
        return load_teachable(path, inside, unsafe)
    if is_saved_model(path):
        return load_saved_model(path)
    keras = import_keras()
    try:
        with named(path, ".h5" if is_hdf5(path) else ".keras") as file:
            if is_of_keras_2(written_by(path)):
                return load_with_keras_2(path, file, unsafe)
            return keras.saving.load_model(file, compile=False, safe_mode=not unsafe)
    except StartupError:
        raise
    except Exception as error:  # noqa: BLE001 - Keras raises whatever the file's content trips over
        raise StartupError(sentence(error, path, unsafe)) from None


def load_with_keras_2(path: Path, file: Path, unsafe: bool) -> Any:
    """Return a model that Keras 2 has written, in the shell of one of Keras 3; `file` is its path for Keras.

    Raises StartupError, or whatever Keras does.
    """
    try:
        import tf_keras
    except ImportError:
        raise StartupError(
            f"{path} was written by Keras {written_by(path)}: install tf_keras, which reads it (pip install tf_keras)."
        ) from None
    if not unsafe and has_lambda(model_config(path)):
        raise ValueError("enable_unsafe_deserialization")
    log.info("Keras %s wrote this file, so Keras 2 (tf_keras %s) loads it.", written_by(path), tf_keras.__version__)
    original = tf_keras.models.load_model(file, compile=False, **({} if is_hdf5(file) else {"safe_mode": not unsafe}))
    inputs = {
        name: (tuple(t.shape), t.dtype.name) for name, t in zip(original.input_names, original.inputs, strict=True)
    }

    def call(tensors: dict[str, Any]) -> Any:
        ordered = [tensors[name] for name in original.input_names]
        outputs = original(ordered if len(ordered) > 1 else ordered[0], training=False)
        return outputs if isinstance(outputs, dict) else dict(zip(original.output_names, as_list(outputs), strict=True))

    return in_keras_3(call, inputs, original)


def as_list(value: Any) -> list[Any]:
    """Return a list of one or several outputs."""
    return list(value) if isinstance(value, list | tuple) else [value]


def in_keras_3(call: Callable[[dict[str, Any]], Any], inputs: dict[str, tuple[Any, str]], original: Any) -> Any:
    """Return a Keras model that calls a function of TensorFlow's, whose inputs have these shapes and types by name."""
    keras = import_keras()

    class Shell(keras.layers.Layer):  # type: ignore[misc, name-defined]
        def call(self, tensors: dict[str, Any]) -> Any:
            return call(tensors)

    shell = Shell()
    shell.original = original  # which holds the variables, and knows its layers
    tensors = {name: keras.Input(batch_shape=shape, dtype=dtype, name=name) for name, (shape, dtype) in inputs.items()}
    return keras.Model(tensors, shell(tensors))


def model_config(path: Path) -> Any:
    """Return what a file says of its model's layers, or None."""
    with contextlib.suppress(Exception):  # whatever is wrong with the file, it says nothing
        if is_hdf5(path):
            return json.loads(hdf5_attribute(path, "model_config"))
        return json.loads(read_member(path, "config.json"))
    return None


def read_member(path: Path, name: str) -> bytes:
    """Return a file that stands in a .keras file, packed or not. Raises whatever is in the way."""
    if path.is_dir():
        return (path / name).read_bytes()
    with zipfile.ZipFile(path) as archive:
        return archive.read(name)


def hdf5_attribute(path: Path, name: str) -> str:
    """Return a text that stands beside the weights in an HDF5 file. Raises LookupError where there is none."""
    import h5py

    with h5py.File(path) as file:
        text = file.attrs[name]
    return text.decode() if isinstance(text, bytes) else str(text)


def has_lambda(config: Any) -> bool:
    """Return whether a model's config has a layer that carries Python code."""
    if isinstance(config, dict):
        return config.get("class_name") in ("Lambda", "__lambda__") or any(map(has_lambda, config.values()))
    return isinstance(config, list) and any(map(has_lambda, config))


@contextlib.contextmanager
def named(path: Path, ending: str) -> Iterator[Path]:
    """Give a file the ending by which Keras tells its formats apart."""
    if path.is_dir():
        ending = ""  # by which it knows a folder
    if path.suffix in ((".h5", ".hdf5") if ending == ".h5" else (ending,)):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder, f"model{ending}")
        link.symlink_to(path.resolve())
        yield link


def written_by(path: Path) -> str:
    """Return the version of Keras that wrote a file, as far as it says so."""
    with contextlib.suppress(Exception):  # whatever is wrong with the file, it says nothing
        if is_hdf5(path):
            return hdf5_attribute(path, "keras_version")
        return str(json.loads(read_member(path, "metadata.json"))["keras_version"])
    return ""


def is_of_keras_2(version: str) -> bool:
    """Return whether Keras 3 refuses most of what this version has written, and misreads some of it without a word."""
    return version.startswith(("1.", "2."))


def training_loss(path: Path | None) -> tuple[str, bool]:
    """Return the name of the loss that a model in a file was trained with, and whether on logits; else "" and False."""
    if not path:
        return "", False
    config: Any = None
    with contextlib.suppress(Exception):  # as above
        if is_hdf5(path):
            config = json.loads(hdf5_attribute(path, "training_config"))
        else:
            config = model_config(path)["compile_config"]
        config = config["loss"]
    return loss_of(config)


def loss_of(config: Any) -> tuple[str, bool]:
    """Return a loss's name in lower case without underscores, and whether it is for logits; of several losses none."""
    if isinstance(config, str):
        return config.lower().replace("_", ""), False
    if isinstance(config, dict) and "class_name" in config:
        inner = config.get("config")
        if isinstance(inner, str):  # a function
            return loss_of(inner)
        return str(config["class_name"]).lower(), bool((inner or {}).get("from_logits"))
    return "", False


def sentence(error: Exception, path: Path, unsafe: bool) -> str:
    """Return why Keras cannot load a file, as a sentence that says what to do."""
    text, version = str(error), written_by(path)
    if match := re.search(r"Could not locate (?:class|function) '([^']+)'|Unknown (?:layer|class)[^']*'([^']+)'", text):
        return (
            f"{path} cannot be loaded as a Keras model: it needs {match[1] or match[2]}, which is none of Keras' own: "
            "give the file of Python that defines and registers it with --import FILE, or save the model without own "
            "layers, by model.export(FOLDER)."
        )
    if not unsafe and re.search("enable_unsafe_deserialization|safe_mode", text):
        return (
            f"{path} cannot be loaded as a Keras model: it carries Python code of its own (a Lambda layer), which runs "
            "only with --unsafe-model: give it where you trust whoever made the file."
        )
    if is_of_keras_2(version):
        return (
            f"{path} was written by Keras {version}, and tf_keras, which reads such files, cannot load it "
            f"({reason_of(error)}): load it with that version, and export it with tf.saved_model.save(model, FOLDER)."
        )
    here = import_keras().__version__
    wrote = f" (Keras {version} wrote it, and this is Keras {here})" if version and version != here else ""
    return f"{path} cannot be loaded as a Keras model{wrote}: {reason_of(error)}"


def load_saved_model(path: Path) -> Any:
    """Return a Keras model around a SavedModel's signature `serving_default`, or the only one that it has.

    Raises StartupError.
    """
    import_keras()
    import tensorflow as tf

    with contextlib.suppress(ImportError):
        import tf_keras  # noqa: F401 - which tells TensorFlow of the optimizers that Keras 2 saved beside its models
    try:
        saved = tf.saved_model.load(os.fspath(path))
    except Exception as error:  # noqa: BLE001 - as above
        raise StartupError(f"{path} cannot be loaded as a SavedModel: {reason_of(error)}") from None
    names = sorted(saved.signatures)
    if "serving_default" not in names and len(names) != 1:
        has = f"it has {', '.join(names)}" if names else "it has none"
        raise StartupError(
            f"{path} has no signature serving_default to serve; {has}: save it with model.export(FOLDER)."
        )
    signature = saved.signatures["serving_default" if "serving_default" in names else names[0]]

    graph = signature.graph.as_graph_def()
    operations = {node.op for node in graph.node} | {n.op for f in graph.library.function for n in f.node_def}
    if any(operation.startswith("Assign") for operation in operations):
        raise StartupError(
            f"{path} is stateful (it changes its own variables at each call), which would mix the requests of several "
            "clients: save it with stateful=False."
        )
    specs = signature.structured_input_signature[1]
    try:
        inputs = {name: (tuple(spec.shape), spec.dtype.name) for name, spec in specs.items()}
        return in_keras_3(lambda tensors: signature(**tensors), inputs, saved)
    except Exception as error:  # noqa: BLE001 - a shape without rank, a ragged tensor
        raise StartupError(f"{path} has a signature that cannot be served: {reason_of(error)}") from None

"""Model files as people have them: told apart by their content, and what is wrong with one in a sentence."""

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
from keras_server.models.tracing import import_keras, reason_of

log = logging.getLogger("keras_server")


def is_hdf5(path: Path) -> bool:
    """Return whether a file is in HDF5, whatever it is called."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"\x89HDF"


def is_model_file(path: Path) -> bool:
    """Return whether a file can be a Keras model: a zip archive or HDF5."""
    return path.is_file() and (is_hdf5(path) or zipfile.is_zipfile(path))


def is_saved_model(path: Path) -> bool:
    """Return whether this is a folder in TensorFlow's format."""
    return (path / "saved_model.pb").is_file()


def is_export(path: Path) -> bool:
    """Return whether this is a folder that `keras-server export` has written, whole or not."""
    return (path / "about.json").is_file()


def kind_of(path: Path) -> str:
    """Return what a file or folder is that is no model of Keras, for a sentence."""
    if path.is_dir():
        if (path / "checkpoint").is_file():
            return "a folder of checkpoints, which are only weights"
        return "a folder without saved_model.pb, or versions of it in folders 1, 2, ..."
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        return "empty"
    kinds = {
        "cut off or damaged, a zip archive without its end": head.startswith(b"PK"),
        "a model of TensorFlow Lite": head[4:8] == b"TFL3",
        "a model of ONNX": path.suffix.lower() == ".onnx",
        "a frozen graph of TensorFlow 1": path.suffix.lower() == ".pb",
        "a pickle": head.startswith(b"\x80") or path.suffix.lower() in (".pkl", ".pickle"),
        "a model of OpenVINO": path.suffix.lower() == ".xml",
        "a picture": head.startswith((b"\xff\xd8\xff", b"\x89PNG")),
    }
    return next(
        (kind for kind, holds in kinds.items() if holds), "neither a zip archive nor HDF5, as Keras writes them"
    )


def teachable(path: Path) -> str:
    """Return where the model stands in an archive that Teachable Machine has exported; "" for any other file.

    Beside it stands labels.txt. Who packs it anew may well put both into a folder.
    """
    if not path.is_file() or not zipfile.is_zipfile(path):
        return ""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    for name in names:
        folder, found, rest = name.rpartition("keras_model.h5")
        if not found:
            folder, found, rest = name.partition("model.savedmodel/saved_model.pb")
        if found and not rest and folder[-1:] in ("", "/") and f"{folder}labels.txt" in names:
            return name.removesuffix("/saved_model.pb")
    return ""


def load_teachable(path: Path, inside: str, unsafe: bool) -> Any:
    """Return the Keras model that an archive holds. Raises StartupError."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with zipfile.ZipFile(path) as archive:
                archive.extractall(folder)
        except (OSError, ValueError, RuntimeError, zipfile.BadZipFile) as error:
            raise StartupError(f"{path} cannot be unpacked: {reason_of(error)}") from None
        try:
            return load_file(Path(folder, inside), unsafe)
        except StartupError as error:
            raise StartupError(str(error).replace(folder, str(path))) from None


def newest_version(path: Path) -> Path | None:
    """Return the newest of a model's versions, laid out as TensorFlow Serving has them: NAME/1, NAME/2."""
    versions = [folder for folder in path.iterdir() if folder.name.isdecimal() and is_saved_model(folder)]
    return max(versions, key=lambda folder: int(folder.name), default=None)


def load_file(path: Path, unsafe: bool) -> Any:
    """Return the Keras model in a file or a SavedModel folder. Raises StartupError."""
    if inside := teachable(path):
        return load_teachable(path, inside, unsafe)
    if is_saved_model(path):
        return load_saved_model(path)
    keras = import_keras()
    if not is_hdf5(path):
        check_archive(path)
    try:
        with named(path, ".h5" if is_hdf5(path) else ".keras") as file:
            if is_of_keras_2(written_by(path)):
                return load_with_keras_2(file, unsafe)
            return keras.saving.load_model(file, compile=False, safe_mode=not unsafe)
    except Exception as error:  # noqa: BLE001 - Keras raises whatever the file's content trips over
        raise StartupError(sentence(error, path, unsafe)) from None


def load_with_keras_2(path: Path, unsafe: bool) -> Any:
    """Return a model that Keras 2 has written, in the shell of one of Keras 3. Raises whatever Keras does."""
    try:
        import tf_keras
    except ImportError:
        raise StartupError(f"{path} was written by Keras 2: install tf_keras, which reads it.") from None
    if not unsafe and has_lambda(model_config(path)):
        raise ValueError("enable_unsafe_deserialization")
    log.info("Keras %s wrote this file, so Keras 2 (tf_keras %s) loads it.", written_by(path), tf_keras.__version__)
    original = tf_keras.models.load_model(
        path, compile=False, **({} if path.suffix == ".h5" else {"safe_mode": not unsafe})
    )
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
        with zipfile.ZipFile(path) as archive:
            return json.loads(archive.read("config.json"))
    return None


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
    if path.suffix.lower() in ((".h5", ".hdf5") if ending == ".h5" else (".keras",)):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder, f"model{ending}")
        link.symlink_to(path.resolve())
        yield link


def check_archive(path: Path) -> None:
    """Raise StartupError for a zip archive that is no Keras model, saying what it is."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if "config.json" in names:
        return
    inside = next((name for name in names if re.search(r"\.(keras|h5|hdf5)$", name)), None)
    if inside and "weights" not in inside:
        raise StartupError(f"{path} is an archive with {inside} inside: unpack it, and serve that file.")
    if any(name.endswith("data.pkl") for name in names):
        raise StartupError(f"{path} is a model of PyTorch, which Keras does not read: export it from there to Keras.")
    if inside:
        raise StartupError(f"{path} holds only weights, without the model that they belong to.")
    raise StartupError(f"{path} is a zip archive without a Keras model in it: save one with model.save('name.keras').")


def written_by(path: Path) -> str:
    """Return the version of Keras that wrote a file, as far as it says so."""
    with contextlib.suppress(Exception):  # whatever is wrong with the file, it says nothing
        if is_hdf5(path):
            return hdf5_attribute(path, "keras_version")
        with zipfile.ZipFile(path) as archive:
            return str(json.loads(archive.read("metadata.json"))["keras_version"])
    return ""


def is_of_keras_2(version: str) -> bool:
    """Return whether Keras 3 refuses most of what this version has written, and misreads some of it without a word."""
    return version.startswith(("1.", "2."))


def training_loss(path: Path | None) -> tuple[str, bool]:
    """Return the name of the loss that a model in a file was trained with, and whether on logits; else "" and False."""
    if not path or path.is_dir():
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
            "save the model without own layers, or export it with model.export(FOLDER)."
        )
    if "No model config found" in text:
        return f"{path} holds only weights: name the model that they belong to with --model, and these with --weights."
    if not unsafe and re.search("enable_unsafe_deserialization|safe_mode", text):
        return (
            f"{path} cannot be loaded as a Keras model: it carries Python code of its own (a Lambda layer), which runs "
            "only with --unsafe-model: give it where you trust whoever made the file."
        )
    if is_of_keras_2(version):
        return (
            f"{path} was written by Keras {version}, and Keras 3 cannot read it: load it with that version, and export "
            "it with tf.saved_model.save(model, FOLDER)."
        )
    return f"{path} cannot be loaded as a Keras model: {reason_of(error)}"


def load_saved_model(path: Path) -> Any:
    """Return a Keras model around a SavedModel's signature `serving_default`, or the only one that it has.

    Raises StartupError.
    """
    import_keras()
    import tensorflow as tf

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

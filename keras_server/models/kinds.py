"""What a model's file or folder is, told by its content and, if at all possible, never by its name.

Nothing here needs Keras: what is no model at all is refused before a process is started that would load it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import stat
import sys
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

from keras_server.images import begins_as_picture
from keras_server.models.errors import StartupError

SAVE = "save one with model.save('name.keras')"
HEAD = 4096  # bytes of a file that are looked at

# How files begin that people take for Keras models, what they are, and what to do.
OTHERS: tuple[tuple[bytes, str, str], ...] = (
    (rb"\Z", "empty", "copy or download it once more"),
    (rb"version https://git-lfs", "a pointer of Git LFS to it", "fetch the file itself with git lfs pull"),
    (rb"(?i)(\xef\xbb\xbf)?\s*<(!doctype html|html)", "a web page", "download the file itself, not the page about it"),
    (rb"PK\x03\x04", "cut off or damaged, a zip archive without its end", "copy or download it once more"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ\0|\x28\xb5\x2f\xfd|7z\xbc\xaf|Rar!|.{257}ustar", "a packed file", "unpack it"),
    (rb"\x80\x02\x8a\x0al\xfc\x9c", "a model of PyTorch", "export it from there to ONNX, or to Keras"),
    (rb"\x80[\x02-\x05]|\x78[\x01\x9c\xda]", "a pickle", f"load it where it was made, and {SAVE.replace('one ', '')}"),
    (rb".{8}\{\s*\"", "weights in safetensors, without the model that they belong to", SAVE),
    (rb"GGUF", "a language model in GGUF", SAVE),
    (rb"\x93NUMPY", "an array of numpy", SAVE),
    (rb"%PDF", "a PDF", SAVE),
    (rb"\s*\{.*\"(modelTopology|weightsManifest)\"", "a model of TensorFlow.js", "convert it back with tensorflowjs"),
    (rb"\s*\{.*\"class_name\".*\"config\"", "a model's layers in JSON, without its weights", SAVE),
    (rb"\s*\{.*\"(added_tokens|vocab|vocab_size|word_index|tokenizer_class)\"", "a tokenizer or its settings", SAVE),
    (rb"\s*[\[{]", "JSON", SAVE),
    (rb"\s*<\?xml", "XML", SAVE),
)


# Likewise those that OpenVINO reads. ONNX is a message of protobuf that begins with ir_version, 3 or more, and another
# field after it; a SavedModel's begins with 1.
FOREIGN = {
    ".xml": rb"\s*(<\?xml[^>]*>\s*)?<net\b",
    ".tflite": rb"....TFL3",
    ".onnx": rb"\x08[\x03-\x1f][\x12\x1a\x22\x28\x32\x3a\x42]",
}
TAKEN = {*sys.stdlib_module_names, "h5py", "keras", "keras_server", "numpy", "openvino", "tensorflow", "tf_keras"}
DAMAGED = (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError)  # what zipfile raises of a damaged archive


def is_hdf5(path: Path) -> bool:
    """Return whether a file is in HDF5, whatever it is called."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"\x89HDF"


def is_saved_model(path: Path) -> bool:
    """Return whether this is a folder in TensorFlow's format."""
    return (path / "saved_model.pb").is_file()


def is_unpacked(path: Path) -> bool:
    """Return whether this is a folder with what a .keras file holds, as some systems unpack it unasked."""
    return all((path / name).is_file() for name in ("config.json", "metadata.json", "model.weights.h5"))


def foreign_format(path: Path) -> str:
    """Return the usual ending of a file that OpenVINO reads without Keras: .xml, .onnx or .tflite; "" for any other."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        head = file.read(HEAD)
    return next((ending for ending, start in FOREIGN.items() if re.match(start, head, re.DOTALL)), "")


def is_export(path: Path) -> bool:
    """Return whether this is a folder that `keras-server export` has written, whole or not."""
    return (path / "about.json").is_file()


def newest_version(path: Path) -> Path | None:
    """Return the newest of a model's versions, laid out as TensorFlow Serving has them: NAME/1, NAME/2."""
    versions = [folder for folder in path.iterdir() if folder.name.isdecimal() and is_saved_model(folder)]
    return max(versions, key=lambda folder: int(folder.name), default=None)


def teachable(path: Path) -> str:
    """Return where the model stands in an archive that Teachable Machine has exported; "" for any other file.

    Beside it stands labels.txt. Who packs it anew may well put both into a folder.
    """
    if not path.is_file() or not zipfile.is_zipfile(path):
        return ""
    names: list[str] = []
    with contextlib.suppress(*DAMAGED), zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    for name in names:
        folder, found, rest = name.rpartition("keras_model.h5")
        if not found:
            folder, found, rest = name.partition("model.savedmodel/saved_model.pb")
        if found and not rest and folder[-1:] in ("", "/") and f"{folder}labels.txt" in names:
            return name.removesuffix("/saved_model.pb")
    return ""


def find_model(path: Path) -> Path:
    """Return a model's file or folder: of several versions the newest. Raises StartupError where it can be no model."""
    with readable(path):
        if stat.S_ISDIR(path.stat().st_mode):
            if is_saved_model(path) or is_unpacked(path) or is_export(path):
                return path
            if newest := newest_version(path):
                return newest
            raise refusal(path, "Keras model", *kind_of_folder(path))
        check_regular(path, "--model takes a file or a folder")
        if zipfile.is_zipfile(path):
            check_archive(path)
        elif is_hdf5(path):
            check_hdf5(path)
        elif not foreign_format(path):
            raise refusal(path, "Keras model", *kind_of(path))
    return path


def check_weights(path: Path) -> None:
    """Raise StartupError for what can be no file of weights."""
    with readable(path):
        check_regular(path, "--weights takes a file")
        if is_hdf5(path):
            check_whole(path)
        elif not zipfile.is_zipfile(path):
            raise refusal(path, "file of weights", *kind_of(path))


def check_program(path: Path) -> None:
    """Raise StartupError for what is no file of Python, or has a mistake in its syntax."""
    with readable(path), warnings.catch_warnings(action="ignore"):
        check_regular(path, "--import takes a file")
        try:
            compile(path.read_bytes(), path, "exec")
        except SyntaxError as error:
            where = f"line {error.lineno}: " if error.lineno else ""
            raise StartupError(f"--import {path} is no Python ({where}{error.msg}).") from None
    if path.suffix != ".py":
        raise StartupError(f"--import {path}: its name has to end in .py.")
    if path.stem in TAKEN:  # it would stand in for that one
        raise StartupError(
            f"--import {path}: {path.stem} is a module that loads the model: give the file another name."
        )


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what the system says of a file that it cannot read into StartupError."""
    try:
        yield
    except FileNotFoundError:
        raise StartupError(f"There is no file {path}.") from None
    except (OSError, ValueError) as error:
        raise StartupError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error}).") from None


def check_regular(path: Path, takes: str) -> None:
    """Raise StartupError for a folder, a device or a pipe. Raises OSError, too."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a device or a pipe"
        raise StartupError(f"{path} is {kind}: {takes}.")


def refusal(path: Path, wanted: str, kind: str, remedy: str) -> StartupError:
    """Return the sentence on what is not what was wanted."""
    return StartupError(f"{path} is not a {wanted}, but {kind}: {remedy}.")


def kind_of(path: Path) -> tuple[str, str]:
    """Return what a file is that is neither a zip archive nor HDF5, and what to do. Raises OSError."""
    with path.open("rb") as file:
        head = file.read(HEAD)
    if path.name == "saved_model.pb":
        return "a part of a SavedModel", f"give its folder, {path.parent}"
    if re.search(r"\.index$|\.data-\d{5}-of-\d{5}$|\.ckpt$", path.name) or path.name == "checkpoint":
        return "a part of a checkpoint, which is only weights", SAVE
    if begins_as_picture(head):
        return "a picture", SAVE
    if found := next(((kind, remedy) for start, kind, remedy in OTHERS if re.match(start, head, re.DOTALL)), None):
        return found
    # What follows has no beginning of its own.
    known = {
        ".pb": ("a frozen graph of TensorFlow 1", "convert it to a SavedModel there"),
        ".onnx": ("a damaged model of ONNX", "copy or download it once more"),
        ".py": ("a program", f"run it, and {SAVE.replace('one', 'the model')}"),
        ".mlmodel": ("a model of Core ML", SAVE),
    }
    if path.suffix.lower() in known:
        return known[path.suffix.lower()]
    with contextlib.suppress(UnicodeDecodeError):
        head[: HEAD - 3].decode()
        if b"\0" not in head:
            return "a text file", SAVE
    return "neither a zip archive nor HDF5, as Keras writes them", SAVE


def kind_of_folder(path: Path) -> tuple[str, str]:
    """Return what a folder without a model is, and what to do. Raises OSError."""
    names = sorted(os.listdir(path))
    inside = [name for name in names if re.search(r"\.(keras|h5|hdf5)$", name) and "weights" not in name]
    if "variables.index" in names or "variables.data-00000-of-00001" in names:
        return "a part of a SavedModel", f"give the folder that it is in, {path.absolute().parent}"
    if "checkpoint" in names or any(name.endswith(".index") for name in names):
        return "a folder of checkpoints, which are only weights", SAVE
    if {"model.safetensors", "pytorch_model.bin", "tf_model.h5"} & {*names}:
        return "a model of Hugging Face's transformers", "export it from there to ONNX, or to a SavedModel"
    if "model.json" in names:
        return "a folder with a model of TensorFlow.js", "convert it back with tensorflowjs"
    if len(inside) == 1:
        return f"a folder with {inside[0]} inside", f"serve that, --model {path / inside[0]}"
    if not names:
        return "an empty folder", SAVE
    return "a folder without saved_model.pb, or versions of it in folders 1, 2, ...", SAVE


def check_archive(path: Path) -> None:
    """Raise StartupError for a zip archive that is no Keras model, saying what it is."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except DAMAGED as error:
        raise StartupError(f"{path} is a damaged zip archive ({error}): copy or download it once more.") from None
    if "config.json" in names or teachable(path):
        return
    inside = next((name for name in names if re.search(r"\.(keras|h5|hdf5|onnx|tflite)$", name)), None)
    if inside and "weights" not in inside:
        raise StartupError(f"{path} is an archive with {inside} inside: unpack it, and serve that file.")
    if saved := next((name for name in names if name.rpartition("/")[2] == "saved_model.pb"), None):
        folder = saved.rpartition("/")[0] or "a SavedModel"
        raise StartupError(f"{path} is an archive with {folder} inside: unpack it, and serve that folder.")
    if any(name.endswith("data.pkl") for name in names):
        raise StartupError(f"{path} is a model of PyTorch, which Keras does not read: export it from there to ONNX.")
    if inside:
        raise StartupError(f"{path} holds only weights, without the model that they belong to.")
    if names and all(name.endswith(".npy") for name in names):
        raise StartupError(f"{path} holds arrays of numpy, without the model that they belong to: {SAVE}.")
    raise StartupError(f"{path} is a zip archive without a Keras model in it: {SAVE}.")


def check_whole(path: Path) -> None:
    """Raise StartupError for a file in HDF5 that is cut off. Raises OSError."""
    with path.open("rb") as file:
        if path.stat().st_size < hdf5_length(file.read(64)):
            raise StartupError(f"{path} is cut off: copy or download it once more.")


def check_hdf5(path: Path) -> None:
    """Raise StartupError for a file in HDF5 that is cut off, or holds no model. Raises OSError.

    Names stand in it as they are: no library is needed to find them.
    """
    check_whole(path)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:

        def has(*names: bytes) -> bool:
            return all(content.find(name) >= 0 for name in names)

        if has(b"model_config"):
            return
        # as Keras 2 and Keras 3 name them
        if has(b"layer_names") or has(b"layers", b"vars") or has(b"_layer_checkpoint_dependencies"):
            raise StartupError(
                f"{path} holds only weights: name the model that they belong to with --model, and these with --weights."
            )
        if has(b"optimizer"):
            raise StartupError(f"{path} holds the state of an optimizer, without the model that it trained: {SAVE}.")
    raise StartupError(f"{path} is in HDF5 and holds no Keras model, but other data: {SAVE}.")


def hdf5_length(head: bytes) -> int:
    """Return how many bytes a file in HDF5 has to have, by its first 64; 0 where it does not say so.

    HDF5 File Format Specification 3.0, II.A: the superblock's end of file address, whose place hangs on its version.
    """
    if len(head) < 64:
        return 64
    at, size = {0: (40, 13), 1: (44, 13), 2: (28, 9), 3: (28, 9)}.get(head[8], (0, 0))
    return int.from_bytes(head[at : at + 8], "little") if head[size] == 8 else 0

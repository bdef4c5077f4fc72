"""What a folder of models holds, and whether it has changed.

models/
  cats.keras, cats.toml            a model in a file, with its settings beside it
  digits/saved_model.pb, ...       a folder that is a model itself: a SavedModel, an export
  flowers/1/, flowers/2/           the versions of a model, as TensorFlow Serving has them
  flowers/3/model.onnx             a version may also hold a lone file or folder, as Triton has them
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from keras_server.models.kinds import is_export, is_saved_model, is_unpacked
from keras_server.models.source import reachable

# Files with other endings are taken for what lies beside models. A model's file is told by its content, once it is one.
ENDINGS = (".keras", ".h5", ".hdf5", ".onnx", ".tflite", ".xml", ".zip")

Files = frozenset[tuple[str, int, int, int]]  # of files: name, which it is on the disk, size, and time of its change


def is_model_folder(path: Path) -> bool:
    """Return whether a folder is a model itself."""
    return is_saved_model(path) or is_unpacked(path) or is_export(path)


def models_in(folder: Path) -> dict[str, list[Path]]:
    """Return the files and folders with models in a folder, by name; of one name there should be one. Raises OSError.

    Whether they can be served nobody has looked. A folder that cannot be read, such as lost+found, may hold one.
    """
    found: dict[str, list[Path]] = {}
    for path in visible(folder):
        try:
            is_one = path.suffix.lower() in ENDINGS or is_model_folder(path) or bool(versions_in(path))
        except OSError:
            is_one = True
        if is_one:
            found.setdefault(reachable(path), []).append(path)
    return found


def versions_in(path: Path) -> dict[int, Path]:
    """Return what lies under the numbers of a model's versions; nothing where it has none. Raises OSError."""
    if not path.is_dir() or is_model_folder(path):
        return {}
    return {int(child.name): inside(child) for child in visible(path) if child.name.isascii() and child.name.isdigit()}


def inside(version: Path) -> Path:
    """Return the model of a version: the folder itself, or the only model in it."""
    if version.is_dir() and not is_model_folder(version):
        candidates = [child for child in visible(version) if child.suffix.lower() in ENDINGS or is_model_folder(child)]
        if len(candidates) == 1:
            return candidates[0]
    return version


def visible(folder: Path) -> Iterator[Path]:
    """Yield what is in a folder, in order, but for what is hidden. Raises OSError."""
    for name in sorted(os.listdir(folder)):
        if not name.startswith((".", "_")):
            yield folder / name


def state_of(*paths: Path) -> Files:
    """Return what tells whether files, and all that is in folders, have changed. What is not there does not count."""
    found: set[tuple[str, int, int, int]] = set()
    for path in paths:
        files = (Path(root, name) for root, _, names in os.walk(path) for name in names) if path.is_dir() else [path]
        for file in files:
            with contextlib.suppress(OSError):  # it has gone meanwhile
                status = file.stat()
                found.add((str(file), status.st_ino, status.st_size, status.st_mtime_ns))
    return frozenset(found)


def beside_of(path: Path) -> list[Path]:
    """Return the files that a model's settings may stand in: beside it or in it."""
    if not path.is_dir():
        return [path, path.with_suffix(".toml"), path.parent / f"{path.stem}.labels.txt"]
    names = [f"{path.name}.toml", f"{path.name}.labels.txt"]
    return [path / "about.json", *(folder / name for folder in (path, path.parent) for name in names)]

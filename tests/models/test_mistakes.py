"""Mistakes at start-up: one true sentence each, a status of 1 or 2, no traceback, and Keras only where it is needed."""

import io
import json
import os
import pickle
import re
import socket
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import DOG, ROOT

import run_keras_server as server
from keras_server.front.listener import bind
from keras_server.models import opening
from keras_server.models.child import convert_in_child
from keras_server.models.errors import StartupError
from keras_server.models.files import load_file
from keras_server.models.source import Source

DATA = ROOT / "tests" / "data" / "models"


@pytest.fixture(autouse=True)
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder to work in, full of what people mistake for models, and no trace of another server."""
    for name in [name for name in os.environ if name.startswith("KERAS_SERVER_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(server, "settings", server.settings)
    monkeypatch.setattr(server, "model", None)
    monkeypatch.setattr(server, "end_at_once", lambda: None)
    listeners: list[Any] = []  # which main() leaves to the end of the process

    def remembered(*address: Any) -> Any:
        found = bind(*address)
        listeners.extend(found)
        return found

    monkeypatch.setattr(server, "bind", remembered)
    monkeypatch.chdir(tmp_path)
    yield
    for listener in listeners:
        listener.close()


@pytest.fixture
def no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where Keras would be asked."""

    def asked(*_: Any) -> Any:
        raise AssertionError("a process was started to load it")

    monkeypatch.setattr(opening, "convert_in_child", asked)
    monkeypatch.setattr(opening, "load_described", asked)


def last_words(capfd: pytest.CaptureFixture[str], *arguments: str, status: int = 1) -> str:
    """Start with these arguments, and return the one line with which it ends."""
    try:
        ended = server.main(["--port", "0", *arguments])
    except SystemExit as stop:
        ended = int(str(stop.code))
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if " INFO " not in line]
    assert ended == status, err
    assert out.count("\n") <= 1
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    assert "Traceback" not in err
    return lines[0]


def zipped(**files: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


def tarred() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        archive.add(DATA / "silu.keras", "silu.keras")
    return out.getvalue()


def hdf5(**groups: dict[str, Any]) -> bytes:
    """A file in HDF5 with an array under each path; the attributes of the root stand under "attrs"."""
    import h5py

    out = io.BytesIO()
    with h5py.File(out, "w") as file:
        for name, value in groups.pop("attrs", {}).items():
            file.attrs[name] = value
        for group, arrays in groups.items():
            for name, array in arrays.items():
                file.create_dataset(f"{group}/{name}", data=array)
    return out.getvalue()


def packed(array: np.ndarray, save: Callable[..., None]) -> bytes:
    out = io.BytesIO()
    save(out, array)
    return out.getvalue()


SAFETENSORS = struct.pack("<Q", 64) + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(64) + bytes(4)
KERAS, H5 = (DATA / "silu.keras").read_bytes(), (DATA / "flowers.h5").read_bytes()
# What a file holds, and what the sentence says of it.
FILES: dict[str, tuple[bytes, str]] = {
    "empty.keras": (b"", "is not a Keras model, but empty: copy or download it once more."),
    "half.keras": (KERAS[: len(KERAS) // 2], "cut off or damaged, a zip archive without its end: copy or download"),
    "directory.keras": (KERAS.replace(b"PK\1\2", b"PK\1\3"), "is a damaged zip archive (Bad magic number"),
    "version.keras": (KERAS.replace(b"\2\x14\3\x14", b"\2\x14\3\xff"), "archive (zip file version 25.5): copy"),
    "half.h5": (H5[: len(H5) // 2], "half.h5 is cut off: copy or download it once more."),
    "begun.h5": (H5[:40], "begun.h5 is cut off"),
    "pointer.keras": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "page.keras": (b"\n<!DOCTYPE html><html lang=en><title>404</title>", "a web page: download the file itself"),
    "photo.keras": (DOG.read_bytes(), "is not a Keras model, but a picture"),
    "pickle.pkl": (pickle.dumps({"w": [1]}), "a pickle: load it where it was made, and save with"),
    "pickle.keras": (pickle.dumps({"w": [1]}, 2), "a pickle"),
    "torch.pth": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "a model of PyTorch: export it from there to ONNX"),
    "torch.pt": (zipped(**{"net/data.pkl": b"", "net/data/0": b""}), "is a model of PyTorch, which Keras does not"),
    "model.safetensors": (SAFETENSORS, "weights in safetensors, without the model that they belong to"),
    "llm.gguf": (b"GGUF\3\0\0\0", "a language model in GGUF"),
    "frozen.pb": (b"\n\x0e\n\x01x\x12\x0bPlaceholder", "a frozen graph of TensorFlow 1: convert it to a SavedModel"),
    "model.ckpt.index": (b"\0\0\1\2", "a part of a checkpoint, which is only weights"),
    "model.ckpt.data-00000-of-00001": (bytes(9), "a part of a checkpoint, which is only weights"),
    "tokenizer.json": (b'{"version": "1.0", "added_tokens": [], "model": {}}', "a tokenizer or its settings"),
    "word_index.json": (b'{"word_index": {"the": 1}}', "a tokenizer or its settings"),
    "layers.json": (b'{"module": "keras", "class_name": "Sequential", "config": {}}', "layers in JSON, without its"),
    "model.json": (b'{"format": "layers-model", "modelTopology": {}}', "a model of TensorFlow.js: convert it back"),
    "labels.json": (b'["cat", "dog"]', "is not a Keras model, but JSON"),
    "labels.txt": (b"cat\ndog\n", "is not a Keras model, but a text file"),
    "latin.txt": ("Straße".encode("latin-1"), "neither a zip archive nor HDF5, as Keras writes them"),
    "train.py": (b"import keras\n", "a program: run it, and save the model with model.save('name.keras')"),
    "array.npy": (packed(np.zeros(3), np.save), "an array of numpy"),
    "arrays.npz": (packed(np.zeros(3), np.savez), "arrays.npz holds arrays of numpy, without the model"),
    "model.tar.gz": (tarred(), "a packed file: unpack it"),
    "paper.pdf": (b"%PDF-1.7", "a PDF"),
    "noise.keras": (bytes(range(128, 256)), "neither a zip archive nor HDF5, as Keras writes them"),
    "photos.zip": (zipped(**{"a.jpg": b"x"}), "photos.zip is a zip archive without a Keras model in it"),
    "inside.zip": (zipped(**{"my/net.keras": KERAS}), "is an archive with my/net.keras inside: unpack it, and serve"),
    "saved.zip": (zipped(**{"my/saved_model.pb": b""}), "is an archive with my inside: unpack it, and serve that fold"),
    "only.keras": (zipped(**{"model.weights.h5": b""}), "only.keras holds only weights, without the model"),
    "old.weights.h5": (hdf5(attrs={"layer_names": ["d"]}, d={"k": [1]}), "holds only weights: name the model that"),
    "new.weights.h5": (hdf5(**{"layers/d/vars": {"0": [1]}}), "holds only weights: name the model that they"),
    "optimizer.h5": (hdf5(optimizer={"m": [1]}), "holds the state of an optimizer, without the model that it trained"),
    "data.h5": (hdf5(train={"x": [1]}), "data.h5 is in HDF5 and holds no Keras model, but other data"),
}  # fmt: skip


@pytest.mark.usefixtures("no_child")
@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_models(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    content, words = FILES[name]
    Path(name).write_bytes(content)
    sentence = last_words(capfd, "--model", name)
    assert words in sentence
    assert name in sentence


# What is in a folder, and what the sentence says of it.
FOLDERS: dict[str, tuple[tuple[str, ...], str]] = {
    "nothing": ((), "nothing is not a Keras model, but an empty folder"),
    "photos": (("a.jpg",), "a folder without saved_model.pb, or versions of it in folders 1, 2, ..."),
    "versions": (("1/readme.txt",), "a folder without saved_model.pb, or versions of it in folders"),
    "one": (("net.keras", "readme.txt"), "a folder with net.keras inside: serve that, --model one/net.keras"),
    "checkpoints": (("checkpoint", "c-1.index"), "a folder of checkpoints, which are only weights"),
    "saved/variables": (("variables.index",), "a part of a SavedModel: give the folder that it is in, "),
    "bert": (("config.json", "model.safetensors"), "a model of Hugging Face's transformers"),
    "js": (("model.json", "group1-shard1of1.bin"), "a folder with a model of TensorFlow.js"),
}


@pytest.mark.usefixtures("no_child")
@pytest.mark.parametrize("name", FOLDERS)
def test_folders_that_are_no_models(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    files, words = FOLDERS[name]
    Path(name).mkdir(parents=True)
    for file in files:
        Path(name, file).parent.mkdir(exist_ok=True)
        Path(name, file).write_bytes(b"x")
    assert words in last_words(capfd, "--model", name)


MODEL = ("--model", str(DATA / "silu.keras"))
# Arguments, the status, and what the sentence says.
OPTIONS: dict[str, tuple[tuple[str, ...], int, str]] = {
    "nonsense": (("--model", "nonsense"), 1, "nonsense is neither a file nor a classifier of keras.applications"),
    "a typing error": (("--model", "resnet5O"), 1, "such as resnet50."),
    "no such file": (("--model", "no/such.keras"), 1, "There is no file no/such.keras."),
    "a file's neighbour": (("--model", "file.txt/net.keras"), 1, "cannot be read (Not a directory)"),
    "a name too long": (("--model", "x" * 300 + ".keras"), 1, "cannot be read (File name too long)"),
    "a device": (("--model", "/dev/null"), 1, "/dev/null is a device or a pipe: --model takes a file or a folder."),
    "a pipe": (("--model", "./pipe"), 1, "pipe is a device or a pipe"),
    "a broken link": (("--model", "link.keras"), 1, "There is no file link.keras."),
    "a SavedModel's file": (("--model", "saved/saved_model.pb"), 1, "a part of a SavedModel: give its folder, saved"),
    "weights for a file": ((*MODEL, "--weights", MODEL[1]), 1, "--weights is for an architecture that --model names"),
    "no such weights": (("--model", "resnet50", "--weights", "none.h5"), 1, "There is no file none.h5."),
    "a folder as weights": (("--model", "resnet50", "--weights", "."), 1, ". is a folder: --weights takes a file."),
    "text as weights": (("--model", "resnet50", "--weights", "file.txt"), 1, "is not a file of weights, but a text"),
    "half weights": (("--model", "resnet50", "--weights", "half.h5"), 1, "half.h5 is cut off"),
    "no such import": ((*MODEL, "--import", "none.py"), 1, "There is no file none.py."),
    "a folder to import": ((*MODEL, "--import", "."), 1, ". is a folder: --import takes a file."),
    "a syntax error": ((*MODEL, "--import", "wrong.py"), 1, "--import wrong.py is no Python (line 2: "),
    "binary to import": ((*MODEL, "--import", "half.h5"), 1, "--import half.h5 is no Python ("),
    "a program called as a module": (
        (*MODEL, "--import", "json.py"), 1,
        "--import json.py: json is a module that loads the model: give the file another name.",
    ),
    "a text to import": ((*MODEL, "--import", "empty.txt"), 1, "--import empty.txt: its name has to end in .py."),
    "preprocess": ((*MODEL, "--preprocess", "cafe"), 1, "--preprocess cafe is no mode: take one of auto, none, unit"),
    "no such labels": ((*MODEL, "--labels", "none.txt"), 1, "There is no file none.txt."),
    "a folder as labels": ((*MODEL, "--labels", "."), 1, ". is a folder: --labels takes a file."),
    "empty labels": ((*MODEL, "--labels", "empty.txt"), 1, "empty.txt is empty: it should hold"),
    "binary labels": ((*MODEL, "--labels", "half.h5"), 1, "half.h5 is no text file"),
    "engine": (("--engine", "cuda"), 2, "--engine: 'cuda' is none of auto, openvino, keras."),
    "precision": (("--precision", "float16"), 2, "--precision: 'float16' is none of float32, bfloat16, int8, auto."),
    "precision of Keras": ((*MODEL, "--precision", "bfloat16", "--engine", "keras"), 1, "bfloat16"),
    "int8 without pictures": (
        (*MODEL, "--precision", "int8"), 1,
        "--precision int8 needs --calibrate FOLDER, with a few hundred pictures of the kind that will be sent",
    ),
    "nothing to calibrate with": (
        (*MODEL, "--precision", "int8", "--calibrate", "none"), 1,
        "--calibrate: there is neither a folder nor a file none: it takes a folder of pictures, an .npz file",
    ),
    "no pictures to calibrate with": (
        (*MODEL, "--precision", "auto", "--calibrate", "."), 1,
        "--calibrate: . holds no different pictures: 100 different ones are needed at least",
    ),
    "crop": (("--crop", "center"), 2, "--crop: 'center' is none of none, centre."),
    "activation": (("--activation", "relu"), 2, "--activation: 'relu' is none of auto, none, softmax, sigmoid."),
    "background": (("--background", "blu"), 2, "--background: 'blu' is no colour"),
    "port": (("--port", "http"), 2, "--port: 'http' is not a whole number from 0 to 65535."),
    "an option": (("--modell", "x"), 2, "No such option '--modell'"),
    "no value": (("--model",), 2, "Option '--model' requires an argument."),
    "an argument": (("my.keras",), 2, "'my.keras' belongs to no option: a model is named with --model."),
    "a host": (("--host", "no-such-host.invalid"), 1, "Cannot listen on no-such-host.invalid port 0 ("),
    "another's address": (("--host", "203.0.113.7"), 1, "Cannot listen on 203.0.113.7 port 0 (Cannot assign requested"),
    "a key file": (("--api-key-file", "none"), 2, "--api-key-file: none cannot be read (No such file or directory)."),
    "an empty key": (("--api-key", ""), 2, "--api-key: a key is empty, which would open the door to all."),
}  # fmt: skip


@pytest.mark.usefixtures("no_child")
@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_are_wrong(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    Path("file.txt").write_text("cat\n")
    Path("empty.txt").write_bytes(b"")
    Path("json.py").write_text("answer = 42")
    Path("half.h5").write_bytes(H5[:500])
    Path("wrong.py").write_text("import keras\nclass Scale(:\n")
    Path("link.keras").symlink_to("gone")
    Path("saved").mkdir()
    Path("saved/saved_model.pb").write_bytes(b"x")
    os.mkfifo("pipe")
    arguments, status, words = OPTIONS[name]
    assert words in last_words(capfd, *arguments, status=status)


@pytest.mark.usefixtures("no_child")
def test_a_port_that_is_taken(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        words = f"Cannot listen on 127.0.0.1 port {port} (Address already in use): choose another --port."
        assert words in last_words(capfd, "--port", port, "--model", "bundled")


@pytest.mark.usefixtures("no_child")
@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"net.toml": 'preproces = "tf"'}, "net.toml: 'preproces' is no setting of a model: did you mean preprocess?"),
        ({"net.toml": 'crop = "center"'}, "net.toml: crop: 'center' is none of none, centre."),
        ({"net.toml": "{"}, "net.toml is no TOML ("),
    ],
)
def test_what_stands_beside_it(files: dict[str, str], words: str, capfd: pytest.CaptureFixture[str]) -> None:
    Path("net.keras").write_bytes(KERAS)
    for name, content in files.items():
        Path(name).write_text(content)
    assert words in last_words(capfd, "--model", "net.keras", status=2)


@pytest.mark.usefixtures("no_child")
def test_files_that_may_not_be_read(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Even where the tests run as root, who may read all."""

    def forbidden(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "stat", forbidden)
    assert "my.keras cannot be read (Permission denied)." in last_words(capfd, "--model", "my.keras")


@pytest.mark.usefixtures("no_child")
def test_the_environment(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("KERAS_SERVER_TOP", "five")
    assert "KERAS_SERVER_TOP: 'five' is not a whole number" in last_words(capfd, status=2)


SCALE = """
import keras
{line}
class Scale(keras.layers.Layer):
    def call(self, x):
        return x
"""
# What only Keras can find out: arguments, and what the sentence says.
LOADED: dict[str, tuple[tuple[str, ...], str]] = {
    "own layer": (("--model", str(DATA / "custom.keras")), "needs Scale, which is none of Keras' own: give the file"),
    "an import without it": (("--model", str(DATA / "custom.keras"), "--import", "other.py"), "needs Scale, which"),
    "an import that fails": ((*MODEL, "--import", "fails.py"), "--import fails.py fails: NameError: name 'keras' is"),
    "an import that exits": ((*MODEL, "--import", "exits.py"), "--import exits.py fails: SystemExit: 3"),
    "a Lambda": (("--model", str(DATA / "lambda.h5")), "carries Python code of its own (a Lambda layer), which runs"),
    "stateful": (("--model", str(DATA / "stateful3.keras")), "stateful"),
    "a broken SavedModel": (("--model", "saved"), "saved cannot be loaded as a SavedModel: "),
    "broken weights": (("--model", "broken.keras"), "broken.keras cannot be loaded as a Keras model: Bad CRC-32 for"),
    "no Keras model": (("--model", "json.keras"), "json.keras cannot be loaded as a Keras model"),
    "labels": ((*MODEL, "--labels", "names.txt"), "names.txt: 2 names are in the file for the 3 classes of silu"),
    "an output": ((*MODEL, "--output", "age"), "--output: silu has no output age: it has "),
    "weights of others": (("--model", "mobilenetv2", "--weights", MODEL[1]), "does not fit mobilenetv2: A total of "),
}  # fmt: skip


@pytest.mark.parametrize("name", LOADED)
def test_mistakes_that_keras_finds(name: str, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own noise is kept back, and so is TensorFlow's."""
    monkeypatch.setattr(opening, "convert_in_child", convert_in_child)
    Path("other.py").write_text("print('hello')\n")
    Path("fails.py").write_text("@keras.saving.register_keras_serializable()\nclass A: pass\n")
    Path("exits.py").write_text("import sys\nsys.exit(3)\n")
    Path("names.txt").write_text("cat\ndog\n")
    Path("saved").mkdir()
    Path("saved/saved_model.pb").write_bytes(b"\x08\x01\x12nonsense")
    content = bytearray(KERAS)
    at = zipfile.ZipFile(io.BytesIO(KERAS)).getinfo("model.weights.h5").header_offset + 3000
    content[at : at + 400] = b"\xa5" * 400
    Path("broken.keras").write_bytes(content)
    Path("json.keras").write_bytes(zipped(**{"config.json": b"{}", "metadata.json": b"{}"}))
    arguments, words = LOADED[name]
    assert words in last_words(capfd, *arguments, "--cache-dir", "")


def test_a_layer_of_ones_own_is_imported(capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the sentence says."""
    Path("layers.py").write_text(SCALE.format(line="@keras.saving.register_keras_serializable('my')"))
    code = "import keras, layers; keras.Sequential([keras.Input((2,)), layers.Scale()]).save('own.keras')"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    monkeypatch.setattr(server, "settings", server.settings.__class__(model="own.keras", import_=("layers.py",)))
    server.load_model()
    (answer,) = server.model.compute([np.array([[3, 4]], np.float32)])  # type: ignore[attr-defined]
    assert answer.tolist() == [[3, 4]]


@pytest.mark.parametrize("installed", [False, True])
def test_what_tf_keras_cannot_load(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two causes, and a sentence each."""
    if installed:
        tf_keras = pytest.importorskip("tf_keras")

        def fail(*_: Any, **__: Any) -> Any:
            raise ValueError("Layer count mismatch when loading weights")

        monkeypatch.setattr(tf_keras.models, "load_model", fail)
        words = (
            r"was written by Keras 2\.15\.0, and tf_keras, .*cannot load it \(Layer count mismatch when loading weig"
        )
    else:
        monkeypatch.setitem(sys.modules, "tf_keras", None)
        words = r"was written by Keras 2\.15\.0: install tf_keras, which reads it"
    with pytest.raises(StartupError, match=f"^{re.escape(str(DATA))}/k215_func.keras {words}"):
        load_file(DATA / "k215_func.keras", False)


def test_a_file_of_another_keras_says_so() -> None:
    metadata = json.dumps({"keras_version": "9.1.0"}).encode()
    Path("new.keras").write_bytes(zipped(**{"config.json": b'{"class_name": "New"}', "metadata.json": metadata}))
    with pytest.raises(StartupError, match=r"cannot be loaded as a Keras model \(Keras 9\.1\.0 wrote it, and this is"):
        load_file(Path("new.keras"), False)


def test_a_keras_file_that_was_unpacked_is_served() -> None:
    """As Safari and some websites do unasked."""
    with zipfile.ZipFile(DATA / "silu.keras") as archive:
        archive.extractall("silu.keras")
    expected = np.load(DATA / "silu.keras.npz")
    model = Source("silu.keras").load()
    assert np.allclose(model(expected["in0"]), expected["out0"], atol=1e-5)


def test_the_real_process_says_one_line() -> None:
    """Nothing of Python, of Keras, or of TensorFlow."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "run_keras_server.py"), "--port", "0", "--model", "nonsense"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout == " * Loading the Keras model: please wait until the server has fully started\n"
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: nonsense is neither a file nor a classifier of keras.applications, such as ")

"""Files that are no Keras models by themselves: Teachable Machine's archives."""

import io
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from conftest import DOG, Process, encode
from PIL import Image, ImageOps

import run_keras_server as server
from keras_server.models.beside import beside
from keras_server.models.errors import StartupError
from keras_server.models.kinds import teachable
from keras_server.models.labels import read_labels
from keras_server.models.source import Source
from keras_server.settings import read_settings

DATA = Path(__file__).resolve().parents[1] / "data" / "models"
TEACHABLE = DATA / "converted_keras.zip"


@pytest.fixture(autouse=True)
def house(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("KERAS_SERVER_")]:
        monkeypatch.delenv(name)


def serve(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    """Return the client of a server that was started with these arguments, in this process."""
    settings = read_settings(["--cache-dir", "", *arguments], beside)
    monkeypatch.setattr(server, "settings", settings)
    monkeypatch.setattr(server, "model", None)
    server.load_model()
    return server.app.test_client()


def answer(client: Any, data: bytes) -> dict[str, float]:
    rows = client.post("/predict?top=2", data=data, content_type="image/jpeg").json["predictions"]
    return {row["label"]: row["probability"] for row in rows}


@pytest.fixture(scope="module")
def snippet(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bytes], dict[str, float]]:
    """The lines of Python that Teachable Machine shows beside its export, for any size of its model's pictures."""
    tf_keras = pytest.importorskip("tf_keras")
    folder = tmp_path_factory.mktemp("unpacked")
    zipfile.ZipFile(TEACHABLE).extractall(folder)
    model = tf_keras.models.load_model(folder / "keras_model.h5", compile=False)
    class_names = (folder / "labels.txt").read_text().splitlines()

    def classify(photo: bytes) -> dict[str, float]:
        image = Image.open(io.BytesIO(photo)).convert("RGB")
        image = ImageOps.fit(image, model.input_shape[1:3], Image.Resampling.LANCZOS)
        normalized = (np.asarray(image).astype(np.float32) / 127.5) - 1
        prediction = model.predict(normalized[np.newaxis], verbose=0)[0]
        return {name[2:].strip(): float(p) for name, p in zip(class_names, prediction, strict=True)}

    return classify


def photos() -> list[bytes]:
    dog = Image.open(DOG)
    tall = dog.rotate(90, expand=True).resize((900, 1600))
    return [
        DOG.read_bytes(),
        encode(dog.resize((4000, 3000)), "JPEG", quality=90),
        encode(tall, "JPEG"),
        encode(ImageOps.invert(dog.convert("RGB")).crop((0, 0, 1000, 130))),
    ]


def test_teachable_machines_archive_answers_as_its_own_lines(
    snippet: Callable[[bytes], dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = serve(monkeypatch, "--model", str(TEACHABLE))
    for photo in photos():
        assert answer(client, photo) == pytest.approx(snippet(photo), abs=1e-5)
    assert answer(client, photos()[0]).keys() == {"cat", "dog"}


def test_options_come_before_what_it_says(
    snippet: Callable[[bytes], dict[str, float]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "names").write_text("a\nb\n")
    options = ["--labels", str(tmp_path / "names"), "--crop", "none"]
    got, expected = answer(serve(monkeypatch, "--model", str(TEACHABLE), *options), photos()[3]), snippet(photos()[3])
    assert got.keys() == {"a", "b"}
    assert abs(got["a"] - expected["cat"]) > 1e-3
    copy = tmp_path / "mine.zip"
    copy.write_bytes(TEACHABLE.read_bytes())
    (tmp_path / "mine.toml").write_text('crop = "none"')
    found = read_settings(["--model", str(copy)], beside)
    assert (found.crop, found.preprocess, found.interpolation) == ("none", "tf", "lanczos")
    assert found.labels == f"{copy}/labels.txt"


def packed(path: Path, **files: bytes | Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content if isinstance(content, bytes) else content.read_bytes())
    return path


def test_packed_anew_in_a_folder(tmp_path: Path) -> None:
    inner = zipfile.ZipFile(TEACHABLE)
    files = {f"my export/{name}": inner.read(name) for name in inner.namelist()}
    path = packed(tmp_path / "again.zip", **{"__MACOSX/._keras_model.h5": b"", **files})
    assert teachable(path) == "my export/keras_model.h5"
    assert read_labels(Path(beside(str(path)).values["labels"])) == ("cat", "dog")
    assert Source(str(path)).load().output_shape == (None, 2)


def test_its_savedmodel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which it calls converted_savedmodel.zip."""
    keras = pytest.importorskip("keras")
    keras.utils.set_random_seed(3)
    model = keras.Sequential(
        [keras.Input((12, 12, 3)), keras.layers.Flatten(), keras.layers.Dense(2, activation="softmax")]
    )
    model.export(tmp_path / "model.savedmodel", verbose=False)
    files = {path.relative_to(tmp_path).as_posix(): path for path in tmp_path.rglob("*") if path.is_file()}
    path = packed(tmp_path / "converted_savedmodel.zip", **files, **{"labels.txt": b"0 left\n1 right\n"})
    image = ImageOps.fit(Image.open(DOG), (12, 12), Image.Resampling.LANCZOS)
    expected = model.predict(np.asarray(image, np.float32)[np.newaxis] / 127.5 - 1, verbose=0)[0]
    got = answer(serve(monkeypatch, "--model", str(path)), DOG.read_bytes())
    assert got == pytest.approx({"left": expected[0], "right": expected[1]}, abs=1e-5)


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"keras_model.h5": b"x"}, "is an archive with keras_model.h5 inside: unpack it"),
        ({"my_keras_model.h5": b"x", "labels.txt": b"x"}, "is an archive with my_keras_model.h5 inside: unpack it"),
        ({"labels.txt": b"0 cat"}, "is a zip archive without a Keras model in it"),
    ],
)
def test_other_archives_are_none_of_its(files: dict[str, bytes], sentence: str, tmp_path: Path) -> None:
    path = packed(tmp_path / "converted_keras.zip", **files)
    assert teachable(path) == ""
    with pytest.raises(StartupError, match=re.escape(sentence)):
        Source(str(path)).load()


def test_what_is_wrong_inside_is_said_of_the_archive(tmp_path: Path) -> None:
    path = packed(tmp_path / "converted_keras.zip", **{"keras_model.h5": DATA / "only_weights.h5", "labels.txt": b"a"})
    with pytest.raises(StartupError, match=f"^{re.escape(str(path))}/keras_model.h5 holds only weights"):
        Source(str(path)).load()
    damaged = bytearray(TEACHABLE.read_bytes())
    damaged[200:400] = bytes(200)
    path.write_bytes(damaged)
    with pytest.raises(StartupError, match=f"^{re.escape(str(path))} cannot be unpacked: "):
        Source(str(path)).load()


def test_labels_in_an_archive(tmp_path: Path) -> None:
    path = packed(tmp_path / "a.zip", **{"deep/names.txt": b"cat\ndog"})
    assert read_labels(path / "deep" / "names.txt") == ("cat", "dog")
    with pytest.raises(StartupError, match=r"There is no file .*a.zip/names.txt"):
        read_labels(path / "names.txt")


def test_the_server_serves_it(start: Callable[..., Process]) -> None:
    process = start("--model", str(TEACHABLE)).wait_until_ready()
    rows = requests.post(f"{process.url}/predict", files={"image": DOG.read_bytes()}, timeout=60).json()
    assert {row["label"] for row in rows["predictions"]} == {"cat", "dog"}
    assert rows["model"] == "converted_keras"

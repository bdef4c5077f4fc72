"""Files that are no Keras models by themselves: Teachable Machine's archives, ONNX, TensorFlow Lite, OpenVINO."""

import importlib
import io
import os
import re
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from conftest import DOG, Process, encode
from PIL import Image, ImageOps

import run_keras_server as server
from keras_server.models import engines, opening
from keras_server.models.beside import beside, locate
from keras_server.models.convert import convert
from keras_server.models.errors import StartupError
from keras_server.models.foreign import tensor_of
from keras_server.models.kinds import teachable
from keras_server.models.labels import read_labels
from keras_server.models.meaning import final_spec
from keras_server.models.registry import serve_source
from keras_server.models.source import Source
from keras_server.models.spec import Spec, Tensor
from keras_server.settings import Settings, read_settings

DATA = Path(__file__).resolve().parents[1] / "data" / "models"
TEACHABLE = DATA / "converted_keras.zip"


@pytest.fixture(autouse=True)
def house(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("KERAS_SERVER_")]:
        monkeypatch.delenv(name)


def serve(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    """Return the client of a server that was started with these arguments, in this process."""
    settings = read_settings(["--cache-dir", "", *arguments], locate)
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
    snippet: Callable[[bytes], dict[str, float]], monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    client = serve(monkeypatch, "--model", str(TEACHABLE), "--cache-dir", cache)
    for photo in photos():
        assert answer(client, photo) == pytest.approx(snippet(photo), abs=1e-5)
    assert answer(client, photos()[0]).keys() == {"cat", "dog"}


def test_options_come_before_what_it_says(
    snippet: Callable[[bytes], dict[str, float]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: str
) -> None:
    (tmp_path / "names").write_text("a\nb\n")
    options = ["--labels", str(tmp_path / "names"), "--crop", "none", "--cache-dir", cache]
    got, expected = answer(serve(monkeypatch, "--model", str(TEACHABLE), *options), photos()[3]), snippet(photos()[3])
    assert got.keys() == {"a", "b"}
    assert abs(got["a"] - expected["cat"]) > 1e-3
    copy = tmp_path / "mine.zip"
    copy.write_bytes(TEACHABLE.read_bytes())
    (tmp_path / "mine.toml").write_text('crop = "none"')
    found = read_settings(["--model", str(copy)], locate)
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


# Models that OpenVINO reads itself: the numbers are computed in numpy, by TensorFlow Lite, or by Keras


WEIGHTS = ((np.arange(12).reshape(3, 4) % 5) - 2).astype("f") / 4
BIAS = np.array([0.5, 0, -0.5, 0.25], "f")
TOKEN = ((np.arange(16).reshape(4, 4) % 5) - 2).astype("f") / 4


def softmax(scores: np.ndarray) -> np.ndarray:
    exponentials = np.exp(scores - scores.max(-1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(-1, keepdims=True))


def pooled(rows: np.ndarray) -> np.ndarray:
    return np.asarray(rows.mean(axis=(2, 3)))


# What an ONNX file of tests/data answers to rows of the shape (3, 8, 8), and the meaning and batch of its output.
ONNX: dict[str, tuple[Callable[[np.ndarray], np.ndarray], str, int | None]] = {
    "pool1": (lambda rows: softmax(pooled(rows) @ WEIGHTS + BIAS), "probabilities", None),
    "pooln": (lambda rows: pooled(rows) @ WEIGHTS + BIAS, "logits", None),
    "token1": (
        lambda rows: 1 / (1 + np.exp(-np.insert(pooled(rows), 0, 2, axis=1) @ TOKEN)),
        "probabilities",
        1,
    ),
}


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where Keras would be asked."""

    def asked(*_: Any) -> Any:
        raise AssertionError("Keras was asked")

    monkeypatch.setattr(opening, "convert_in_child", asked)
    monkeypatch.setattr(opening, "load_described", asked)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", ONNX)
@pytest.mark.parametrize("ending", [".onnx", ".keras"])
def test_onnx_answers_as_numpy_does(name: str, ending: str, tmp_path: Path) -> None:
    function, meaning, batch = ONNX[name]
    path = tmp_path / f"net{ending}"
    path.write_bytes((DATA / f"{name}.onnx").read_bytes())
    served = serve_source(Source(str(path)), Settings())
    (tensor,) = served.spec.outputs
    assert (served.spec.name, tensor.name, tensor.meaning, served.spec.batch) == ("net", "scores", meaning, batch)
    assert served.spec.inputs == (Tensor("image", (3, 8, 8), "float32"),)
    rows = np.random.default_rng(1).normal(size=(5, 3, 8, 8)).astype(np.float32)
    for count in (1, 2, 5):
        (answer,) = served.compute([rows[:count]])
        np.testing.assert_allclose(answer, function(rows[:count]), rtol=1e-4, atol=1e-5)
    served.close()


@pytest.mark.usefixtures("alone")
def test_pictures_reach_onnx_with_their_channels_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes((DATA / "pooln.onnx").read_bytes())
    (tmp_path / "net.labels.txt").write_text("a\nb\nc\nd\n")
    client = serve(monkeypatch, "--model", str(tmp_path / "net.onnx"), "--preprocess", "unit")
    picture = Image.new("RGB", (8, 8), (255, 51, 0))
    expected = softmax(np.array([[1, 0.2, 0]]) @ WEIGHTS + BIAS)[0]
    rows = client.post("/predict?top=4", data=encode(picture), content_type="image/png").json["predictions"]
    assert {row["label"]: row["probability"] for row in rows} == pytest.approx(
        dict(zip("abcd", expected.tolist(), strict=True)), abs=1e-5
    )
    explained = client.post("/explain", data=encode(picture), content_type="image/png")
    assert (explained.status_code, "is no model of Keras" in explained.json["error"]) == (422, True)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("mixed", {}, "in its output scores a row alone has another answer than among others"),
        ("external", {}, "external.onnx keeps its weights in .*weights.bin, which cannot be read"),
        ("pooln", {"engine": "keras"}, "--engine keras: .* is no model of Keras, and OpenVINO alone reads it"),
    ],
)
def test_onnx_that_cannot_be_served(name: str, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(StartupError, match=sentence):
        serve_source(Source(str(DATA / f"{name}.onnx")), Settings(**options))


@pytest.mark.usefixtures("alone")
def test_damaged_onnx(tmp_path: Path) -> None:
    content = (DATA / "pooln.onnx").read_bytes()
    (tmp_path / "net.onnx").write_bytes(content[: len(content) // 2])
    with pytest.raises(StartupError, match=r"net\.onnx cannot be read by OpenVINO: .*\.$"):
        serve_source(Source(str(tmp_path / "net.onnx")), Settings())


def digits(batch: int | None = None) -> Any:
    keras = pytest.importorskip("keras")
    keras.utils.set_random_seed(5)
    image = keras.Input(batch_shape=(batch, 12, 10, 3), name="picture")
    x = keras.layers.Conv2D(4, 3, activation="relu")(image)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(image, keras.layers.Dense(3, activation="softmax", name="kinds")(x))


@pytest.mark.parametrize("kind", ["bf16", "f16", "f32", "f64", "boolean", "i4", "i8", "i16", "i32", "i64", "u1", "u4",
                                  "u8", "u16", "u32", "u64", "string", "dynamic"])  # fmt: skip
def test_types_that_numpy_lacks_are_refused(kind: str) -> None:
    """OpenVINO itself would have bits of bfloat16 read as those of float16, and half bytes as whole ones."""
    openvino = engines.openvino()
    ops = importlib.import_module(f"{openvino.__name__}.opset13")
    port = ops.parameter([-1, 3], getattr(openvino.Type, kind), name="x").output(0)
    if kind in ("bf16", "i4", "u1", "u4", "string", "dynamic"):
        with pytest.raises(StartupError, match=f"m.xml cannot be served: its tensor x is of type {kind}, which numpy"):
            tensor_of(port, Path("m.xml"))
    else:
        found = tensor_of(port, Path("m.xml"))
        words = {"f": "float", "i": "int", "u": "uint"}
        assert found == Tensor("x", (3,), "bool" if kind == "boolean" else words[kind[0]] + kind[1:])


@pytest.mark.parametrize("batch", [None, 1, 4])
def test_openvinos_own_answers_as_the_keras_model_that_it_was(batch: int | None, tmp_path: Path) -> None:
    model = digits(batch)
    engines.openvino().save_model(convert(model), tmp_path / "net.xml", compress_to_fp16=False)
    served = serve_source(Source(str(tmp_path / "net.xml")), Settings())
    assert served.spec.batch == (batch if batch == 4 else None)
    assert served.spec.outputs[0].meaning == "probabilities"
    assert served.spec.image == (12, 10, 3, False)
    rows = np.random.default_rng(2).uniform(0, 255, (4, 12, 10, 3)).astype(np.float32)
    expected = np.concatenate([model(row[np.newaxis]) for row in rows]) if batch == 1 else np.asarray(model(rows))
    for count in (1, 3, 4):
        np.testing.assert_allclose(served.compute([rows[:count]])[0], expected[:count], atol=1e-5)
    served.close()
    (tmp_path / "net.bin").unlink()
    with pytest.raises(StartupError, match=r"net\.xml cannot be read by OpenVINO: "):
        serve_source(Source(str(tmp_path / "net.xml")), Settings())


@pytest.mark.filterwarnings("ignore")  # TensorFlow finds its own interpreter old
@pytest.mark.parametrize("kind", ["float", "uint8", "int8"])
def test_tensorflow_lite_answers_as_its_own_interpreter(kind: str, tmp_path: Path) -> None:
    tf = pytest.importorskip("tensorflow")
    model = digits()
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    rows = np.random.default_rng(2).integers(0, 256, (3, 12, 10, 3)).astype(np.float32)
    if kind != "float":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = lambda: ([row[np.newaxis]] for row in rows)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        converter.inference_input_type = converter.inference_output_type = getattr(tf, kind)
    (tmp_path / "net.bin").write_bytes(converter.convert())
    interpreter = tf.lite.Interpreter(str(tmp_path / "net.bin"))
    interpreter.allocate_tensors()
    (given,), (gives,) = interpreter.get_input_details(), interpreter.get_output_details()
    given_rows = (rows - (128 if kind == "int8" else 0)).astype(given["dtype"])
    expected = []
    for row in given_rows:
        interpreter.set_tensor(given["index"], row[np.newaxis])
        interpreter.invoke()
        expected.append(interpreter.get_tensor(gives["index"])[0])
    served = serve_source(Source(str(tmp_path / "net.bin")), Settings())
    assert served.spec.inputs[0].dtype == given["dtype"].__name__
    for count in (1, 3):
        (answer,) = served.compute([given_rows[:count]])
        assert answer.dtype == gives["dtype"]
        np.testing.assert_allclose(answer.astype(float), expected[:count], atol=1e-5 if kind == "float" else 2)
    if kind != "float":  # no list of probabilities, and said so
        assert served.spec.kind == "none"
        assert kind in served.spec.reason
    served.close()


def test_fractions_are_no_whole_numbers() -> None:
    """A quantized model's pictures are whole numbers: scaled to -1..1 they would all be 0."""
    inputs, outputs = (Tensor("image", (8, 8, 3), "uint8"),), (Tensor("o", (3,), "float32", "logits"),)
    spec = Spec(inputs=inputs, outputs=outputs, labels=())
    with pytest.raises(StartupError, match="--preprocess tf gives fractions, and resnet50 takes whole numbers"):
        final_spec(replace(spec, preprocess="none"), Settings(preprocess="tf"))

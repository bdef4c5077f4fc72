"""Models of every kind: loaded, converted, described and kept, in this process."""

import io
import sys
import urllib.error
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from conftest import DOG, encode, spec
from PIL import Image

import run_keras_server as server
from keras_server.images import PREPROCESS
from keras_server.models import architectures, engines, opening
from keras_server.models import convert as converting
from keras_server.models import source as loading
from keras_server.models.convert import convert
from keras_server.models.describe import describe

keras: Any = pytest.importorskip("keras")
Setter = Callable[..., None]


@pytest.fixture(autouse=True)
def house(monkeypatch: pytest.MonkeyPatch, setting: Setter, tmp_path: Path) -> Iterator[None]:
    """Leave the house as it was found, and keep converted models in a folder of the test's."""
    monkeypatch.setattr(server, "model", None)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "home"))
    setting(cache_dir=str(tmp_path / "cache"))
    yield
    keras.backend.clear_session()


def classify(data: bytes, top: int = 1) -> Any:
    """POST an image and return the answer."""
    return server.app.test_client().post(f"/predict?top={top}", data=data, content_type="image/jpeg").json


def probabilities(answer: dict[str, Any]) -> dict[str, float]:
    return {row["label"]: row["probability"] for row in answer["predictions"]}


def save(folder: Path, *layers: Any, name: str = "own.keras") -> Path:
    """Save a model of these layers."""
    keras.Sequential(layers).save(folder / name)
    return folder / name


def layers(*shape: int | None, classes: int = 4, activation: str | None = "softmax", layout: str = "last") -> list[Any]:
    """A small classifier for images of this shape, with weights that are the same every time."""
    keras.utils.set_random_seed(1)
    return [
        keras.Input(shape),
        keras.layers.Rescaling(1 / 255),
        keras.layers.GlobalAveragePooling2D(data_format=f"channels_{layout}"),
        keras.layers.Dense(classes, activation),
    ]


PHOTO = encode(Image.open(DOG).resize((512, 384)), "JPEG", quality=95)


@pytest.mark.parametrize(
    ("name", "preprocess", "engine", "told"),
    [("ResNet50", "caffe", "openvino", "openvino"), ("MobileNet", "tf", "keras", "keras/tensorflow")],
)
def test_an_architecture_with_a_weights_file_answers_as_keras_does(
    name: str, preprocess: str, engine: str, told: str, setting: Setter, tmp_path: Path
) -> None:
    keras.utils.set_random_seed(0)
    keras_model = getattr(keras.applications, name)(weights=None)
    keras_model.save_weights(path := tmp_path / "own.weights.h5")
    setting(model=name.lower(), weights=str(path), engine=engine, cache_dir="")
    server.load_model()
    assert (spec().engine, spec().name) == (told, name.lower())
    assert (spec().preprocess, spec().target) == (preprocess, (224, 224))
    pixels = np.asarray(Image.open(io.BytesIO(PHOTO)).resize((224, 224)), np.float32)[np.newaxis]
    prepared = getattr(keras.applications, name.lower()).preprocess_input(pixels)
    expected = np.asarray(keras_model(prepared, training=False))[0]
    answer = probabilities(classify(PHOTO, 1000))
    assert np.abs(np.array([answer[label] for label in spec().labels if label in answer]) - [
        expected[spec().labels.index(label)] for label in spec().labels if label in answer
    ]).max() < 1e-4  # fmt: skip
    assert len(answer) >= 998  # ImageNet has two pairs of classes of one name: crane and maillot


def test_batches_of_every_size_answer_alike(setting: Setter, cache: str) -> None:
    setting(model="bundled", cache_dir=cache)
    server.load_model()
    rows = np.random.default_rng(0).uniform(0, 255, (9, 224, 224, 3)).astype(np.float32)
    alone = np.concatenate([server.model.predict(row[np.newaxis]) for row in rows])
    assert np.allclose(server.model.predict(rows), alone, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_as_many_batches_as_the_engine_has_lanes_are_computed_side_by_side(threads: int) -> None:
    import tiny_models

    engine = engines.OpenVINOEngine(convert(tiny_models.many()), "float32", threads, max_batch=8)
    assert engine.lanes == threads

    def compute(rows: int) -> None:
        inputs = [np.arange(rows, dtype=np.float32)[:, np.newaxis] + number for number in range(12)]
        outputs = engine(inputs)
        engine([np.zeros((rows, 1), np.float32)] * 12)  # the answers given before stay
        with pytest.raises(RuntimeError):
            engine([np.zeros((rows, 2), np.float32)] * 12)
        for number, (array, output) in enumerate(zip(inputs, outputs, strict=True)):
            np.testing.assert_allclose(output, array * (number + 1))

    with ThreadPoolExecutor(threads) as callers:
        assert len([*callers.map(compute, [1, 2, 3, 8, 1] * 20)]) == 100


@pytest.mark.parametrize(("handed", "lanes"), [(3600, 1), (0, 2)])
def test_a_quick_model_has_one_lane(
    setting: Setter, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, handed: float, lanes: int
) -> None:
    """Which computes with all threads, whoever asks."""
    import tiny_models

    monkeypatch.setattr(engines, "HANDED", handed)
    tiny_models.many().save(path := tmp_path / "many.keras")
    setting(model=str(path), cache_dir="", engine_threads=2)
    server.load_model()
    engine = server.model.batcher.run
    assert isinstance(engine, engines.OpenVINOEngine)
    assert (engine.lanes, len(engine.free), server.model.batcher.lanes) == (lanes,) * 3
    assert (engine.all_threads in engine.free) == (lanes == 1)
    outputs = server.model.compute([np.full((3, 1), number, np.float32) for number in range(12)])
    assert [output[:, 0].tolist() for output in outputs] == [[n * (n + 1.0)] * 3 for n in range(12)]


def test_without_a_cache_the_model_is_converted_and_right(setting: Setter) -> None:
    setting(model="bundled", cache_dir="")
    server.load_model()
    (row,) = classify(PHOTO, 1)["predictions"]
    assert (row["label"], row["probability"]) == ("German_shepherd", pytest.approx(0.964, abs=0.01))


def test_bundled_model_knows_the_dog(setting: Setter, cache: str) -> None:
    setting(model="bundled", cache_dir=cache)
    server.load_model()
    answer = classify(PHOTO, 5)
    assert answer["model"] == "efficientnet_lite0"
    assert answer["predictions"][0]["label"] == "German_shepherd"
    assert answer["predictions"][0]["probability"] > 0.9


def test_large_photos_get_the_plain_answer(setting: Setter, cache: str) -> None:
    """Decoding at a fraction must not show: top-1 equal, probabilities within 0.02."""
    setting(model="bundled", cache_dir=cache)
    server.load_model()
    for size in ((1600, 1200), (2400, 1800), (4000, 3000)):
        photo = Image.open(DOG).resize(size, Image.Resampling.LANCZOS)
        plain = photo.resize((224, 224))  # as small as the model wants it, by Pillow's best way
        large, small = (probabilities(classify(encode(p, kind, quality=95), 1000)) for p, kind in
                        ((photo, "JPEG"), (plain, "PNG")))  # fmt: skip
        assert max(large, key=large.__getitem__) == max(small, key=small.__getitem__)
        assert max(abs(large[label] - small[label]) for label in large) < 0.02


def test_default_falls_back_to_the_bundled_model(setting: Setter, cache: str, monkeypatch: Any, caplog: Any) -> None:
    setting(cache_dir=cache)
    caplog.set_level("WARNING")  # tests of conversion have absl raise the root's

    def refuse(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError(OSError(-2, "Name not known"))

    monkeypatch.setattr(architectures.urllib.request, "urlopen", refuse)
    convert_here = opening.convert_in_child
    monkeypatch.setattr(
        opening,
        "convert_in_child",
        lambda name, job: convert_here(name, job) if name != "resnet50" else pytest.fail("Keras was asked"),
    )
    server.load_model()
    assert spec().name == "efficientnet_lite0"
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "Name not known" in record.getMessage()
    assert "--weights" in record.getMessage()
    setting(model="resnet50")
    with pytest.raises(loading.DownloadError, match="--model bundled"):
        server.load_model()


def test_resnet50_in_keras_cache_is_the_default(setting: Setter, monkeypatch: Any, tmp_path: Path) -> None:
    setting(engine="keras")  # which needs no conversion
    (tmp_path / "home" / "models").mkdir(parents=True)
    (tmp_path / "home" / "models" / "resnet50_weights_tf_dim_ordering_tf_kernels.h5").touch()
    built = []

    def build(weights: str) -> Any:
        built.append(weights)
        return keras.Sequential(layers(224, 224, 3, classes=1000))

    build.__module__ = "keras.src.applications.resnet"
    monkeypatch.setattr(keras.applications, "ResNet50", build)
    server.load_model()
    assert spec().name == "resnet50"
    assert built == ["imagenet"]


def test_keras_is_not_needed_for_the_second_start(setting: Setter, cache: str, monkeypatch: Any) -> None:
    setting(model="bundled", cache_dir=cache)
    server.load_model()
    first = classify(PHOTO, 5)
    monkeypatch.setattr(loading.Source, "load", lambda self: pytest.fail("the cache was not used"))
    server.load_model()
    assert classify(PHOTO, 5) == first


def test_cache_is_bound_to_the_models_bytes(setting: Setter, tmp_path: Path) -> None:
    setting(model=str(save(tmp_path, *layers(32, 32, 3))))
    server.load_model()
    first = classify(PHOTO, 4)
    save(tmp_path, *layers(32, 32, 3, classes=3))
    server.load_model()
    assert len(classify(PHOTO, 3)["predictions"]) == 3 < len(first["predictions"])


def test_no_cache(tmp_path: Path, setting: Setter) -> None:
    setting(model=str(save(tmp_path, *layers(16, 16, 3))), cache_dir="")
    server.load_model()
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("layout", ["first", "last"])
def test_size_channels_and_layout_are_the_models(channels: int, layout: str, setting: Setter, tmp_path: Path) -> None:
    """An own reading of the model's weights on own pixels gives the probabilities."""
    shape = (channels, 20, 30) if layout == "first" else (20, 30, channels)
    path = save(tmp_path, *layers(*shape, layout=layout))
    setting(model=str(path))
    server.load_model()
    assert spec().target == (30, 20)
    kernel, bias = keras.saving.load_model(path).get_weights()
    shown = Image.open(io.BytesIO(PHOTO)).convert("L" if channels == 1 else "RGB")
    features = np.asarray(shown.resize((30, 20), reducing_gap=3), np.float32).reshape(-1, channels).mean(0) / 255
    logits = features @ kernel + bias
    expected = np.exp(logits) / np.exp(logits).sum()
    answer = probabilities(classify(PHOTO, 4))
    assert [answer[str(i)] for i in range(4)] == pytest.approx(list(expected), abs=1e-3)


def test_logits_become_probabilities(setting: Setter, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    setting(model=str(save(tmp_path, *layers(16, 16, 3, activation=None))))
    server.load_model()
    logits = probabilities(classify(PHOTO, 4))
    assert "logits" in caplog.text
    assert sum(logits.values()) == pytest.approx(1)
    setting(model=str(save(tmp_path, *layers(16, 16, 3), name="soft.keras")))
    server.load_model()
    assert probabilities(classify(PHOTO, 4)) == pytest.approx(logits, abs=1e-5)
    setting(model=str(tmp_path / "own.keras"), activation="none")
    server.load_model()
    values = classify(PHOTO, 4)["values"]
    assert np.exp(values) / np.exp(values).sum() == pytest.approx([logits[str(i)] for i in range(4)], abs=1e-5)


@pytest.mark.parametrize("activation", ["sigmoid", None])
def test_one_output_becomes_two_rows(activation: str | None, setting: Setter, tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    dense = keras.layers.Dense(
        1, activation, kernel_initializer="zeros", bias_initializer=keras.initializers.Constant(2)
    )
    setting(model=str(save(tmp_path, *layers(16, 16, 3)[:-1], dense)), labels=str(tmp_path / "labels.txt"))
    server.load_model()
    if activation is None and spec().activation == "none":
        pytest.fail("a lone logit was taken for a probability")
    answer = classify(PHOTO, 2)["predictions"]
    assert [row["label"] for row in answer] == ["dog", "cat"]
    # 1 / (1 + e**-2), and what is left of 1
    assert [row["probability"] for row in answer] == [pytest.approx(0.88079708), pytest.approx(0.11920292)]


def test_independent_classes_stay_as_they_are(setting: Setter, tmp_path: Path) -> None:
    setting(model=str(save(tmp_path, *layers(16, 16, 3, activation="sigmoid"))))
    server.load_model()
    assert spec().activation == "none"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("labels.txt", "ant\nbee\ncat\ndog\n"),
        ("labels.json", '["ant", "bee", "cat", "dog"]'),
        ("index.json", '{"0": ["n1", "ant"], "1": ["n2", "bee"], "2": ["n3", "cat"], "3": ["n4", "dog"]}'),
    ],
)
def test_labels(name: str, content: str, setting: Setter, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    setting(model=str(save(tmp_path, *layers(16, 16, 3))), labels=str(tmp_path / name))
    server.load_model()
    assert sorted(probabilities(classify(PHOTO, 4))) == ["ant", "bee", "cat", "dog"]


def test_without_labels_the_numbers_stand(setting: Setter, tmp_path: Path) -> None:
    setting(model=str(save(tmp_path, *layers(16, 16, 3, classes=1000))))
    server.load_model()
    assert len(probabilities(classify(PHOTO, 1000))) == 1000, "not ImageNet's names, though there are 1000"


@pytest.mark.parametrize("name", ["own.h5", "saved"])
def test_other_formats(name: str, setting: Setter, tmp_path: Path) -> None:
    path = save(tmp_path, *layers(16, 16, 3))
    setting(model=str(path))
    server.load_model()
    expected = probabilities(classify(PHOTO, 4))
    keras_model = keras.saving.load_model(path)
    if name.endswith("h5"):
        keras_model.save(tmp_path / name)
    else:
        keras_model.export(tmp_path / name, verbose=False)
    setting(model=str(tmp_path / name))
    server.load_model()
    assert spec().name == Path(name).stem
    assert probabilities(classify(PHOTO, 4)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("mode", ["tf", "caffe", "resnet50"])
def test_preprocess_can_be_chosen(mode: str, setting: Setter, tmp_path: Path) -> None:
    setting(model=str(save(tmp_path, *layers(16, 16, 3))), preprocess=mode)
    server.load_model()
    assert spec().preprocess == {"resnet50": "caffe"}.get(mode, mode)


MISTAKES: dict[str, tuple[dict[str, str], str]] = {
    "no such file": ({"model": "nothing/here.keras"}, "no file"),
    "no such name": ({"model": "resnet51"}, "such as resnet"),
    "not a model": ({"model": str(DOG)}, "not a Keras model"),
    "weights with a file": ({"model": "bundled", "weights": "x.h5"}, "--weights is for"),
    "no such weights": ({"model": "resnet50", "weights": "x.h5"}, "no file"),
    "bad preprocess": ({"model": "bundled", "preprocess": "cafe"}, "--preprocess cafe is no mode"),
    "too few labels": ({"model": "bundled", "labels": str(DOG.parent / "requirements.txt")}, "1000 classes"),
    "labels that are none": ({"model": "bundled", "labels": str(DOG)}, "no text file"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_in_a_sentence(name: str, setting: Setter, cache: str) -> None:
    values, words = MISTAKES[name]
    setting(**values, cache_dir=cache)
    with pytest.raises(loading.StartupError, match=words) as error:
        server.load_model()
    assert "\n" not in str(error.value)


def test_files_that_are_no_models(tmp_path: Path, setting: Setter) -> None:
    good = save(tmp_path, *layers(16, 16, 3)).read_bytes()
    for content in (b"", b"PK\x05\x06" + bytes(18), b"\x89HDF\r\n\x1a\n" + bytes(100), good[:-2000], good[:500]):
        (tmp_path / "bad.keras").write_bytes(content)
        setting(model=str(tmp_path / "bad.keras"))
        with pytest.raises(loading.StartupError) as error:
            server.load_model()
        assert "bad.keras" in str(error.value)
        assert "\n" not in str(error.value)


def test_weights_that_do_not_fit(setting: Setter, tmp_path: Path) -> None:
    keras.Sequential(layers(16, 16, 3)).save_weights(path := tmp_path / "other.weights.h5")
    setting(model="mobilenet", weights=str(path))
    with pytest.raises(loading.StartupError, match="does not fit mobilenet"):
        server.load_model()


def test_code_in_a_model_file_is_not_run(setting: Setter, tmp_path: Path) -> None:
    """Keras' safe mode stays on unless --unsafe-model switches it off."""
    hidden = keras.layers.Lambda(lambda x: x * 2)
    setting(model=str(save(tmp_path, *layers(16, 16, 3)[:1], hidden, *layers(16, 16, 3)[1:])))
    with pytest.raises(loading.StartupError, match="cannot be loaded"):
        server.load_model()
    setting(unsafe_model=True)
    server.load_model()


def test_model_that_openvino_cannot_convert(setting: Setter, tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
    setting(model=str(save(tmp_path, *layers(16, 16, 3))))
    caplog.set_level("WARNING")

    def fail(_: Any) -> None:
        raise ValueError("no translation\nfor op Strange")

    monkeypatch.setattr(converting, "convert", fail)
    server.load_model()
    assert spec().engine == "keras/tensorflow"
    assert "no translation" in caplog.text
    assert sum(probabilities(classify(PHOTO, 4)).values()) == pytest.approx(1)
    setting(engine="openvino")
    with pytest.raises(loading.StartupError, match="--engine keras"):
        server.load_model()


@pytest.mark.skipif(not engines.has_bfloat16(), reason="this processor has no bfloat16 arithmetic")
def test_bfloat16(setting: Setter, cache: str) -> None:
    setting(model="bundled", precision="bfloat16", cache_dir=cache)
    server.load_model()
    assert probabilities(classify(PHOTO, 1)).keys() == {"German_shepherd"}


def test_bfloat16_is_refused_where_the_processor_has_none(setting: Setter, monkeypatch: Any) -> None:
    monkeypatch.setattr(opening, "has_bfloat16", lambda: False)
    setting(model="bundled", precision="bfloat16")
    with pytest.raises(loading.StartupError, match="no bfloat16"):
        server.load_model()


def test_a_gpu_is_left_to_keras(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not engines.accelerated() or list(Path("/dev").glob("nvidia[0-9]*"))
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    assert engines.accelerated(), "a backend chosen by hand is to be used"


def test_openvino_does_not_phone_home() -> None:
    engines.openvino()
    assert sys.modules["openvino_telemetry"] is None


def families() -> list[str]:
    """One classifier of each module of keras.applications, the one that is quickest to build."""
    small: dict[str, str] = {}
    for name, build in vars(keras.applications).items():
        if name[0].isupper() and (build.__module__ not in small or name in ("ConvNeXtTiny", "NASNetMobile")):
            small[build.__module__] = name
    return sorted(small.values())


@pytest.mark.filterwarnings("ignore:.input_shape. is undefined:UserWarning")  # MobileNet's weights are for 224 pixels
@pytest.mark.parametrize("name", families())
def test_every_family_is_described_and_fetches_its_weights_where_it_is_asked_whether_they_can_be_had(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = getattr(keras.applications, name)
    asked: list[str] = []

    def get_file(*arguments: Any, **options: Any) -> str:
        asked.append(next(value for value in (*arguments, *options.values()) if str(value).startswith("http")))
        return "none.weights.h5"

    # ResNet50V2 is built by the module of ResNet50.
    builder = sys.modules[build.__module__.removesuffix("_v2") if name == "ResNet50V2" else build.__module__]
    monkeypatch.setattr(builder.file_utils, "get_file", get_file)
    monkeypatch.setattr(keras.Model, "load_weights", lambda *_: None)
    with keras.StatelessScope():  # the graph, with weights that are never computed with
        keras_model = build(weights="imagenet")
    assert {urlsplit(url).netloc for url in asked} == {urlsplit(architectures.WEIGHTS).netloc}
    assert all(url.startswith(architectures.WEIGHTS) for url in asked) or name.startswith("EfficientNetB")
    spec = describe(loading.Source(name.lower()), keras_model)
    height, width, channels, first = spec.image or pytest.fail("not taken for an image model")
    assert (channels, first, spec.classes) == (3, False, 1000)
    assert keras_model.input_shape[1:3] in ((height, width), (None, None))


def test_every_classifier_of_keras_applications_has_a_name_and_a_preprocessing() -> None:
    builders = {name.lower(): build for name, build in vars(keras.applications).items() if name[0].isupper()}
    assert builders.keys() == architectures.PREPROCESS_OF.keys()
    for name, build in builders.items():
        module = sys.modules[build.__module__]
        order, mean, deviation = PREPROCESS[architectures.PREPROCESS_OF[name]]
        pixels = np.random.default_rng(1).uniform(0, 255, (1, 4, 4, 3)).astype(np.float32)
        ordered = pixels[..., ::-1] if order == "BGR" else pixels
        ours = (ordered - np.array(mean)) / np.array(deviation)
        assert np.allclose(ours, module.preprocess_input(pixels.copy()), atol=1e-4), name

"""Explanations: the features found, the maps they give, and POST /explain."""

import io
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import DOG, encode
from flask.testing import FlaskClient
from PIL import Image, ImageDraw

import run_keras_server as server
from keras_server.explain import cam as cam_of
from keras_server.explain import explainer as explaining
from keras_server.explain import heatmap
from keras_server.explain.cam import (
    Unexplainable,
    direction_of,
    engine_cam,
    heat_function,
    keras_cam,
    last_features,
    logits,
)
from keras_server.explain.explainer import Explainer
from keras_server.models.batcher import Overdue, QueueFull
from keras_server.models.convert import convert_function, load_described
from keras_server.models.describe import describe
from keras_server.models.engines import OpenVINOEngine
from keras_server.models.registry import PredictorEngine
from keras_server.models.served import Served
from keras_server.models.source import KerasModel, Source
from keras_server.models.spec import Spec, Tensor
from keras_server.models.tracing import import_keras
from keras_server.ticket import TICKET, Ticket

JSON = {"Accept": "application/json"}
DOGS_BOX = (40, 25, 910, 730)  # left, top, right, bottom of the dog on dog.jpg, from the tail to the tips of the ears
# Round the dog itself, for its box is most of the picture.
OUTLINE = [(40, 520), (60, 600), (200, 610), (245, 600), (330, 725), (385, 725), (340, 560), (415, 480), (650, 490),
           (645, 640), (680, 695), (725, 695), (750, 725), (825, 715), (745, 580), (740, 470), (835, 350), (895, 240),
           (910, 50), (885, 28), (820, 100), (780, 28), (760, 130), (690, 205), (480, 225), (330, 290), (230, 360),
           (190, 500), (130, 545), (70, 510)]  # fmt: skip


@pytest.fixture
def keras() -> Any:
    """Keras, with the same random weights for a test each time."""
    found = import_keras()
    found.utils.set_random_seed(7)
    return found


@pytest.fixture(scope="module")
def bundled() -> tuple[Any, Spec]:
    """The bundled model in Keras, and its spec."""
    source = Source("bundled")
    keras_model = source.load()
    return keras_model, describe(source, keras_model)


@pytest.fixture(scope="module")
def bundled_cam(bundled: tuple[Any, Spec]) -> Any:
    """What computes its maps, which takes as long to make as twenty maps."""
    return keras_cam(*bundled, "")


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Serve a Keras model to the test client."""

    def put(keras_model: Any, spec: Spec | None = None, cam: Any = None) -> FlaskClient:
        spec = spec or replace(
            describe(KerasModel(keras_model), keras_model), name="tiny", labels=(), preprocess="none"
        )
        engine = PredictorEngine(SimpleNamespace(predict=lambda batch: np.asarray(keras_model(batch))))
        monkeypatch.setattr(
            server, "model", Served(spec, engine, explain=lambda: cam or keras_cam(keras_model, spec, ""))
        )
        return server.app.test_client()

    return put


@pytest.fixture
def bundled_client(bundled: tuple[Any, Spec], bundled_cam: Any, serve: Callable[..., Any]) -> FlaskClient:
    """The bundled model behind the test client."""
    return serve(*bundled, bundled_cam)


def ask(client: Any, data: bytes, query: str = "", **headers: str) -> Any:
    return client.post(f"/explain{query}", data=data, content_type="image/jpeg", headers=headers)


def tiny(keras: Any, *head: Any, size: int = 12, channels: int = 3) -> Any:
    """Return a small convolutional classifier that ends in the layers `head`."""
    layers = [keras.Input((size, size, channels)), keras.layers.Conv2D(6, 3, activation="relu", padding="same")]
    return keras.Sequential([*layers, keras.layers.MaxPooling2D(), *head])


def cams(keras_model: Any) -> dict[str, Any]:
    """Return both ways to a map: by TensorFlow, and converted by OpenVINO."""
    output = (spec := describe(KerasModel(keras_model), keras_model)).outputs[0]
    function = heat_function(keras_model, spec, 0)  # traced once for both
    engine = OpenVINOEngine(convert_function(function, 2), "float32", 2, 1)
    return {
        "tensorflow": lambda picture, label: np.asarray(function(picture, direction_of(label, output))),
        "openvino": engine_cam(engine, output),
    }


def in_graph(keras_model: Any, row: np.ndarray, find: Callable[[Any, Any], Any]) -> np.ndarray:
    """Return the values of a tensor that `find` picks from the graph of a model, by its input and output."""
    import tensorflow as tf

    @tf.function(autograph=False)
    def run(source: Any) -> Any:
        return find(source, keras_model(source, training=False))

    return np.asarray(run(tf.constant(row)))


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).uniform(0, 1, shape).astype(np.float32)


def reference(keras: Any, features: Any, scores: Any, inputs: Any, picture: np.ndarray, label: int) -> np.ndarray:
    """Compute Grad-CAM as the paper has it, from symbolic tensors."""
    import tensorflow as tf

    model = keras.Model(inputs[0], [features, scores])
    with tf.GradientTape() as tape:
        a, y = model(picture, training=False)
        score = y[:, label]
    alpha = np.asarray(tape.gradient(score, a))[0].mean(axis=(0, 1))
    return np.maximum((np.asarray(a)[0] * alpha).sum(axis=-1), 0)


# Where the map lies


def mass(heat: np.ndarray, size: tuple[int, int], inside: np.ndarray) -> float:
    """Return the share of a map, stretched to a picture's size, that lies inside."""
    stretched = Image.fromarray(heat.astype(np.float32)).resize(size, Image.Resampling.BILINEAR)
    values = np.asarray(stretched).clip(0)
    return float((values * inside).sum() / values.sum())


def test_the_map_of_the_dog_lies_on_the_dog(bundled_client: Any) -> None:
    answer = ask(bundled_client, DOG.read_bytes(), **JSON).json
    assert (answer["label"], answer["width"], answer["height"]) == ("German_shepherd", 1024, 768)
    heat = np.array(answer["map"])
    box = np.zeros((768, 1024))
    box[DOGS_BOX[1] : DOGS_BOX[3], DOGS_BOX[0] : DOGS_BOX[2]] = 1
    assert mass(heat, (1024, 768), box) > 0.8  # the box is 0.78 of the picture
    outline = Image.new("L", (1024, 768))
    ImageDraw.Draw(outline).polygon(OUTLINE, fill=1)
    dog = np.asarray(outline)
    assert mass(heat, (1024, 768), dog) > 1.7 * dog.mean()


@pytest.mark.parametrize("corner", [(0, 0), (1024, 0), (0, 768), (1024, 768)])
def test_the_map_finds_a_dog_in_a_corner(bundled_client: Any, corner: tuple[int, int]) -> None:
    picture = Image.new("RGB", (2048, 1536), (128, 128, 128))
    picture.paste(Image.open(DOG), corner)
    answer = ask(bundled_client, encode(picture, "JPEG"), "?label=German_shepherd", **JSON).json
    quarter = np.zeros((1536, 2048))
    quarter[corner[1] : corner[1] + 768, corner[0] : corner[0] + 1024] = 1
    assert mass(np.array(answer["map"]), (2048, 1536), quarter) > 0.7


# Grad-CAM itself


@pytest.mark.parametrize("head", ["mean", "flat"])
def test_grad_cam_of_a_small_model_equals_the_reference(keras: Any, head: str) -> None:
    middle = keras.layers.GlobalAveragePooling2D() if head == "mean" else keras.layers.Flatten()
    model = tiny(keras, middle, keras.layers.Dense(4, activation="softmax"))
    kernel, bias = (np.asarray(weight) for weight in model.layers[-1].weights)
    scores = keras.ops.matmul(model.layers[-1].input, kernel) + bias
    picture = noise(1, 12, 12, 3)
    found = cams(model)
    for label in range(4):
        expected = reference(keras, model.layers[0].output, scores, model.inputs, picture, label)
        for cam in found.values():
            assert cam(picture, label).shape == (12, 12)
            np.testing.assert_allclose(cam(picture, label), expected, atol=1e-4 * max(1, expected.max()))


def branch(keras: Any, *makers: Any) -> Callable[[Any], Any]:
    """Return what lets a tensor go several ways, which are joined."""
    return lambda x: keras.layers.Concatenate()([keras.layers.Flatten()(make(x)) for make in makers])


# Heads between the last convolution and the scores, each with operations whose gradient OpenVINO does not have itself.
HEADS: dict[str, Callable[[Any], list[Any]]] = {
    "max pooling twice": lambda k: [k.MaxPooling2D(2), k.MaxPooling2D(2), k.Flatten(), k.Dense(9, "relu")],
    "max pooling that overlaps": lambda k: [k.MaxPooling2D(3, 2, padding="same"), k.Flatten()],
    "average pooling that overlaps": lambda k: [k.AveragePooling2D(3, 2, padding="same"), k.Flatten()],
    "largest of all": lambda k: [k.GlobalMaxPooling2D()],
    "convolutions of a pixel": lambda k: [
        k.GlobalAveragePooling2D(keepdims=True), k.Conv2D(5, 1, activation="relu6"), k.Conv2D(4, 1), k.Flatten(),
    ],
    "a convolution of a pixel in groups": lambda k: [
        k.GlobalAveragePooling2D(keepdims=True), k.Conv2D(6, 1, groups=3), k.Flatten(),
    ],
    "selu of zeros": lambda k: [k.GlobalAveragePooling2D(), k.Dense(9, "relu"), k.Activation("selu")],
    "normalised": lambda k: [k.GlobalAveragePooling2D(), k.LayerNormalization(), k.UnitNormalization()],
    "batch norm": lambda k: [k.GlobalAveragePooling2D(), k.Dense(9, "elu"), k.BatchNormalization()],
    "cut out": lambda k: [k.Cropping2D(((1, 2), (3, 0))), k.Flatten()],
    "leaky": lambda k: [k.GlobalAveragePooling2D(), k.Dense(9), k.LeakyReLU(0.2)],
    **{
        name: lambda k, name=name: [  # type: ignore[misc]
            k.GlobalAveragePooling2D(), k.Dense(9, "softplus"), k.Activation(getattr(import_keras().ops, name)),
        ]
        for name in ("sqrt", "rsqrt", "reciprocal")
    },
    **{
        name: lambda k, name=name: [k.GlobalAveragePooling2D(), k.Dense(9, name)]  # type: ignore[misc]
        for name in ("gelu", "mish", "selu", "softplus", "softsign", "swish", "tanh", "sigmoid", "hard_swish")
    },
}  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
def test_heads_have_their_gradient(keras: Any, name: str) -> None:
    image = keras.Input((13, 11, 3))
    x = features = keras.layers.Conv2D(6, 3, padding="same")(image)
    for layer in HEADS[name](keras.layers):
        x = layer(x)
    check_heat(keras, image, features, keras.layers.Dense(3)(x))


def test_branches_have_their_gradient(keras: Any) -> None:
    image = keras.Input((13, 11, 3))
    features = keras.layers.Conv2D(6, 3, padding="same")(image)
    ways = (
        keras.layers.DepthwiseConv2D(3, strides=2, padding="same", depth_multiplier=2),
        keras.layers.DepthwiseConv2D(3, dilation_rate=2),
        keras.layers.Conv2D(2, 3, strides=2),
        keras.layers.Conv2D(6, 3, padding="same", groups=2),
        keras.layers.Conv2DTranspose(2, 3, strides=2, padding="same"),
        keras.layers.GlobalAveragePooling2D(),
        keras.layers.GlobalMaxPooling2D(),
    )
    check_heat(keras, image, features, keras.layers.Dense(3)(branch(keras, *ways)(features)))


def test_a_dilated_convolution_is_one_map(keras: Any) -> None:
    """TensorFlow computes it in parts of the picture, which are no maps of it."""
    image = keras.Input((14, 12, 3))
    features = keras.layers.Conv2D(6, 3, dilation_rate=2)(image)
    check_heat(keras, image, features, keras.layers.Dense(3)(keras.layers.GlobalAveragePooling2D()(features)))


def test_a_convolution_in_groups_has_a_map(keras: Any) -> None:
    """On a CPU Keras computes it in a function of its own."""
    image = keras.Input((14, 12, 4))
    features = keras.layers.Conv2D(6, 3, strides=2, groups=2)(image)
    check_heat(keras, image, features, keras.layers.Dense(3)(keras.layers.GlobalAveragePooling2D()(features)))


@pytest.mark.parametrize("head", ["pooled", "flat"])
def test_layers_of_keras_2_that_normalise_have_their_gradient(head: str, tmp_path: Path) -> None:
    """Its LayerNormalization is a batch norm with the moments of what goes in."""
    tf_keras = pytest.importorskip("tf_keras")
    k = tf_keras.layers
    image = tf_keras.Input((9, 8, 3))
    features = k.Conv2D(6, 3)(image)
    way = [k.GlobalAveragePooling2D()] if head == "pooled" else [k.Conv2D(4, 3), k.LayerNormalization(), k.Flatten()]
    x = features
    for layer in way:
        x = layer(x)
    scores = k.Dense(3)(k.LayerNormalization()(k.Concatenate()([x, k.GlobalMaxPooling2D()(features)])))
    model = tf_keras.Model(image, scores)
    model.set_weights([np.random.default_rng(4).uniform(-1, 1, weight.shape) for weight in model.get_weights()])
    with pytest.warns(UserWarning, match="legacy"):
        model.save(tmp_path / "own.h5")
    found = cams(load_described(Source(str(tmp_path / "own.h5"))).model)
    picture = noise(1, 9, 8, 3)
    for label in range(3):
        expected = reference(tf_keras, features, scores, [image], picture, label)
        for cam in found.values():
            np.testing.assert_allclose(cam(picture, label), expected, atol=1e-4 * expected.max(), rtol=0)


def check_heat(keras: Any, image: Any, features: Any, scores: Any) -> None:
    """Hold both ways to a map against the paper's, for each label."""
    random = np.random.default_rng(2)
    picture = random.normal(size=(1, *image.shape[1:])).astype(np.float32)
    found = cams(keras.Model(image, scores))
    for label in range(3):
        expected = reference(keras, features, scores, [image], picture, label)
        for cam in found.values():
            np.testing.assert_allclose(cam(picture, label), expected, atol=1e-4 * expected.max(), rtol=0)


def test_grad_cam_of_the_bundled_model_equals_the_reference(keras: Any, bundled: tuple[Any, Spec]) -> None:
    model, _ = bundled
    picture = np.asarray(Image.open(DOG).resize((224, 224)), np.float32)[np.newaxis]
    last = next(layer for layer in reversed(model.layers) if len(layer.output.shape) == 4)
    dense = model.layers[-1]
    pooled = dense.input
    kernel, bias = (np.asarray(weight) for weight in dense.weights)
    for cam in cams(model).values():
        for label in (235, 17):
            scores = keras.ops.matmul(pooled, kernel) + bias
            expected = reference(keras, last.output, scores, model.inputs, picture, label)
            found = cam(picture, label)
            assert found.max() > 0
            np.testing.assert_allclose(found, expected, atol=1e-4)
            np.testing.assert_allclose(found / found.max(), expected / expected.max(), atol=1e-4)


def test_one_output_speaks_for_the_second_class_and_against_the_first(keras: Any) -> None:
    dense = keras.layers.Dense(1, activation="sigmoid")
    model = tiny(keras, keras.layers.GlobalAveragePooling2D(), dense)
    kernel = np.zeros((3, 3, 3, 6), np.float32)
    kernel[1, 1, 0, 0] = kernel[1, 1, 2, 1] = 1  # the first feature is red, the second blue
    model.layers[0].set_weights([kernel, np.zeros(6)])
    dense.set_weights([np.array([[1], [-1], [0], [0], [0], [0]]), np.zeros(1)])
    picture = np.zeros((1, 12, 12, 3), np.float32)
    picture[:, :, :6, 0] = picture[:, :, 6:, 2] = 1  # red on the left, blue on the right
    for cam in cams(model).values():
        first, second = (cam(picture, label) for label in (0, 1))
        assert first[:, 6:].max() > 0
        assert first[:, :6].max() == 0
        assert second[:, :6].max() > 0
        assert second[:, 6:].max() == 0


def test_a_direction_is_the_label_or_for_or_against_the_only_score() -> None:
    """Float32, between -1 and 1, as converted functions take it."""
    three, one = (Tensor("scores", (count,), "float32") for count in (3, 1))
    directions = [direction_of(label, three) for label in range(3)] + [direction_of(label, one) for label in range(2)]
    assert [each.tolist() for each in directions] == [[[1, 0, 0]], [[0, 1, 0]], [[0, 0, 1]], [[-1]], [[1]]]
    assert {each.dtype for each in directions} == {np.dtype(np.float32)}


@pytest.mark.parametrize("end", ["dense", "activation", "softmax", "operation", "nested", "none"])
def test_the_score_is_taken_before_the_softmax(keras: Any, end: str) -> None:
    x = vector = keras.Input((5,))
    dense = keras.layers.Dense(3, activation="softmax" if end == "dense" else None)
    if end == "nested":
        inner = keras.Sequential([keras.Input((5,)), dense, keras.layers.Softmax()])
        x = inner(x)
    else:
        x = dense(x)
    ends = {
        "activation": keras.layers.Activation("softmax"),
        "softmax": keras.layers.Softmax(),
        "operation": keras.ops.softmax,
    }
    output = ends[end](x) if end in ends else x
    row = noise(2, 5)
    found = in_graph(keras.Model(vector, output), row, lambda _, output: logits(output))
    kernel, bias = (np.asarray(weight) for weight in dense.weights)
    np.testing.assert_allclose(found, row @ kernel + bias, atol=1e-6)


def test_the_last_convolution_counts_not_its_pooling(keras: Any) -> None:
    model = tiny(keras, keras.layers.Flatten(), keras.layers.Dense(3, activation="softmax"))
    picture = noise(1, 12, 12, 3)
    features = in_graph(model, picture, lambda source, output: last_features(source, logits(output)))
    np.testing.assert_allclose(features, np.asarray(model.layers[0](picture)), atol=1e-6)


@pytest.mark.parametrize("pooling", [None, "avg"])
def test_models_inside_models_are_looked_into(keras: Any, pooling: str | None) -> None:
    base = keras.applications.MobileNetV2(
        weights=None, include_top=False, input_shape=(96, 96, 3), alpha=0.35, pooling=pooling
    )
    top = [] if pooling else [keras.layers.GlobalAveragePooling2D()]
    model = keras.Sequential(
        [
            keras.Input((96, 96, 3)),
            keras.Sequential([keras.layers.RandomFlip(), keras.layers.Rescaling(1 / 127.5, offset=-1)]),
            base,
            *top,
            keras.Sequential([keras.layers.Dropout(0.5), keras.layers.Dense(4, activation="softmax")]),
        ]
    )
    picture = noise(1, 96, 96, 3) * 255
    features = base.get_layer("out_relu").output
    means = keras.Model(base.inputs[0], features)
    dense = model.layers[-1].layers[-1]
    scaled = keras.ops.convert_to_numpy(model.layers[0](picture, training=False))
    expected = np.asarray(means(scaled))[0] @ np.asarray(dense.weights[0])[:, 2] / 9
    for cam in cams(model).values():
        np.testing.assert_allclose(cam(picture, 2), np.maximum(expected, 0), atol=1e-4)


FAMILIES = {  # of keras.applications, by a small member: how its last features are called, and how many they are
    "ConvNeXtTiny": ("Add", 768),
    "DenseNet121": ("relu", 1024),
    "EfficientNetB0": ("top_activation", 1280),
    "EfficientNetV2B0": ("top_activation", 1280),
    "InceptionV3": ("mixed10", 2048),
    "MobileNet": ("conv_pw_13_relu", 1024),
    "MobileNetV2": ("out_relu", 1280),
    "MobileNetV3Small": ("activation", 576),
    "NASNetMobile": ("activation", 1056),
    "ResNet50": ("conv5_block3_out", 2048),
    "ResNet50V2": ("post_relu", 2048),
    "VGG16": ("block5_conv3", 512),
    "Xception": ("block14_sepconv2_act", 2048),
}


def test_every_family_is_here(keras: Any) -> None:
    """A release of Keras with a new one is to be looked at."""
    family = re.compile(r"(ConvNeXt|DenseNet|EfficientNetV2|EfficientNet|InceptionResNet|InceptionV3|MobileNetV3|"
                        r"MobileNetV2|MobileNet|NASNet|ResNet\d+V2|ResNet|VGG|Xception)")  # fmt: skip
    names = [name for name in vars(keras.applications) if name[0].isupper()]
    assert all(family.match(name) for name in names)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_features_of_every_family_are_found(keras: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    side = 139 if name == "InceptionV3" else 96  # so that the last features are more than one pixel
    model = getattr(keras.applications, name)(weights=None, input_shape=(side, side, 3), classes=3)
    picture = noise(1, side, side, 3)
    layer, channels = FAMILIES[name]
    found: list[Any] = []

    def find(source: Any, scores: Any) -> Any:
        found.extend([scores, last_features(source, scores)])
        return found[1]

    monkeypatch.setattr(cam_of, "last_features", find)  # in the graph of the maps: tracing takes longest
    both = cams(model)
    scores, features = found
    assert scores.op.type != "Softmax"
    assert features.shape[-1] == channels
    assert f"/{layer}" in features.op.name
    maps = [cam(picture, 1) for cam in both.values()]
    assert maps[0].shape == tuple(features.shape[1:3])
    slack = 1e-3 if name == "ConvNeXtTiny" else 1e-4  # it moves by so much where its picture does in the last digit
    np.testing.assert_allclose(*maps, atol=slack * maps[0].max(), rtol=0)
    # Of random weights a label may have nothing in its favour; one of the directions shows where the features matter.
    assert max(cam(picture, label).max() for cam in both.values() for label in range(3)) > 0


# Models without such a map


def test_a_model_without_convolutions_is_refused(keras: Any, serve: Callable[..., Any]) -> None:
    layers = [keras.layers.Rescaling(1 / 255), keras.layers.Flatten(), keras.layers.Dense(4, activation="softmax")]
    client = serve(keras.Sequential([keras.Input((8, 8, 3)), *layers]))
    answer = ask(client, encode(Image.new("RGB", (9, 9))))
    assert (answer.status_code, answer.json["success"]) == (422, False)
    assert answer.json["error"] == "tiny has no convolutional features before its labels, so it cannot be explained."
    assert ask(client, encode(Image.new("RGB", (9, 9)))).json == answer.json  # and again, without another try


def test_another_backend_is_refused(keras: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(Unexplainable, match=r"needs? Keras on TensorFlow.* jax"):
        heat_function(None, Spec(), 0)


def test_a_model_from_nowhere_is_refused(client: FlaskClient, dog: bytes) -> None:
    answer = ask(client, dog)
    assert (answer.status_code, "came from no file" in answer.json["error"]) == (422, True)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (Spec(inputs=(Tensor("image", (3, 224, 224), "float32"),)), "channels last"),
        (Spec(outputs=(Tensor("map", (7, 7, 2), "float32"),)), "no output that is a list of classes"),
    ],
)
def test_what_has_no_place_for_a_map_is_refused(spec: Spec, words: str) -> None:
    with pytest.raises(Unexplainable, match=words):
        heat_function(None, spec, 0)


# POST /explain


def test_what_depends_on_two_headers_says_both(bundled_client: Any, setting: Callable[..., None], dog: bytes) -> None:
    setting(cors_origin=("https://a", "https://b"))
    answer = bundled_client.post("/explain", data=dog, content_type="image/jpeg", headers={"Origin": "https://b"})
    assert {*answer.headers["Vary"].split(", ")} == {"Accept", "Origin"}
    assert answer.headers["Access-Control-Allow-Origin"] == "https://b"


def test_a_form_gets_a_png(bundled_client: Any, dog: bytes) -> None:
    answer = bundled_client.post("/explain", data={"image": (io.BytesIO(dog), "dog.jpg")})
    assert (answer.status_code, answer.content_type) == (200, "image/png")
    assert answer.headers["Vary"] == "Accept"
    picture = Image.open(io.BytesIO(answer.data))
    assert (picture.size, picture.mode) == ((512, 384), "RGB")
    heat = np.array(ask(bundled_client, dog, **JSON).json["map"])
    assert heat.max() == 1
    assert heat.min() >= 0
    changed = np.abs(np.asarray(picture, np.float32) - np.asarray(Image.open(io.BytesIO(dog)), np.float32))
    warm, cold = np.unravel_index(heat.argmax(), heat.shape), np.unravel_index(heat.argmin(), heat.shape)
    at = [
        tuple(int((i + 0.5) * n / m) for i, n, m in zip(c, (384, 512), heat.shape, strict=True)) for c in (warm, cold)
    ]
    assert changed[at[0]].mean() > 20 > 10 > changed[at[1]].mean()


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("*/*", "image/png"),
        ("image/*", "image/png"),
        ("text/html", "image/png"),
        ("application/json", "application/json"),
        ("application/json, image/png;q=0.5", "application/json"),
    ],
)
def test_what_the_client_accepts_it_gets(bundled_client: Any, dog: bytes, accept: str, kind: str) -> None:
    assert ask(bundled_client, dog, Accept=accept).mimetype == kind


def test_the_probability_is_that_of_predict(bundled_client: Any, dog: bytes) -> None:
    rows = bundled_client.post("/predict", data=dog, content_type="image/jpeg").json["predictions"]
    for query, row in [("", rows[0]), (f"?label={rows[2]['label']}", rows[2]), ("?label=235", rows[0])]:
        answer = ask(bundled_client, dog, query, **JSON).json
        assert answer["label"] == row["label"]
        assert answer["probability"] == pytest.approx(row["probability"], abs=1e-6)
        assert answer["model"] == "efficientnet_lite0"


def test_the_more_probable_of_two_equal_labels_is_meant(bundled_client: Any, dog: bytes) -> None:
    named, *both = [
        ask(bundled_client, dog, f"?label={label}", **JSON).json["probability"] for label in ("crane", 134, 517)
    ]
    assert min(both) < max(both) == named


@pytest.mark.parametrize(
    ("label", "sentence"),
    [
        ("nope", "There is no label 'nope'.* such as \\w+.* 0 to 999"),
        ("German shepard", "such as German_shepherd,"),
        ("1000", "0 to 999"),
        ("-1", "0 to 999"),
        ("07", "0 to 999"),
        ("", "0 to 999"),
    ],
)
def test_an_unknown_label_is_a_mistake(bundled_client: Any, dog: bytes, label: str, sentence: str) -> None:
    answer = bundled_client.post("/explain", query_string={"label": label}, data=dog, content_type="image/jpeg")
    assert answer.status_code == 400
    assert re.search(sentence, answer.json["error"])


@pytest.mark.parametrize("accept", ["image/png", "application/json"])
@pytest.mark.parametrize("data", [b"", b"hello", encode(Image.new("RGB", (99, 99)), "JPEG")[:300]])
def test_what_is_no_picture_is_refused(bundled_client: Any, data: bytes, accept: str) -> None:
    answer = ask(bundled_client, data, Accept=accept)
    assert (answer.status_code, answer.json["success"]) == (400, False)


def test_two_pictures_are_one_too_many(bundled_client: Any, dog: bytes) -> None:
    files = [(io.BytesIO(dog), "a.jpg"), (io.BytesIO(dog), "b.jpg")]
    answer = bundled_client.post("/explain", data={"image": files})
    assert (answer.status_code, "one at a time" in answer.json["error"]) == (400, True)


def test_other_methods_and_types(bundled_client: Any) -> None:
    assert bundled_client.get("/explain").status_code == 405
    assert bundled_client.post("/explain", data="x", content_type="text/plain").status_code == 415


def test_the_key_is_asked(bundled_client: Any, setting: Callable[..., None], dog: bytes) -> None:
    setting(api_key=("secret",))
    assert ask(bundled_client, dog).status_code == 401
    assert ask(bundled_client, dog, Authorization="Bearer secret").status_code == 200


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_overlay_is_upright(bundled_client: Any, orientation: int) -> None:
    dog = Image.open(DOG).resize((320, 240))
    turn = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    stored = dog.transpose(turn[orientation]) if orientation in turn else dog
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(stored, "JPEG", exif=exif, quality=95)
    answer = ask(bundled_client, data, **JSON).json
    assert (answer["width"], answer["height"]) == (320, 240)
    overlay = Image.open(io.BytesIO(ask(bundled_client, data).data))
    assert overlay.size == (320, 240)
    corner = np.abs(np.asarray(overlay, np.float32) - np.asarray(dog, np.float32))[:40, :40]
    assert corner.mean() < 12  # where the map is cold the picture shows


@pytest.mark.parametrize(
    "picture",
    [
        Image.open(DOG).resize((1300, 650)),
        Image.open(DOG).resize((60, 80)).convert("RGBA"),
        Image.open(DOG).resize((60, 80)).convert("P"),
        Image.fromarray((noise(50, 70) * 65535).astype(np.uint16)),
    ],
    ids=["large", "alpha", "palette", "16 bits"],
)
def test_any_picture_is_overlaid_within_bounds(bundled_client: Any, picture: Image.Image) -> None:
    overlay = Image.open(io.BytesIO(ask(bundled_client, encode(picture)).data))
    scale = min(1, heatmap.SIDE / max(picture.size))
    assert overlay.size == tuple(round(scale * length) for length in picture.size)
    answer = ask(bundled_client, encode(picture), **JSON).json
    assert (answer["width"], answer["height"]) == picture.size


def test_grey_pictures_and_numbered_classes(keras: Any, serve: Callable[..., Any]) -> None:
    head = [keras.layers.Flatten(), keras.layers.Dense(10, activation="softmax")]
    client = serve(tiny(keras, *head, size=28, channels=1))
    answer = ask(client, encode(Image.fromarray((noise(40, 30) * 255).astype(np.uint8))), "?label=7", **JSON).json
    assert (answer["label"], answer["width"], answer["height"]) == ("7", 30, 40)
    assert np.array(answer["map"]).shape == (28, 28)


def test_logits_become_probabilities(keras: Any, serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    keras_model = tiny(keras, keras.layers.Flatten(), keras.layers.Dense(3))
    client = serve(
        keras_model, replace(describe(KerasModel(keras_model), keras_model), labels=(), activation="softmax")
    )
    data = encode(Image.fromarray((noise(12, 12, 3) * 255).astype(np.uint8)))
    found = [ask(client, data, f"?label={label}", **JSON).json["probability"] for label in range(3)]
    assert sum(found) == pytest.approx(1, abs=1e-5)
    rows = client.post("/predict", data=data, content_type="image/png").json["predictions"]
    assert max(found) == pytest.approx(rows[0]["probability"], abs=1e-6)


# Limits


@pytest.fixture
def blocked() -> Iterator[tuple[Explainer, Any, Any]]:
    """An explainer whose model waits to be released, and the events that say so."""
    entered, release = threading.Event(), threading.Event()

    def cam(picture: np.ndarray, label: int) -> np.ndarray:
        entered.set()
        release.wait(60)
        return np.ones((2, 2), np.float32)

    explainer = Explainer(Spec(), None, queue_size=1)
    explainer.cam = cam
    yield explainer, entered, release
    release.set()


def test_past_the_queue_explanations_are_turned_away(blocked: tuple[Explainer, Any, Any]) -> None:
    explainer, entered, release = blocked
    picture = noise(1, 4, 4, 3)
    threads = [threading.Thread(target=explainer.heat, args=(picture, 0)) for _ in range(2)]
    threads[0].start()
    assert entered.wait(60)
    threads[1].start()
    while explainer.batcher.waiting < 1:  # until the second stands in the queue, which holds one
        threads[1].join(0.01)
    with pytest.raises(QueueFull):
        explainer.heat(picture, 0)
    release.set()
    for thread in threads:
        thread.join()
    assert explainer.heat(picture, 0).tolist() == [[1, 1], [1, 1]]


def test_an_explanation_ends_with_its_deadline(blocked: tuple[Explainer, Any, Any]) -> None:
    explainer, _, _ = blocked
    token = TICKET.set(Ticket(0))
    try:
        with pytest.raises(Overdue):
            explainer.heat(noise(1, 4, 4, 3), 0)
    finally:
        TICKET.reset(token)


def test_several_first_requests_at_once_share_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Slow(explaining.Batcher):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            made.append(threading.get_ident())
            time.sleep(0.1)  # in which the others come
            super().__init__(*arguments, **options)

    monkeypatch.setattr(explaining, "Batcher", Slow)
    explainer = Explainer(Spec(), lambda: lambda picture, label: np.ones((1, 1), np.float32), queue_size=8)
    with ThreadPoolExecutor(4) as pool:
        maps = [pool.submit(explainer.heat, noise(1, 4, 4, 3), 0) for _ in range(4)]
        assert [each.result().tolist() for each in maps] == [[[1]]] * 4
    assert len(made) == 1
    explainer.close()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_heat_that_is_not_finite_is_no_map(value: float) -> None:
    explainer = Explainer(Spec(name="tiny"), None, queue_size=1)
    explainer.cam = lambda picture, label: np.array([[1, value]], np.float32)
    with pytest.raises(ValueError, match="tiny has gradients that are not finite"):
        explainer.heat(noise(1, 4, 4, 3), 0)


def test_heat_is_scaled_to_its_most_and_none_stays_none() -> None:
    explainer = Explainer(Spec(), None, queue_size=1)
    for found, expected in (([[0.5, 2.0]], [[0.25, 1]]), ([[0.0, 0.0]], [[0, 0]])):
        explainer.cam = lambda picture, label, found=found: np.array(found, np.float32)
        assert explainer.heat(noise(1, 4, 4, 3), 0).tolist() == expected


# Colours


def test_the_ramp_rises_evenly_in_lightness() -> None:
    ramp = heatmap.ramp().astype(float) / 255
    linear = np.where(ramp <= 0.04045, ramp / 12.92, ((ramp + 0.055) / 1.055) ** 2.4)
    to_cones = np.array([[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
                         [0.0883024619, 0.2817188376, 0.6299787005]])  # fmt: skip
    lightness = np.cbrt(linear @ to_cones.T) @ np.array([0.2104542553, 0.7936177850, -0.0040720468])
    np.testing.assert_allclose(lightness, np.linspace(0.32, 0.92, 256), atol=0.01)


def test_the_page_has_the_same_ramp(client: FlaskClient) -> None:
    line = re.search('data-ramp="([^"]*)"', client.get("/").text)
    assert line
    assert line[1].split()[0] == "#390085"
    assert line[1] == " ".join("#{:02x}{:02x}{:02x}".format(*colour) for colour in heatmap.ramp(9))

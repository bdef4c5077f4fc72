"""Served models hold the numbers that their own Keras gives: files of users, and kinds of layers built on the spot."""

import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import absl.logging
import numpy as np
import pytest
from conftest import ROOT, engine_and_spec

from keras_server.explain.cam import heat_function
from keras_server.models import convert as converting
from keras_server.models.convert import ConversionError, convert
from keras_server.models.describe import describe
from keras_server.models.engines import KerasEngine, OpenVINOEngine
from keras_server.models.errors import StartupError
from keras_server.models.reference import Reference, differs, random_rows, sizes_to_try
from keras_server.models.source import KerasModel, Source
from keras_server.models.spec import Spec, Tensor, probabilities
from keras_server.models.tracing import import_keras, reason_of, structures
from keras_server.settings import Settings

DATA = ROOT / "tests" / "data" / "models"
REFUSED = {"sm_nosig", "stateful3.keras"}  # though there are numbers
GOOD = sorted(path.stem for path in DATA.glob("*.npz") if path.stem not in REFUSED)
UNSAFE = {"lambda.h5", "l2norm.h5"}
# Those that OpenVINO computes otherwise than Keras, or not at all.
ON_KERAS = {"argmax.keras", "int8.keras", "mixed_bfloat16.keras", "masking.keras", "text.keras", "textvec.keras"}


def open_file(path: Path, **settings: Any) -> Any:
    return engine_and_spec(Source(str(path), unsafe=path.name in UNSAFE), Settings(cache_dir="", **settings))


def arrays(numbers: Any, kind: str) -> list[np.ndarray]:
    names = sorted(
        (name for name in numbers.files if re.fullmatch(rf"{kind}\d+", name)), key=lambda name: int(name[len(kind) :])
    )
    return [numbers[name] for name in names]


@pytest.mark.parametrize("name", GOOD)
def test_files_of_users_have_the_numbers_of_their_own_keras(name: str) -> None:
    engine, spec = open_file(DATA / name)
    numbers = np.load(DATA / f"{name}.npz")
    given, right = arrays(numbers, "in"), arrays(numbers, "out")
    named = dict(zip([str(n) for n in numbers["inames"]], given, strict=False))
    inputs = [named.get(tensor.name, array) for tensor, array in zip(spec.inputs, given, strict=True)]
    inputs = [np.char.encode(a, "utf-8").astype(object) if a.dtype.kind == "U" else a for a in inputs]
    names = [str(n) for n in numbers["onames"]]
    if len(names) > 1:
        assert {tensor.name for tensor in spec.outputs} == set(names)
        order = [[tensor.name for tensor in spec.outputs].index(name) for name in names]
    else:
        order = [*range(len(right))]
    assert len(spec.outputs) == len(right)
    for rows in (slice(None), *(slice(row, row + 1) for row in range(len(inputs[0])))):
        outputs = engine([array[rows] for array in inputs])
        for number, expected in zip(order, right, strict=True):
            assert outputs[number].shape == expected[rows].shape
            size = max(1, np.abs(expected).max())
            np.testing.assert_allclose(outputs[number], expected[rows], rtol=1e-3, atol=1e-3 * size)
    assert not any("keras_tensor" in tensor.name for tensor in (*spec.inputs, *spec.outputs))
    assert spec.engine.startswith("keras" if name in ON_KERAS else "openvino")


SENTENCES = {
    "custom.keras": "Scale",
    "only_weights.h5": "only weights",
    "notkeras.keras": "zip archive without a Keras model",
    "sm_nosig": "has no signature serving_default to serve; it has none",
    "scalar.keras": "no row for each",
    "stateful3.keras": "stateful=False",
}


@pytest.mark.parametrize("name", SENTENCES)
def test_what_cannot_be_served_is_refused_in_a_sentence(name: str) -> None:
    with pytest.raises(StartupError, match=SENTENCES[name]) as error:
        open_file(DATA / name)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(".")


OTHER_FILES: dict[str, tuple[str, bytes]] = {
    "but empty": ("m.keras", b""),
    "neither a zip archive nor HDF5": ("m.keras", b"\xf0hello"),
    "cut off or damaged": ("m.keras", (DATA / "silu.keras").read_bytes()[:-300]),
    "m.keras cannot be read by OpenVINO: TFLite model has no subgraphs": ("m.keras", b"\x1c\0\0\0TFL3" + bytes(50)),
    "a damaged model of ONNX": ("m.onnx", b"\x08\x07"),
    "a frozen graph": ("m.pb", b"\n\x10"),
    "a pickle": ("m.keras", b"\x80\x04\x95"),
    "Bad CRC-32": (
        "m.keras",
        (lambda d: d[:2000] + bytes([d[2000] ^ 255]) + d[2001:])((DATA / "silu.keras").read_bytes()),
    ),
    "is cut off": ("m.h5", (DATA / "agegender.h5").read_bytes()[:5000]),
}


@pytest.mark.parametrize("words", OTHER_FILES)
def test_files_of_other_kinds_are_told_apart(words: str, tmp_path: Path) -> None:
    name, content = OTHER_FILES[words]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(StartupError, match=words) as error:
        open_file(tmp_path / name)
    assert "\n" not in str(error.value)


def test_folders_without_a_model_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "checkpoint").write_text("model_checkpoint_path: x")
    for name, words in (("empty", "an empty folder"), ("weights", "only weights")):
        with pytest.raises(StartupError, match=words):
            open_file(tmp_path / name)


def test_a_stateful_model_is_refused_however_it_is_saved(tmp_path: Path) -> None:
    keras, tf_keras = import_keras(), pytest.importorskip("tf_keras")
    x = keras.Input(batch_shape=(1, 5, 2))
    keras.Model(x, keras.layers.LSTM(3, stateful=True)(x)).save(tmp_path / "state.keras")
    y = tf_keras.Input(batch_shape=(1, 5, 2))
    tf_keras.Model(y, tf_keras.layers.LSTM(3, stateful=True)(y)).save(tmp_path / "saved", save_format="tf")
    for name in ("state.keras", "saved"):
        with pytest.raises(StartupError, match=r"is stateful .* stateful=False"):
            open_file(tmp_path / name)


def test_a_model_of_an_own_class_is_told_how_to_be_saved(tmp_path: Path) -> None:
    keras = import_keras()

    @keras.saving.register_keras_serializable("tests")
    class Own(keras.Model):
        def __init__(self, **more: Any):
            super().__init__(**more)
            self.dense = keras.layers.Dense(2)

        def call(self, x: Any) -> Any:
            return self.dense(x)

    own = Own()
    rows = np.ones((2, 4), np.float32)
    right = np.asarray(own(rows))
    own.save(tmp_path / "own.keras")
    with pytest.raises(StartupError, match="export it with"):
        open_file(tmp_path / "own.keras")
    own.export(tmp_path / "exported", verbose=False)
    engine, _ = open_file(tmp_path / "exported")
    np.testing.assert_allclose(engine([rows])[0], right, atol=1e-5)


@pytest.mark.parametrize("name", sorted(UNSAFE))
def test_code_in_a_file_is_not_run_unless_allowed(name: str) -> None:
    with pytest.raises(StartupError, match="--unsafe-model"):
        engine_and_spec(Source(str(DATA / name)), Settings(cache_dir=""))


def test_inputs_of_keras_2_keep_their_order(tmp_path: Path) -> None:
    tf_keras = pytest.importorskip("tf_keras")
    last, first = tf_keras.Input((2,), name="z_first"), tf_keras.Input((3,), name="a_second")
    outputs = [tf_keras.layers.Rescaling(2.0, name="twice")(last), tf_keras.layers.Rescaling(3.0, name="thrice")(first)]
    path = tmp_path / "two.h5"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras 2 finds its own format old
        tf_keras.Model([last, first], outputs).save(path)
    engine, spec = engine_and_spec(Source(str(path)), Settings(cache_dir=""))
    values = {"z_first": np.array([[1.0, 2.0]], np.float32), "a_second": np.array([[1.0, 2.0, 3.0]], np.float32)}
    answers = dict(zip([t.name for t in spec.outputs], engine([values[t.name] for t in spec.inputs]), strict=True))
    assert answers["twice"].tolist() == [[2, 4]]
    assert answers["thrice"].tolist() == [[3, 6, 9]]


def test_a_file_is_told_by_its_content(tmp_path: Path) -> None:
    for name, ending in (
        ("silu.keras", ".h5"),
        ("agegender.h5", ".keras"),
        ("silu.keras", ".model"),
        ("agegender.h5", ""),
    ):
        path = tmp_path / f"renamed{ending}"
        path.write_bytes((DATA / name).read_bytes())
        assert [t.name for t in open_file(path)[1].outputs] == [t.name for t in open_file(DATA / name)[1].outputs]


def test_a_name_that_no_address_can_hold_is_made_reachable(tmp_path: Path) -> None:
    for name, reachable in (
        ("a:b.keras", "a_b"),
        ("my model.keras", "my_model"),
        ("50%.keras", "50_"),
        ("été.keras", "été"),
    ):
        path = tmp_path / name
        path.write_bytes((DATA / "silu.keras").read_bytes())
        assert Source(str(path)).name == reachable


# Layers whose conversion leaves results that nobody asked for, or answers otherwise


def build(maker: Callable[[Any], Any]) -> Any:
    keras = import_keras()
    keras.utils.set_random_seed(2)
    return maker(keras)


def functional(keras: Any, *layers: Any, shape: tuple[int | None, ...] = (16, 16, 3), dtype: str = "float32") -> Any:
    return keras.Sequential([keras.Input(shape, dtype=dtype), *layers])


def heads(k: Any) -> Any:
    x = ids = k.Input((6,), dtype="int32", name="ids")
    x = k.layers.GlobalAveragePooling1D()(k.layers.Embedding(20, 4, mask_zero=True)(x))
    return k.Model(ids, [k.layers.Dense(n, name=f"head{n}")(x) for n in (1, 2, 3)], name="model")


def doubled(k: Any) -> Any:
    x = k.Input((4,))
    return k.Model(x, k.ops.maximum(x, 2 * x))


def attention(k: Any) -> Any:
    x = k.Input((None, 6))
    y = k.layers.MultiHeadAttention(2, 3)(x, x)
    return k.Model(x, k.layers.Dense(2)(k.layers.GlobalAveragePooling1D()(k.layers.LayerNormalization()(x + y))))


def dot(k: Any) -> Any:
    a, b = k.Input((5,), name="a"), k.Input((5,), name="b")
    return k.Model({"b": b, "a": a}, {"z": k.layers.Dot(1)([a, b]), "c": k.layers.Dense(2)(a)})


def shared(k: Any) -> Any:
    a, b = k.Input((5,), name="left"), k.Input((5,), name="right")
    dense = k.layers.Dense(3, "relu")
    return k.Model([a, b], [dense(a), dense(b)])


def several_types(k: Any) -> Any:
    number, token = k.Input((3,), name="number"), k.Input((1,), dtype="int64", name="token")
    x = k.layers.Flatten()(k.layers.Embedding(7, 2)(token))
    return k.Model([number, token], k.layers.Dense(2, "softmax")(k.layers.Concatenate()([number, x])))


KINDS: dict[str, Callable[[Any], Any]] = {
    "random flip": lambda k: functional(k, k.layers.RandomFlip(), k.layers.Flatten(), k.layers.Dense(3)),
    "random zoom": lambda k: functional(k, k.layers.RandomZoom(0.2), k.layers.Flatten(), k.layers.Dense(3)),
    "resizing": lambda k: functional(k, k.layers.Resizing(8, 8), k.layers.Flatten(), k.layers.Dense(3)),
    "centre crop": lambda k: functional(k, k.layers.CenterCrop(8, 8), k.layers.Flatten(), k.layers.Dense(3)),
    "upsampling": lambda k: functional(k, k.layers.UpSampling2D(interpolation="bilinear"), k.layers.Conv2D(2, 3)),
    "group normalization": lambda k: functional(k, k.layers.Conv2D(4, 3), k.layers.GroupNormalization(2), k.layers.Flatten(), k.layers.Dense(2)),
    "time distributed": lambda k: functional(k, k.layers.TimeDistributed(k.layers.Dense(4)), k.layers.LSTM(3), shape=(5, 6)),
    "masked time distributed": lambda k: functional(k, k.layers.Masking(), k.layers.LSTM(4, return_sequences=True), k.layers.TimeDistributed(k.layers.Dense(2)), shape=(None, 3)),
    "bidirectional": lambda k: functional(k, k.layers.Embedding(30, 4, mask_zero=True), k.layers.Bidirectional(k.layers.GRU(3)), k.layers.Dense(2), shape=(None,), dtype="int32"),
    "convolutional lstm": lambda k: functional(k, k.layers.ConvLSTM2D(2, 3), k.layers.GlobalAveragePooling2D(), shape=(4, 8, 8, 3)),
    "silu": lambda k: functional(k, k.layers.Conv2D(4, 3, activation="silu"), k.layers.GlobalAveragePooling2D(), k.layers.Dense(3, "softmax")),
    "gelu": lambda k: functional(k, k.layers.Dense(4, "gelu"), k.layers.Dense(2, "mish"), shape=(5,)),
    "one convolution after the other": lambda k: functional(k, *[k.layers.Conv1D(2, 5, dilation_rate=4) for _ in range(3)], k.layers.GlobalMaxPooling1D(), shape=(None, 1)),
    "category encoding": lambda k: functional(k, k.layers.CategoryEncoding(5, output_mode="multi_hot"), k.layers.Dense(2), shape=(3,), dtype="int32"),
    "discretization": lambda k: functional(k, k.layers.Discretization([0.0, 1.0]), k.layers.Embedding(3, 2), shape=(4,)),
    "unit normalization": lambda k: functional(k, k.layers.UnitNormalization(), k.layers.Dense(2), shape=(5,)),
    "mixed float16": lambda k: functional(k, k.layers.Conv2D(4, 3, dtype="mixed_float16"), k.layers.Flatten(), k.layers.Dense(3, dtype="float32")),
    "bytes": lambda k: functional(k, k.layers.Rescaling(1 / 255), k.layers.Flatten(), k.layers.Dense(2), dtype="uint8"),
    "whole numbers out": lambda k: k.Model(x := k.Input((4,)), k.ops.argmax(x, axis=-1)),
    "truth out": lambda k: k.Model(x := k.Input((4,)), k.ops.greater(x, 0.5)),
    "its own input": lambda k: k.Model(x := k.Input((4,)), [x, k.layers.Dense(2)(x)]),
    "a list of one": lambda k: k.Model([x := k.Input((4,))], [k.layers.Dense(2)(x)]),
    "no length": lambda k: k.Model(x := k.Input(()), k.layers.Rescaling(2.0)(x)),
    "nested": lambda k: functional(k, functional(k, k.layers.Conv2D(2, 3), k.layers.Flatten()), k.layers.Dense(3, "softmax")),
    "spectral": lambda k: functional(k, k.layers.SpectralNormalization(k.layers.Dense(3)), shape=(5,)),
    "three heads and a mask": heads,
    "maximum": doubled,
    "attention": attention,
    "dot": dot,
    "shared": shared,
    "several types": several_types,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer_answers_as_keras_does(kind: str) -> None:
    keras_model = build(KINDS[kind])
    engine, spec = engine_and_spec(KerasModel(keras_model), Settings(cache_dir=""))
    assert len(spec.outputs) == len(keras_model.outputs)
    keras = import_keras()
    random = np.random.default_rng(7)
    for rows, length in ((1, 60), (3, 60), (5, 71)):
        inputs = []
        for tensor in spec.inputs:
            shape = (rows, *(size or length for size in tensor.shape))
            values = (
                random.integers(0, 5, shape) if tensor.dtype.startswith(("int", "uint")) else random.normal(size=shape)
            )
            inputs.append(values.astype(tensor.dtype))
        packed = keras.tree.pack_sequence_as(structures(keras_model)[0], inputs)
        right = keras_model(packed, training=False)
        for output, expected in zip(engine(inputs), keras.tree.flatten(right), strict=True):
            expected = np.asarray(expected)
            assert output.shape == expected.shape
            assert output.dtype == expected.dtype
            np.testing.assert_allclose(
                output.astype(float), expected.astype(float), atol=2e-4 * max(1, np.abs(expected.astype(float)).max())
            )


def test_the_answers_of_a_quantized_model_are_those_of_keras() -> None:
    keras_model = build(lambda k: functional(k, k.layers.Dense(16, "relu"), k.layers.Dense(3, "softmax"), shape=(8,)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras warns of its own input layer
        keras_model.quantize("int8")
    engine, _ = engine_and_spec(KerasModel(keras_model), Settings(cache_dir=""))
    rows = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    np.testing.assert_allclose(engine([rows])[0], np.asarray(keras_model(rows)), atol=1e-5)
    assert engine([rows])[0].std() > 0.01


def test_a_fixed_batch_is_honoured() -> None:
    keras = import_keras()
    for batch in (1, 4):
        x = keras.Input(batch_shape=(batch, 3))
        keras_model = keras.Model(x, keras.layers.Dense(2)(x))
        engine, spec = engine_and_spec(KerasModel(keras_model), Settings(cache_dir=""))
        assert spec.batch == batch
        rows = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
        kernel, bias = keras_model.get_weights()
        np.testing.assert_allclose(engine([rows])[0], rows @ kernel + bias, atol=1e-5)


def test_the_innermost_reason_is_told() -> None:
    """As OpenVINO and Keras worded them in 2026."""
    openvino = (
        "Check 'false' failed at src/frontends/common_translators/src/unconverted_ops_report.cpp:151:\n"
        "FrontEnd API failed with OpConversionFailure:\nModel wasn't fully converted.\nSummary:\n"
        "-- No conversion rule found for operations: Bitcast\nTo facilitate the conversion of unsupported operations, ..."
    )
    assert reason_of(RuntimeError(openvino)) == "No conversion rule found for operations: Bitcast"
    keras = (
        "Exception encountered when calling Conv1D.call().\n\n\x1b[1mComputed output size would be negative: -2\x1b[0m\n\n"
        "Arguments received by Conv1D.call():\n  inputs=tf.Tensor(shape=(1, 8, 2), dtype=float32)"
    )
    assert reason_of(ValueError(keras)) == "Computed output size would be negative: -2"
    assert reason_of(KeyError()) == "KeyError"


def test_the_converter_looks_for_no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would look for each of them among all. Large weights are not copied into the function, which has a limit."""
    dense = lambda k: k.layers.Dense(3, "softmax")  # noqa: E731
    model = build(lambda k: functional(k, k.layers.Conv2D(200, 3), k.layers.GlobalAveragePooling2D(), dense(k)))
    functions = [heat_function(model, describe(KerasModel(model), model), 0)]
    monkeypatch.setattr(converting, "convert_function", lambda function, inputs: functions.append(function))
    convert(model)
    assert len(functions) == 2
    for function in functions:
        assert [tuple(tensor.shape) for tensor, _ in function.graph.captures] == [(3, 3, 3, 200)]


# What the comparison notices


def test_a_wrong_conversion_is_not_served(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "keras_server")
    keras_model = build(lambda k: functional(k, k.layers.Dense(3), shape=(4,)))
    other = build(lambda k: functional(k, k.layers.Dense(3, bias_initializer="ones"), shape=(4,)))
    monkeypatch.setattr(converting, "convert", lambda _: convert(other))
    engine, spec = engine_and_spec(KerasModel(keras_model), Settings(cache_dir=""))
    assert spec.engine == "keras/tensorflow"
    assert re.search(r"converted, dense\w* differs by 1 where its largest value is \d", caplog.text)
    rows = np.ones((2, 4), np.float32)
    np.testing.assert_allclose(engine([rows])[0], np.asarray(keras_model(rows)), atol=1e-6)


def test_a_wrong_conversion_is_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = build(lambda k: functional(k, k.layers.Dense(3, bias_initializer="ones"), shape=(4,)))
    settings = Settings(cache_dir=str(tmp_path / "cache"))
    path = tmp_path / "own.keras"
    build(lambda k: functional(k, k.layers.Dense(3), shape=(4,))).save(path)
    with monkeypatch.context() as patch:
        patch.setattr(converting, "convert", lambda _: convert(other))
        engine_and_spec(Source(str(path)), settings)
    assert not [*(tmp_path / "cache").rglob("*.bin")], "only the verdict is kept"
    shutil.rmtree(tmp_path / "cache")
    assert engine_and_spec(Source(str(path)), settings)[1].engine == "openvino"
    assert len([*(tmp_path / "cache").iterdir()]) == 1


@pytest.mark.parametrize(
    ("actual", "words"),
    [
        ([[1.0, 2.0]], ""),
        ([[1.00019, 2.0]], ""),
        ([[1.00021, 2.0]], "differs by 0.00021 where its largest value is 2"),
        ([[1.0, 2.0, 3.0]], "has shape (1, 3) instead of (1, 2)"),
        ([[np.nan, 2.0]], "is finite in other places"),
    ],
)
def test_how_far_answers_may_be_apart(actual: list[list[float]], words: str) -> None:
    expected = np.array([[1.0, 2.0]], np.float32)
    assert differs(np.array(actual, np.float32), expected, np.zeros(())) == words


def test_where_keras_itself_wavers_a_hundredth_at_most_is_allowed() -> None:
    expected, moved = np.array([[0.0, 1.0]], np.float32), np.array([[1.0, 1.0]])
    assert differs(np.array([[0.009, 1.0]], np.float32), expected, moved) == ""
    assert "differs by" in differs(np.array([[0.012, 1.0]], np.float32), expected, moved)
    whole = np.array([1, 2])
    assert differs(np.array([2, 2]), whole, np.zeros(2)) != ""
    assert differs(np.array([2, 2]), whole, np.array([1, 0])) == ""


def test_a_tensor_without_counterpart_is_no_conversion() -> None:
    from keras_server.models.convert import by_tensor_name

    with pytest.raises(ConversionError, match="'x' has no counterpart"):
        by_tensor_name([], ["x:0"])


# What the numbers mean


def image_model(k: Any, *layers: Any, **compiled: Any) -> Any:
    model = functional(k, k.layers.Rescaling(1 / 255), k.layers.GlobalAveragePooling2D(), *layers)
    if compiled:
        model.compile(**compiled)
    return model


def own_loss(truth: Any, found: Any) -> Any:
    """A function that no file holds, and that nobody needs who only predicts."""
    return found - truth


def spec_of(maker: Callable[[Any], Any], tmp_path: Path, ending: str = "keras", **settings: Any) -> Spec:
    path = tmp_path / f"m.{ending}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras finds the old format old
        absl.logging.set_verbosity(absl.logging.ERROR)
        build(maker).save(path)
    return engine_and_spec(Source(str(path)), Settings(cache_dir="", **settings))[1]


MEANINGS: dict[str, tuple[Callable[[Any], Any], str, str]] = {
    "softmax": (lambda k: image_model(k, k.layers.Dense(3, "softmax")), "classes", "none"),
    "a softmax layer": (lambda k: image_model(k, k.layers.Dense(3), k.layers.Softmax()), "classes", "none"),
    "an activation layer": (lambda k: image_model(k, k.layers.Dense(3), k.layers.Activation("softmax")), "classes", "none"),
    "softmax, flattened": (lambda k: image_model(k, k.layers.Dense(3, "softmax"), k.layers.Flatten()), "classes", "none"),
    "logits": (lambda k: image_model(k, k.layers.Dense(3)), "classes", "softmax"),
    "small logits": (lambda k: image_model(k, k.layers.Dense(3, kernel_initializer="zeros")), "classes", "softmax"),
    "independent classes": (lambda k: image_model(k, k.layers.Dense(3, "sigmoid")), "classes", "none"),
    "one probability": (lambda k: image_model(k, k.layers.Dense(1, "sigmoid")), "classes", "none"),
    "one number": (lambda k: image_model(k, k.layers.Dense(1)), "values", "none"),
    "one positive number": (lambda k: image_model(k, k.layers.Dense(1, "relu")), "values", "none"),
    "one logit": (
        lambda k: image_model(k, k.layers.Dense(1), loss=k.losses.BinaryCrossentropy(from_logits=True)), "classes", "sigmoid",
    ),
    "independent logits": (
        lambda k: image_model(k, k.layers.Dense(3), loss=k.losses.BinaryCrossentropy(from_logits=True)), "classes", "sigmoid",
    ),
    "a loss of one's own": (lambda k: image_model(k, k.layers.Dense(3, "softmax"), loss=own_loss), "classes", "none"),
    "a box": (lambda k: image_model(k, k.layers.Dense(4), loss="mse"), "values", "none"),
    "a tanh": (lambda k: image_model(k, k.layers.Dense(2, "tanh")), "values", "none"),
    "nested": (lambda k: functional(k, image_model(k, k.layers.Dense(3, "softmax"))), "classes", "none"),
}  # fmt: skip


@pytest.mark.parametrize("ending", ["keras", "h5"])
@pytest.mark.parametrize("name", MEANINGS)
def test_the_last_layer_and_the_loss_say_what_numbers_mean(name: str, ending: str, tmp_path: Path) -> None:
    maker, kind, activation = MEANINGS[name]
    spec = spec_of(maker, tmp_path, ending, engine="auto" if ending == "keras" else "keras")
    assert (spec.kind, spec.activation) == (kind, activation)


def test_two_labels_make_a_lone_number_a_logit(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    spec = spec_of(lambda k: image_model(k, k.layers.Dense(1)), tmp_path, labels=str(tmp_path / "labels.txt"))
    assert (spec.kind, spec.activation, spec.labels) == ("classes", "sigmoid", ("cat", "dog"))


def test_the_activation_can_be_said(tmp_path: Path) -> None:
    one = lambda k: image_model(k, k.layers.Dense(1))  # noqa: E731
    assert spec_of(one, tmp_path, activation="sigmoid").kind == "classes"
    assert spec_of(one, tmp_path, activation="none").kind == "values"
    assert spec_of(lambda k: image_model(k, k.layers.Dense(3)), tmp_path, activation="none").kind == "values"


def two_outputs(k: Any) -> Any:
    x = k.layers.GlobalAveragePooling2D()(image := k.Input((8, 8, 3)))
    return k.Model(image, [k.layers.Dense(1, name="age")(x), k.layers.Dense(2, "softmax", name="gender")(x)])


def test_of_several_outputs_the_class_list_is_taken(tmp_path: Path) -> None:
    spec = spec_of(two_outputs, tmp_path)
    assert [tensor.name for tensor in spec.outputs] == ["age", "gender"]
    assert (spec.kind, spec.output, spec.classes) == ("classes", 1, 2)
    spec = spec_of(two_outputs, tmp_path, output="age")
    assert (spec.kind, spec.output) == ("values", 0)
    with pytest.raises(StartupError, match="has no output sex: it has age, gender"):
        spec_of(two_outputs, tmp_path, output="sex")


def test_a_map_of_classes_is_no_class_list(tmp_path: Path) -> None:
    def build_both(k: Any) -> Any:
        features = k.layers.Conv2D(2, 3, activation="softmax", name="map")(image := k.Input((8, 8, 3)))
        pooled = k.layers.GlobalAveragePooling2D()(features)
        return k.Model(image, [features, k.layers.Dense(2, "softmax", name="kind")(pooled)])

    spec = spec_of(build_both, tmp_path)
    assert [tensor.meaning for tensor in spec.outputs] == ["values", "probabilities"]
    assert (spec.kind, spec.output) == ("classes", 1)


def test_where_several_outputs_may_be_meant_the_server_asks(tmp_path: Path) -> None:
    def build_two(k: Any) -> Any:
        x = k.layers.GlobalAveragePooling2D()(image := k.Input((8, 8, 3)))
        return k.Model(image, [k.layers.Dense(2, "softmax", name=name)(x) for name in ("first", "second")])

    spec = spec_of(build_two, tmp_path)
    assert spec.kind == "none"
    assert "--output and one of first, second" in spec.reason
    assert spec_of(build_two, tmp_path, output="second").output == 1


@pytest.mark.parametrize(
    ("name", "words"), [("unet.keras", "no list of classes"), ("argmax.keras", "no list of classes")]
)
def test_an_output_that_is_no_class_list_is_said_to_be_that(name: str, words: str) -> None:
    spec = open_file(DATA / name)[1]
    assert spec.kind == "none"
    assert words in spec.reason


def test_labels_are_never_ignored(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("a\nb\nc\n")
    model = lambda k: functional(k, k.layers.Dense(3, "softmax"), shape=(4,))  # noqa: E731
    assert spec_of(model, tmp_path, labels=str(tmp_path / "labels.txt")).labels == ("a", "b", "c")
    (tmp_path / "labels.txt").write_text("a\nb\n")
    with pytest.raises(StartupError, match="2 names are in the file for the 3 classes"):
        spec_of(model, tmp_path, labels=str(tmp_path / "labels.txt"))


def test_output_names_do_not_hang_on_the_way_to_a_model(tmp_path: Path) -> None:
    names = []
    for path in ("bundled", str(ROOT / "keras_server" / "bundled" / "efficientnet_lite0.keras")):
        keras_model = (source := Source(path)).load()
        spec = describe(source, keras_model)
        names.append([tensor.name for tensor in (*spec.inputs, *spec.outputs)])
    assert names[0] == names[1]
    assert not any("keras_tensor" in name for name in names[0])


# Probabilities


def of(activation: str, classes: int = 3) -> Spec:
    return Spec(activation=activation, outputs=(Tensor("o", (classes,), "float32"),))


def test_sigmoid_and_softmax_of_several_rows() -> None:
    """Against the formulas of the textbook, worked out in Python's own floats."""
    rows = np.array([[0.0, 1.0, -2.0], [1000.0, 0.0, -1000.0], [3.0, 3.0, 3.0]], np.float32)
    softmax = probabilities(rows, of("softmax"))
    np.testing.assert_allclose(softmax[0], [0.2594965, 0.7053845, 0.0351190], atol=1e-6)
    np.testing.assert_allclose(softmax[1:], [[1, 0, 0], [1 / 3, 1 / 3, 1 / 3]], atol=1e-6)
    sigmoid = probabilities(rows, of("sigmoid"))
    np.testing.assert_allclose(sigmoid[0], [0.5, 0.7310586, 0.1192029], atol=1e-6)
    np.testing.assert_allclose(sigmoid[1], [1, 0.5, 0], atol=1e-6)
    one = probabilities(np.array([[0.44508], [-0.44508]], np.float32), of("sigmoid", 1))
    np.testing.assert_allclose(one, [[0.3905315, 0.6094685], [0.6094685, 0.3905315]], atol=1e-5)


@pytest.mark.parametrize("value", [1.48, -0.48, 1.002, -0.002])
def test_numbers_outside_0_and_1_are_never_called_probabilities(value: float) -> None:
    with pytest.raises(ValueError, match=r"outside 0\.\.1"):
        probabilities(np.array([[0.5, value, 0.1]]), of("none"))


def test_what_rounding_adds_is_taken_off() -> None:
    assert probabilities(np.array([[1.0005, -0.0005, 0.5]]), of("none")).tolist() == [[1, 0, 0.5]]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_no_probability(value: float) -> None:
    for activation in ("none", "softmax", "sigmoid"):
        with pytest.raises(ValueError, match="not finite"):
            probabilities(np.array([[0.5, value]]), of(activation))


def test_a_reference_uses_tokens_of_the_vocabulary() -> None:
    keras_model = build(heads)
    spec = describe(KerasModel(keras_model), keras_model)
    for rows in Reference(keras_model, spec).samples():
        assert 0 <= rows[0].min() <= rows[0].max() < 20


def test_any_length_is_tried_until_the_model_takes_one() -> None:
    """First those that are likely; of sequences each that is short, and the longest that most models of words take."""

    def tried(*shape: int | None) -> list[int]:
        spec = Spec(inputs=(Tensor("x", shape, "float32"),))
        return [sizes[0][0] for sizes in sizes_to_try(spec)]

    assert tried(None, None, 3) == [224, 256, 128, 64, 32, 512]
    assert tried(None, 6)[:3] == [128, 64, 32]
    assert {*tried(None, 6)} == {*range(1, 65), 128, 256, 512}
    assert tried(5, 6) == [5]


def test_the_second_row_ends_in_padding() -> None:
    spec = Spec(
        inputs=(Tensor("words", (9,), "int32"), Tensor("x", (6, 2), "float32"), Tensor("pair", (2,), "float32"))
    )
    words, x, pair = random_rows(None, spec, [(9,), (6, 2), (2,)])
    assert (words[1, 6:] == 0).all()
    assert (x[1, 4:] == 0).all()
    assert x[1, :4].all()
    assert x[::2].all()
    assert pair.all()  # too short for any


@pytest.mark.parametrize("batch", [None, 4])
def test_a_reference_has_rows_together_and_alone_and_longer_ones(batch: int | None) -> None:
    keras = import_keras()
    tensor = keras.Input(batch_shape=(batch, None, 6))
    model = keras.Model(tensor, keras.layers.GlobalAveragePooling1D()(tensor))
    spec = describe(KerasModel(model), model)
    assert spec.batch == batch
    found = [rows[0].shape for rows in Reference(model, spec).samples()]
    alone = [] if batch else [(1, 128, 6)] * 3
    assert found == [(batch or 3, 128, 6), *alone, (batch or 3, 256, 6)]


@pytest.mark.parametrize(("most", "sizes"), [(1, [1]), (2, [1, 2]), (5, [1, 2, 4, 8]), (8, [1, 2, 4, 8])])
def test_jax_compiles_before_the_first_request_every_size_that_may_come(
    most: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    keras = import_keras()
    compiled: list[int] = []

    class Model(keras.Model):  # type: ignore[misc, name-defined]
        def predict_on_batch(self, batch: np.ndarray) -> np.ndarray:
            compiled.append(len(batch))
            return batch

    tensor = keras.Input((3,))
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    KerasEngine(Model(tensor, tensor * 2), most)
    assert compiled == sizes


def test_engines_of_several_lanes_answer_alike() -> None:
    keras_model = build(attention)
    rows = np.random.default_rng(0).normal(size=(3, 8, 6)).astype(np.float32)
    for threads in (1, 2, 3):
        engine = OpenVINOEngine(convert(keras_model), "float32", threads, 8)
        np.testing.assert_allclose(engine([rows])[0], np.asarray(keras_model(rows)), atol=1e-5)


def test_an_engine_takes_arrays_as_requests_bring_them_and_leaves_them_as_they_are() -> None:
    keras_model = build(attention)
    engine = OpenVINOEngine(convert(keras_model), "float32", 1, 8)
    rows = np.random.default_rng(0).normal(size=(2, 8, 6)).astype(np.float32)
    wanted = np.asarray(keras_model(rows))
    read_only = np.frombuffer(rows.tobytes(), np.float32).reshape(rows.shape)  # of a body
    big_endian, turned = rows.astype(">f4"), np.asfortranarray(rows)
    for array in (rows, read_only, turned, np.repeat(rows, 2, axis=2)[..., ::2], rows.astype(np.float64), big_endian):
        before = array.copy()
        np.testing.assert_allclose(engine([array])[0], wanted, atol=1e-5)
        np.testing.assert_array_equal(array, before)


def test_an_engine_of_many_inputs_takes_those_that_it_has_to_copy() -> None:
    import tiny_models

    engine = OpenVINOEngine(convert(tiny_models.many()), "float32", 1, 8)
    arrays = [np.frombuffer(np.full((2, 1), number, np.float32).tobytes(), np.float32) for number in range(12)]
    outputs = engine([array.reshape(2, 1) for array in arrays])
    assert [output[:, 0].tolist() for output in outputs] == [[n * (n + 1.0)] * 2 for n in range(12)]


@pytest.mark.parametrize(("rows", "computed"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8)])
def test_jax_computes_powers_of_two_only_and_gives_back_the_rows_that_were_asked(rows: int, computed: int) -> None:
    """JAX itself is not here: this is what it would be asked, since it compiles each size anew."""
    engine = KerasEngine(build(attention), 8)
    asked: list[np.ndarray] = []

    class Model:
        def predict_on_batch(self, batch: np.ndarray) -> np.ndarray:
            asked.append(batch)
            return batch[:, 0] * 2

    engine.backend, engine.function, engine.model = "jax", None, Model()
    batch = np.random.default_rng(0).normal(size=(rows, 8, 6)).astype(np.float32)
    np.testing.assert_array_equal(engine([batch])[0], batch[:, 0] * 2)
    assert [len(each) for each in asked] == [computed]
    np.testing.assert_array_equal(asked[0][:rows], batch)


# ----------------------------------------------------------------------------------------------------------
# What OpenVINO computes otherwise, or not at all
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "number", "compute", "expected"),
    [
        ("int64", 2**40 + 1, lambda k, x: x * 2, 2**41 + 2),
        ("int32", 2**25 + 1, lambda k, x: k.ops.mod(x, 1000), 433),
        ("int32", 2**25 + 3, lambda k, x: k.ops.floor_divide(x, 7), 4793490),
        ("uint8", 200, lambda k, x: x * 2, 144),
        ("int8", 100, lambda k, x: x + x, -56),
    ],
    ids=["int64", "mod", "divide", "uint8", "int8"],
)
def test_whole_numbers_are_computed_as_keras_does(dtype: str, number: int, compute: Any, expected: int) -> None:
    keras = import_keras()
    tensor = keras.Input((3,), dtype=dtype)
    engine, _ = engine_and_spec(KerasModel(keras.Model(tensor, compute(keras, tensor))), Settings(cache_dir=""))
    assert engine([np.full((2, 3), number, dtype)])[0].tolist() == [[expected] * 3] * 2


def test_a_model_that_mixes_rows_is_refused() -> None:
    keras = import_keras()
    tensor = keras.Input((4,))
    for output in (tensor - keras.ops.mean(tensor, axis=0), keras.ops.flip(tensor, axis=0)):
        with pytest.raises(StartupError, match="mixes the rows of a batch"):
            engine_and_spec(KerasModel(keras.Model(tensor, output)), Settings(cache_dir=""))


def test_float64_is_computed_in_float64() -> None:
    keras = import_keras()
    tensor = keras.Input((2,), dtype="float64")
    engine, spec = engine_and_spec(KerasModel(keras.Model(tensor, tensor - 1e9)), Settings(cache_dir=""))
    assert spec.outputs[0].dtype == "float64"
    assert engine([np.array([[1e9 + 1.5, 1e9]])])[0].tolist() == [[1.5, 0]]


def test_whole_pictures_are_still_converted() -> None:
    keras = import_keras()
    layers = [keras.Input((8, 8, 3), dtype="uint8"), keras.layers.Rescaling(1 / 255), keras.layers.Conv2D(2, 3)]
    assert engine_and_spec(KerasModel(keras.Sequential(layers)), Settings(cache_dir=""))[1].engine == "openvino"


def test_a_tensor_without_numbers_is_refused() -> None:
    keras = import_keras()
    for shape, stop in (((0,), None), ((3,), 0)):
        tensor = keras.Input(shape)
        output = keras.layers.Dense(2)(tensor)[:, :stop]
        with pytest.raises(StartupError, match=r"of shape \(None, 0\) goes in or comes out"):
            engine_and_spec(KerasModel(keras.Model(tensor, output)), Settings(cache_dir=""))


def test_as_many_features_as_rows_are_no_rows() -> None:
    keras = import_keras()
    tensor = keras.Input((3,))
    with pytest.raises(StartupError, match="has no row for each that goes in"):
        engine_and_spec(KerasModel(keras.Model(tensor, keras.ops.sum(tensor, 0))), Settings(cache_dir=""))


def test_names_with_blanks_are_served_layer_by_layer(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "keras_server")
    keras = import_keras()
    tensor = keras.Input((3,), name="in put")
    model = keras.Model(tensor, keras.layers.Dense(2, kernel_initializer="ones", name="out put")(tensor))
    engine, spec = engine_and_spec(KerasModel(model), Settings(cache_dir=""))
    assert [tensor.name for tensor in spec.outputs] == ["out put"]
    assert engine([np.array([[1, 2, 3]], np.float32)])[0].tolist() == [[6, 6]]
    assert "'out put' is not a valid scope name" in caplog.text


def test_lists_in_a_dict_are_outputs_each() -> None:
    keras = import_keras()
    tensor = keras.Input((1,))
    model = keras.Model(tensor, {"q": [tensor + 1, tensor * 2], "b": {"x": tensor - 3}})
    engine, spec = engine_and_spec(KerasModel(model), Settings(cache_dir=""))
    assert len(spec.outputs) == 3
    assert [output.tolist() for output in engine([np.array([[5]], np.float32)])] == [[[2]], [[6]], [[10]]]

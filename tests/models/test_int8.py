"""int8: what is quantized answers as float32 does, or is refused, or stays as it is; and the server needs no NNCF."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from conftest import ROOT, Process, encode
from PIL import Image
from tiny_models import file_of, keras, keras_model

from keras_server.models import agreement, child, opening, precision, quantize
from keras_server.models.agreement import Agreement
from keras_server.models.compare import compare
from keras_server.models.engines import openvino
from keras_server.models.errors import StartupError
from keras_server.models.export import Export
from keras_server.models.opening import Opened, open_model
from keras_server.models.quantize import Candidate, Quantizer
from keras_server.models.source import KerasModel, Source
from keras_server.models.spec import Spec, Tensor
from keras_server.settings import Settings


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures in which one colour is the most by far, with noise."""
    folder, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number in range(120):
        pixels = random.uniform(0, 80, (24, 24, 3))
        pixels[:, :, number % 3] += 120
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of numbers for hairline(), which differ by a few thousandths."""
    first = np.random.default_rng(0).uniform(-1, 1, 150)
    second = first + np.random.default_rng(1).uniform(-0.002, 0.004, 150)
    return saved(tmp_path_factory.mktemp("pairs") / "pairs.npz", pair=np.stack([first, second], 1))


@pytest.fixture
def _whatever_it_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models are no faster in int8; nobody measures for long."""
    monkeypatch.setattr(quantize, "GAIN", 0)
    monkeypatch.setattr(quantize, "TIMED_SECONDS", 0)


def saved(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)
    return path


def opened(model: str | Path, calibrate: Path, **values: Any) -> Opened:
    """Open a tiny model, or a file of one, in int8."""
    source = Source(str(file_of(model) if isinstance(model, str) else model))
    values = {"precision": "int8", "cache_dir": "", "min_agreement": 0.95} | values
    return open_model(source, Settings(calibrate=str(calibrate), **values))


def figures_of(found: Opened) -> agreement.Tested:
    assert found.spec.tested
    return found.spec.tested


def quantizers(model: Path) -> int:
    """How many quantizers there are in a model."""
    operations = openvino().Core().read_model(model).get_ops()
    return sum(operation.get_type_name() == "FakeQuantize" for operation in operations)


# What keeps its promise


@pytest.mark.usefixtures("_whatever_it_gains")
def test_it_answers_as_float32_to_what_it_has_not_seen(photos: Path, tmp_path: Path) -> None:
    found = opened("colours", photos, cache_dir=str(tmp_path))
    assert found.spec.precision == "int8"
    found_in = figures_of(found).agreement
    assert (found_in.compared, found_in.rows, found_in.sure) == ("labels", 40, 40)
    assert (found_in.same, found_in.same_sure) == (1, 1)
    assert 0 < found_in.mean_change <= found_in.largest_change < 0.02
    assert (figures_of(found).calibrated, figures_of(found).how) == (80, "weights of 7 bits")
    pixels = np.zeros((3, 24, 24, 3), np.float32)
    pixels[range(3), :, :, range(3)] = 200
    pixels[:, :, :, 0] += 40
    means = 20 * pixels.mean((1, 2)) / 255
    known = np.exp(means) / np.exp(means).sum(1, keepdims=True)  # what the model is made for
    np.testing.assert_allclose(found.engine([pixels])[0], known, atol=0.05)
    (folder,) = (entry for entry in tmp_path.iterdir() if (entry / "int8.xml").exists())
    assert quantizers(folder / "int8.xml") == 3  # of the activations before each layer, and of the weights of one
    assert quantizers(folder / "model.xml") == quantizers(folder / "heat.xml") == 0


@pytest.mark.usefixtures("_whatever_it_gains")
def test_a_regression_is_held_to_the_spread_of_its_values(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(150, 4))
    found = opened("sum_of", saved(tmp_path / "rows.npz", numbers=rows))
    found_in = figures_of(found).agreement
    assert (found_in.compared, found_in.rows, found_in.sure) == ("values", 50, 0)
    assert found_in.same >= 0.95
    assert 0 < found_in.mean_change < 0.05
    np.testing.assert_allclose(found.engine([np.array([[1, -1, 0.5, 0.5]], np.float32)])[0], [[10]], atol=1)


@pytest.mark.usefixtures("_whatever_it_gains")
def test_tables_and_sequences_are_quantized_with_files_of_rows(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    rows = {"sizes": random.normal(size=(120, 3)), "age": random.normal(size=(120, 1))}
    found = opened("tabular", saved(tmp_path / "rows.npz", **rows), min_agreement=0.5)
    assert figures_of(found).agreement.compared == "labels"
    assert [output.shape for output in found.engine([np.zeros((2, 1), "float32"), np.zeros((2, 3), "float32")])] == [
        (2, 1), (2, 2),
    ]  # fmt: skip
    lines = [random.integers(0, 100, 3 + number % 9).tolist() for number in range(120)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(str, lines)))
    found = opened("tokens", tmp_path / "rows.jsonl", min_agreement=0.5)
    assert found.engine([np.zeros((2, 7), np.int32)])[0].shape == (2, 1)


@pytest.mark.usefixtures("_whatever_it_gains")
@pytest.mark.parametrize("model", ["pool1.onnx", "pooln.onnx"])
def test_models_of_others_are_quantized_too(model: str, tmp_path: Path) -> None:
    path = ROOT / "tests" / "data" / "models" / model
    spec = open_model(Source(str(path)), Settings(cache_dir="")).spec
    shape = [size or 1 for size in spec.inputs[0].shape]
    rows = np.random.default_rng(0).uniform(0, 255, (100, *shape))
    found = opened(path, saved(tmp_path / "rows.npz", **{spec.inputs[0].name: rows}), min_agreement=0)
    assert found.spec.precision == "int8"


@pytest.mark.usefixtures("_whatever_it_gains")
def test_a_model_in_memory_is_quantized_too(photos: Path, caplog: Any) -> None:
    source = KerasModel(keras_model("colours"))
    found = open_model(source, Settings(precision="int8", calibrate=str(photos), cache_dir=""))
    assert (found.spec.precision, figures_of(found).agreement.same) == ("int8", 1)
    assert found.explain()
    open_model(source, Settings(calibrate=str(photos), cache_dir=""))
    assert "--calibrate changes nothing without --precision int8 or auto." in caplog.messages


@pytest.mark.usefixtures("_whatever_it_gains")
def test_a_model_of_a_fixed_batch_is_quantized_in_batches(tmp_path: Path) -> None:
    k = keras()
    numbers = k.Input(batch_shape=(4, 6), name="numbers")
    path = tmp_path / "four.keras"
    k.Model(numbers, k.layers.Dense(3, activation="softmax")(k.layers.Dense(8, activation="relu")(numbers))).save(path)
    rows = saved(tmp_path / "rows.npz", numbers=np.random.default_rng(0).normal(size=(120, 6)))
    found = opened(path, rows)
    assert found.spec.precision == "int8"
    assert found.engine([np.zeros((5, 6), np.float32)])[0].shape == (5, 3)


# What does not


@pytest.mark.usefixtures("_whatever_it_gains")
def test_layers_stay_in_float32_where_nothing_else_keeps_the_promise(pairs: Path) -> None:
    found = opened("hairline", pairs)
    assert figures_of(found).how == "accurate bias correction, single layers in float32"
    assert figures_of(found).agreement.same >= 0.95
    wide = np.array([[0.5, 0.5], [0.5, 0.503]], np.float32)
    assert found.engine([wide])[0].argmax(1).tolist() == [0, 1]


@pytest.mark.usefixtures("_whatever_it_gains")
def test_it_is_refused_with_its_figures(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Quantizer.candidates
    monkeypatch.setattr(Quantizer, "candidates", lambda self: itertools.islice(whole(self), 2))
    with pytest.raises(StartupError) as error:
        opened("hairline", pairs)
    words = str(error.value)
    assert words.startswith("In int8 hairline does not keep --min-agreement 0.95 (and 0.99 of the rows that float32 is")
    assert words.count("the same first label for ") == 2
    assert "of 50 rows" in words
    assert "(weights of 7 bits); " in words
    assert "(weights of 7 bits, accurate bias correction)." in words
    assert words.endswith("or lower --min-agreement.")
    wide = saved(tmp_path / "rows.npz", pair=np.random.default_rng(2).normal(size=(150, 2)))
    assert figures_of(opened("hairline", wide)).how == "weights of 7 bits"


@pytest.mark.usefixtures("_whatever_it_gains")
def test_a_way_that_fails_is_followed_by_the_next(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Candidate:
        raise RuntimeError("no such layer")

    whole = Quantizer.candidates
    monkeypatch.setattr(Quantizer, "candidates", lambda self: itertools.chain([broken], whole(self)))
    assert figures_of(opened("colours", photos)).how == "weights of 7 bits"
    monkeypatch.setattr(Quantizer, "candidates", lambda self: [broken])
    with pytest.raises(StartupError, match=r"sure of\): it cannot be had \(no such layer\)"):
        opened("colours", photos)


def test_what_gains_nothing_stays_as_it_is(photos: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(quantize, "gain", lambda *_: 1.19)
    found = opened("colours", photos)
    assert (found.spec.precision, found.spec.tested) == ("float32", None)
    assert (
        "In int8 colours computes 1.19 times as fast on this processor, and under 1.2 it is not worth it: it stays as "
        "it is." in caplog.messages
    )
    rows = [np.random.default_rng(0).uniform(0, 255, (2, 24, 24, 3)).astype(np.float32)]
    plain = open_model(Source(str(file_of("colours"))), Settings(cache_dir=""))
    np.testing.assert_array_equal(found.engine(rows)[0], plain.engine(rows)[0])
    monkeypatch.setattr(quantize, "gain", lambda *_: 1.2)
    assert opened("colours", photos).spec.precision == "int8"


def test_the_gain_is_a_ratio_of_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "TIMED_SECONDS", 0)
    clock = iter(np.cumsum([step for _ in range(7) for step in (1, 3, 1, 1.5)]))  # a pause, the slow one, a pause, ...
    monkeypatch.setattr(quantize.time, "process_time", lambda: next(clock))
    batches: list[int] = []
    slow: Any = lambda inputs: batches.append(len(inputs[0]))  # noqa: E731
    assert quantize.gain(slow, lambda inputs: [], [np.zeros((1, 4))]) == pytest.approx(2)
    assert set(batches) == {8}


def test_the_gain_is_measured_for_some_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two, by a clock that each look moves on by a half of one; seven rounds are run before it is looked at."""
    clock = itertools.count(1000, 0.5)
    monkeypatch.setattr(quantize.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(quantize.time, "process_time", itertools.count().__next__)
    rounds: list[Any] = []
    slow: Any = lambda inputs: rounds.append(inputs)  # noqa: E731
    assert quantize.gain(slow, lambda inputs: [], [np.zeros((1, 4))]) == 1
    assert len(rounds) == 7 + 3


def test_what_is_wrong_is_said_before_anything_is_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "convert_in_child", None)
    with pytest.raises(StartupError, match="there is neither a folder nor a file"):
        opened("colours", tmp_path / "none")
    with pytest.raises(StartupError, match="holds no different pictures"):
        opened("colours", tmp_path)


def test_int8_needs_rows_and_openvino(photos: Path) -> None:
    source = Source(str(file_of("colours")))
    with pytest.raises(StartupError, match=r"--precision int8 needs --calibrate FOLDER, with a few hundred pictures"):
        open_model(source, Settings(precision="int8", cache_dir=""))
    with pytest.raises(StartupError, match=r"--precision int8 needs the engine openvino\."):
        opened("colours", photos, engine="keras")


def test_without_nncf_a_sentence_says_what_is_missing(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nncf", None)
    monkeypatch.setattr(quantize, "find_spec", lambda name: None)
    with pytest.raises(StartupError, match="nncf must be installed to quantize a model"):
        opened("colours", photos)


@pytest.mark.usefixtures("_whatever_it_gains")
def test_what_is_quantized_is_not_quantized_again(photos: Path, tmp_path: Path) -> None:
    opened("colours", photos, cache_dir=str(tmp_path))
    (file,) = tmp_path.glob("*/int8.xml")
    pixels = np.random.default_rng(0).uniform(0, 255, (100, 24, 24, 3))
    rows = saved(tmp_path / "rows.npz", **{open_model(Source(str(file)), Settings()).spec.inputs[0].name: pixels})
    with pytest.raises(StartupError, match="int8 is quantized already: serve it as it is, without --precision int8"):
        opened(file, rows)


# How answers are compared


def labels(rows: list[list[float]]) -> list[list[np.ndarray]]:
    return [[np.array([row], np.float32)] for row in rows]


def test_labels_are_compared_by_the_probability_that_float32_gives_its_first() -> None:
    spec = Spec(outputs=(Tensor("p", (2,), "float32", "probabilities"),))
    a = labels([[0.9, 0.1], [0.4, 0.6], [0.5, 0.5], [0.2, 0.8]])
    b = labels([[0.8, 0.2], [0.6, 0.4], [0.5, 0.5], [0.2, 0.8]])
    assert compare(spec, a, b) == Agreement(
        "labels", 4, 0.75, 3, pytest.approx(2 / 3), pytest.approx(0.075), pytest.approx(0.2)
    )
    logits = Spec(outputs=(Tensor("p", (2,), "float32", "logits"),), kind="none")
    assert compare(logits, labels([[0, 100]]), labels([[100, 0]])) == Agreement("labels", 1, 0, 1, 0, 1, 1)
    assert compare(logits, labels([[0, 0.01]]), labels([[0.01, 0]])).sure == 1
    binary = Spec(outputs=(Tensor("p", (1,), "float32", "binary logits"),), kind="none")
    assert compare(binary, labels([[3]]), labels([[-3]])).same == 0


def test_values_are_compared_by_their_spread() -> None:
    spec = Spec(outputs=(Tensor("y", (1,), "float32", "values"),), kind="values")
    a = labels([[1000], [1002]])  # a spread of 1, at a thousand
    assert compare(spec, a, labels([[1000.04], [1002.06]])) == Agreement(
        "values", 2, 0.5, 0, 1, pytest.approx(0.05, rel=1e-2), pytest.approx(0.06, rel=1e-2)
    )
    whole = Spec(outputs=(Tensor("y", (1,), "int64"),), kind="none")
    numbers = [[np.array([[0]])], [np.array([[1000]])]]
    assert compare(whole, numbers, [[np.array([[0]])], [np.array([[1001]])]]).same == 0.5


def test_a_row_agrees_where_all_of_its_outputs_do() -> None:
    outputs = (Tensor("p", (2,), "float32", "probabilities"), Tensor("y", (1,), "float32", "values"))
    spec = Spec(outputs=outputs, kind="none")
    a = [[np.array([[0.9, 0.1]]), np.array([[float(number)]])] for number in range(4)]
    b = [[p, y + (number == 0)] for number, (p, y) in enumerate(a)]
    assert compare(spec, a, b).same == 0.75


@pytest.mark.parametrize("values", [[np.nan, 0.5], [1.5, 0.5]])
def test_numbers_that_are_none_are_refused(values: list[float], tmp_path: Path) -> None:
    spec = Spec(outputs=(Tensor("p", (2,), "float32", "probabilities"),))
    with pytest.raises(ValueError, match="answered with numbers"):
        compare(spec, labels([values]), labels([[0.5, 0.5]]))


@pytest.mark.parametrize(
    ("same", "of_sure", "least", "kept"),
    [(0.95, 0.99, 0.95, True), (0.9499, 1, 0.95, False), (0.99, 0.989, 0.95, False), (0.9, 0.98, 0.9, True),
     (1, 1, 1, True), (0.999, 1, 1, False), (0, 0.8, 0, True)],
)  # fmt: skip
def test_of_those_that_float32_is_sure_of_fewer_may_differ(
    same: float, of_sure: float, least: float, kept: bool
) -> None:
    assert Agreement("labels", 1000, same, 1000, of_sure, 0, 0).keeps(least) == kept


# The cache and exports


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The jobs of those who had a model quantized."""
    jobs: list[Any] = []

    def noted(name: str, job: Any) -> Path:
        jobs.append(job)
        return quantize.do(job, lambda words: None)

    monkeypatch.setattr(precision, "quantize_in_child", noted)
    return jobs


@pytest.mark.usefixtures("_whatever_it_gains")
def test_it_is_quantized_once(photos: Path, tmp_path: Path, asked: list[Any]) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for file in photos.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    cache = str(tmp_path / "cache")
    first = opened("colours", folder, cache_dir=cache)
    assert figures_of(opened("colours", folder, cache_dir=cache)) == figures_of(first)
    assert len(asked) == 1
    for count, values in enumerate([{"min_agreement": 0.9}, {"crop": "centre"}, {"preprocess": "tf"}], 2):
        opened("colours", folder, cache_dir=cache, **{"min_agreement": 0.95} | values)
        assert len(asked) == count
    (folder / "0.png").unlink()
    opened("colours", folder, cache_dir=cache)
    assert len(asked) == 5
    assert not Path(asked[0].elsewhere).exists()


def test_that_it_gains_nothing_is_kept_too(photos: Path, tmp_path: Path, asked: list[Any], monkeypatch: Any) -> None:
    monkeypatch.setattr(quantize, "gain", lambda *_: 1.0)
    for _ in range(2):
        assert opened("colours", photos, cache_dir=str(tmp_path)).spec.precision == "float32"
    assert len(asked) == 1


@pytest.fixture(scope="module")
def folder(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of the colours with int8 in it."""
    out = tmp_path_factory.mktemp("exports") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize, "GAIN", 0)
        patch.setenv("KERAS_SERVER_CACHE_DIR", "")
        from keras_server.commands import COMMANDS

        assert (
            COMMANDS["export"]([str(file_of("colours")), str(out), "--precision", "int8", "--calibrate", str(photos)])
            == 0
        )
    return out


def from_export(folder: Path, **values: Any) -> Opened:
    return open_model(Source(str(folder)), Settings(cache_dir="", **values))


def test_an_export_says_its_figures_and_keeps_both(folder: Path, photos: Path) -> None:
    about = json.loads((folder / "about.json").read_text())["about"]
    assert about["settings"] == {"precision": "int8"}
    (figures,) = about["tested"]
    assert figures["agreement"]["same"] == 1
    assert {file.stem for file in folder.glob("*.xml")} == {"model", "int8", "heat"}
    assert from_export(folder, precision="int8").spec.precision == "int8"
    plain = from_export(folder)
    assert (plain.spec.precision, plain.spec.tested) == ("float32", None)


def test_it_is_served_without_nncf_and_says_its_figures(folder: Path, serving_site: Path, tmp_path: Path) -> None:
    assert not (serving_site / "nncf").exists()
    process = Process(
        "--model", str(folder), "--cache-dir", "", "--drain-seconds", "0",
        command=["-S", str(ROOT / "run_keras_server.py")], folder=tmp_path, PYTHONPATH=str(serving_site),
    )  # fmt: skip
    try:
        url = process.wait_until_ready().url
        picture = encode(Image.new("RGB", (24, 24), (10, 250, 20)))
        answer = requests.post(f"{url}/predict", data=picture, headers={"Content-Type": "image/png"}, timeout=60).json()
        page = requests.get(url, timeout=60).text
        metadata = requests.get(f"{url}/v2/models/colours", timeout=60).json()
        heat = requests.post(f"{url}/explain", data=picture, headers={"Content-Type": "image/png"}, timeout=60)
    finally:
        _, output = process.stop()
    assert (answer["predictions"][0]["label"], heat.status_code) == ("1", 200)
    figures = metadata["parameters"]
    assert (figures["precision"], figures["agreement"]["rows"], figures["agreement"]["same"]) == ("int8", 40, 1)
    sentence = "In int8 it gives the same first label for 100.0% of 40 rows (100.0% of the 40 that float32 is sure of)"
    assert sentence in page
    assert sentence in output
    assert "Serving colours with openvino in int8 on" in output


def test_auto_takes_what_this_processor_gains_by(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for can, served in ((True, "int8"), (False, "float32")):
        monkeypatch.setattr(precision, "sums_bytes", lambda can=can: can)
        assert from_export(folder, precision="auto").spec.precision == served
    assert from_export(folder, precision="int8").spec.precision == "int8"  # who asks for it has it
    monkeypatch.setattr(precision, "sums_bytes", lambda: True)
    assert from_export(folder, precision="auto", min_agreement=1).spec.precision == "int8"
    plain = open_model(Source(str(file_of("colours"))), Settings(cache_dir="", precision="auto"))
    assert plain.spec.precision == "float32"


def agreeing(**values: Any) -> agreement.Tested:
    return agreement.Tested("int8", Agreement("labels", 50, 0.96, 40, 1.0, 0.01, 0.1), 3.0, **values)


def test_what_was_accepted_is_held_to_the_promise_of_who_serves_it() -> None:
    export = Export(Path(), Spec(), tested=(agreeing(),))
    assert precision.choose(export, Settings(precision="int8"))[0] == "int8"
    with pytest.raises(StartupError, match=r"does not keep --min-agreement 0.97 in int8: In int8 it gives"):
        precision.choose(export, Settings(precision="int8", min_agreement=0.97))
    assert precision.choose(export, Settings(precision="auto", min_agreement=0.97)) == ("float32", None)


def test_weights_of_8_bits_are_for_processors_with_vnni(monkeypatch: pytest.MonkeyPatch) -> None:
    export = Export(Path(), Spec(), tested=(agreeing(portable=False),))
    monkeypatch.setattr(precision, "sums_bytes", lambda: True)
    assert precision.choose(export, Settings(precision="int8"))[0] == "int8"
    monkeypatch.setattr(precision, "sums_bytes", lambda: False)
    with pytest.raises(StartupError, match="was quantized for processors with VNNI, which this one lacks"):
        precision.choose(export, Settings(precision="int8"))


@pytest.mark.parametrize("vnni", [True, False])
def test_the_quickest_way_is_tried_first_and_8_bits_only_with_vnni(vnni: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "sums_bytes", lambda: vnni)
    quantizer = object.__new__(Quantizer)
    monkeypatch.setattr(quantizer, "quantized", lambda portable, fast: (portable, fast))
    *whole, last = quantizer.candidates()
    made = [make() for make in whole]
    assert [each.model for each in made] == [(True, True), (True, False), *([(False, False)] if vnni else [])]
    assert all(each.portable == each.model[0] for each in made)
    assert last == quantizer.with_layers_in_float32


def test_auto_takes_bfloat16_where_int8_gains_nothing(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not quantize.has_bfloat16():
        monkeypatch.setattr(quantize, "has_bfloat16", lambda: True)
        monkeypatch.setattr(precision, "has_bfloat16", lambda: True)
    gains = iter([1.0, 1.5])
    monkeypatch.setattr(quantize, "gain", lambda *_: next(gains))
    found = opened("colours", photos, precision="auto")
    assert found.spec.precision == "bfloat16"
    assert figures_of(found).agreement.same == 1
    assert figures_of(found).calibrated == 0  # which it needs no rows for


# Processors


CHILD = """
import sys
import numpy as np
from keras_server.models.engines import OpenVINOEngine
engine = OpenVINOEngine(sys.argv[1], "int8", 1, 1)
np.save(sys.argv[3], np.concatenate([engine([row[None]])[0] for row in np.load(sys.argv[2])]))
"""


def answers_on(model: Path, rows: np.ndarray, instructions: str, folder: Path) -> np.ndarray:
    """What a model answers where oneDNN takes no more than these instructions (its documented ONEDNN_MAX_CPU_ISA)."""
    np.save(folder / "rows.npy", rows)
    subprocess.run(
        [sys.executable, "-c", CHILD, str(model), str(folder / "rows.npy"), str(folder / "answers.npy")],
        env=os.environ | {"ONEDNN_MAX_CPU_ISA": instructions}, cwd=ROOT, check=True,
    )  # fmt: skip
    found: np.ndarray = np.load(folder / "answers.npy")
    return found


@pytest.mark.skipif(not quantize.sums_bytes(), reason="there is nothing to compare with on a processor without VNNI")
@pytest.mark.parametrize("portable", [True, False])
def test_sums_do_not_overflow_on_processors_without_vnni(portable: bool, tmp_path: Path) -> None:
    """Large sums: AVX2 adds two products of bytes in 16 bits, which hold 127 * 255 but not twice that."""
    from openvino import opset13 as ops

    random = np.random.default_rng(0)
    x = ops.parameter([-1, 16, 8, 8], np.float32)
    kernel = random.uniform(0.9, 1, (16, 16, 3, 3)).astype(np.float32)
    summed = ops.convolution(x, kernel, [1, 1], [1, 1], [1, 1], [1, 1])
    model = openvino().Model([ops.reduce_mean(ops.relu(summed), np.array([2, 3]))], [x])
    rows = random.uniform(0.9, 1, (100, 16, 8, 8)).astype(np.float32)
    samples = quantize.Samples([[row[None]] for row in rows], [])
    quantized = Quantizer(model, Spec(), samples, 0.95).quantized(portable=portable, fast=True)
    openvino().save_model(quantized, tmp_path / "int8.xml", compress_to_fp16=False)
    known = np.stack([rows[:8, :, 1:-1, 1:-1].mean((1, 2, 3))] * 16, 1)
    full, less = (answers_on(tmp_path / "int8.xml", rows[:8], isa, tmp_path) for isa in ("ALL", "AVX2"))
    assert full.shape == known.shape
    apart = np.abs(full - less).max() / full.max()
    assert apart < 1e-3 if portable else apart > 0.1


def test_linux_says_what_the_processor_has(monkeypatch: pytest.MonkeyPatch) -> None:
    from keras_server import machine

    for flags, found in (("sse2 avx2", False), ("avx2 avx512_vnni fma", True), ("avx_vnni", True), ("amx_int8", True)):
        monkeypatch.setattr(Path, "read_text", lambda self, flags=flags: f"processor\t: 0\nflags\t\t: fpu {flags}\n")
        assert machine.sums_bytes() == found


# A process of its own


@pytest.fixture
def silent(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """What is printed in the test fails it; the model in float32 is converted in this process, beforehand."""
    open_model(Source(str(file_of("hairline"))), Settings(cache_dir=""))
    capfd.readouterr()
    yield
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("silent")
def test_a_process_of_its_own_quantizes_and_prints_nothing(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(precision, "quantize_in_child", child.quantize_in_child)
    caplog.set_level("INFO")
    found = opened("hairline", pairs, min_agreement=0, cache_dir=str(tmp_path))
    assert found.spec.precision in ("int8", "float32")  # as this processor gains by it
    assert "hairline is being quantized, which takes minutes, in a process of its own." in caplog.messages
    assert any("n int8 " in message for message in caplog.messages)


@pytest.mark.usefixtures("silent")
def test_what_is_wrong_in_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "quantize_in_child", child.quantize_in_child)
    with pytest.raises(StartupError, match="has x, and hairline takes pair"):
        opened("hairline", saved(tmp_path / "rows.npz", x=np.zeros((200, 2))))


def test_one_that_does_not_end_has_a_limit_of_its_own(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "quantize_in_child", child.quantize_in_child)
    monkeypatch.setattr(child, "LONGEST", {"convert": 3600, "quantize": 1})
    with pytest.raises(StartupError, match=r"the process that quantizes it was still \w+.* after 1 seconds"):
        opened("hairline", pairs, min_agreement=0, cache_dir=str(tmp_path))


def test_nncf_tells_its_makers_nothing() -> None:
    """In a process without pytest, in which it never would."""
    program = (
        "from keras_server.models.quantize import nncf; nncf(); import sys; from nncf.telemetry import telemetry; "
        "print(type(telemetry).__name__ == 'NNCFTelemetry', sys.modules['openvino_telemetry'])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False None\n"


def test_the_server_imports_no_nncf() -> None:
    program = "import run_keras_server, sys; print([n for n in sys.modules if n.split('.')[0] in ('nncf', 'scipy')])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"

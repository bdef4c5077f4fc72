"""`keras-server export`: a folder that answers as the model does, without Keras, and with its options baked in."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import requests
from conftest import DOG, ROOT, Process
from packaging.requirements import Requirement

import run_keras_server
import run_keras_server as server
from keras_server.commands.export import NotExportable, exported
from keras_server.models import opening, source
from keras_server.models.errors import DownloadError
from keras_server.models.export import FORMAT, read_export, write_about
from keras_server.models.tracing import import_keras
from keras_server.settings import Settings

SERVICE = str(ROOT / "run_keras_server.py")


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("settings", "model"):
        monkeypatch.setattr(server, name, getattr(server, name))
    monkeypatch.setenv("KERAS_SERVER_CACHE_DIR", str(tmp_path / "cache"))


def export(*arguments: object) -> int:
    return server.main(["export", *map(str, arguments)])


def load(*arguments: object) -> Any:
    """Serve what the command line says in this process, and return the test client."""
    server.configure([*map(str, arguments)])
    server.start_model()
    return server.app.test_client()


@pytest.fixture(scope="module")
def two_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of a classifier with two outputs, of which one convolves as the other."""
    keras = import_keras()
    keras.utils.set_random_seed(4)
    image = keras.Input((16, 16, 3), name="photo")
    x = keras.layers.Conv2D(6, 3, activation="relu")(image)
    x = keras.layers.GlobalAveragePooling2D()(x)
    outputs = [keras.layers.Dense(3, name="animal")(x), keras.layers.Dense(2, "softmax", name="indoors")(x)]
    path: Path = tmp_path_factory.mktemp("models") / "two.keras"
    keras.Model(image, outputs).save(path)
    return path


def answers(client: Any, path: str = "/predict", **headers: str) -> Any:
    return client.post(path, data=DOG.read_bytes(), content_type="image/jpeg", headers=headers).json


# What is baked in


def test_an_export_answers_as_the_model_with_its_options(two_heads: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("cat\ndog\nhorse\n")
    options = ["--labels", tmp_path / "labels.txt", "--preprocess", "tf", "--output", "animal", "--crop", "centre",
               "--background", "#ff0000"]  # fmt: skip
    client = load("--model", two_heads, *options)
    expected, heat = answers(client), answers(client, "/explain", Accept="application/json")
    assert {row["label"] for row in expected["predictions"]} == {"cat", "dog", "horse"}
    assert export(two_heads, tmp_path / "deep" / "out", *options) == 0
    (tmp_path / "labels.txt").unlink()  # they are in the export
    client = load("--model", tmp_path / "deep" / "out")
    assert answers(client) == expected
    assert answers(client, "/explain", Accept="application/json") == heat
    assert (server.settings.background, server.settings.crop) == ("#ff0000", "centre")
    assert {path.name for path in (tmp_path / "deep" / "out").iterdir()} == {
        "about.json", "model.xml", "model.bin", "heat.xml", "heat.bin",
    }  # fmt: skip


def test_options_win_over_what_is_baked_in(two_heads: Path, tmp_path: Path) -> None:
    assert export(two_heads, tmp_path / "out", "--output", "animal", "--preprocess", "tf", "--background", "red") == 0
    client = load("--model", tmp_path / "out", "--output", "indoors", "--preprocess", "none", "--background", "blue")
    expected = load("--model", two_heads, "--output", "indoors")
    assert answers(client) == answers(expected)
    assert server.settings.background == "white"
    client = load("--model", tmp_path / "out", "--output", "indoors")
    refused = answers(client, "/explain")
    assert refused["error"] == "This export of two has heat maps of its output animal, and indoors is served."


def test_settings_beside_the_model_are_baked_in(two_heads: Path, tmp_path: Path) -> None:
    shutil.copy(two_heads, tmp_path / "own.keras")
    (tmp_path / "own.toml").write_text('output = "animal"\ncrop = "centre"\npreprocess = "unit"')
    (tmp_path / "own.labels.txt").write_text("cat\ndog\nhorse\n")
    assert export(tmp_path / "own.keras", tmp_path / "out", "--crop", "none") == 0
    expected = answers(load("--model", tmp_path / "own.keras", "--crop", "none"))
    (tmp_path / "own.labels.txt").unlink()
    assert answers(load("--model", tmp_path / "out")) == expected
    about = json.loads((tmp_path / "out" / "about.json").read_text())["about"]
    assert about["settings"] == {"output": "animal", "crop": "none"}


# For several servers, which share one


def test_servers_that_share_an_export_answer_as_the_model_with_its_options(two_heads: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("cat\ndog\nhorse\n")
    options = ["--labels", tmp_path / "labels.txt", "--preprocess", "tf", "--output", "animal", "--top", "2"]
    expected = answers(load("--model", two_heads, *options))
    shared = exported(server.settings, tmp_path / "out")
    (tmp_path / "labels.txt").unlink()
    assert shared == replace(server.settings, model=str(tmp_path / "out"), labels="", preprocess="auto")
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in shared.environment().items():
            patch.setenv(variable, value)
        assert answers(load()) == expected
    assert len(expected["predictions"]) == 2


def test_layers_of_ones_own_stay_with_the_conversion(tmp_path: Path) -> None:
    """Whoever serves the export needs neither the file of Python nor the rights that the model needed."""
    program = tmp_path / "own.py"
    program.write_text("print('imported')")
    settings = Settings(model=str(ROOT / "tests/data/models/silu.keras"), import_=(str(program),), unsafe_model=True)
    shared = exported(settings, tmp_path / "out")
    assert (shared.import_, shared.unsafe_model, shared.model) == ((), False, str(tmp_path / "out"))


def test_without_weights_and_internet_the_bundled_model_is_shared(
    tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is so for good: no server finds out by itself, or one might serve another model than its neighbours."""

    def nowhere(name: str) -> None:
        raise DownloadError(name, "no internet")

    monkeypatch.setattr(opening, "check_download", nowhere)
    monkeypatch.setattr(source, "cached_weights", lambda name: [])
    shared = exported(Settings(cache_dir=cache), tmp_path / "out")
    assert answers(load("--model", shared.model))["model"] == "efficientnet_lite0"


@pytest.mark.parametrize(
    "values",
    [{"model": "tests/data/models/text.keras"}, {"model": "tests/data/models/silu.keras", "engine": "keras"}],
    ids=["OpenVINO cannot", "OpenVINO is not to"],
)
def test_where_keras_computes_each_server_loads_the_model(values: dict[str, str], tmp_path: Path) -> None:
    settings = Settings(**values)  # type: ignore[arg-type]
    assert exported(settings, tmp_path / "out") is settings
    assert not (tmp_path / "out").exists()


def test_what_openvino_is_to_compute_and_cannot_is_refused_before_any_server_starts(tmp_path: Path) -> None:
    with pytest.raises(NotExportable, match="text cannot be exported, since OpenVINO cannot run it"):
        exported(Settings(model="tests/data/models/text.keras", engine="openvino"), tmp_path / "out")


def test_an_export_what_openvino_reads_and_several_models_are_shared_as_they_are(bundled: Path, tmp_path: Path) -> None:
    one, foreign, folder = (str(path) for path in (bundled, bundled / "model.xml", bundled.parent))
    watched = Settings(model="my.keras", watch=1.0)
    for settings in (Settings(model=one), Settings(model=foreign), Settings(model_dir=folder), watched):
        assert exported(settings, tmp_path / "out") is settings
    assert not (tmp_path / "out").exists()


# Without TensorFlow


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory, cache: str) -> Path:
    """An export of the bundled model."""
    folder = tmp_path_factory.mktemp("exports") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "settings", server.settings)
        patch.setattr(server, "model", server.model)
        patch.setenv("KERAS_SERVER_CACHE_DIR", cache)
        assert export("bundled", folder) == 0
    return folder


def test_the_export_is_served_where_there_is_no_tensorflow(bundled: Path, serving_site: Path, tmp_path: Path) -> None:
    """With what requirements-serve.txt installs, the answers are the same to the last digit; Pillow resizes in both."""
    found: list[list[bytes]] = []
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "cykooz_resizer.py").write_text("raise ImportError")
    for command, path in (([SERVICE], tmp_path / "hidden"), (["-S", SERVICE], serving_site)):
        process = Process(
            "--model", str(bundled), "--drain-seconds", "0", command=command, folder=tmp_path, PYTHONPATH=str(path)
        )
        found.append([])
        try:
            url = process.wait_until_ready().url
            post = [("/predict?top=1000", "*/*"), ("/explain", "application/json"), ("/explain", "image/png")]
            headers = {"Content-Type": "image/jpeg"}
            for path, accept in post:
                answer = requests.post(
                    url + path, data=DOG.read_bytes(), headers=headers | {"Accept": accept}, timeout=60
                )
                found[-1].append(answer.content)
            for path in (
                "/",
                "/docs",
                "/openapi.json",
                "/v1/models/efficientnet_lite0",
                "/v2/models/efficientnet_lite0",
            ):
                assert requests.get(url + path, timeout=60).status_code == 200, path
        finally:
            status, output = process.stop()
        assert status == 0
        assert "WARNING" not in output
        assert f"resized by Pillow {PIL.__version__}" in output
    assert found[0] == found[1]


@pytest.mark.parametrize("model", ["bundled", "tests/data/models/silu.keras"])
def test_without_keras_a_sentence_says_what_is_missing(model: str, serving_site: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-S", SERVICE, "--model", model, "--port", "0"], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(serving_site), "KERAS_SERVER_CACHE_DIR": ""}, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("error: keras and tensorflow must be installed to convert a model (pip install -r ")
    assert done.stderr.count("\n") == 1


def test_requirements_say_the_same_in_both_places() -> None:
    import tomllib

    more = {Requirement(line) for line in (ROOT / "requirements.txt").read_text().splitlines() if line[0] != "-"}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {Requirement(text) for text in extras["tensorflow"]} == more
    assert (ROOT / "requirements-int8.txt").read_text().splitlines() == ["-r requirements-serve.txt", *extras["int8"]]
    assert (ROOT / "requirements.txt").read_text().startswith("-r requirements-serve.txt\n")


# Mistakes


def test_a_folder_that_holds_something_stays(two_heads: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "mine.txt"):
        assert export(two_heads, out) == 1
        assert capsys.readouterr().err == f"error: {out} is there already: name a folder that is not, or remove it.\n"
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    assert export(two_heads, tmp_path / "empty") == 0


def test_nothing_half_is_left(two_heads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from keras_server.models import export as writing

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "write_about", full)
    monkeypatch.setenv("KERAS_SERVER_CACHE_DIR", "")
    assert export(DOG.parent / "tests/data/models/silu.keras", tmp_path / "x" / "out") == 1
    assert "No space left on device" in capsys.readouterr().err
    assert [*(tmp_path / "x").glob("*")] == []


def test_what_openvino_cannot_run_is_not_exported(tmp_path: Path, capsys: Any) -> None:
    assert export(ROOT / "tests/data/models/text.keras", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "text cannot be exported, since OpenVINO cannot run it (it takes or gives text)" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "model.bin").write_bytes(b"x"), "is damaged"),
        (lambda folder: (folder / "heat.bin").unlink(), "is not a whole export"),
        (lambda folder: (folder / "about.json").write_text("{"), "is not a whole export"),
        (
            lambda folder: (folder / "about.json").write_text(
                (folder / "about.json").read_text().replace(FORMAT, "keras-server-export/1")
            ),
            "exported by another version of the server (keras-server-export/1, and not ",
        ),
    ],
)
def test_a_damaged_export_is_refused(damage: Any, words: str, bundled: Path, tmp_path: Path) -> None:
    shutil.copytree(bundled, tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(Exception, match="Export the model anew: keras-server export MODEL") as error:
        load("--model", tmp_path / "out")
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("spec", {}, "is not a whole export (it says nothing of activation, batch, engine, "),
        ("settings", ["top"], "Expected `object`, got `array` - at `$.settings`"),
        ("explained", 1, "is not a whole export (it has 1 outputs)."),
        ("flaw", 7, "Expected `str`, got `int` - at `$.flaw`"),
    ],
)
def test_an_edited_export_is_refused(key: str, value: Any, words: str, bundled: Path, tmp_path: Path) -> None:
    """With checksums that fit, as a careful editor makes them."""
    shutil.copytree(bundled, tmp_path / "out")
    write_about(tmp_path / "out", read_export(bundled) | {key: value})
    with pytest.raises(Exception, match="Export the model anew: keras-server export MODEL") as error:
        load("--model", tmp_path / "out")
    assert words in str(error.value)


def test_an_export_has_no_keras_model(bundled: Path) -> None:
    with pytest.raises(Exception, match="is an export for OpenVINO, without the Keras model"):
        load("--model", bundled, "--engine", "keras")


def test_the_answers_are_those_of_the_keras_model(bundled: Path) -> None:
    load("--model", bundled)
    rows = np.random.default_rng(0).uniform(0, 255, (2, 224, 224, 3)).astype(np.float32)
    keras_model = import_keras().saving.load_model(ROOT / "keras_server/bundled/efficientnet_lite0.keras")
    served: Any = run_keras_server.model
    np.testing.assert_allclose(served.predict(rows), np.asarray(keras_model(rows)), atol=1e-5)
    assert replace(served.spec, labels=()).name == "efficientnet_lite0"

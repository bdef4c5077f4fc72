"""`keras-server check`: the answers held against what is on photos, before a deployment."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import DOG, encode
from PIL import Image

import run_keras_server as server
from keras_server.commands.check import Expected, expectation
from keras_server.models.tracing import import_keras


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch, cache: str) -> None:
    for name in ("settings", "model"):
        monkeypatch.setattr(server, name, getattr(server, name))
    monkeypatch.setenv("KERAS_SERVER_CACHE_DIR", cache)


def check(capsys: Any, *arguments: object) -> tuple[int, str, str]:
    """Return the exit status and what is printed."""
    status = server.main(["check", *map(str, arguments)])
    return status, *capsys.readouterr()


@pytest.fixture
def brightness(tmp_path: Path) -> Path:
    """A model that tells dark pictures from bright ones, if its pixels go from 0 to 1."""
    keras = import_keras()
    dense = keras.layers.Dense(2, "softmax")
    layers = [keras.Input((8, 8, 3)), keras.layers.GlobalAveragePooling2D(), dense]
    model = keras.Sequential(layers)
    dense.set_weights([np.array([[0.0, 10.0]] * 3), np.array([15.0, 0.0])])  # the boundary is a mean of 0.5
    model.save(tmp_path / "own.keras")
    (tmp_path / "own.labels.txt").write_text("dark\nbright\n")
    for name, grey in (("night", 120), ("day", 140)):
        (tmp_path / f"{name}.png").write_bytes(encode(Image.new("RGB", (9, 9), (grey, grey, grey))))
    return tmp_path


def test_as_expected(capsys: Any) -> None:
    assert check(capsys, "bundled", "--expect", f"{DOG}=German_shepherd") == (
        0, "efficientnet_lite0: all 1 as expected.\n", "",
    )  # fmt: skip


def test_what_differs_is_told_and_which_preprocessing_would_fit(brightness: Path, capsys: Any) -> None:
    expected = ["--expect", f"{brightness}/night.png=dark", "--expect", f"{brightness}/day.png=bright"]
    status, out, err = check(capsys, brightness / "own.keras", *expected)
    assert (status, err) == (1, "")
    first, second = out.splitlines()
    assert first == f"{brightness}/night.png: dark was expected (0.0000), and bright is answered (1.0000)."
    assert second == "With --preprocess unit all 2 would be as expected."
    assert check(capsys, brightness / "own.keras", *expected, "--preprocess", "unit")[0] == 0
    (brightness / "own.toml").write_text('preprocess = "unit"')
    assert check(capsys, brightness / "own.keras", *expected)[0] == 0
    swapped = ["--expect", f"{brightness}/night.png=bright", "--expect", f"{brightness}/day.png=dark"]
    assert check(capsys, brightness / "own.keras", *swapped)[1].count("was expected") == 2
    assert "--preprocess" not in check(capsys, brightness / "own.keras", *swapped)[1]


@pytest.mark.parametrize(
    ("expected", "words"),
    [
        (
            "dog.jpg=German shepherd",
            "'German shepherd' is no label of efficientnet_lite0: take one such as German_shep",
        ),
        ("none.jpg=kelpie", "none.jpg cannot be read: No such file or directory."),
        ("README.md=kelpie", "README.md: This is not an image"),
    ],
)
def test_mistakes_are_no_differences(expected: str, words: str, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(DOG.parent)
    status, out, err = check(capsys, "bundled", "--expect", expected)
    assert (status, out) == (1, "")
    assert err.startswith("error: --expect: ")
    assert words in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bundled"], "Missing option '--expect'."),
        (["--expect", "dog.jpg=kelpie"], "Missing argument 'MODEL'."),
        (["bundled", "--expect", "dog.jpg"], "'dog.jpg' is not PHOTO=LABEL"),
    ],
)
def test_what_cannot_be_understood(arguments: list[str], words: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as end:
        server.main(["check", *arguments])
    assert end.value.code == 2
    assert words in capsys.readouterr().err


def test_labels_and_photos_may_hold_an_equals_sign(tmp_path: Path) -> None:
    for name in ("a.png", "b=c.png"):
        (tmp_path / name).touch()
    for name, label in (("a.png", "x=y"), ("b=c.png", "x=y=z"), ("none.png", "x")):
        assert expectation(f"{tmp_path / name}={label}") == Expected(tmp_path / name, label)

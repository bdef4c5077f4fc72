"""What --calibrate takes, how it is divided, and what is wrong with anything else."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import DOG, ROOT, encode
from PIL import Image

import run_keras_server as server
from keras_server.models.calibration import HELD, LEAST, MOST, Row, look, prepared, read_samples
from keras_server.models.errors import StartupError
from keras_server.models.spec import Spec, Tensor
from keras_server.settings import Settings

PICTURES = ROOT / "tests" / "data" / "pictures"
TOKENS = Spec("tokens", (Tensor("tokens", (None,), "int32"),), kind="none")
TWO = Spec("two", (Tensor("sizes", (3,), "float32"), Tensor("age", (1,), "float32")), kind="none")
SMALL = Spec("small", (Tensor("image", (8, 8, 3), "float32"),), preprocess="none")


def coloured(folder: Path, count: int, pixels: int = 8) -> Path:
    """Fill a folder with pictures, each of another colour, in folders of a few."""
    for number in range(count):
        place = folder / str(number % 3)
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (pixels, pixels), (number % 256, number // 256, 7)).save(place / f"{number}.png")
    return folder


def samples(path: Path, spec: Spec = SMALL) -> Any:
    return read_samples(Settings(calibrate=str(path)), spec)


def keys(rows: list[Row]) -> set[bytes]:
    return {b"".join(array.tobytes() for array in row) for row in rows}


# How it is divided


@pytest.mark.parametrize(("count", "calibrating", "held"), [(100, 66, 34), (450, 300, 150), (700, MOST, HELD)])
def test_no_row_is_on_both_sides(count: int, calibrating: int, held: int, tmp_path: Path) -> None:
    found = samples(coloured(tmp_path, count))
    assert (len(found.calibrating), len(found.held)) == (calibrating, held)
    assert len(keys(found.calibrating) | keys(found.held)) == calibrating + held


def test_the_same_picture_twice_is_one(tmp_path: Path) -> None:
    folder = coloured(tmp_path, LEAST)
    for file in [*folder.rglob("*.png")]:
        (folder / f"copy of {file.name}").write_bytes(file.read_bytes())
        Image.open(file).save(folder / f"{file.stem}.bmp")  # with the same pixels
    found = samples(folder)
    assert len(found.calibrating) + len(found.held) == LEAST


def test_names_change_nothing_and_contents_do(tmp_path: Path) -> None:
    one, other = coloured(tmp_path / "one", LEAST), coloured(tmp_path / "other", LEAST)
    for file in [*other.rglob("*.png")]:
        file.rename(other / f"x{file.name}")
    assert look(one) == look(other)
    assert keys(samples(one).held) == keys(samples(other).held)
    Image.new("RGB", (8, 8), "white").save(other / "x0.png")
    assert look(one) != look(other)


def test_what_is_no_picture_is_passed_over_and_damaged_ones_are_told(tmp_path: Path, caplog: Any) -> None:
    folder = coloured(tmp_path, LEAST)
    (folder / "notes.txt").write_text("mine")
    (folder / ".hidden.png").write_bytes(encode(Image.new("RGB", (8, 8), "white")))
    (folder / "cut.jpg").write_bytes(DOG.read_bytes()[:5000])
    found = samples(folder)
    assert len(found.calibrating) + len(found.held) == LEAST
    (record,) = caplog.records
    assert record.getMessage().startswith("--calibrate: 1 pictures are passed over, such as ")
    assert "cut.jpg: The image is damaged or cut off" in record.getMessage()


# How pictures are read


@pytest.mark.parametrize("crop", ["none", "centre"])
@pytest.mark.parametrize("preprocess", ["caffe", "tf"])
@pytest.mark.parametrize(
    "picture",
    ["base.jpg", "alpha_cutout_hidden_black.png", "grey16_whiteiszero.tif", "photo.heic", "canvas_digit_7.png"],
)
def test_pictures_are_read_as_predict_reads_them(
    picture: str, preprocess: str, crop: str, model: Any, client: Any, setting: Callable[..., None]
) -> None:
    """To the last bit, with the prepare_image that comes with the server."""
    setting(crop=crop, background="#204060")
    data = (PICTURES / picture).read_bytes()
    spec = replace(server.app.current_model().spec, preprocess=preprocess)
    server.app.current_model().spec = spec
    assert client.post("/predict", data=data, content_type="image/png").status_code == 200
    from keras_server.images import open_image

    settings = Settings(crop=crop, background="#204060")
    np.testing.assert_array_equal(prepared(open_image(data, 50), spec, settings), model.batches[-1])


def test_channels_may_come_first_and_numbers_be_whole() -> None:
    first = Spec(inputs=(Tensor("image", (3, 20, 10), "uint8"),), preprocess="none")
    last = Spec(inputs=(Tensor("image", (20, 10, 3), "float32"),), preprocess="none")
    rows = [prepared(Image.open(DOG), spec, Settings()) for spec in (first, last)]
    assert (rows[0].shape, rows[0].dtype) == ((1, 3, 20, 10), np.uint8)
    np.testing.assert_array_equal(np.moveaxis(rows[0], 1, -1), rows[1])


# Files of rows


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n\n \n")  # blank lines are none
    return path


def test_both_kinds_of_file_give_the_same_rows(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    sizes, age = random.normal(size=(120, 3)).astype("float32"), random.normal(size=(120, 1)).astype("float32")
    np.savez(tmp_path / "rows.npz", age=age, sizes=sizes)
    rows = [{"age": a, "sizes": s} for a, s in zip(age.tolist(), sizes.tolist(), strict=True)]
    one, other = samples(tmp_path / "rows.npz", TWO), samples(lines(tmp_path / "rows.jsonl", rows), TWO)
    assert (len(one.calibrating), len(one.held)) == (80, 40)
    assert keys(one.held) == keys(other.held)
    assert [array.shape for array in one.held[0]] == [(1, 3), (1, 1)]


def test_sequences_may_be_of_different_lengths(tmp_path: Path) -> None:
    rows = [[*range(1, 2 + number)] for number in range(LEAST)]
    found = samples(lines(tmp_path / "rows.jsonl", rows), TOKENS)
    lengths = sorted(row[0].shape[1] for row in (*found.calibrating, *found.held))
    assert lengths == [*range(1, LEAST + 1)]
    assert found.held[0][0].dtype == np.int32


def npz(**arrays: Any) -> bytes:
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


ROWS = "a row of tokens is int32 of shape [any], and "
MISTAKES = {
    "nothing there": ("none", None, SMALL, "there is neither a folder nor a file none: it takes a folder of pictures"),
    "a picture": ("a.png", encode(Image.new("RGB", (8, 8))), SMALL, "a.png is a single picture: it takes a folder"),
    "a table": ("a.csv", b"1,2\n", TWO, "a.csv is no such file: it takes a folder of pictures, an .npz file"),
    "no npz": ("a.npz", b"1,2\n", TWO, "a.npz is no file of numpy.savez, or a damaged one."),
    "a pickle": ("a.npz", npz(tokens=np.array([None, {}])), TOKENS, "a.npz is no file of numpy.savez, or a damaged"),
    "half an npz": ("a.npz", npz(tokens=np.zeros((200, 3)))[:300], TOKENS, "a.npz is no file of numpy.savez, or a dam"),
    "other names": ("a.npz", npz(x=np.zeros((200, 3))), TOKENS, "a.npz has x, and tokens takes tokens."),
    "an input less": ("a.npz", npz(age=np.zeros((200, 1))), TWO, "a.npz has age, and two takes sizes, age."),
    "unequal": ("a.npz", npz(age=np.zeros((9, 1)), sizes=np.zeros((8, 3))), TWO, "for each input: age 9, sizes 8."),
    "no rows": ("a.npz", npz(tokens=np.zeros((0, 3))), TOKENS, "a.npz has 0 different rows: 100 different"),
    "a shape": ("a.npz", npz(tokens=np.zeros((9, 3, 2))), TOKENS, ROWS + "shape [3, 2] came."),
    "fractions": ("a.jsonl", b"[1, 2]\n[1, 2.5]", TOKENS, "line 2: " + ROWS + "numbers that are not int32 came."),
    "text": ("a.jsonl", b'["the", "cat"]', TOKENS, ROWS + "lists of different lengths, or no numbers came."),
    "ragged": ("a.jsonl", b"[[1], [2, 3]]", TOKENS, ROWS + "lists of different lengths, or no numbers came."),
    "too large": ("a.jsonl", b"[99999999999]", TOKENS, ROWS + "numbers that are not int32 came."),
    "NaN": ("a.jsonl", b'{"sizes": [NaN, 1, 2], "age": [3]}', TWO, "and numbers that are not finite came."),
    "empty rows": ("a.jsonl", b"[]", TOKENS, ROWS + "shape [0] came."),
    "no JSON": ("a.jsonl", b"[1]\n[1", TOKENS, "a.jsonl, line 2 is no JSON: a row a line is wanted."),
    "not JSON at all": ("a.jsonl", b"\xff\xfe\0", TOKENS, "a.jsonl, line 1 is no JSON: a row a line is wanted."),
    "not named": ("a.jsonl", b"[1, 2]", TWO, "a.jsonl, line 1 has to be an object with sizes, age."),
    "another name": ("a.jsonl", b'{"token": [1]}', TOKENS, "a.jsonl, line 1 has token, and tokens takes tokens."),
    "the same again": ("a.jsonl", b"[1, 2]\n" * 200, TOKENS, "a.jsonl has 1 different rows: 100 different ones are"),
    "a picture in base64": ("a.jsonl", b'{"b64": "/9j/"}', SMALL, "a.jsonl, line 1 has b64, and small takes image."),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_sentence_says_what_is_wrong_with_it(mistake: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    name, content, spec, words = MISTAKES[mistake]
    if content is not None:
        Path(name).write_bytes(content)
    with pytest.raises(StartupError) as error:
        (look(Path(name)), samples(Path(name), spec))
    assert str(error.value).startswith("--calibrate: ")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("count", "words"), [(0, "holds no different pictures"), (99, "holds 99 different pictures")])
def test_few_pictures_are_told_how_many_are_needed(count: int, words: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StartupError, match=f"{words}: 100 different ones are needed at least, and some 450"):
        look(coloured(tmp_path, count))


def test_pictures_that_become_the_same_are_few(tmp_path: Path) -> None:
    for number in range(150):
        Image.new("RGB", (8, 8), (number // 50, 0, 0)).save(tmp_path / f"{number}.png", compress_level=number % 10)
        with (tmp_path / f"{number}.png").open("ab") as file:
            file.write(b"%d" % number)  # after the end: another file of the same pixels
    look(tmp_path)
    with pytest.raises(StartupError, match="has 3 different rows"):
        samples(tmp_path)


def test_a_model_that_takes_no_pictures_needs_a_file(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"two takes none from /predict: it needs an \.npz file"):
        samples(coloured(tmp_path, LEAST), TWO)


def test_large_rows_are_fewer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keras_server.models.calibration.MEMORY", 120 * 8 * 8 * 3 * 4)
    found = samples(coloured(tmp_path, 200))
    assert len(found.calibrating) + len(found.held) == 120
    monkeypatch.setattr("keras_server.models.calibration.MEMORY", 1)
    found = samples(tmp_path)
    assert len(found.calibrating) + len(found.held) == LEAST

"""What a model sees of a picture: cut and resized as in training, and heat maps that lie on that part."""

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import DOG, FakeModel, encode, serve_with
from PIL import Image, ImageOps

import run_keras_server as server
from keras_server.images import PREPROCESS, open_image, seen, to_array
from keras_server.models.registry import PredictorEngine
from keras_server.models.served import Served
from keras_server.models.spec import Spec, Tensor

Setter = Callable[..., None]
PILLOWS = ["bicubic", "bilinear", "nearest", "lanczos", "box", "hamming"]
SIZES = [(512, 384), (384, 512), (300, 300), (1025, 301), (224, 224), (60, 901), (37, 23), (1, 5)]


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    serve_with(monkeypatch, preprocess="none")


def prepare(data: bytes, target: tuple[int, int]) -> np.ndarray:
    return np.asarray(server.prepare_image(open_image(data, 50), target)[0])


def photo(size: tuple[int, int]) -> Image.Image:
    return Image.open(DOG).resize(size)


@pytest.mark.parametrize("interpolation", PILLOWS)
@pytest.mark.parametrize("target", [(224, 224), (96, 64), (64, 96)])
def test_the_middle_is_cut_out_as_pillow_does(
    interpolation: str, target: tuple[int, int], setting: Setter, pillow: None
) -> None:
    setting(crop="centre", interpolation=interpolation)
    for size in SIZES:
        picture = photo(size)
        expected = ImageOps.fit(picture, target, Image.Resampling[interpolation.upper()])
        # The default reduces what is three times as large in two steps.
        most = 4 if interpolation == "bicubic" and min(size) > 3 * min(target) else 0
        assert np.abs(prepare(encode(picture), target) - np.asarray(expected, np.float32)).max() <= most, size


@pytest.mark.parametrize("interpolation", PILLOWS[1:])
@pytest.mark.parametrize("crop", ["none", "centre"])
def test_one_that_was_chosen_is_exact_for_large_photos(interpolation: str, crop: str, setting: Setter) -> None:
    setting(crop=crop, interpolation=interpolation)
    data = encode(photo((4000, 3000)), "JPEG", quality=92)
    whole, method = Image.open(io.BytesIO(data)), Image.Resampling[interpolation.upper()]
    expected = whole.resize((224, 224), method) if crop == "none" else ImageOps.fit(whole, (224, 224), method)
    assert np.array_equal(prepare(data, (224, 224)), np.asarray(expected, np.float32))


@pytest.mark.parametrize("crop", ["none", "centre"])
def test_the_default_moves_large_photos_by_little(crop: str, setting: Setter) -> None:
    setting(crop=crop)
    data = encode(photo((4000, 3000)), "JPEG", quality=92)
    opened = open_image(data, 50)
    prepared = server.prepare_image(opened, (224, 224))[0]
    assert opened.width < 4000, "decoded at a fraction"
    whole = Image.open(io.BytesIO(data))
    expected = whole.resize((224, 224)) if crop == "none" else ImageOps.fit(whole, (224, 224))
    apart = np.abs(prepared - np.asarray(expected, np.float32))
    assert (apart.mean() < 0.5, apart.max() < 8) == (True, True)


@pytest.mark.parametrize("crop", ["none", "centre"])
def test_tensorflow_is_what_keras_trains_with(crop: str, setting: Setter, tmp_path: Path) -> None:
    """image_dataset_from_directory samples without smoothing; Pillow cuts the fraction off that TensorFlow keeps."""
    keras = pytest.importorskip("keras")
    sizes = [(512, 384), (384, 512), (224, 224), (100, 80), (1600, 900)]
    (tmp_path / "dog").mkdir()
    for number, size in enumerate(sizes):
        photo(size).save(tmp_path / "dog" / f"{number}.png")
    loaded = keras.utils.image_dataset_from_directory(
        tmp_path,
        image_size=(160, 224),
        batch_size=None,
        shuffle=False,
        crop_to_aspect_ratio=crop == "centre",
        verbose=0,
    )
    setting(crop=crop, interpolation="tensorflow")
    for number, (expected, _) in enumerate(loaded):
        prepared = prepare((tmp_path / "dog" / f"{number}.png").read_bytes(), (224, 160))
        apart = np.abs(prepared - expected.numpy())
        assert apart.max() <= 1.01, sizes[number]


def test_nearest_is_what_keras_loads_with(setting: Setter, tmp_path: Path) -> None:
    """As load_img and ImageDataGenerator do, unless they are told otherwise."""
    keras = pytest.importorskip("keras")
    photo((2000, 1500)).save(tmp_path / "photo.jpg")
    setting(interpolation="nearest")
    expected = keras.utils.img_to_array(keras.utils.load_img(tmp_path / "photo.jpg", target_size=(160, 224)))
    assert np.array_equal(prepare((tmp_path / "photo.jpg").read_bytes(), (224, 160)), expected)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(("mode", "least"), [("none", 0), ("unit", 0), ("tf", -1)])
def test_even_preprocessing_takes_any_channels(channels: int, mode: str, least: float) -> None:
    pixels = np.linspace(0, 255, 6 * channels).astype(np.uint8).reshape(2, 3, channels)
    picture = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    most = 255 if mode == "none" else 1
    expected = least + pixels / 255 * (most - least)
    assert np.allclose(to_array(picture, mode), expected, atol=1e-6)
    assert mode in PREPROCESS


def test_what_is_seen() -> None:
    assert seen((400, 300), (224, 224), "none") == (0, 0, 400, 300)
    assert seen((400, 300), (224, 224), "centre") == (50, 0, 350, 300)
    assert seen((300, 400), (224, 224), "centre") == (0, 50, 300, 350)
    assert seen((400, 300), (200, 50), "centre") == (0, 100, 400, 200)
    for width in range(1, 60):  # never outside, however it is rounded
        for height in range(1, 60):
            left, top, right, bottom = seen((width, height), (7, 3), "centre")
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height


# Heat maps


@pytest.fixture
def explained(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The client of a server whose model sees everything everywhere."""
    spec = Spec(inputs=(Tensor("image", (224, 224, 3), "float32"),), preprocess="none")
    served = Served(spec, PredictorEngine(FakeModel()), explain=lambda: lambda picture, label: np.ones((7, 7), "f"))
    monkeypatch.setattr(server, "model", served)
    yield server.app.test_client()
    served.close()


@pytest.mark.parametrize(
    ("size", "orientation", "part"),
    [((400, 200), 1, (100, 0, 300, 200)), ((200, 400), 1, (0, 100, 200, 300)), ((400, 200), 6, (0, 100, 200, 300)),
     ((2400, 1200), 1, (600, 0, 1800, 1200))],
)  # fmt: skip
def test_heat_lies_on_the_part_that_is_seen(
    size: tuple[int, int], orientation: int, part: tuple[int, ...], explained: Any, setting: Setter
) -> None:
    setting(crop="centre")
    exif = Image.Exif()
    exif[0x0112] = orientation
    grey = encode(Image.new("RGB", size, "grey"), "JPEG", exif=exif)
    answer = explained.post("/explain", data=grey, content_type="image/jpeg", headers={"Accept": "application/json"})
    assert answer.json["seen"] == [*part]
    drawn = Image.open(io.BytesIO(explained.post("/explain", data=grey, content_type="image/jpeg").data))
    scale = drawn.width / answer.json["width"]
    hot = np.abs(np.asarray(drawn, np.int16) - 128).max(axis=-1) > 8
    rows, columns = np.nonzero(hot)
    assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == tuple(round(scale * edge) for edge in part)
    assert len(rows) == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)


def test_without_cropping_all_is_seen(explained: Any) -> None:
    grey = encode(Image.new("RGB", (400, 200), "grey"))
    answer = explained.post("/explain", data=grey, content_type="image/png", headers={"Accept": "application/json"})
    assert answer.json["seen"] == [0, 0, 400, 200]


@pytest.mark.parametrize("route", ["/predict", "/v1/models/m:predict", "/v2/models/m/infer"])
def test_every_route_crops(route: str, monkeypatch: pytest.MonkeyPatch, setting: Setter) -> None:
    """The sides of the picture are red, and the model sees none of them."""
    setting(crop="centre")
    fake = FakeModel()
    inputs = (Tensor("image", (8, 8, 3), "float32"),)
    client = serve_with(monkeypatch, fake, name="m", preprocess="none", inputs=inputs)
    picture = Image.new("RGB", (80, 40), "red")
    picture.paste("blue", (10, 0, 70, 40))
    text = base64.b64encode(encode(picture)).decode()
    body: dict[str, Any] = {
        "/predict": {"image": text},
        "/v1/models/m:predict": {"instances": [{"b64": text}]},
        "/v2/models/m/infer": {"inputs": [{"name": "image", "shape": [1], "datatype": "BYTES", "data": [text]}]},
    }[route]
    assert client.post(route, json=body).status_code == 200
    assert (fake.batches[0] == (0, 0, 255)).all()

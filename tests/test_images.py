"""Preparing images: held against Keras' own functions, and against what a person sees."""

import io
from typing import Any

import numpy as np
import pytest
from conftest import DOG, encode, serve_with
from PIL import Image

import run_keras_server as server
from keras_server.images import PREPROCESS, ImageError, open_image
from keras_server.models.spec import Tensor


@pytest.fixture(scope="module")
def keras() -> Any:
    return pytest.importorskip("keras")


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Preprocess nothing, so that pixels can be looked at."""
    serve_with(monkeypatch, preprocess="none")


def picture() -> Image.Image:
    """An RGB picture whose four quarters and gradients tell every way of turning it apart."""
    y, x = np.mgrid[0:40, 0:60]
    pixels = np.stack([x * 4, y * 6, 255 - x * 2 - y * 3], axis=-1).astype(np.uint8)
    pixels[:20, :30] //= 2
    return Image.fromarray(pixels)


def prepare(data: bytes, target: tuple[int, int] = (60, 40)) -> np.ndarray:
    return server.prepare_image(open_image(data, 50), target)


@pytest.mark.parametrize("mode", PREPROCESS)
def test_preprocessing_equals_keras(keras: Any, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_with(monkeypatch, preprocess=mode)
    expected = np.asarray(Image.open(DOG).resize((224, 224)), np.float32)[np.newaxis]
    if mode != "none":
        expected = keras.applications.imagenet_utils.preprocess_input(expected, mode=mode)
    prepared = prepare(DOG.read_bytes(), (224, 224))
    assert prepared.dtype == np.float32
    assert prepared.shape == (1, 224, 224, 3)
    assert np.allclose(prepared, expected, rtol=1e-5, atol=1e-4)


def test_target_is_width_and_height(plain: None) -> None:
    assert prepare(encode(picture()), (48, 32)).shape == (1, 32, 48, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_photos_are_turned_upright(plain: None, orientation: int, kind: str) -> None:
    """A viewer shows the same picture for each orientation; so must the model see it."""
    back = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    upright = picture()
    stored = upright.transpose(back[orientation]) if orientation in back else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless: dict[str, dict[str, Any]] = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}
    options = lossless.get(kind, {})
    prepared = prepare(encode(stored, kind, exif=exif, **options))
    assert np.abs(prepared[0] - np.asarray(upright, np.float32)).mean() < 3


def test_exif_that_cannot_be_read_is_ignored(plain: None) -> None:
    prepared = prepare(encode(picture(), exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff garbage"))
    assert np.array_equal(prepared[0], np.asarray(picture(), np.float32))


def modes() -> dict[str, tuple[bytes, Image.Image]]:
    """Return files of every mode, and the RGB picture that each shows."""
    rgb = picture()
    grey = rgb.convert("L")
    rgba = rgb.convert("RGBA")
    rgba.putalpha(128)
    palette = rgb.quantize(64)
    transparent = io.BytesIO()
    palette.save(transparent, "PNG", transparency=bytes(range(64)))
    sixteen = Image.fromarray(np.asarray(grey, np.uint16) * 257)
    return {
        "RGB": (encode(rgb), rgb),
        "L": (encode(grey), grey),
        "LA": (encode(grey.convert("LA")), grey),
        "RGBA": (encode(rgba), rgb),
        "P": (encode(palette), palette),
        "P with a transparent colour": (encode(palette, transparency=3), palette),
        "P with alpha": (transparent.getvalue(), palette),
        "P of a GIF": (encode(palette, "GIF"), palette),
        "1": (encode(grey.convert("1")), grey.convert("1")),
        "CMYK": (encode(rgb.convert("CMYK"), "TIFF"), rgb.convert("CMYK")),
        "YCbCr": (encode(rgb.convert("YCbCr"), "TIFF"), rgb.convert("YCbCr")),
        "LAB": (encode(Image.new("LAB", (60, 40), (128, 128, 128)), "TIFF"), Image.new("LAB", (60, 40), (128,) * 3)),
        "I;16": (encode(sixteen), grey),
        "I;16B": (encode(Image.fromarray(np.asarray(grey, ">u2") * 257), "TIFF"), grey),
        "I": (encode(Image.fromarray(np.asarray(grey, np.int32) * 257), "TIFF"), grey),
        "I, 8 bits used": (encode(Image.fromarray(np.asarray(grey, np.int32)), "TIFF"), grey),
        "F up to 1": (encode(Image.fromarray(np.asarray(grey, np.float32) / 255), "TIFF"), grey),
        "F up to 255": (encode(Image.fromarray(np.asarray(grey, np.float32)), "TIFF"), grey),
    }


@pytest.mark.parametrize("name", modes())
def test_every_mode_becomes_rgb(plain: None, name: str) -> None:
    data, shown = modes()[name]
    expected = np.asarray(shown.convert("RGB"), np.float32)
    prepared = prepare(data)[0]
    assert np.abs(prepared - expected).max() <= 2


def test_animations_give_their_first_frame(plain: None) -> None:
    frames = [Image.new("RGB", (60, 40), colour) for colour in ("red", "blue", "green")]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert np.abs(prepare(data)[0, 20, 30] - (255, 0, 0)).max() < 3, kind


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels_are_the_models(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_with(monkeypatch, preprocess="none", inputs=(Tensor("image", (40, 60, channels), "float32"),))
    expected = np.asarray(picture().convert({1: "L", 3: "RGB", 4: "RGBA"}[channels]), np.float32)
    assert np.array_equal(prepare(encode(picture()))[0], expected.reshape(40, 60, channels))


def photograph(megapixels: float) -> Image.Image:
    """The sample photo at another size."""
    image = Image.open(DOG)
    scale = (megapixels * 1e6 / image.width / image.height) ** 0.5
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)


def test_large_photos_are_decoded_small(plain: None, monkeypatch: pytest.MonkeyPatch) -> None:
    image = photograph(12)
    opened = open_image(encode(image, "JPEG", quality=92), 50)
    prepared = server.prepare_image(opened, (224, 224))
    assert opened.width < image.width / 2, "decoded at a fraction"
    reference = np.asarray(image.resize((224, 224)), np.float32)
    assert np.abs(prepared[0] - reference).mean() < 2


def test_small_photos_are_decoded_whole(plain: None) -> None:
    small = photograph(0.18)  # about 490 x 370
    opened = open_image(encode(small, "JPEG", quality=92), 50)
    reference = np.asarray(Image.open(io.BytesIO(encode(small, "JPEG", quality=92))).resize((224, 224)), np.float32)
    assert np.array_equal(server.prepare_image(opened, (224, 224))[0], reference)


def test_opening_decodes_nothing() -> None:
    """The limit is looked at in the header: a picture of 30,000 x 30,000 costs nothing to refuse."""
    image = Image.new("1", (30_000, 30_000))
    with pytest.raises(ImageError, match="30000 x 30000"):
        open_image(encode(image), 50)


def test_phone_photos_of_several_pictures(plain: None) -> None:
    data = encode(picture(), "MPO", save_all=True, append_images=[Image.new("RGB", (60, 40))], quality=100)
    assert np.abs(prepare(data)[0] - np.asarray(picture(), np.float32)).mean() < 3

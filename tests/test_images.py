"""Preparing images: held against Keras' own functions, and against what a person sees."""

import io
import re
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pillow_heif
import pytest
import tifffile
from conftest import DOG, ROOT, encode, serve_with
from PIL import Image

import run_keras_server as server
from keras_server import images, tiff
from keras_server.images import PREPROCESS, ImageError, open_image, upright_size
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
def test_preprocessing_equals_keras(keras: Any, mode: str, pillow: None, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_with(monkeypatch, preprocess=mode)
    expected = np.asarray(Image.open(DOG).resize((224, 224)), np.float32)[np.newaxis]
    if mode == "unit":
        expected = keras.layers.Rescaling(1 / 255)(expected)
    elif mode != "none":
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


def test_a_size_is_that_of_the_picture_once_it_is_upright() -> None:
    exif = Image.Exif()
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        upright = (60, 40) if orientation < 5 else (40, 60)
        assert upright_size(Image.open(io.BytesIO(encode(Image.new("RGB", (60, 40)), exif=exif)))) == upright
    garbage = encode(Image.new("RGB", (60, 40)), exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff garbage")
    assert upright_size(Image.open(io.BytesIO(garbage))) == (60, 40)


@pytest.mark.parametrize("error", [SyntaxError, struct.error, KeyError])
def test_where_pillow_fails_on_exif_the_size_is_as_stored(error: type[Exception], monkeypatch: Any) -> None:
    def fail(_: Image.Image) -> None:
        raise error

    monkeypatch.setattr(Image.Image, "getexif", fail)
    assert upright_size(Image.new("RGB", (60, 40))) == (60, 40)


def on_white(palette: Image.Image, alpha: Callable[[int], int]) -> Image.Image:
    """Return a palette's picture on white, by the alpha of each of its numbers."""
    mask = Image.fromarray(np.vectorize(alpha)(np.asarray(palette)).astype(np.uint8))
    return Image.composite(palette.convert("RGB"), Image.new("RGB", palette.size, "white"), mask)


def modes() -> dict[str, tuple[bytes, Image.Image]]:
    """Return files of every mode, and the RGB picture that each shows."""
    rgb = picture()
    grey = rgb.convert("L")
    rgba = rgb.convert("RGBA")
    rgba.putalpha(128)
    half = Image.blend(Image.new("RGB", rgb.size, "white"), rgb, 128 / 255)
    palette = rgb.quantize(64)
    transparent = io.BytesIO()
    palette.save(transparent, "PNG", transparency=bytes(range(64)))
    sixteen = Image.fromarray(np.asarray(grey, np.uint16) * 257)
    return {
        "RGB": (encode(rgb), rgb),
        "L": (encode(grey), grey),
        "LA": (encode(grey.convert("LA")), grey),
        "RGBA": (encode(rgba), half),
        "P": (encode(palette), palette),
        "P with a transparent colour": (
            encode(palette, transparency=3),
            on_white(palette, lambda i: 0 if i == 3 else 255),
        ),
        "P with alpha": (transparent.getvalue(), on_white(palette, lambda i: i)),
        "P of a GIF": (encode(palette, "GIF"), palette),
        "1": (encode(grey.convert("1")), grey.convert("1")),
        "CMYK": (encode(rgb.convert("CMYK"), "TIFF"), rgb.convert("CMYK")),
        "YCbCr": (encode(rgb.convert("YCbCr"), "TIFF"), rgb.convert("YCbCr")),
        "LAB": (encode(Image.new("LAB", (60, 40), (128, 128, 128)), "TIFF"), Image.new("LAB", (60, 40), (128,) * 3)),
        "I;16": (encode(sixteen), grey),
        "I;16B": (encode(Image.fromarray(np.asarray(grey, ">u2") * 257), "TIFF"), grey),
        "F up to 1": (encode(Image.fromarray(np.asarray(grey, np.float32) / 255), "TIFF"), grey),
    }


@pytest.mark.parametrize("name", modes())
@pytest.mark.parametrize("band", [2**20, 150, 30])
def test_every_mode_becomes_rgb(plain: None, name: str, band: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one piece, or in bands of two rows of pixels, or of a part of one."""
    monkeypatch.setattr(images, "BAND", band)
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


def test_small_photos_are_decoded_whole(plain: None, pillow: None) -> None:
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


# TIFFs of more than 8 bits, by their own tags


def deep(pixels: np.ndarray, **options: Any) -> bytes:
    out = io.BytesIO()
    tifffile.imwrite(out, pixels, **options)
    return out.getvalue()


def sixteen() -> np.ndarray:
    return np.asarray(picture(), np.uint16) * 257


RGB, GREY = np.asarray(picture(), np.float32), np.asarray(picture().convert("L"), np.float32)
ALPHA = np.linspace(0, 1, 60, dtype=np.float32)[np.newaxis, :, np.newaxis] * np.ones((40, 1, 1), np.float32)
WHITE = RGB * ALPHA + 255 * (1 - ALPHA)
DEEP: dict[str, tuple[bytes, np.ndarray]] = {
    "grey": (deep(GREY.astype(np.uint16) * 257, photometric="minisblack"), GREY),
    "WhiteIsZero": (deep(65535 - GREY.astype(np.uint16) * 257, photometric="miniswhite"), GREY),
    "RGB": (deep(sixteen(), photometric="rgb"), RGB),
    "planar RGB": (deep(np.moveaxis(sixteen(), -1, 0), photometric="rgb", planarconfig="separate"), RGB),
    "deflated": (deep(sixteen(), photometric="rgb", compression="zlib"), RGB),
    "big endian": (deep(sixteen(), photometric="rgb", byteorder=">"), RGB),
    "32 bits": (deep((GREY / 255 * (2**32 - 1)).astype(np.uint32), photometric="minisblack"), GREY),
    "32 bits RGB": (deep((RGB / 255 * (2**32 - 1)).astype(np.uint32), photometric="rgb"), RGB),
    "float RGB": (deep(RGB / 255, photometric="rgb"), RGB),
    "float": (deep(GREY / 255, photometric="minisblack"), GREY),
    "half": (deep((GREY / 255).astype(np.float16), photometric="minisblack"), GREY),
    "a float that names its range": (deep(GREY * 4 - 100, photometric="minisblack", extratags=[
        (340, "f", 1, -100.0, True), (341, "f", 1, 920.0, True)]), GREY),
    "alpha": (deep(np.concatenate([sixteen(), (65535 * ALPHA).astype(np.uint16)], -1), photometric="rgb",
                   extrasamples=["unassalpha"]), WHITE),
    "a fourth channel of something else": (deep(np.concatenate([sixteen(), (65535 * ALPHA).astype(np.uint16)], -1),
                                                photometric="rgb", extrasamples=["unspecified"]), RGB),
    "multiplied alpha": (deep(np.concatenate([(sixteen() * ALPHA).astype(np.uint16), (65535 * ALPHA).astype(np.uint16)],
                                             -1), photometric="rgb", extrasamples=["assocalpha"]), WHITE),
    "grey and alpha": (deep(np.concatenate([GREY[..., np.newaxis].astype(np.uint16) * 257,
                                            (65535 * ALPHA).astype(np.uint16)], -1), photometric="minisblack",
                            extrasamples=["unassalpha"], planarconfig="contig"),
                       GREY * ALPHA[..., 0] + 255 * (1 - ALPHA[..., 0])),
    "two pages": (deep(np.stack([GREY, GREY[::-1]]).astype(np.uint16) * 257, photometric="minisblack"), GREY),
}  # fmt: skip


@pytest.mark.parametrize("name", DEEP)
@pytest.mark.parametrize("rows", [64, 7])
def test_deep_tiffs_are_read_by_their_tags(plain: None, name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiff, "ROWS", rows)  # of 40, at a time
    data, expected = DEEP[name]
    expected = expected if expected.ndim == 3 else np.repeat(expected[..., np.newaxis], 3, -1)
    assert np.abs(prepare(data)[0] - expected).max() <= 2


REFUSED = {
    "with a sign": deep(GREY.astype(np.int16), photometric="minisblack"),
    "fractions whose range": deep(GREY, photometric="minisblack"),
    "in CMYK": deep(np.zeros((8, 8, 4), np.uint16), photometric="separated"),
    "in CIELAB": deep(np.zeros((8, 8, 3), np.uint16), photometric="cielab"),
}


@pytest.mark.parametrize("words", REFUSED)
def test_deep_tiffs_that_tags_do_not_explain_are_refused_by_name(words: str) -> None:
    with pytest.raises(ImageError, match=f"{words}.*8 bits a channel"):
        open_image(REFUSED[words], 50)


@pytest.mark.parametrize(
    ("photometric", "kind"),
    [(3, "a palette"), (4, "a mask"), (5, "CMYK"), (6, "YCbCr"), (8, "CIELAB"), (9, "ICCLAB"), (10, "ITULAB"),
     (32844, "colours of another kind")],
)  # fmt: skip
def test_colours_that_are_not_read_are_named(photometric: int, kind: str) -> None:
    """By the numbers of TIFF 6.0 and its supplements."""
    with pytest.raises(tiff.TiffError, match=f"16 bits a channel in {kind}$"):
        tiff.to_bytes(np.zeros((1, 1, 4), np.float32), photometric, 16, ())


@pytest.mark.parametrize(
    ("values", "least", "most", "scaled"),
    [
        ([0, 0.5, 1], 0, 1, [0, 0.5, 1]),
        ([10, 15, 20], 10, 20, [0, 0.5, 1]),
        ([0, 1.01], 0, 1, None),
        ([-0.01, 1], 0, 1, None),
        ([0, np.nan], 0, 1, None),
        ([0, np.inf], 0, np.inf, None),
        ([1, 1], 1, 1, None),
    ],
)
def test_fractions_are_read_where_their_range_is_known(
    values: list[float], least: float, most: float, scaled: list[float] | None
) -> None:
    pixels, tags = np.array(values, np.float32), {340: least, 341: most}
    if scaled is None:
        with pytest.raises(tiff.TiffError, match="a TIFF of fractions whose range it does not name"):
            tiff.scale(pixels, 32, 3, tags.get)
    else:
        assert tiff.scale(pixels, 32, 3, tags.get).tolist() == scaled


def test_deep_tiffs_are_turned_and_bounded(plain: None) -> None:
    turned = np.rot90(sixteen(), 1)  # as a camera held upright stores it, with the way back in the tag
    data = deep(np.ascontiguousarray(turned), photometric="rgb", extratags=[(274, "H", 1, 6, True)])
    assert np.abs(prepare(data)[0] - RGB).max() <= 2
    with pytest.raises(ImageError, match="60 x 40"):
        open_image(DEEP["planar RGB"][0], 0.002)
    with pytest.raises(ImageError, match="damaged or cut off"):
        open_image(DEEP["float RGB"][0][:-4000], 50)


# What phones and messengers send


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 4}, {"quality": 100}])
def test_a_jpeg_that_lacks_only_its_end_is_whole(plain: None, options: dict[str, Any]) -> None:
    data = encode(photograph(0.1), "JPEG", **options)
    whole = prepare(data)
    assert data.endswith(b"\xff\xd9")
    assert np.array_equal(prepare(data[:-2]), whole)
    assert np.array_equal(prepare(data[:-1]), whole)
    assert np.array_equal(prepare(data + b"\0" * 100 + b"as some phones append"), whole)
    for cut in (0.9, 0.5):
        with pytest.raises(ImageError, match="cut off"):
            prepare(data[: int(cut * len(data))])


def test_avif_is_read(plain: None) -> None:
    data = encode(picture(), "AVIF", quality=100, subsampling="4:4:4")
    assert np.abs(prepare(data)[0] - RGB).max() <= 4


def test_heic_is_read_under_any_name_and_turned_once(plain: None) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    out = io.BytesIO()
    stored = picture().transpose(Image.Transpose.ROTATE_90)
    pillow_heif.from_pillow(stored).save(out, quality=100, chroma=444, exif=exif.tobytes())
    assert prepare(out.getvalue()).shape == (1, 40, 60, 3)
    assert np.abs(prepare(out.getvalue())[0] - RGB).mean() < 6


def test_the_background_shows_through(monkeypatch: pytest.MonkeyPatch, setting: Callable[..., None]) -> None:
    serve_with(monkeypatch, preprocess="none")
    clear = encode(Image.new("RGBA", (8, 8), (255, 0, 0, 0)))
    for colour, pixel in (("white", (255, 255, 255)), ("#102030", (16, 32, 48))):
        setting(background=colour)
        assert prepare(clear, (8, 8))[0, 0, 0].tolist() == list(pixel)


def test_a_model_of_four_channels_keeps_the_transparency(monkeypatch: pytest.MonkeyPatch) -> None:
    serve_with(monkeypatch, preprocess="none", inputs=(Tensor("image", (8, 8, 4), "float32"),))
    assert prepare(encode(Image.new("RGBA", (8, 8), (255, 10, 20, 30))), (8, 8))[0, 0, 0].tolist() == [255, 10, 20, 30]


def test_of_an_animation_its_first_frame_is_shown(plain: None) -> None:
    """Also where the picture for those who cannot show it is another one."""
    frames = [Image.new("RGB", (60, 40), colour) for colour in ("red", "blue", "green")]
    data = encode(frames[0], "PNG", save_all=True, append_images=frames[1:], default_image=True)
    assert prepare(data)[0, 20, 30].tolist() == [0, 0, 255]


OTHERS = {
    "a JPEG XL": [b"\xff\x0a", b"\0\0\0\x0cJXL \r\n"],
    "a JPEG 2000": [b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"],
    "a JPEG-LS": [b"\xff\xd8\xff\xf7"],
    "a JPEG XR": [b"II\xbc\x01"],
    "a PDF": [b"%PDF-1.7\n"],
    "an SVG": [b"<svg xmlns='...'></svg>", b"\xef\xbb\xbf <?xml version='1.0'?>\n<svg>", b"<!-- by hand -->\n<svg>"],
    "a web page": [b"<!DOCTYPE html><html>", b"\xef\xbb\xbf<!-- a --> <HTML>", b"\n<html>"],
    "a Photoshop file": [b"8BPS"],
    "a PostScript file": [b"%!PS-Adobe-3.0", b"\xc5\xd0\xd3\xc6"],
    "a zip archive": [b"PK\x03\x04"],
    "a video": [b"\0\0\0\x18ftypisom", b"\0\0\0\x14ftypqt  ", b"\0\0\0\x18ftypmp42", b"\0\0\0\x08wide",
                b"\0\0\0\x08moov", b"\x1aE\xdf\xa3", b"RIFF\0\0\0\0AVI "],
    "an icon": [b"\0\0\x01\0", b"icns"],
    "a picture in PNM": [b"P6\n1 1\n255\nabc", b"P1 1"],
    "a DICOM file": [bytes(128) + b"DICM"],
    "a raw photograph": [b"II\x1a\0\0\0HEAPCCDR", b"\0\0\0\x18ftypcrx ", b"FUJIFILMCCD-RAW", b"IIU\0", b"IIRO",
                         b"MMOR"],
}  # fmt: skip


@pytest.mark.parametrize(("kind", "start"), [(kind, start) for kind, starts in OTHERS.items() for start in starts])
def test_files_of_a_kind_that_is_not_read_are_named(kind: str, start: bytes) -> None:
    with pytest.raises(ImageError, match=f"This is {kind}, which is not read: send it as a JPEG or PNG"):
        open_image(start + bytes(50), 50)


PICTURES = ROOT / "tests" / "data" / "pictures"


@pytest.mark.parametrize(
    "name", sorted(p.name for p in PICTURES.iterdir() if "expected" not in p.name and p.name != "base.jpg")
)
def test_pictures_of_users_look_as_people_see_them(plain: None, name: str) -> None:
    beside = PICTURES / f"{name}.expected.png"
    expected = prepare((beside if beside.exists() else PICTURES / "base.jpg").read_bytes(), (120, 90))
    assert np.abs(prepare((PICTURES / name).read_bytes(), (120, 90)) - expected).mean() < 3


# Found by trying each kind in every way


def png(depth: int, colour: int, rows: list[bytes], key: bytes) -> bytes:
    """Return a PNG, 8 pixels wide, with a transparent colour."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4) + name + content + zlib.crc32(name + content).to_bytes(4)

    head = (8).to_bytes(4) + len(rows).to_bytes(4) + bytes([depth, colour, 0, 0, 0])
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(*each) for each in [(b"IHDR", head), (b"tRNS", key), (b"IDAT", pixels), (b"IEND", b"")]
    )


def test_a_transparent_colour_has_the_depth_of_its_picture(plain: None) -> None:
    four = png(4, 0, [bytes.fromhex("05050505")] * 8, b"\0\5")
    assert prepare(four, (8, 8))[0, 0, :2, 0].tolist() == [0, 255]
    two = png(2, 0, [bytes([0b00_10_00_10] * 2)] * 8, b"\0\2")
    assert prepare(two, (8, 8))[0, 0, :2, 0].tolist() == [0, 255]
    pixel, key = (300).to_bytes(2) + (2000).to_bytes(2) + (40000).to_bytes(2), (300).to_bytes(2) * 3
    assert prepare(png(16, 2, [(pixel + key) * 4] * 8, pixel), (8, 8))[0, 0, :2].tolist() == [[255] * 3, [1] * 3]


def test_a_jpeg_cut_between_scans_or_restart_markers_is_cut(plain: None) -> None:
    """There a decoder finds nothing missing, or skips whatever comes before the restart marker that it expects."""
    restarts = encode(photograph(0.1), "JPEG", restart_marker_blocks=4)
    marks = [found.start() for found in re.finditer(rb"\xff[\xd0-\xd7]", restarts)]
    progressive = encode(photograph(0.1), "JPEG", progressive=True)
    scans = [found.start() for found in re.finditer(rb"\xff\xda", progressive)][1:]
    assert len(marks) > 50
    assert len(scans) > 5
    for data, ends in (restarts, [*marks[-3:], *(mark + 2 for mark in marks[-3:])]), (progressive, scans):
        for end in ends:
            with pytest.raises(ImageError, match="cut off"):
                prepare(data[:end])


def twelve(values: np.ndarray) -> bytes:
    """Return grey values of 8 bits as packed ones of 12."""
    bits = np.unpackbits(
        (values.astype(np.uint32) * 4095 // 255).astype(">u2")[..., np.newaxis].view(np.uint8), axis=-1
    )
    return np.packbits(bits.reshape(*values.shape, 16)[..., 4:].reshape(len(values), -1), axis=-1).tobytes()


@pytest.mark.parametrize("photometric", ["miniswhite", "minisblack"])
def test_packed_bits_are_read(plain: None, photometric: str) -> None:
    values = 255 - GREY if photometric == "miniswhite" else GREY
    data = bytearray(deep(np.zeros((40, 90), np.uint8), photometric=photometric, metadata=None))
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page: Any = file.pages[0]
        at, places = page.dataoffsets[0], {code: page.tags[code].valueoffset for code in (256, 258)}
    data[at : at + 3600] = twelve(values)
    data[places[256] : places[256] + 2], data[places[258] : places[258] + 2] = b"\x3c\0", b"\x0c\0"
    assert np.abs(prepare(bytes(data))[0, ..., 0] - GREY).max() <= 1


def test_raw_photographs_are_named_though_they_hold_a_preview() -> None:
    out = io.BytesIO()
    with tifffile.TiffWriter(out) as writer:
        writer.write(np.zeros((8, 8, 3), np.uint8), photometric="rgb", subfiletype=1, subifds=1)
        writer.write(np.zeros((32, 32), np.uint16), photometric="cfa")
    dng = deep(np.zeros((8, 8, 3), np.uint8), photometric="rgb", extratags=[(50706, "B", 4, (1, 4, 0, 0), True)])
    for data in (out.getvalue(), dng, b"II*\0\x10\0\0\0CR\2\0" + bytes(50)):
        with pytest.raises(ImageError, match="a raw photograph"):
            open_image(data, 50)


def test_each_refusal_is_the_true_one() -> None:
    heads = [b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0\0\x10JFIF", b"GIF89a", b"GIF87a", b"RIFF\0\0\0\0WEBP"]
    heads += [b"BM" + bytes(8), *(b"\0\0\0\x18ftyp" + brand for brand in (b"avif", b"avis", b"heic", b"heix", b"heim"))]
    heads += [b"\0\0\0\x18ftyp" + brand for brand in (b"heis", b"hevc", b"hevx", b"mif1", b"msf1")]
    for data in heads:
        with pytest.raises(ImageError, match="damaged or cut off"):
            open_image(data, 50)
    with pytest.raises(ImageError, match="a JPEG of 12 bits a channel"):
        open_image(encode(picture(), "JPEG").replace(b"\xff\xc0\0\x11\x08", b"\xff\xc1\0\x11\x0c"), 50)
    with pytest.raises(ImageError, match="8 bits with a sign"):
        open_image(deep(np.zeros((8, 8), np.int8), photometric="minisblack"), 50)
    options = {"photometric": "miniswhite", "planarconfig": "contig", "extrasamples": ["unassalpha"]}
    grey_alpha = deep(np.zeros((8, 8, 2), np.uint8), **options)
    with pytest.raises(ImageError, match="2 x 8 bits with no compression"):
        open_image(grey_alpha, 50)
    with pytest.raises(ImageError, match="damaged or cut off"):
        open_image(grey_alpha[:-20], 50)

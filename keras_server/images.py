"""Pictures: open, decode, bring to the model's channels, turn into numbers."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import re
import warnings

import numpy as np
import pillow_heif
from PIL import Image, ImageOps, PngImagePlugin

from keras_server import resampling, tiff
from keras_server.pictures.ifd import is_modest
from keras_server.pictures.limits import ImageError as ImageError  # what the functions here raise
from keras_server.pictures.parts import RUN_LENGTHS, WEBP, Jpeg, check_parts, read_jpeg, webp_size
from keras_server.pictures.work import Work, estimate, estimate_jpeg

FORMATS = {  # what is read: as Pillow calls it, and as people do
    "JPEG": "JPEG", "PNG": "PNG", "WEBP": "WebP", "GIF": "GIF", "BMP": "BMP", "TIFF": "TIFF", "AVIF": "AVIF",
    "HEIF": "HEIC",
}  # fmt: skip
NAMES = f"{', '.join([*FORMATS.values()][:-1])} and {[*FORMATS.values()][-1]}"

# How files of these kinds begin, TIFF aside: a file that does and cannot be opened is damaged.
BEGINNINGS = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF....WEBP|GIF8[79]a|BM.{4}\0\0\0\0|....ftyp(avi[fs]|hei[cxms]|hev[cx]|mif1|msf1)",
    re.DOTALL,
)

# Kinds of file that people take for pictures, by their first bytes, and that are not read.
OTHERS = {
    "a JPEG XL": rb"\xff\x0a|\0\0\0\x0cJXL ",
    "a JPEG 2000": rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    "a JPEG-LS": rb"\xff\xd8\xff\xf7",
    "a JPEG XR": rb"II\xbc\x01",
    "an SVG": rb"(\xef\xbb\xbf)?\s*(<\?xml.*|<!--.*|<!DOCTYPE svg.*)?<svg",
    "a web page": rb"(?i)(\xef\xbb\xbf)?\s*(<!--.*-->\s*)?(<!doctype html|<html)",
    "a PDF": rb"%PDF",
    "a Photoshop file": rb"8BPS",
    "a PostScript file": rb"%!PS|\xc5\xd0\xd3\xc6",
    "an icon": rb"\0\0\x01\0|icns",
    "a video": rb"....(ftyp(iso|mp4|M4V|qt  |avc1|3g|dash|MSNV|f4v)|moov|mdat|wide|free)|\x1aE\xdf\xa3|RIFF....AVI ",
    "a raw photograph": rb"II\x1a\0\0\0HEAPCCDR|....ftypcrx|FUJIFILMCCD-RAW|IIU\0|II\*\0....CR\x02|IIR[OS]|MMOR",
    "a DICOM file": rb".{128}DICM",
    "a zip archive": rb"PK\x03\x04",
    "a picture in PNM": rb"P[1-7]\s",
}

# The interpolation for which a large photo may be decoded and reduced roughly beforehand, which moves its pixels by a
# quarter of one in 255 on average. Any other was chosen by hand, and is done as in training.
FAST = "bicubic"

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's names, by number of channels

# What is done to pixels in 0..255, mostly by the preprocess_input of keras.applications, as (pixels - mean) / deviation
# with the channels in this order. In figures, for a start from the cache has no Keras; a test compares them.
PREPROCESS: dict[str, tuple[str, tuple[float, ...], tuple[float, ...]]] = {
    "none": ("RGB", (0, 0, 0), (1, 1, 1)),
    "unit": ("RGB", (0, 0, 0), (255, 255, 255)),  # what ImageDataGenerator(rescale=1 / 255) does
    "caffe": ("BGR", (103.939, 116.779, 123.68), (1, 1, 1)),
    "tf": ("RGB", (127.5, 127.5, 127.5), (127.5, 127.5, 127.5)),
    "torch": ("RGB", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
}

Image.MAX_IMAGE_PIXELS = None  # open_image has the limit, and Pillow's own would only warn
# What is wrong with a file is said to its sender, who would otherwise fill the log, and Python's memory of warnings.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)
PngImagePlugin.MAX_TEXT_MEMORY = 2**20  # bytes of all comments in a PNG, unpacked; Pillow's own limit is 64 MiB


CUT = "The image is damaged or cut off: it cannot be decoded."
WHOLE = 2**16  # pixels a side: no JPEG has more
BAND = 2**20  # pixels that are converted at a time, for in between they take several times the memory
pillow_heif.register_heif_opener(thumbnails=False)


class Picture:
    """An upload whose head has been read, and whose pixels have not."""

    def __init__(self, data: bytes, max_megapixels: float):
        """Look at an encoded image of at most so many million pixels. Raises ImageError."""
        if not data:
            raise ImageError("The file is empty.")
        self.data, self.max_megapixels = data, max_megapixels
        self.jpeg = read_jpeg(data) if data.startswith(b"\xff\xd8") else None
        self.tiff = tiff.Tiff(data) if tiff.is_tiff(data) else None
        check_parts(data)
        self.webp = webp_size(data) if WEBP.match(data) else None  # which is opened in its turn
        self.opened = None if WEBP.match(data) else self.open()
        kind = other_kind(data) or (self.jpeg and self.jpeg.bits > 8 and f"a JPEG of {self.jpeg.bits} bits a channel")
        if self.tiff and self.tiff.is_raw():
            kind = "a raw photograph"
        if kind and (self.opened is None or self.tiff):
            raise ImageError(f"This is {kind}, which is not read: send it as a JPEG or PNG.")
        size = self.opened.size if self.opened else self.tiff.size if self.tiff and self.tiff.first else self.webp
        if size is None:
            if self.tiff or BEGINNINGS.match(data):
                raise ImageError(CUT)
            raise ImageError(f"This is not an image that the server reads, which are {NAMES}.")
        if self.tiff:
            self.tiff.check(max_megapixels)
        check_size(*size, max_megapixels)
        self.pixels = max(math.prod(size), self.tiff.pixels if self.tiff else 0)
        # A JPEG has a bit at least for each 8 x 8 pixels, unless it is coded arithmetically; what is missing of them
        # Pillow would paint grey.
        if self.jpeg and self.jpeg.width * self.jpeg.height > 64 * 8 * len(data) and not self.jpeg.arithmetic:
            raise ImageError(CUT)

    def open(self) -> Image.Image | None:
        """Return what Pillow makes of the file's head, if anything."""
        if self.data.startswith(b"\xff\xd8") and not self.jpeg:
            return None
        with contextlib.suppress(Exception):  # Pillow's readers raise whatever a mutilated header trips over
            return Image.open(io.BytesIO(self.jpeg.lean if self.jpeg else self.data), formats=[*FORMATS])
        return None

    @property
    def deep(self) -> bool:
        """Whether it is a TIFF that Pillow does not bring to 8 bits."""
        return self.tiff is not None and (self.opened is None or tiff.is_deep(self.opened))

    def work(self, side: int) -> Work:
        """Return what it takes to decode it to at least `side` pixels a side."""
        if self.tiff and self.deep:
            return self.tiff.work()
        if self.jpeg:
            return estimate_jpeg(self.jpeg, len(self.data), side, whole=not lacks_end(self.data))
        if not self.opened:
            return estimate("WEBP", self.pixels, len(self.data))
        runs = self.opened.format == "BMP" and self.opened.info.get("compression") in RUN_LENGTHS
        return estimate("BMP in runs" if runs else self.opened.format or "", self.pixels, len(self.data))

    def image(self) -> Image.Image:
        """Return it for decoding, which has begun where there is no other way. Raises ImageError."""
        if self.tiff and self.deep:
            return open_deep(self.data, self.opened)
        image = self.opened or self.open()
        if image is None:
            raise ImageError(CUT)
        if self.jpeg and lacks_end(self.data):
            return with_end(self.jpeg)
        if image.format == "PNG":
            scale_key(image, self.data[24])
        if image.info.get("default_image"):  # of an APNG, for those who cannot show the animation: nobody sees it
            try:
                with contextlib.suppress(EOFError):
                    image.seek(1)
            except Exception:  # noqa: BLE001 - as in open()
                raise ImageError(CUT) from None
        return image


def open_image(data: bytes, max_megapixels: float) -> Image.Image:
    """Open an encoded image of at most so many million pixels; most are decoded later. Raises ImageError."""
    return Picture(data, max_megapixels).image()


def other_kind(data: bytes) -> str | None:
    """Return the kind of a file that is none of FORMATS, in words, if it is a known one."""
    return next((kind for kind, start in OTHERS.items() if re.match(start, data[:4096], re.DOTALL)), None)


def begins_as_picture(data: bytes) -> bool:
    """Return whether a file's first bytes are those of a picture; nothing is decoded."""
    return bool(BEGINNINGS.match(data)) or tiff.is_tiff(data)


def scale_key(image: Image.Image, depth: int) -> None:
    """Bring a PNG's transparent colour from its own depth, in which Pillow leaves it, to the 8 bits of the pixels."""
    key = image.info.get("transparency")
    if isinstance(key, int) and depth in (2, 4):
        image.info["transparency"] = key * 255 // (2**depth - 1)
    elif isinstance(key, tuple) and depth == 16:
        image.info["transparency"] = tuple(value >> 8 for value in key)


def check_size(width: int, height: int, max_megapixels: float) -> None:
    """Raise ImageError for a picture of more pixels than are allowed."""
    if width * height > max_megapixels * 1e6:
        raise ImageError(
            f"The image has {width} x {height} pixels, more than the {max_megapixels:g} million allowed: shrink it."
        )


def open_deep(data: bytes, opened: Image.Image | None) -> Image.Image:
    """Decode a TIFF that Pillow does not bring to 8 bits. Raises ImageError."""
    try:
        return tiff.read(data, opened)
    except tiff.TiffError as error:
        raise ImageError(f"This is {error}, which is not read: save it with 8 bits a channel.") from None
    except Exception:  # noqa: BLE001 - as Pillow's, its readers raise anything
        raise ImageError(CUT) from None


def lacks_end(data: bytes) -> bool:
    """Return whether no end marker follows the last scan of a JPEG."""
    return data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda")


def with_end(jpeg: Jpeg) -> Image.Image:
    """Open a JPEG without its end marker, if nothing but that is missing. Raises ImageError.

    Phones and messengers write such files. Where pixels are missing, too, bytes in their place change what is decoded;
    two kinds of bytes, since one may give what was there, and once after the restart marker that would be next, without
    which a decoder that expects one skips them. Whole scans may be missing, too.
    """
    data = jpeg.lean.rstrip(b"\xff")  # half of the marker
    restarts = re.findall(rb"\xff([\xd0-\xd7])", data[data.rfind(b"\xff\xda") :])
    following = bytes([0xFF, 0xD0 + (restarts[-1][0] - 0xD0 + 1) % 8 if restarts else 0xD0])
    try:
        first = pixels_with(data, b"")
        for filler in (b"\x55" * 64, (following if b"\xff\xdd" in data else b"") + b"\xaa" * 64):
            if not np.array_equal(first, pixels_with(data, filler)):
                raise ImageError(CUT)
        if jpeg.missing:
            raise ImageError(CUT)
    except Exception:  # noqa: BLE001 - as in open_image
        raise ImageError(CUT) from None
    return Image.open(io.BytesIO(data + b"\xff\xd9"), formats=["JPEG", "MPO"])


def pixels_with(data: bytes, filler: bytes) -> np.ndarray:
    """Return the pixels of a JPEG to which bytes and the end marker are appended."""
    with Image.open(io.BytesIO(data + filler + b"\xff\xd9"), formats=["JPEG", "MPO"]) as image:
        return np.asarray(image)


def least_side(target: tuple[int, int], interpolation: str) -> int:
    """Return how many pixels a side a JPEG has to be decoded to at least, to be resized with this interpolation."""
    return 2 * max(target) if interpolation == FAST else WHOLE


def decode(image: Image.Image, side: int, mode: str, background: str = "white") -> Image.Image:
    """Return the opened image in `mode`, upright, of its full size or, from a JPEG, at least `side` pixels a side.

    What is transparent shows the background, unless the mode is RGBA. Raises ImageError.
    """
    try:
        image.draft("RGB", (side, side))
        image.load()
        with contextlib.suppress(Exception):  # EXIF data that cannot be read says nothing about the pixels
            forget_exif(image)
            ImageOps.exif_transpose(image, in_place=True)
        return convert_mode(image, mode, background)
    except Exception:  # noqa: BLE001 - as in open_image
        raise ImageError(CUT) from None


def forget_exif(image: Image.Image) -> None:
    """Take the EXIF data off an image, of which Pillow still knows its own reading, unless they were too long for it.

    Else Pillow would write them anew once the image is turned, however much they name.
    """
    exif = image.info.pop("exif", None) or b""
    if is_modest(exif):
        image.info["exif"] = exif
        image.getexif()
        del image.info["exif"]


def convert_mode(image: Image.Image, mode: str, background: str) -> Image.Image:
    """Return the image in `mode` (L, RGB or RGBA), whatever its own, as people see it on the background."""
    if not image.mode.startswith("I") and (mode == "RGBA" or not image.has_transparency_data):
        return image if image.mode == mode else image.convert(mode)
    result, rows = Image.new(mode, image.size), max(1, BAND // image.width)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        result.paste(convert_band(band, mode, background), (0, top))
    return result


def convert_band(image: Image.Image, mode: str, background: str) -> Image.Image:
    """Return a band of an image of 16 bits, or with transparency, as convert_mode() does."""
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip at 255
        shown = Image.fromarray(np.rint(np.asarray(image, np.float32) / 257).clip(0, 255).astype(np.uint8))
        if isinstance(key := image.info.get("transparency"), int):  # the one value that nobody sees
            shown.putalpha(Image.fromarray(np.where(np.asarray(image) == key, 0, 255).astype(np.uint8)))
        image = shown
    if mode != "RGBA" and image.has_transparency_data:
        image = image.convert("RGBA")
        below = Image.new("RGBA", image.size, background)
        image = Image.alpha_composite(below, image)
    return image if image.mode == mode else image.convert(mode)


def seen(size: tuple[int, int], target: tuple[int, int], crop: str) -> tuple[float, float, float, float]:
    """Return the part of a picture of this size that a model sees: its left, top, right and bottom, in pixels.

    `crop` is "none", and the picture is squeezed into the target, or "centre": the largest part of the target's shape.
    """
    (width, height), (wide, high) = size, target
    if crop == "none":
        return 0, 0, width, height
    scale = min(width / wide, height / high)
    left, top = max(0, (width - scale * wide) / 2), max(0, (height - scale * high) / 2)  # rounding goes below
    return left, top, width - left, height - top


def resize(image: Image.Image, target: tuple[int, int], crop: str, interpolation: str) -> Image.Image:
    """Return what a model sees of the image, at the size that it takes.

    `interpolation` is a name of Pillow's; or "tensorflow", which is its bilinear one without smoothing, and which
    Keras' image_dataset_from_directory loads pictures for training with.
    """
    box = seen(image.size, target, crop)
    if interpolation == "tensorflow":
        # Which cuts at whole pixels, and sees nothing beyond.
        wide, high = (max(int(round(length, 6)), 1) for length in (box[2] - box[0], box[3] - box[1]))
        left, top = (image.width - wide) // 2, (image.height - high) // 2
        cut = image.crop((left, top, left + wide, top + high))
        return cut.transform(target, Image.Transform.EXTENT, (0, 0, wide, high), Image.Resampling.BILINEAR)
    if interpolation == FAST:
        return resampling.bicubic(image, target, box)
    return image.resize(target, Image.Resampling[interpolation.upper()], box)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return a picture's width and height once its EXIF orientation is followed."""
    try:
        forget_exif(image)
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    except Exception:  # noqa: BLE001 - as in decode: EXIF that cannot be read says nothing
        turned = False
    return (image.height, image.width) if turned else (image.width, image.height)


def to_array(image: Image.Image, preprocess: str) -> np.ndarray:
    """Return an L, RGB or RGBA image as the model takes it: float32, shape (height, width, channels).

    `preprocess` is a key of PREPROCESS: what is done to the pixels, which are 0..255.
    """
    order, mean, deviation = PREPROCESS[preprocess]
    width, channels = image.width, len(image.getbands())
    # As rows of width x channels, in which numpy computes several times faster than in triples.
    pixels = np.frombuffer(image.tobytes("raw", order if channels == 3 else image.mode), np.uint8)
    rows = pixels.reshape(image.height, -1).astype(np.float32)
    if preprocess != "none":
        rows -= np.tile(np.resize(mean, channels).astype(np.float32), width)
        rows /= np.tile(np.resize(deviation, channels).astype(np.float32), width)
    return rows.reshape(image.height, width, channels)

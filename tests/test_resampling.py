"""A model sees the same of a picture with SIMD as by Pillow, within rounding; where it would not, Pillow resizes."""

import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib import metadata

import numpy as np
import PIL
import pytest
from conftest import DOG, ROOT, lacking
from PIL import Image

from keras_server import images, resampling

DOG_SMALL = Image.open(DOG).resize((600, 450))
MOST, MEAN = 2, 0.21  # of 255, between one value and Pillow's


@pytest.fixture
def simd(monkeypatch: pytest.MonkeyPatch) -> list[Image.Image]:
    """The pictures that SIMD has resized."""
    if not resampling.simd:
        lacking("cykooz-resizer is not installed: pip install -r requirements-resize.txt.")
    resized: list[Image.Image] = []
    original = resampling.with_simd

    def count(image: Image.Image, target: tuple[int, int], box: resampling.Box) -> Image.Image:
        resized.append(image)
        return original(image, target, box)

    monkeypatch.setattr(resampling, "with_simd", count)
    return resized


def pillows(image: Image.Image, target: tuple[int, int], crop: str) -> np.ndarray:
    """Return what Pillow makes of it, as numbers to count with."""
    box = images.seen(image.size, target, crop)
    return np.asarray(image.resize(target, Image.Resampling.BICUBIC, box, reducing_gap=3.0)).astype(int)


def pictures(kind: str) -> Iterator[tuple[Image.Image, tuple[int, int]]]:
    """Yield pictures of all sizes and shapes, and sizes to bring them to, smaller and larger."""
    draw, noise = random.Random(kind), np.random.default_rng(0)
    for number in range(120):
        size = draw.randint(1, 700), draw.randint(1, 700)
        picture = DOG_SMALL.resize(size)
        if kind != "photograph":
            values = noise.integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
            picture = Image.fromarray(values if kind == "noise" else np.where(values < 128, 0, 255).astype(np.uint8))
        yield picture.convert("L") if number % 3 else picture, (draw.randint(1, 400), draw.randint(1, 400))
    yield picture, picture.size


@pytest.mark.parametrize("crop", ["none", "centre"])
@pytest.mark.parametrize("kind", ["photograph", "noise", "black and white"])
def test_it_is_pillows_within_rounding(kind: str, crop: str, simd: list[Image.Image]) -> None:
    for picture, target in pictures(kind):
        resized = images.resize(picture, target, crop, "bicubic")
        apart = np.abs(np.asarray(resized) - pillows(picture, target, crop))
        assert (resized.mode, resized.size) == (picture.mode, target)
        assert (apart.max() <= MOST, apart.mean() <= MEAN) == (True, True), (picture.size, target)
    assert len(simd) > 40


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (300, 400), (896, 1195), (100, 80), (1, 1)])
def test_ordinary_pictures_are_resized_with_simd(size: tuple[int, int], simd: list[Image.Image]) -> None:
    target = (224, 224) if size != (300, 400) else (100, 100)
    images.resize(DOG_SMALL.resize(size), target, "none", "bicubic")
    assert len(simd) == 1


@pytest.mark.parametrize(
    ("picture", "target", "interpolation"),
    [
        (DOG_SMALL.convert("RGBA"), (224, 224), "bicubic"),  # Pillow loses much of the colour of what is transparent
        (DOG_SMALL, (100, 200), "bicubic"),  # a sixth of the width: reduced beforehand
        (DOG_SMALL, (200, 75), "bicubic"),  # likewise of the height
        (DOG_SMALL.resize((240, 600)), (220, 200), "bicubic"),  # whose height Pillow 13 changes first
        (DOG_SMALL.resize((2000, 1049)), (1000, 1000), "bicubic"),  # too large to be copied
        (DOG_SMALL, (224, 224), "bilinear"),
        (DOG_SMALL, (224, 224), "lanczos"),
    ],
)
def test_others_are_pillows_to_the_last_bit(
    picture: Image.Image, target: tuple[int, int], interpolation: str, simd: list[Image.Image]
) -> None:
    gap = 3.0 if interpolation == "bicubic" else None
    expected = picture.resize(target, Image.Resampling[interpolation.upper()], reducing_gap=gap)
    assert np.array_equal(images.resize(picture, target, "none", interpolation), expected)
    assert not simd


def test_sixfold_is_where_pillow_begins_to_reduce() -> None:
    """Which its own answer shows: with and without the gap."""
    for width, reduces in ((599, False), (600, True)):
        picture = DOG_SMALL.resize((width, 450))
        plain = picture.resize((100, 100), Image.Resampling.BICUBIC)
        assert np.array_equal(pillows(picture, (100, 100), "none"), plain) != reduces
        assert resampling.is_alike(picture, (100, 100), (0, 0, *picture.size)) != reduces


def test_threads_do_not_disturb_each_other(simd: list[Image.Image]) -> None:
    """Each makes a resizer of its own."""
    shapes = [(500, 375), (320, 240), (240, 240), (640, 480)]
    alone = [np.asarray(images.resize(DOG_SMALL.resize(size), (224, 224), "none", "bicubic")) for size in shapes]
    wrong: list[int] = []

    def resize(number: int) -> None:
        picture = DOG_SMALL.resize(shapes[number])
        for _ in range(50):
            if not np.array_equal(images.resize(picture, (224, 224), "none", "bicubic"), alone[number]):
                wrong.append(number)

    threads = [threading.Thread(target=resize, args=(number,)) for number in range(len(shapes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(simd) == 204


def test_what_resizes_is_told() -> None:
    if not resampling.simd:
        lacking("cykooz-resizer is not installed: pip install -r requirements-resize.txt.")
    assert f"cykooz-resizer {metadata.version('cykooz-resizer')}" == resampling.RESIZER


def test_without_it_pillow_resizes() -> None:
    """In a process whose imports of it fail: to the last bit, and it is told."""
    program = (
        "import sys; sys.modules['cykooz_resizer'] = None\n"
        "from PIL import Image; from keras_server import images, resampling\n"
        "dog = Image.open('dog.jpg').resize((500, 375))\n"
        "assert images.resize(dog, (224, 224), 'none', 'bicubic') == dog.resize((224, 224))\n"
        "print(resampling.RESIZER)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"Pillow {PIL.__version__}\n"

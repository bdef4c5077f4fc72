"""What decoding takes of a processor and of memory, beside what keras_server/pictures/work.py estimates. On Linux.

    .venv/bin/python benchmarks/decoding.py

Photographs, noise and single colours in every format, then the worst files that are known: what each makes the server
spend for each byte of it. Times are of the process, the best of three.
"""

from __future__ import annotations

import io
import re
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from bombs import scans, segment
from PIL import Image

from keras_server.front.server import give_memory_back
from keras_server.images import ImageError, Picture, decode

ROOT = Path(__file__).resolve().parents[1]
SIDE = 448  # pixels that a model of 224 asks for


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """Return an image's file."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def ordinary() -> Iterator[tuple[str, bytes]]:
    """Yield pictures of 25 million pixels, by what they are."""
    photo = Image.open(ROOT / "dog.jpg").convert("RGB").resize((5000, 5000))
    pixels = np.asarray(photo).astype(int)
    noise = pixels + np.random.default_rng(0).integers(-20, 20, pixels.shape)
    images = {
        "photograph": photo,
        "noise": Image.fromarray(noise.clip(0, 255).astype(np.uint8)),
        "black": Image.new("RGB", photo.size),
    }
    for name, image in images.items():
        yield f"JPEG, {name}", encoded(image, "JPEG", quality=90)
        yield f"progressive JPEG, {name}", encoded(image, "JPEG", quality=95, progressive=True, subsampling=0)
        yield f"PNG, {name}", encoded(image, "PNG", compress_level=1)
        yield f"WebP, {name}", encoded(image, "WEBP", method=0)
        yield f"lossless WebP, {name}", encoded(image, "WEBP", method=0, lossless=True)
        yield f"GIF, {name}", encoded(image.quantize(64, method=Image.Quantize.FASTOCTREE), "GIF")
        yield f"BMP, {name}", encoded(image, "BMP")
        yield f"TIFF in LZW, {name}", encoded(image, "TIFF", compression="tiff_lzw")
        yield f"AVIF, {name}", encoded(image, "AVIF", quality=60, speed=10)
        yield f"HEIC, {name}", encoded(image, "HEIF", quality=60)
    rgba = photo.convert("RGBA")
    rgba.putalpha(100)
    grey = np.asarray(photo.convert("L"))
    yield "PNG, transparent", encoded(rgba, "PNG", compress_level=1)
    yield "WebP, transparent", encoded(rgba, "WEBP", method=0, lossless=True)
    yield "PNG of 16 bits", encoded(Image.fromarray(grey.astype(np.uint16) * 257), "PNG", compress_level=1)
    yield "TIFF of floats", encoded(Image.fromarray(grey.astype(np.float32) / 255), "TIFF")


def hostile() -> Iterator[tuple[str, bytes]]:
    """Yield the worst files that are known, each within the limits."""
    yield "PNG of one bit", encoded(Image.new("1", (7071, 7071)), "PNG", optimize=True)
    yield "PNG, transparent", encoded(Image.new("RGBA", (7071, 7071), (1, 2, 3, 4)), "PNG", optimize=True)
    yield "WebP, lossless", encoded(Image.new("RGB", (7000, 7000), (9, 9, 9)), "WEBP", lossless=True)
    yield "GIF", encoded(Image.new("L", (7071, 7071)), "GIF")
    yield "TIFF of floats", encoded(Image.new("F", (7071, 7071), 1), "TIFF", compression="tiff_adobe_deflate")
    yield "AVIF", encoded(Image.new("RGB", (7000, 7000)), "AVIF", speed=10)
    yield "HEIC", encoded(Image.new("RGB", (7000, 7000)), "HEIF")
    yield "JPEG in 49 scans", scans(7064, 48)
    yield "arithmetic JPEG in 50 scans", arithmetic(7000, 49)


def arithmetic(side: int, count: int) -> bytes:
    """Return a JPEG of three components in arithmetic coding, with so many scans of nothing for each."""
    components = b"".join(bytes([number, 0x11, 0]) for number in (1, 2, 3))
    out = b"\xff\xd8" + segment(0xDB, b"\0" + b"\1" * 64)
    out += segment(0xCA, struct.pack(">BHHB", 8, side, side, 3) + components)
    out += segment(0xDA, b"\3\1\0\2\0\3\0\0\0\0") + b"\xaa" * 100
    out += b"".join(segment(0xDA, bytes([1, number, 0, 1, 63, 0])) for number in (1, 2, 3)) * count
    return out + b"\xff\xd9"


def measure(data: bytes) -> tuple[float, int, int, Picture]:
    """Return the seconds of a processor, the most bytes meanwhile, and the pixels of a picture. Raises ImageError."""
    best, peak = float("inf"), 0
    for _ in range(3):
        Path("/proc/self/clear_refs").write_text("5")
        before, started = memory("VmRSS"), time.process_time()
        picture = Picture(data, 50)
        decode(picture.image(), SIDE, "RGB").resize((224, 224), Image.Resampling.BICUBIC, reducing_gap=3.0)
        best, peak = min(best, time.process_time() - started), max(peak, memory("VmHWM") - before)
    return best, peak, picture.work(SIDE).pixels, picture


def memory(which: str) -> int:
    """Return a figure of this process' memory, in bytes."""
    found = re.search(rf"{which}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def main() -> None:
    """Print both tables."""
    give_memory_back()
    print("| picture | ns a pixel | estimated | bytes a pixel | estimated |\n|---|---|---|---|---|")
    for name, data in ordinary():
        seconds, peak, pixels, picture = measure(data)
        work = picture.work(SIDE)
        figures = (1e9 * seconds, 1e9 * work.seconds, peak, work.bytes)
        print(f"| {name} | " + " | ".join(f"{figure / pixels:.1f}" for figure in figures) + " |", flush=True)
    print("\n| worst file | bytes | seconds | MiB | microseconds a byte | bytes a byte |\n|---|---|---|---|---|---|")
    for name, data in hostile():
        try:
            seconds, peak, _, _ = measure(data)
        except ImageError as error:
            print(f"| {name} | {len(data):,} | {error} | | | |")
            continue
        ratios = f"{1e6 * seconds / len(data):.1f} | {peak / len(data):,.0f}"
        print(f"| {name} | {len(data):,} | {seconds:.2f} | {peak / 2**20:.0f} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()

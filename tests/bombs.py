"""Small files that would swell, and files that lie about themselves."""

import struct
import zlib

from conftest import encode
from PIL import Image


def zeros(megabytes: int) -> bytes:
    """Return so many megabytes of zeros, deflated to a thousandth."""
    packer = zlib.compressobj(9)
    return b"".join([*(packer.compress(bytes(2**20)) for _ in range(megabytes)), packer.flush()])


def chunk(kind: bytes, data: bytes) -> bytes:
    """Return a chunk of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes, data: bytes = b"") -> bytes:
    """Return a PNG file that claims this size and has these chunks before its data."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    parts = [header, *chunks, chunk(b"IDAT", data or zlib.compress(bytes(1000))), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def gif(width: int, height: int, frame_width: int, frame_height: int) -> bytes:
    """Return a GIF file that claims this size, with a frame that claims that one."""
    screen = struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6)
    frame = struct.pack("<HHHHB", 0, 0, frame_width, frame_height, 0)
    return b"GIF89a" + screen + b"," + frame + b"\x02\x02\x4c\x01\x00;"


def tiff(width: int, height: int, **tags: int) -> bytes:
    """Return a TIFF file of this size; t273=9 sets the tag 273."""
    values = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 200, 277: 1, 278: height, 279: 10}
    values |= {int(name[1:]): value for name, value in tags.items()}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(values.items()))
    return (b"II*\0\x08\0\0\0" + struct.pack("<H", len(values)) + entries + bytes(4)).ljust(300, b"\0")


def bmp(width: int, height: int) -> bytes:
    """Return a BMP file of this size with hardly any pixels."""
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 154, 0, 0, 54) + head + bytes(100)


def webp(width: int, height: int) -> bytes:
    """Return a WebP file of this size without pixels."""
    data = b"\x2f" + struct.pack("<I", (width - 1) | (height - 1) << 14) + bytes(21)
    return b"RIFF" + struct.pack("<I", 12 + len(data)) + b"WEBPVP8L" + struct.pack("<I", len(data)) + data


def jpeg(width: int, height: int, kind: str = "JPEG") -> bytes:
    """Return a JPEG file that claims this size."""
    data = bytearray(encode(Image.new("RGB", (64, 64), (200, 10, 10)), kind))
    start = data.index(b"\xff\xc0")
    data[start + 5 : start + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def film(kind: str, frames: int = 300) -> bytes:
    """Return a file of many frames, the first of them grey."""
    first, *others = [Image.new("RGB", (64, 64), (128 + n % 2, 128, 128)) for n in range(frames)]
    return encode(first, kind, save_all=True, append_images=others)


# Each is to be answered 400.
BOMBS = {
    "png": png(30_000, 30_000),
    "largest png": png(2**31 - 1, 2**31 - 1),
    "png just inside the limit": png(7000, 7000),
    "png zTXt": png(8, 8, chunk(b"zTXt", b"a\0\0" + zeros(512))),
    "png iTXt": png(8, 8, chunk(b"iTXt", b"a\0\1\0\0\0" + zeros(512))),
    "png iCCP": png(8, 8, chunk(b"iCCP", b"a\0\0" + zeros(512))),
    "gif": gif(65535, 65535, 65535, 65535),
    "gif with a large frame": gif(1, 1, 65535, 65535),
    "gif with a large screen": gif(65535, 65535, 1, 1),
    "tiff": tiff(100_000, 100_000),
    "largest tiff": tiff(2**32 - 1, 2**32 - 1),
    "deflated tiff": tiff(30_000, 30_000, t259=8),
    "tiff with a lying count": tiff(7000, 7000, t279=2**32 - 1),
    "tiff with a lying offset": tiff(7000, 7000, t273=2**32 - 1),
    "tiff with large tiles": tiff(64, 64, t322=60_000, t323=60_000, t324=200, t325=2**31),
    "tiff in a loop": b"II*\0\x08\0\0\0" + struct.pack("<HHHIII", 1, 256, 4, 1, 10, 8),
    "tiff with endless tags": b"II*\0\x08\0\0\0" + struct.pack("<HHHIII", 1, 256, 4, 2**30, 26, 0),
    "bmp": bmp(30_000, 30_000),
    "bmp just inside the limit": bmp(7000, 7000),
    "bmp upside down": bmp(7000, -7000),
    "smallest bmp": bmp(-(2**31), -(2**31)),
    "webp": webp(16_383, 16_383),
    "jpeg": jpeg(65_500, 65_500),
    "jpeg just inside the limit": jpeg(7000, 7000),
    "mpo": jpeg(7000, 7000, "MPO"),
}

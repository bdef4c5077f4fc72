"""Small files that would swell, and files that lie about themselves."""

import struct
import zlib

from conftest import encode
from PIL import Image


def zeros(megabytes: int) -> bytes:
    """Return so many megabytes of zeros, deflated to a thousandth: the same block again and again."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    block = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)
    checksum = megabytes * 2**20 % 65521 << 16 | 1  # Adler-32 of zeros
    return b"\x78\xda" + block * megabytes + b"\3\0" + struct.pack(">I", checksum)


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


def segment(code: int, content: bytes) -> bytes:
    """Return a segment of a JPEG."""
    return bytes([0xFF, code]) + struct.pack(">H", len(content) + 2) + content


def scans(side: int, count: int) -> bytes:
    """Return a grey progressive JPEG, with so many scans that hold nothing but long runs of empty blocks."""
    blocks = (-(-side // 8)) ** 2
    out = b"\xff\xd8" + segment(0xDB, b"\0" + b"\1" * 64)
    out += segment(0xC2, struct.pack(">BHHB", 8, side, side, 1) + b"\1\x11\0")
    out += segment(0xC4, b"\0\1" + bytes(15) + b"\0") + segment(0xC4, b"\x10\1\1" + bytes(14) + b"\xe0\x00")
    first = segment(0xDA, b"\1\1\0\0\0\0") + bytes(-(-blocks // 8))
    run = "".join("0" + format(min(blocks - at, 32767) - 16384, "014b") for at in range(0, blocks, 32767))
    run += "1" * (-len(run) % 8)
    empty = int(run, 2).to_bytes(len(run) // 8).replace(b"\xff", b"\xff\0")
    return out + first + (segment(0xDA, b"\1\1\0\1\x3f\0") + empty) * count + b"\xff\xd9"


def inserted(data: bytes, at: int, part: bytes, count: int) -> bytes:
    """Return a file with so many copies of a part in one place."""
    return data[:at] + part * count + data[at:]


def strips(count: int, compression: int = 1, length: int = 64, **tags: int) -> bytes:
    """Return a TIFF of 64 pixels a row and as many rows, each a strip that names the same bytes of the file."""
    values = {256: (4, 64), 257: (4, count), 258: (3, 8), 259: (3, compression), 262: (3, 1), 277: (3, 1), 278: (4, 1)}
    values |= {int(name[1:]): (4, value) for name, value in tags.items()}
    lists = 10 + 12 * (len(values) + 2) + 4
    rows = [(tag, kind, 1, value) for tag, (kind, value) in values.items()]
    rows += [(273, 4, count, lists), (279, 4, count, lists + 4 * count)]
    entries = b"".join(struct.pack("<HHII", *row) for row in sorted(rows))
    places = struct.pack("<I", lists + 8 * count) * count + struct.pack("<I", length) * count
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(rows)) + entries + bytes(4) + places + bytes(length)


def runs(width: int, height: int, data: bytes) -> bytes:
    """Return a BMP in run lengths."""
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(data), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 1078 + len(data), 0, 0, 1078) + head + b"\0\1\2\0" * 256 + data


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

NOISE = Image.effect_noise((64, 64), 50).convert("RGB")
JPEG, PNG, GIF, WEBP = (encode(NOISE, kind) for kind in ("JPEG", "PNG", "GIF", "WEBP"))
AFTER_HEADER = 33  # of a PNG
FIRST_BLOCK = 13 + 3 * 2 ** ((GIF[10] & 7) + 1)  # after the palette
PROGRESSIVE_TIFF = encode(NOISE, "TIFF", compression="jpeg").replace(b"\xff\xc0\0\x11\x08", b"\xff\xc2\0\x11\x08")

# What asks for work without end, and the sentence that says so. Each is to be refused before anything is decoded.
WORK = {
    "scans": (scans(2000, 6000), "The JPEG has more than 50 scans"),
    "segments": (inserted(JPEG, 2, segment(0xE3, b""), 5000), "The JPEG has more than 256 segments"),
    "EXIF segments": (inserted(JPEG, 2, segment(0xE1, b"Exif\0\0x"), 5300), "The JPEG has more than 256 segments"),
    "comments after the scan": (inserted(JPEG, -2, segment(0xFE, b""), 5000), "The JPEG has more than 256 segments"),
    "filling": (inserted(JPEG, 2, b"\xff", 100_000), "The JPEG has more than 1,024 bytes of filling"),
    "PNG chunks": (inserted(PNG, AFTER_HEADER, chunk(b"prVt", b""), 5000), "The PNG has more than 256 chunks beside"),
    "PNG texts": (inserted(PNG, AFTER_HEADER, chunk(b"tEXt", b"a\0"), 5000), "The PNG has more than 256 chunks beside"),
    "PNG profiles": (inserted(PNG, AFTER_HEADER, chunk(b"iCCP", b"a\0\0" + zeros(1)), 2), "more than 1 colour profile"),
    "PNG pixels": (
        inserted(PNG, PNG.index(b"IDAT") - 4, chunk(b"IDAT", b""), 30_000),
        "The PNG has more than 20,000 chunks of pixels",
    ),
    "GIF comments": (inserted(GIF, FIRST_BLOCK, b"!\xfe\1x\0", 5000), "The GIF has more than 256 blocks before"),
    "GIF pieces": (
        inserted(GIF, FIRST_BLOCK, b"!\xfe" + b"\1x" * 30_000 + b"\0", 1),
        "The GIF has more than 20,000 pieces of comments",
    ),
    "WebP chunks": (WEBP + (b"prVt" + bytes(4)) * 5000, "The WebP has more than 256 chunks"),
    "WebP frames": (WEBP + (b"ANMF" + bytes(4)) * 30_000, "The WebP has more than 20,000 frames"),
    "BMP runs": (runs(1000, 1000, b"\1\0" * 600_000), "The BMP has more than 1,048,576 bytes of run lengths"),
    "BMP ends of rows": (runs(3000, 3000, b"\1\1\0\0" * 3000), "The BMP has more than 2,000,000 pixels in run lengths"),
    "strips": (strips(30_000), "The TIFF has more than 20,000 strips or tiles"),
    "strips without sizes": (
        strips(100, 8).replace(struct.pack("<HH", 279, 4), struct.pack("<HH", 280, 4)),
        "The strips of the TIFF name its bytes again and again",
    ),
    "strips of the same bytes": (strips(1000, 8, 60_000), "The strips of the TIFF name its bytes again and again"),
    "tiles": (strips(400, t322=1, t323=1, t324=200), "The TIFF has more than 20,000 strips or tiles"),
    "tiles that jut out": (strips(4, t322=60_000, t323=60_000, t324=200), "The tiles of the TIFF have 3600 million"),
    "TIFF in LZMA": (strips(4, 34925), "a TIFF compressed by LZMA, which is not read"),
    "TIFF of progressive JPEGs": (PROGRESSIVE_TIFF, "a TIFF of progressive or arithmetic JPEGs"),
    "TIFF with a tag twice": (
        strips(4).replace(struct.pack("<HH", 257, 4), struct.pack("<HH", 256, 4)),
        "The TIFF has its tag 256 twice",
    ),
    "TIFF tags": (b"II*\0\x08\0\0\0" + struct.pack("<H", 300) + bytes(3600), "The TIFF has more than 256 tags"),
}  # fmt: skip

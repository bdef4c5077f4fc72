"""The parts that a picture's file consists of, counted before a decoder goes through them one by one."""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from keras_server.pictures import limits
from keras_server.pictures.ifd import is_modest
from keras_server.pictures.limits import refuse

MARKER = re.compile(rb"\xff([^\0\x01\xd0-\xd8\xff])")  # of a JPEG, before a segment with a length or the end
FILLING = 1024  # bytes that may stand before any marker, and that a search goes through one by one
FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})  # the markers of frames
WEBP = re.compile(rb"RIFF....WEBP", re.DOTALL)
RUN_LENGTHS = (1, 2)  # compressions of a BMP, BI_RLE8 and BI_RLE4
SCAN, END = 0xDA, 0xD9
# What Pillow looks into of the segments that say nothing of the pixels: the first of each.
EXIF = b"Exif\0\0"
METADATA = {0xE0: (b"JFIF", b""), 0xE1: (EXIF, b"http://ns.adobe.com/xap/"), 0xEE: (b"Adobe",)}
PROFILE = b"ICC_PROFILE\0"


class Segment(NamedTuple):
    """A segment of a JPEG: its marker's code, where it starts and ends, and what it holds."""

    code: int
    start: int
    end: int
    content: bytes


class Jpeg(NamedTuple):
    """What the segments of a JPEG say of it."""

    width: int
    height: int
    bits: int  # a sample
    samples: int  # of all components
    scanned: int  # samples that the scans go through, one by one
    arithmetic: bool
    buffered: bool  # a decoder has to keep the coefficients of the whole picture
    missing: frozenset[tuple[int, int]]  # components and coefficients that no scan brings to their last bit
    lean: bytes  # the file, without what says nothing of the picture


def segments(data: bytes) -> Iterator[Segment]:
    """Yield the segments of a JPEG as a decoder finds them (ITU-T T.81, B.1). Raises ImageError for too many."""
    at = 2
    for _ in range(limits.PARTS + 1):
        if not (marker := MARKER.search(data, at)) or marker[1][0] == END:
            return
        at = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2])
        yield Segment(marker[1][0], marker.start(), at, data[marker.end() + 2 : at])
    raise refuse("JPEG", "segments", limits.PARTS)


def read_jpeg(data: bytes) -> Jpeg | None:
    """Return what a JPEG says of itself, or None where it has not one frame. Raises ImageError for too much work."""
    if b"\xff" * (FILLING + 2) in data:  # one too many, and the marker's own
        raise refuse("JPEG", "bytes of filling", FILLING)
    kept, seen, first = [b"\xff\xd8"], set[bytes](), 0
    frame: Segment | None = None
    sizes: dict[int, int] = {}  # samples by component
    missing: set[tuple[int, int]] = set()
    scans = Counter[int]()
    buffered = False
    for segment in segments(data):
        content = segment.content
        if segment.code in FRAMES and len(content) >= 6:
            if frame:  # two are none that a decoder takes
                return None
            frame = segment
            height, width = struct.unpack_from(">HH", content, 1)
            factors = {
                content[at]: (content[at + 1] >> 4) * (content[at + 1] & 15) for at in range(6, len(content) - 2, 3)
            }
            most = max(factors.values(), default=1) or 1
            sizes = {component: width * height * factor // most for component, factor in factors.items()}
            missing = {(component, k) for component in sizes for k in range(64)}
        elif segment.code == SCAN and frame and len(content) >= 4:
            first = first or segment.start
            components, (lowest, highest, bits) = content[1:-3:2], content[-3:]
            scans.update(components)
            buffered = buffered or frame.code & 3 == 2 or len(components) < len(sizes)
            if not bits & 15:
                missing -= {(component, k) for component in components for k in range(lowest, min(highest, 63) + 1)}
            if max(scans.values()) > limits.SCANS:
                raise refuse("JPEG", "scans", limits.SCANS)
        if not first and keep(segment, seen):
            kept.append(data[segment.start : segment.end])
    if not frame:
        return None
    return Jpeg(
        width,
        height,
        frame.content[0],
        sum(sizes.values()),
        sum(sizes.get(component, 0) * count for component, count in scans.items()),
        0xC9 <= frame.code <= 0xCB,
        buffered,
        frozenset(missing),
        b"".join([*kept, data[first:]]) if first else data,
    )


def keep(segment: Segment, seen: set[bytes]) -> bool:
    """Return whether a segment before the first scan is of use; `seen` is what was kept of the metadata."""
    if segment.code == 0xE2:
        return segment.content.startswith(PROFILE)
    if not 0xE0 <= segment.code <= 0xEF and segment.code != 0xFE:
        return True
    kind = next((kind for kind in METADATA.get(segment.code, ()) if segment.content.startswith(kind)), None)
    if kind is None or kind in seen or (kind == EXIF and not is_modest(segment.content)):
        return False
    seen.add(kind)
    return True


def check_png(data: bytes) -> None:
    """Raise ImageError for a PNG of too many chunks."""
    at, pieces, others, profiles = 8, 0, 0, 0
    while at + 8 <= len(data) and (kind := data[at + 4 : at + 8]) != b"IEND":
        if kind in (b"IDAT", b"fdAT", b"fcTL"):
            pieces += 1
        else:
            others += 1
            profiles += kind == b"iCCP"  # each of which swells to a thousandfold
        if profiles > 1:
            raise refuse("PNG", "colour profile", 1)
        if pieces > limits.PIECES:
            raise refuse("PNG", "chunks of pixels", limits.PIECES)
        if others > limits.PARTS:
            raise refuse("PNG", "chunks beside its pixels", limits.PARTS)
        at += 12 + int.from_bytes(data[at : at + 4])


def check_webp(data: bytes) -> None:
    """Raise ImageError for a WebP of too many chunks."""
    at, frames, others = 12, 0, 0
    while at + 8 <= len(data):
        if data[at : at + 4] == b"ANMF":
            frames += 1
        else:
            others += 1
        if frames > limits.PIECES:
            raise refuse("WebP", "frames", limits.PIECES)
        if others > limits.PARTS:
            raise refuse("WebP", "chunks", limits.PARTS)
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        at += 8 + size + size % 2


def webp_size(data: bytes) -> tuple[int, int] | None:
    """Return width and height of a WebP by its first chunk (RFC 9649), None where that is damaged.

    Pillow's decoder takes memory for the whole picture as soon as it is opened.
    """
    kind, content = data[12:16], data[20:30]
    if len(content) < 10:
        return None
    if kind == b"VP8X":
        return int.from_bytes(content[4:7], "little") + 1, int.from_bytes(content[7:10], "little") + 1
    if kind == b"VP8L" and content[0] == 0x2F:
        bits = int.from_bytes(content[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 " and content[3:6] == b"\x9d\x01\x2a":
        return int.from_bytes(content[6:8], "little") & 0x3FFF, int.from_bytes(content[8:10], "little") & 0x3FFF
    return None


def check_gif(data: bytes) -> None:
    """Raise ImageError for a GIF of too many blocks before its first frame."""
    at = 13 + (3 * 2 ** ((data[10] & 7) + 1) if len(data) > 10 and data[10] & 128 else 0)
    blocks, pieces = 0, 0
    while data[at : at + 1] == b"!":
        at, blocks = at + 2, blocks + 1
        if blocks > limits.PARTS:
            raise refuse("GIF", "blocks before its first frame", limits.PARTS)
        while at < len(data) and data[at]:
            at, pieces = at + 1 + data[at], pieces + 1
            if pieces > limits.PIECES:
                raise refuse("GIF", "pieces of comments", limits.PIECES)
        at += 1


def check_bmp(data: bytes) -> None:
    """Raise ImageError for a BMP in run lengths that are too many."""
    compression = int.from_bytes(data[30:34], "little")
    if compression in RUN_LENGTHS and int.from_bytes(data[14:18], "little") >= 40:
        if len(data) > limits.RUNS:
            raise refuse("BMP", "bytes of run lengths", limits.RUNS)
        width, height = struct.unpack_from("<ii", data, 18)
        if abs(width * height) > limits.RUN_PIXELS:
            raise refuse("BMP", "pixels in run lengths", limits.RUN_PIXELS)


CHECKS = (
    (re.compile(rb"\x89PNG\r\n\x1a\n"), check_png),
    (WEBP, check_webp),
    (re.compile(rb"GIF8[79]a"), check_gif),
    (re.compile(rb"BM"), check_bmp),
)


def check_parts(data: bytes) -> None:
    """Raise ImageError for a file, other than a JPEG or TIFF, of more parts than a picture needs."""
    for start, check in CHECKS:
        if start.match(data):
            check(data)

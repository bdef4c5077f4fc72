"""nginx and HAProxy, as they come from Debian, before a server; each a context manager that ends it."""

import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import Self

from fakes import wait_until

NGINX = """
{user}
daemon off;
worker_processes 1;
pid {folder}/pid;
error_log {folder}/error.log;
events {{}}
http {{
    access_log off;
    lingering_timeout 1s;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    {block}
}}
"""

BLOCK = """
    client_body_timeout 3s;
    client_header_timeout 3s;
    upstream server {{ server 127.0.0.1:{server}; keepalive 1; }}
    proxy_http_version 1.1;
    proxy_set_header Connection "";
    server {{
        listen 127.0.0.1:{port};
        location / {{ proxy_pass http://server; }}
        location /buffered/ {{ proxy_pass http://server/; }}
        location /streamed/ {{ proxy_pass http://server/; proxy_request_buffering off; proxy_buffering off; }}
    }}
"""

HAPROXY = """
global
    nbthread 1
defaults
    mode http
    http-reuse always
    timeout connect 5s
    timeout client 3s
    timeout http-keep-alive 10s
    timeout server 10s
listen proxy
    bind 127.0.0.1:{port}
    http-request wait-for-body time 5s if {{ path_beg /buffered }}
    http-request replace-path /(buffered|streamed)(/.*) \\2
    server server 127.0.0.1:{server}
"""


class Proxy:
    """A proxy before the server that listens on a port of this machine."""

    def __init__(self, name: str, server: int = 0, block: str = BLOCK):
        """Start it; `block` is what nginx has within http, with braces that format() takes."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.name, self.folder = name, tempfile.TemporaryDirectory()
        self.config = Path(self.folder.name, "config")
        values = {"port": self.port, "server": server, "folder": self.folder.name}
        values["user"] = "user root;" if os.geteuid() == 0 else ""  # or its worker could not open the folder
        values["block"] = block.format(**values)
        self.config.write_text((NGINX if name == "nginx" else HAPROXY).format(**values))
        options = ["-p", self.folder.name, "-e", "stderr", "-c"] if name == "nginx" else ["-f"]
        self.command = [program(name), *options, str(self.config)]
        self.popen = subprocess.Popen(self.command, stderr=subprocess.DEVNULL)
        wait_until(self.listens)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.popen.terminate()
        self.popen.wait(20)
        self.folder.cleanup()

    def listens(self) -> bool:
        """Whether it takes connections."""
        assert self.popen.poll() is None, f"{self.name} has ended"
        with socket.socket() as probe:
            return not probe.connect_ex(("127.0.0.1", self.port))

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"


def program(name: str) -> str:
    """Return where a proxy's program is, or nothing; Debian keeps it off the path of users."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin") or ""

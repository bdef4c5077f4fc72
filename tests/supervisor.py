"""What systemd does for a service with a socket: it holds the port, starts servers on it, waits until each is ready."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Self

# The variables name the process itself, so they are set in it, as systemd does between fork and exec.
STARTER = """
import fcntl, os, sys
numbers, command = [int(number) for number in sys.argv[1].split(",")], sys.argv[2:]
copies = [fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 100) for number in numbers]
for number in numbers:
    os.close(number)
for place, copy in enumerate(copies, 3):
    os.dup2(copy, place)
given = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(numbers)), "LISTEN_FDNAMES": "http"}
os.execve(command[0], command, given | os.environ)
"""


def handing(files: Sequence[int], command: Sequence[str]) -> list[str]:
    """Return the command that runs another one with these file descriptors handed over; Popen passes them on to it."""
    return [sys.executable, "-c", STARTER, ",".join(map(str, files)), *command]


def holds(process: int, sock: socket.socket) -> bool:
    """Whether a process has a socket."""
    inode = os.fstat(sock.fileno()).st_ino
    return any(os.readlink(file) == f"socket:[{inode}]" for file in Path(f"/proc/{process}/fd").iterdir())


class Supervisor:
    """Holds a port while servers come and go on it; a context manager that ends the last one."""

    def __init__(self, *command: str):
        """Take the command line of the server, and start it."""
        self.command = command
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.port = self.listener.getsockname()[1]
        self.folder = tempfile.TemporaryDirectory()
        self.told = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.told.bind(f"{self.folder.name}/notify")
        self.told.settimeout(240)
        self.process = self.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.told.close()
        self.listener.close()
        self.folder.cleanup()

    def start(self) -> subprocess.Popen[bytes]:
        """Start a server, and return it once it has said that it is ready."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("KERAS_SERVER_")}
        environment = kept | {"NOTIFY_SOCKET": self.told.getsockname()}
        file = self.listener.fileno()
        command = handing([file], self.command)
        process = subprocess.Popen(command, env=environment, pass_fds=[file], stdout=subprocess.DEVNULL)
        try:
            assert self.told.recv(100) == b"READY=1"
        except BaseException:
            process.kill()
            process.wait()
            raise
        return process

    def restart(self) -> int:
        """End the server, and start the next one once it has ended; returns the exit status of the former."""
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(240)
        self.process = self.start()
        return status

"""The server's side of task.py: has a process of its own convert or quantize a model, and passes on what it tells."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

import keras_server
from keras_server.models.convert import Job
from keras_server.models.errors import DownloadError, StartupError
from keras_server.models.quantize import QuantizeJob

log = logging.getLogger("keras_server")

# Of seconds, by the program. A damaged file may keep Keras busy for ever; the largest of keras.applications take two
# minutes to convert, and quantizing EfficientNet-Lite0 with layers left in float32 took 42.
LONGEST = {"convert": 1800.0, "quantize": 4 * 3600.0}


class Crashed(Exception):
    """The process ended without a word while it converted a model that it had loaded; the message says how."""


def convert_in_child(name: str, job: Job) -> Path:
    """Do a job in a process of its own, for the model of this name, and return the folder of the export.

    Raises StartupError, DownloadError, or Crashed where Keras itself may still be able to run the model.
    """
    return in_child(
        "convert",
        name,
        job,
        f"{name} is being converted for OpenVINO, in a process of its own, which Keras and TensorFlow end with.",
    )


def quantize_in_child(name: str, job: QuantizeJob) -> Path:
    """Do a job in a process of its own, for the model of this name, and return the folder of the export.

    Raises StartupError.
    """
    try:
        return in_child(
            "quantize", name, job, f"{name} is being quantized, which takes minutes, in a process of its own."
        )
    except Crashed as error:
        raise StartupError(f"{name} cannot be quantized: {error}.") from None


def in_child(program: str, name: str, job: Job | QuantizeJob, announcement: str) -> Path:
    """Have a program of this package do a job, and return the folder that it tells. Raises as convert_in_child()."""
    told: dict[str, Any] = {}
    stage, limit = "starting", LONGEST[program]
    shown = tqdm(desc=f" * {name}", bar_format="{desc}: {postfix} ({elapsed})", disable=None, leave=False)
    if shown.disable:  # nobody watches
        log.info("%s", announcement)
    root = str(Path(keras_server.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    with (
        shown,
        tempfile.TemporaryFile("w+", errors="replace") as noise,
        subprocess.Popen(
            [sys.executable, "-P", "-m", f"keras_server.models.{program}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=noise,
            text=True,
            env=environment,
        ) as process,
        killed_after(limit, process) as late,
    ):
        assert process.stdin
        assert process.stdout
        print(json.dumps(asdict(job)), file=process.stdin, flush=True)
        for line in process.stdout:
            message = json.loads(line)
            if "log" in message:
                log.log(message["level"], "%s", message["log"])
            stage = message.get("stage", stage)
            shown.set_postfix_str(stage)
            told |= message
            if "folder" in told or "error" in told:  # what it has forked may hold the pipe for as long as it likes
                break
        status = process.wait()
        process.stdin.close()
        if "download" in told:
            raise DownloadError(name, told["download"])
        if "error" in told:
            raise StartupError(told["error"])
        if "folder" in told:
            return Path(told["folder"])
        if late.is_set():
            sentence = f"the process that {program}s it was still {stage} after {limit:.0f} seconds, and was ended."
            raise StartupError(f"{name} cannot be served: {sentence}")
        noise.seek(0)
        print(noise.read(), file=sys.stderr)
    how = f"signal {-status}" if status < 0 else f"status {status}"
    if status == -9:
        raise StartupError(f"The process that {program}s {name} was killed while {stage}, as when memory runs out.")
    sentence = f"the process that {program}s it ended with {how} while {stage}"
    if program == "quantize" or stage.startswith(("converting", "comparing")):
        raise Crashed(sentence)
    raise StartupError(f"{name} cannot be served: {sentence}; what it printed stands above.")


@contextlib.contextmanager
def killed_after(seconds: float, process: subprocess.Popen[str]) -> Iterator[threading.Event]:
    """Kill a process that is still there after so many seconds, and set the event then."""
    late = threading.Event()

    def kill() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(seconds, kill)
    timer.start()
    try:
        yield late
    finally:
        timer.cancel()

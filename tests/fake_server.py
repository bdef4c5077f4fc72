"""The real server around a fake model that obeys lines on standard input; it starts without TensorFlow or OpenVINO.

    python fake_server.py '{"HEAD_SECONDS": 1}' --port 0 ...

The first argument sets constants of the front, the log and telemetry, the others are the server's own. Each line on
standard input is a command, answered by one line of JSON on standard output: hold and go stop and start the model, once
lets one batch pass, fail and die make the next batch raise an exception or end the model's thread, forget collects the
garbage and starts the peak of the memory anew, stick keeps the event loop from ever turning again, stats only answers.
"""

import gc
import json
import math
import os
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

import run_keras_server as server
from keras_server import telemetry
from keras_server.front import limits, logs
from keras_server.front import server as front
from keras_server.models.served import Served
from keras_server.models.spec import Spec

gate = threading.Condition()
passes: float = math.inf  # how many batches are let through
fate: list[str] = []
computed = {"batches": 0, "rows": 0}
fronts: list[front.Front] = []


def run(inputs: list[np.ndarray]) -> list[np.ndarray]:
    """Answer with class 235, German_shepherd."""
    global passes
    with gate:
        gate.wait_for(lambda: passes)
        passes -= 1
    if fate:
        raise {"fail": ArithmeticError, "die": SystemExit}[fate.pop()]("as the test wished")
    computed["batches"] += 1
    computed["rows"] += len(inputs[0])
    return [np.eye(1000, dtype=np.float32)[np.full(len(inputs[0]), 235)]]


run.lanes = 1  # batches at a time


def stats() -> dict[str, Any]:
    """Return what the tests want to know of this process."""
    memory = dict(re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE))
    (found,) = fronts
    return computed | {
        "resident": int(memory["VmRSS"]) * 1024,
        "peak": int(memory["VmHWM"]) * 1024,
        "threads": threading.active_count(),
        "files": len(os.listdir("/proc/self/fd")),
        "busy": bool(server.model.batcher.busy),
        "waiting": server.model.batcher.waiting,
        "queued": len(found.predictions.queue) + len(found.pages.queue),
        "running": found.predictions.running + found.pages.running,
        "held": found.held,
        "bodies": len(found.bodies),
        "connections": len(found.pool),
    }


def obey() -> None:
    """Carry out the commands on standard input."""
    global passes
    for line in sys.stdin:
        command = line.strip()
        if command in ("hold", "go", "once"):
            with gate:
                passes = {"hold": 0, "go": math.inf, "once": passes + 1}[command]
                gate.notify_all()
        elif command == "forget":
            gc.collect()
            Path("/proc/self/clear_refs").write_text("5")
        elif command == "stick":
            fronts[0].loop.run_callback_threadsafe(time.sleep, 3600)
        elif command != "stats":
            fate.append(command)
        server.log.handlers[0].flush()  # so that a test finds in the log what came before
        print("told " + json.dumps(stats()), flush=True)


class Front(front.Front):
    """A front that stats() finds."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        fronts.append(self)
        threading.Thread(target=obey, daemon=True).start()


def main() -> int:
    """Serve the fake model."""
    for name, value in json.loads(sys.argv[1]).items():
        (module,) = [module for module in (limits, logs, telemetry) if hasattr(module, name)]
        setattr(module, name, value)

    def load_model() -> None:
        settings = server.settings
        server.model = Served(Spec(engine="fake"), run, settings.max_batch, settings.queue_size)

    vars(server).update(Front=Front, load_model=load_model)
    return server.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())

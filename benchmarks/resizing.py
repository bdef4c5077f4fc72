"""What resizing with SIMD gains: the resize alone, and through the server, beside Pillow in turn.

    python benchmarks/resizing.py    # where requirements-resize.txt is installed

The bundled model is sent the 500x375 JPEG as a form. The resize alone is counted by the thread's processor time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from PIL import Image  # noqa: E402
from servers import Server, free_port, load, make_picture  # noqa: E402

from keras_server import resampling  # noqa: E402

TARGET = (224, 224)


def resizers(size: tuple[int, int]) -> dict[str, Callable[[], Image.Image]]:
    """Return both ways to resize a photograph of this size."""
    photo, box = Image.open(HERE.parent / "dog.jpg").convert("RGB").resize(size), (0, 0, *size)
    return {
        "Pillow": lambda: photo.resize(TARGET, Image.Resampling.BICUBIC, box, resampling.GAP),
        "SIMD": lambda: resampling.with_simd(photo, TARGET, box),
    }


def milliseconds(resize: Callable[[], Image.Image]) -> float:
    """Return what one resize takes of a processor: the median of 300."""
    found = []
    for _ in range(300):
        begin = time.thread_time()
        resize()
        found.append(time.thread_time() - begin)
    return 1000 * statistics.median(found)


def count(seconds: float) -> int:
    """Return how far a thread of pure Python counts meanwhile."""
    number, end = 0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        number += 1
    return number


def free_share(resize: Callable[[], Image.Image]) -> float:
    """Return the share of its speed that pure Python keeps beside a thread that resizes: the median of 9, in turn."""
    shares, going, ended = [], threading.Event(), threading.Event()

    def keep_resizing() -> None:
        while not ended.is_set():
            going.wait()
            resize()

    thread = threading.Thread(target=keep_resizing)
    thread.start()
    for _ in range(9):
        going.clear()
        alone = count(0.3)
        going.set()
        shares.append(count(0.3) / alone)
    ended.set()
    thread.join()
    return statistics.median(shares)


def measure_server(rounds: int, seconds: float, clients: list[int]) -> dict[int, dict[str, list[float]]]:
    """Return the requests/s of each round, by the number of clients and the way to resize."""
    found: dict[int, dict[str, list[float]]] = {count: {"Pillow": [], "SIMD": []} for count in clients}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        picture = make_picture(folder, "photo", (500, 375))
        (folder / "hidden").mkdir()  # a module in the place of the package, that cannot be imported
        (folder / "hidden" / "cykooz_resizer.py").write_text("raise ImportError\n")
        servers = {}
        for way in ("Pillow", "SIMD"):
            (folder / way).mkdir()
            environment = os.environ | ({"PYTHONPATH": str(folder / "hidden")} if way == "Pillow" else {})
            port = free_port()
            command = [sys.executable, str(HERE.parent / "run_keras_server.py"), "--port", str(port)]
            command += ["--log-level", "error"]
            servers[way] = stack.enter_context(Server(command, environment, port, folder / way))
            servers[way].first_answer(picture)
            said = servers[way].log.read_text()
            assert ("resized by cykooz-resizer" in said) == (way == "SIMD"), said
        for number in range(rounds + 1):
            for count in clients:
                for way in ("Pillow", "SIMD") if number % 2 else ("SIMD", "Pillow"):
                    load_found = load(servers[way].port, picture, count, seconds)
                    assert not load_found["errors"]
                    if number:  # the first round warms up
                        found[count][way].append(load_found["rps"])
    return found


def main() -> None:
    """Measure, and print both tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each load")
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 8, 32])
    options = parser.parse_args()
    if not resampling.simd:
        parser.error("cykooz-resizer is not installed: pip install -r requirements-resize.txt")
    print("| to 224x224 | Pillow | SIMD | gain | Python beside Pillow | beside SIMD |\n|---|---|---|---|---|---|")
    for size in ((500, 375), (1000, 750)):
        both = resizers(size)
        took = [milliseconds(resize) for resize in both.values()]
        free = [f"{free_share(resize):.2f}" for resize in both.values()]
        cells = [f"{each:.2f} ms" for each in took] + [f"{took[0] / took[1]:.1f}x", *free]
        print(f"| {size[0]}x{size[1]} | {' | '.join(cells)} |", flush=True)
    print("\n| clients | Pillow, requests/s | SIMD, requests/s | ratio | ratios of the rounds |\n|---|---|---|---|---|")
    for count, ways in measure_server(options.rounds, options.seconds, options.clients).items():
        before, after = (statistics.median(ways[way]) for way in ("Pillow", "SIMD"))
        ratios = sorted(b / a for a, b in zip(ways["Pillow"], ways["SIMD"], strict=True))
        cells = [
            f"{before:.1f}",
            f"{after:.1f}",
            f"{statistics.median(ratios):.2f}",
            f"{ratios[0]:.2f} to {ratios[-1]:.2f}",
        ]
        print(f"| {count} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

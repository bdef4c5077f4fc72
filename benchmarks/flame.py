"""Draw where the processor time of a request goes: a flame graph of this server's threads under load.

    pip install py-spy    # in an environment of its own; it needs root, or leave to ptrace
    python benchmarks/flame.py docs/request.svg --py-spy PATH [--model bundled] [--clients 8] [--seconds 10]

Only running threads are sampled. OpenVINO's own threads have no frames of Python: what they compute is not in it.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from html import escape
from pathlib import Path

from contestants import arguments_of, environment_of
from servers import HERE, Server, free_port, load, make_numbers, make_picture

WIDTH, ROW, LETTER = 1200, 17, 6.3  # pixels
LEAST = 0.004  # of all samples: what is narrower cannot be seen
COLOURS = ("#e8a87c", "#f2c078", "#f6d186", "#e79f71", "#f3b391", "#eecb8b")

Stack = tuple[str, ...]


def frames(line: str) -> tuple[Stack, int]:
    """Return the frames of a line of py-spy's raw format, outermost first, as module.function, and its samples."""
    stack, _, count = line.rpartition(" ")
    return tuple(named(frame) for frame in stack.split(";")), int(count)


def named(frame: str) -> str:
    """Return "package/module.function" for "function (/a/path/package/module.py:12)": no folder of this machine."""
    found = re.fullmatch(r"(.+) \((.+?\.\w+)(?::\d+)?\)", frame)
    if not found:
        return frame
    function, path = found.groups()
    return f"{'/'.join(Path(path).with_suffix('').parts[-2:])}.{function}"


def draw(stacks: Counter[Stack], title: str) -> str:
    """Return the flame graph as SVG: a box for each frame, as wide as its share of the samples, callers at the top."""
    whole, boxes = sum(stacks.values()), list[str]()
    deepest = 0

    def level(some: list[tuple[Stack, int]], depth: int, left: float) -> None:
        nonlocal deepest
        below: dict[str, list[tuple[Stack, int]]] = {}
        for stack, count in some:
            if len(stack) > depth:
                below.setdefault(stack[depth], []).append((stack, count))
        for name, part in sorted(below.items()):
            share = sum(count for _, count in part) / whole
            if share >= LEAST:
                deepest = max(deepest, depth)
                boxes.append(box(name, share, depth, left))
                level(part, depth + 1, left)
            left += share * WIDTH

    level(list(stacks.items()), 0, 0)
    height = (deepest + 3) * ROW
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="monospace"'
    head += ' font-size="11">'
    return "\n".join([head, f'<text x="4" y="13">{escape(title)}</text>', *boxes, "</svg>\n"])


def box(name: str, share: float, depth: int, left: float) -> str:
    """Return one frame."""
    width, top = share * WIDTH, (depth + 1.5) * ROW
    colour = COLOURS[sum(name.encode()) % len(COLOURS)]
    shown = name[: int(width / LETTER) - 1] if width > 4 * LETTER else ""
    return (
        f'<g><title>{escape(name)}: {share:.1%}</title><rect x="{left:.1f}" y="{top:.0f}" width="{width:.1f}" '
        f'height="{ROW - 1}" fill="{colour}"/><text x="{left + 2:.1f}" y="{top + 12:.0f}">{escape(shown)}</text></g>'
    )


def record(args: argparse.Namespace, folder: Path) -> tuple[Counter[Stack], float]:
    """Return the samples of a server under load, and its requests/s."""
    port, raw = free_port(), folder / "stacks.txt"
    payload = make_numbers(folder) if args.model == "numbers" else make_picture(folder, "small", (500, 375))
    command = [sys.executable, str(HERE.parent / "run_keras_server.py"), "--port", str(port), *arguments_of(args.model)]
    with Server(command, environment_of(args.model, port, folder), port, folder) as server:
        server.first_answer(payload)
        load(port, payload, args.clients, 2)
        spying = [args.py_spy, "record", "--pid", str(server.process.pid), "--format", "raw", "--output", str(raw)]
        spying += ["--duration", str(args.seconds), "--rate", "200"]
        with subprocess.Popen(spying, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as spy:
            rate = load(port, payload, args.clients, args.seconds)["rps"]
            spy.wait()
    stacks = Counter[Stack]()
    for line in raw.read_text().splitlines():
        stack, count = frames(line)
        stacks[stack] += count
    return stacks, rate


def main() -> None:
    """Record, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--py-spy", default="py-spy")
    parser.add_argument("--model", default="bundled", choices=["resnet50", "bundled", "numbers"])
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=int, default=10)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as folder:
        stacks, rate = record(args, Path(folder))
    title = f"{args.model}, {args.clients} clients: {sum(stacks.values())} samples of running threads"
    args.out.write_text(draw(stacks, title))
    print(f"{title}, {rate:.0f} requests/s under the eyes of py-spy")


if __name__ == "__main__":
    main()

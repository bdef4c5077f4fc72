"""Turn the numbers of bench.py into Markdown.

Alone, it writes the report again from kept numbers:

python benchmarks/report.py benchmarks/results.json benchmarks/RESULTS.md
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, Literal

TITLES = {
    "tutorial": "the tutorial's",
    "ours-float32": "this one, float32",
    "ours-bfloat16": "this one, bfloat16",
    "litserve": "LitServe",
    "bentoml": "BentoML",
    "ray": "Ray Serve",
}
PEERS = ("litserve", "bentoml", "ray")
MODEL_TITLES = {"resnet50": "ResNet50", "bundled": "EfficientNet-Lite0 (bundled)"}


class Numbers:
    """Medians over the rounds of a run. What was not measured raises KeyError."""

    def __init__(self, results: dict[str, Any]):
        self.results = results
        small = [row for row in results["loads"] if row["picture"] == "small"]
        self.models = [model for model in MODEL_TITLES if any(row["model"] == model for row in small)]
        self.contestants = [name for name in TITLES if any(row["contestant"] == name for row in small)]
        self.clients = sorted({row["clients"] for row in small})
        self.precisions = list(results["limits"][0]["engine"])

    def rows(self, table: str, **wanted: Any) -> list[dict[str, Any]]:
        """Return the rows that have the wanted values, one a round."""
        found = [row for row in self.results[table] if wanted.items() <= row.items()]
        if not found:
            raise KeyError(f"{table}: {wanted}")
        return found

    def load(self, model: str, contestant: str, clients: int, what: str, picture: str = "small") -> float:
        """Return the median of what was measured under a load."""
        rows = self.rows("loads", model=model, contestant=contestant, clients=clients, picture=picture)
        return median(row[what] for row in rows)

    def errors(self, model: str, contestant: str, clients: int, picture: str = "small") -> int:
        """Return the errors of all rounds."""
        rows = self.rows("loads", model=model, contestant=contestant, clients=clients, picture=picture)
        return sum(row["errors"] for row in rows)

    def engine(self, model: str, precision: str, what: str) -> float:
        """Return the median of a measure of the engine alone."""
        return median(row["engine"][precision][what] for row in self.rows("limits", model=model))

    def decoding_ms(self, picture: str, what: str = "decoding_ms") -> float:
        """Return the median time to decode and prepare a picture, as this server does it or plainly ("plain_ms")."""
        return median(row[what][picture] for row in self.results["limits"])

    def best_peer(self, model: str, clients: int) -> float:
        """Return the most requests/s that a peer reached."""
        rates = [self.load(model, peer, clients, "rps") for peer in PEERS if peer in self.contestants]
        if not rates:
            raise KeyError("no peer was measured")
        return max(rates)

    def limit_of(self, model: str, contestant: str) -> float:
        """Return the images/s of the engine alone, in the precision of the contestant."""
        precision = "bfloat16" if contestant == "ours-bfloat16" else "float32"
        return self.engine(model, precision, "images_per_s")


# ----------------------------------------------------------------------------------------------------------------------
# What issue 3 asks for
# ----------------------------------------------------------------------------------------------------------------------


def targets(n: Numbers) -> list[tuple[str, str, float, Callable[[], float]]]:
    """Return the targets, all for ResNet50: what, at least or at most, how much, and how to find out."""

    def rps(clients: int, contestant: str = "ours-float32") -> float:
        return n.load("resnet50", contestant, clients, "rps")

    def spread(clients: int) -> float:
        return n.load("resnet50", "ours-float32", clients, "p99_ms") / p50(clients)

    def p50(clients: int) -> float:
        return n.load("resnet50", "ours-float32", clients, "p50_ms")

    def limit(precision: str) -> float:
        return n.engine("resnet50", precision, "images_per_s")

    def large_gain() -> float:
        return n.load("resnet50", "ours-float32", 8, "rps", "large") / n.load("resnet50", "tutorial", 8, "rps", "large")

    bf16 = "ours-bfloat16"
    return [
        ("8 clients, float32: requests/s to the tutorial's", "≥", 3.5, lambda: rps(8) / rps(8, "tutorial")),
        ("8 clients, float32: requests/s to the best peer's", "≥", 1.4, lambda: rps(8) / n.best_peer("resnet50", 8)),
        ("8 clients, float32: requests/s to the engine alone", "≥", 0.85, lambda: rps(8) / limit("float32")),
        ("8 clients, bfloat16: requests/s to the tutorial's", "≥", 6, lambda: rps(8, bf16) / rps(8, "tutorial")),
        ("8 clients, bfloat16: requests/s to the engine alone", "≥", 0.75, lambda: rps(8, bf16) / limit("bfloat16")),
        (
            "1 client: p50 to the engine alone plus decoding",
            "≤",
            1.35,
            lambda: p50(1) / (n.engine("resnet50", "float32", "one_ms") + n.decoding_ms("small")),
        ),
        ("32 clients: requests/s to those of 8", "≥", 1, lambda: rps(32) / rps(8)),
        ("128 clients: requests/s to those of 8", "≥", 1, lambda: rps(128) / rps(8)),
        ("32 clients: errors", "≤", 0, lambda: n.errors("resnet50", "ours-float32", 32)),
        ("128 clients: errors", "≤", 0, lambda: n.errors("resnet50", "ours-float32", 128)),
        ("32 clients: p99 to p50", "≤", 3, lambda: spread(32)),
        ("128 clients: p99 to p50", "≤", 3, lambda: spread(128)),
        (
            "any number of clients: requests/s to the best peer's, the least",
            ">",
            1,
            lambda: min(rps(clients) / n.best_peer("resnet50", clients) for clients in n.clients),
        ),
        (
            "12 megapixels, 8 clients: gain over the tutorial, to the gain with the small picture",
            ">",
            1,
            lambda: large_gain() / (rps(8) / rps(8, "tutorial")),
        ),
    ]


def acceptance(n: Numbers) -> list[str]:
    """Return the table of the targets."""
    lines = ["| ResNet50 | target | measured | met |", "|---|---:|---:|---|"]
    for what, relation, target, measure in targets(n):
        try:
            measured = round(measure(), 2)
        except (KeyError, ZeroDivisionError):
            lines.append(f"| {what} | {relation} {target:g} | not measured | |")
            continue
        met = {"≥": measured >= target, "≤": measured <= target, ">": measured > target}[relation]
        shown = f"{measured:.0f}" if what.endswith("errors") else f"{measured:.2f}"
        lines.append(f"| {what} | {relation} {target:g} | {shown} | {'yes' if met else '**no**'} |")
    return lines


# ----------------------------------------------------------------------------------------------------------------------
# Tables
# ----------------------------------------------------------------------------------------------------------------------


def milliseconds(n: Numbers, model: str, contestant: str, clients: int, what: str, picture: str = "small") -> str:
    """Return a percentile; "≥" where the load ended before the slowest answers came."""
    seen = n.load(model, contestant, clients, "answers", picture) >= 1.5 * clients
    return f"{'' if seen else '≥ '}{n.load(model, contestant, clients, what, picture):,.0f}"


def load_table(n: Numbers, model: str, picture: str, clients_of: list[int], contestants: list[str]) -> list[str]:
    """Return what each contestant did under each load."""
    lines = [
        "| clients | server | requests/s | (from, to) | to the tutorial's | to the limit | p50 ms | p99 ms | errors |",
        "|---:|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for clients in clients_of:
        for contestant in contestants:
            rows = n.rows("loads", model=model, contestant=contestant, clients=clients, picture=picture)
            rate = n.load(model, contestant, clients, "rps", picture)
            try:
                gain = f"{rate / n.load(model, 'tutorial', clients, 'rps', picture):.1f}"
            except (KeyError, ZeroDivisionError):
                gain = ""
            cells = [
                str(clients),
                TITLES[contestant],
                f"{rate:.1f}",
                f"({min(row['rps'] for row in rows):.1f}, {max(row['rps'] for row in rows):.1f})",
                gain,
                f"{rate / n.limit_of(model, contestant):.2f}",
                milliseconds(n, model, contestant, clients, "p50_ms", picture),
                milliseconds(n, model, contestant, clients, "p99_ms", picture),
                str(n.errors(model, contestant, clients, picture)),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def start_table(n: Numbers) -> list[str]:
    """Return what each contestant took to start, and its memory after the load."""
    lines = ["| server | model | first answer, s | (from, to) | memory, MB |", "|---|---|---:|---|---:|"]
    for model in n.models:
        for contestant in n.contestants:
            rows = n.rows("starts", model=model, contestant=contestant)
            seconds = [row["seconds"] for row in rows]
            memory = median(row["memory_mb"] for row in rows)
            lines.append(
                f"| {TITLES[contestant]} | {MODEL_TITLES[model]} | {median(seconds):.1f} "
                f"| ({min(seconds):.1f}, {max(seconds):.1f}) | {memory:,.0f} |"
            )
    return lines


def limit_table(n: Numbers) -> list[str]:
    """Return what the engine does alone."""
    lines = ["| model | engine alone | images/s, batches of 8 | a batch of one, ms |", "|---|---|---:|---:|"]
    for model in n.models:
        for precision in n.precisions:
            rate, one = (n.engine(model, precision, what) for what in ("images_per_s", "one_ms"))
            lines.append(f"| {MODEL_TITLES[model]} | {precision} | {rate:.1f} | {one:.1f} |")
    return lines


def render(results: dict[str, Any]) -> str:
    """Return the report."""
    n = Numbers(results)
    labels = {(row["model"], row["label"]) for row in results["starts"] if row["contestant"] != "ours-bfloat16"}
    lines = [
        "# Results of `make bench`",
        "",
        f"{results['date']}, {results['machine']}. Medians of {results['rounds']} rounds with "
        f"{results['seconds']} s for a load, {results['minutes']:.0f} minutes in all. "
        f"Other programs used up to {results['others_busy']:.0%} of the processors before, between and after rounds.",
        "",
        ", ".join(f"{name} {version}" for name, version in results["versions"].items()) + ".",
        "",
        *[f"- Not measured: {TITLES[name]}: {why}." for name, why in (results["skipped"] | results["failed"]).items()],
        *(["- **The servers disagree on the picture's label.**"] if len(labels) > len(n.models) else []),
        "",
        "![Requests per second against clients](throughput.png)",
        "",
        "## What was asked for",
        "",
        *acceptance(n),
        "",
        "## The limit",
        "",
        *limit_table(n),
        "",
        f"Decoding and preparing alone, in one thread: the 500x375 JPEG {n.decoding_ms('small'):.1f} ms "
        f"({n.decoding_ms('small', 'plain_ms'):.1f} ms the tutorial's way), the 12-megapixel one "
        f"{n.decoding_ms('large'):.1f} ms ({n.decoding_ms('large', 'plain_ms'):.1f} ms).",
        "",
    ]
    for model in n.models:
        lines += [f"## {MODEL_TITLES[model]}", "", *load_table(n, model, "small", n.clients, n.contestants), ""]
    large = [row for row in results["loads"] if row["picture"] == "large"]
    if large:
        counts = sorted({row["clients"] for row in large})
        contestants = [name for name in TITLES if any(row["contestant"] == name for row in large)]
        lines += ["## ResNet50, a JPEG of 12 megapixels", ""]
        lines += [*load_table(n, "resnet50", "large", counts, contestants), ""]
    lines += ["## Start and memory", "", *start_table(n)]
    return "\n".join(lines).replace("\n\n\n", "\n\n")


def put(target: Path, marker: str, text: str, new: Literal["first", "last"] | None = None) -> None:
    """Rewrite the section between two markers of a file, and leave all else byte for byte.

    `new` is where a section goes that the file does not have yet.
    """
    old = target.read_bytes().decode() if target.exists() else ""
    if new and f"<!-- {marker}:begin -->" not in old:
        empty = f"<!-- {marker}:begin --><!-- {marker}:end -->\n"
        old = "\n".join(part for part in ([empty, old] if new == "first" else [old, empty]) if part)
    # MARKER:begin and MARKER:end, or MARKER and /MARKER
    pattern = rf"(<!-- {marker}(?::begin)? -->).*?(<!-- (?:{marker}:end|/{marker}) -->)"
    found, count = re.subn(pattern, lambda match: f"{match[1]}\n{text}\n{match[2]}", old, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"error: {target} has not exactly one section {marker}")
    target.write_bytes(found.encode())


def write(results: dict[str, Any], target: Path) -> None:
    """Write the report into its section."""
    put(target, "bench", render(results), new="first")


if __name__ == "__main__":
    write(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))

"""Turn the numbers of bench.py into Markdown.

Alone, it writes the report again from kept numbers:

python benchmarks/report.py benchmarks/results.json benchmarks/RESULTS.md
"""

import json
import re
import sys
from pathlib import Path
from statistics import median
from typing import Literal

from medians import MODEL_TITLES, TITLES, Load, Medians, Row, if_measured
from targets import acceptance

PAYLOAD_TITLES = {"small": "a JPEG of 500x375", "large": "a JPEG of 12 megapixels", "four": "JSON to /v1"}


# ----------------------------------------------------------------------------------------------------------------------
# What is kept
# ----------------------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[Row]:
    """Return the kept runs, the latest first; none where there is no file."""
    return json.loads(path.read_text())["runs"] if path.exists() else []


def replaced(runs: list[Row], new: Row) -> list[Row]:
    """Return the runs with a new one before them, without those of which it measured everything anew.

    A run stays whole or goes: the ratios in it are those of one machine on one day.
    """
    return [new, *(run for run in runs if not Medians(run).loads <= Medians(new).loads)]


def next_round(run: Row) -> int:
    """Return the number of the round that comes after those of a run."""
    return 1 + max(row["round"] for row in run["loads"])


def extended(runs: list[Row], more: Row) -> list[Row]:
    """Return the runs with more rounds in the latest of them. Raises SystemExit where the two are not of one kind."""
    latest, *older = runs
    for what in ("date", "machine", "seconds", "versions"):
        if latest[what] != more[what]:
            raise SystemExit(f"--more: the {what} differs from that of the rounds before: begin anew, without --more.")
    joined = {what: latest[what] + more[what] for what in ("minutes", "starts", "loads", "limits")}
    joined["rounds"] = Medians(joined).rounds()  # which may be of another part
    joined |= {what: latest[what] | more[what] for what in ("skipped", "failed")}
    joined["others_busy"] = max(latest["others_busy"], more["others_busy"])
    return [latest | joined | {"complete": latest["complete"] and more["complete"]}, *older]


# ----------------------------------------------------------------------------------------------------------------------
# Tables
# ----------------------------------------------------------------------------------------------------------------------


def milliseconds(n: Medians, what: str, load: Load) -> str:
    """Return a percentile; "≥" where the load ended before the slowest answers came."""
    value, seen = n.load(what, *load), n.load("answers", *load) >= 1.5 * load[-1]
    return f"{'' if seen else '≥ '}{value:,.{1 if value < 10 else 0}f}"


def shown(value: float | None, digits: int) -> str:
    """Return a figure, or nothing for what was not measured."""
    return "" if value is None else f"{value:.{digits}f}"


def load_table(n: Medians, model: str, payload: str) -> list[str]:
    """Return what each contestant did under each load."""
    lines = [
        "| clients | server | requests/s | (from, to) | to the tutorial's | to the engine | to engine plus decoding "
        "| p50 ms | p99 ms | errors |",
        "|---:|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    loads = [load for load in n.loads if (load[0], load[2]) == (model, payload)]
    for load in sorted(loads, key=lambda load: (load[3], n.contestants.index(load[1]))):
        _, contestant, _, clients = load
        precision = contestant.partition("-")[2] or "float32"
        rate, rates = n.load("rps", *load), [row["rps"] for row in n.rows_of(load)]
        ratios = [
            (if_measured(lambda: n.load("rps", model, "tutorial", payload, clients)), 1),  # noqa: B023
            (if_measured(lambda: n.engine(model, precision)), 2),  # noqa: B023
            (if_measured(lambda: n.possible(model, precision, payload)), 2),  # noqa: B023
        ]
        cells = [
            str(clients),
            TITLES[contestant],
            f"{rate:.1f}",
            f"({min(rates):.1f}, {max(rates):.1f})",
            *(shown(rate / whole if whole else None, digits) for whole, digits in ratios),
            milliseconds(n, "p50_ms", load),
            milliseconds(n, "p99_ms", load),
            str(n.errors(*load)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def start_table(n: Medians) -> list[str]:
    """Return what each contestant took to start, and its memory after the load."""
    lines = ["| server | model | first answer, s | (from, to) | memory, MB |", "|---|---|---:|---|---:|"]
    for model in n.models:
        for contestant in n.contestants:
            rows = [row for row in n.run["starts"] if (row["model"], row["contestant"]) == (model, contestant)]
            if rows:
                seconds = [row["seconds"] for row in rows]
                lines.append(
                    f"| {TITLES[contestant]} | {MODEL_TITLES[model]} | {median(seconds):.1f} "
                    f"| ({min(seconds):.1f}, {max(seconds):.1f}) | {median(row['memory_mb'] for row in rows):,.0f} |"
                )
    return lines


def limit_table(n: Medians) -> list[str]:
    """Return what the engine does alone, and what decoding leaves of it."""
    lines = [
        "| model | precision | images/s of the engine alone | with the 500x375 JPEG decoded | a batch of one, ms |",
        "|---|---|---:|---:|---:|",
    ]
    for model in n.models:
        for precision in next((row["engine"] for row in n.run["limits"] if row["model"] == model), {}):
            figures = (n.engine(model, precision), n.possible(model, precision, "small"), n.one_ms(model, precision))
            lines.append(f"| {MODEL_TITLES[model]} | {precision} | {' | '.join(f'{f:.1f}' for f in figures)} |")
    return lines


def about(n: Medians) -> list[str]:
    """Return when, on what and how it was measured."""
    run = n.run
    part = "" if run["complete"] else " A part of what `make bench` measures."
    labels = {
        (row["model"], row["label"]) for row in run["starts"] if row["contestant"] in ("tutorial", "ours-float32")
    }
    return [
        f"{run['machine']}. Medians of {run['rounds']} rounds with {run['seconds']:g} s for a load, "
        f"{run['minutes']:.0f} minutes in all. Other programs used up to {run['others_busy']:.0%} of the processors "
        f"before, between and after rounds.{part}",
        "",
        ", ".join(f"{name} {version}" for name, version in run["versions"].items()) + ".",
        "",
        *([run["note"], ""] if "note" in run else []),
        *[f"- Not measured: {TITLES[name]}: {why}." for name, why in (run["skipped"] | run["failed"]).items()],
        *(["- **The servers disagree on the label.**"] if len(labels) > len(n.models) else []),
    ]


def render_run(run: Row) -> list[str]:
    """Return the section of one run."""
    n = Medians(run)
    lines = [f"## {run['date']}", "", *about(n), ""]
    if run["complete"]:
        lines += ["![Requests per second against clients](throughput.png)", ""]
    lines += ["### What was asked for", "", *acceptance(n), ""]
    if run["limits"]:
        small, large = (
            [f"{n.decoding_ms(payload, way):.1f} ms" for way in ("decoding_ms", "plain_ms")]
            for payload in ("small", "large")
        )
        lines += ["### The limit", "", *limit_table(n), ""]
        lines += [
            f"Decoding and preparing alone, in one thread: the 500x375 JPEG {small[0]} ({small[1]} the tutorial's "
            f"way), the 12-megapixel one {large[0]} ({large[1]}).",
            "",
        ]
    for model in n.models:
        for payload, title in PAYLOAD_TITLES.items():
            if any((load[0], load[2]) == (model, payload) for load in n.loads):
                lines += [f"### {MODEL_TITLES[model]}, {title}", "", *load_table(n, model, payload), ""]
    return [*lines, "### Start and memory", "", *start_table(n), ""]


def render(runs: list[Row]) -> str:
    """Return the report: the latest run, and older ones that measured what it did not."""
    lines = ["# Results of `make bench`", "", "The latest run comes first; ratios are those within a run.", ""]
    return "\n".join([*lines, *(line for run in runs for line in render_run(run))]).rstrip().replace("\n\n\n", "\n\n")


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


def write(runs: list[Row], target: Path) -> None:
    """Write the report into its section."""
    put(target, "bench", render(runs), new="first")


if __name__ == "__main__":
    write(read(Path(sys.argv[1])), Path(sys.argv[2]))

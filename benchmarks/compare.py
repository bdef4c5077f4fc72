"""What has changed between two runs of bench.py: what got worse stands first."""

from collections.abc import Callable
from typing import NamedTuple

from medians import MODEL_TITLES, TITLES, Load, Medians, Row, if_measured
from plan import CONTESTANTS

NOISE = 0.1  # of a change that says nothing


class Change(NamedTuple):
    """A figure in two runs, and how much better it has become, as a factor: below 1 it is worse."""

    what: str
    before: float
    now: float
    factor: float


def changes(new: Row, committed: list[Row]) -> list[str]:
    """Return lines on what has changed since the latest of the committed runs that measured it."""
    found: dict[str, Change] = {}
    foreign = False
    for old in committed:
        same = old["machine"] == new["machine"]
        for one in between(Medians(old), Medians(new), same):
            if one.what not in found:
                found[one.what], foreign = one, foreign or not same
    if not found:
        return ["Nothing of this is in the committed results."]
    worse = sorted((c for c in found.values() if c.factor < 1 - NOISE), key=lambda c: c.factor)
    better = sorted((c for c in found.values() if c.factor > 1 + NOISE), key=lambda c: -c.factor)
    lines = [f"Worse than the committed results by more than {NOISE:.0%}: {len(worse) or 'nothing'}"]
    lines += map(line, worse)
    lines += [f"Better by more than {NOISE:.0%}: {len(better) or 'nothing'}", *map(line, better)]
    lines.append(f"As before: {len(found) - len(worse) - len(better)}")
    if foreign:
        lines.append("Some of it was measured on another machine: that is compared as shares of the engine alone.")
    return lines


def line(one: Change) -> str:
    """Return a change in a line."""
    return f"  {one.factor:5.2f}x  {one.what}: {one.before:.4g} -> {one.now:.4g}"


def between(old: Medians, new: Medians, same_machine: bool) -> list[Change]:
    """Return the change of each figure that both runs have.

    On another machine requests/s are divided by the engine's, and neither numbers nor starts can be compared.
    """
    found = []
    # In the order of the contestants: ours come before the others.
    for load in sorted(new.loads & old.loads, key=lambda load: (CONTESTANTS.index(load[1]), *map(str, load))):
        model, contestant, payload, clients = load
        what = f"{TITLES[contestant]}, {MODEL_TITLES[model]}, {payload}, clients: {clients}: "
        what += "requests/s" if same_machine else "share of the engine"

        def rate(n: Medians, load: Load = load) -> float:
            return n.load("rps", *load) / (1 if same_machine else n.engine(load[0], "float32"))

        found += change(what, old, new, rate)
    for model, contestant in sorted({load[:2] for load in new.loads & old.loads}):
        for column, name in (("seconds", "seconds to the first answer"), ("memory_mb", "memory, MB")):

            def start(n: Medians, column: str = column, model: str = model, contestant: str = contestant) -> float:
                return n.start(column, model, contestant)

            if same_machine or column == "memory_mb":
                found += change(
                    f"{TITLES[contestant]}, {MODEL_TITLES[model]}: {name}", old, new, start, less_is_better=True
                )
    return found


def change(
    what: str, old: Medians, new: Medians, measure: Callable[[Medians], float], less_is_better: bool = False
) -> list[Change]:
    """Return the change of a figure, if both runs have it."""
    before, now = if_measured(lambda: measure(old)), if_measured(lambda: measure(new))
    if not before or not now:
        return []
    return [Change(what, before, now, before / now if less_is_better else now / before)]

"""What is asked of a run, as shares of what the processor can do and beside the others, and whether it was kept."""

from collections.abc import Callable
from typing import NamedTuple

from medians import MODEL_TITLES, TITLES, Medians, if_measured

OURS = "ours-float32"


class Target(NamedTuple):
    """A figure that has to be at least or at most so much."""

    what: str
    relation: str
    bound: float
    measure: Callable[[], float]


def targets(n: Medians) -> list[Target]:
    """Return all of them."""
    return [*of_large_models(n), *of_the_bundled_model(n), *of_numbers(n), *of_waiting(n)]


def of_large_models(n: Medians) -> list[Target]:
    """Return the targets of ResNet50's requests/s."""

    def rps(clients: int, contestant: str = OURS, payload: str = "small") -> float:
        return n.load("rps", "resnet50", contestant, payload, clients)

    def to_possible(precision: str) -> Callable[[], float]:
        return lambda: rps(8, f"ours-{precision}") / n.possible("resnet50", precision, "small")

    def to_tutorial(precision: str, payload: str = "small") -> Callable[[], float]:
        return lambda: rps(8, f"ours-{precision}", payload) / rps(8, "tutorial", payload)

    found = []
    for precision, share, gain in (("float32", 0.92, 2.8), ("bfloat16", 0.88, 5.5), ("int8", 0.85, 8.5)):
        begin = f"ResNet50, 8 clients, {precision}: requests/s to"
        found += [
            Target(f"{begin} engine plus decoding", "≥", share, to_possible(precision)),
            Target(f"{begin} the tutorial's", "≥", gain, to_tutorial(precision)),
        ]
    return [
        *found,
        Target(
            "ResNet50, 8 clients, float32: requests/s to the best peer's",
            "≥",
            1.4,
            lambda: rps(8) / n.best_peer("resnet50", "small", 8),
        ),
        Target(
            "ResNet50, 1 client, float32: p50 to engine plus decoding",
            "≤",
            1.35,
            lambda: (
                n.load("p50_ms", "resnet50", OURS, "small", 1)
                / (n.one_ms("resnet50", "float32") + n.decoding_ms("small"))
            ),
        ),
        Target("ResNet50, 128 clients: requests/s to those of 8", "≥", 1, lambda: rps(128) / rps(8)),
        Target(
            "ResNet50, 12 megapixels, 8 clients: gain over the tutorial's, to that with the small picture",
            ">",
            1,
            lambda: to_tutorial("float32", "large")() / to_tutorial("float32")(),
        ),
    ]


def of_the_bundled_model(n: Medians) -> list[Target]:
    """Return the targets of the bundled model's requests/s."""

    def rps(clients: int, precision: str) -> float:
        return n.load("rps", "bundled", f"ours-{precision}", "small", clients)

    found = []
    for clients in (8, 32):
        begin = f"bundled model, {clients} clients"

        def share(clients: int = clients) -> float:
            return rps(clients, "float32") / n.engine("bundled", "float32")

        def gain(clients: int = clients) -> float:
            return rps(clients, "int8") / rps(clients, "float32")

        found.append(Target(f"{begin}, float32: requests/s to the engine alone", "≥", 0.72, share))
        found.append(Target(f"{begin}, int8: requests/s to float32's", "≥", 2, gain))
    return found


def of_numbers(n: Medians) -> list[Target]:
    """Return the targets of a small model's requests/s."""

    def rps(clients: int, contestant: str = OURS) -> float:
        return n.load("rps", "numbers", contestant, "four", clients)

    found = []
    for clients in (1, 16, 64):
        begin = f"four numbers, {clients} client{'s' * (clients > 1)}: requests/s to"

        def gain(clients: int = clients) -> float:
            return rps(clients) / rps(clients, "fastapi")

        def ahead(clients: int = clients) -> float:
            return rps(clients) / n.best_peer("numbers", "four", clients)

        found.append(Target(f"{begin} those of {TITLES['fastapi']}", "≥", 1.3, gain))
        found.append(Target(f"{begin} the best peer's", ">", 1, ahead))
    return found


def of_waiting(n: Medians) -> list[Target]:
    """Return the targets of p99 and of errors."""
    found = []
    for model in ("resnet50", "bundled"):
        for clients in (8, 32, 128):
            load = (model, OURS, "small", clients)

            def spread(load: tuple[str, str, str, int] = load) -> float:
                return n.load("p99_ms", *load) / n.load("p50_ms", *load)

            def errors(load: tuple[str, str, str, int] = load) -> float:
                return n.errors(*load)

            begin = f"{MODEL_TITLES[model].partition(' ')[0]}, {clients} clients, float32:"
            found += [Target(f"{begin} p99 to p50", "≤", 2, spread), Target(f"{begin} errors", "≤", 0, errors)]
    return found


def acceptance(n: Medians) -> list[str]:
    """Return the table of the targets."""
    lines = ["| | target | measured | met |", "|---|---:|---:|---|"]
    for what, relation, bound, measure in targets(n):
        if (measured := if_measured(measure)) is None:
            lines.append(f"| {what} | {relation} {bound:g} | not measured | |")
            continue
        measured = round(measured, 2)
        met = {"≥": measured >= bound, "≤": measured <= bound, ">": measured > bound}[relation]
        shown = f"{measured:.0f}" if what.endswith("errors") else f"{measured:.2f}"
        lines.append(f"| {what} | {relation} {bound:g} | {shown} | {'yes' if met else '**no**'} |")
    return lines

"""Draw requests/s against clients from results.json. Runs in the environment that has matplotlib.

.venv-bench/bin/python benchmarks/plot.py results.json throughput.png
"""

import json
import sys

import matplotlib as mpl
from medians import MODEL_TITLES, TITLES, Medians, if_measured
from plan import CLIENTS

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import NullLocator

# Okabe and Ito's colours, which colour-blind readers can tell apart; the markers do it on paper, too.
LOOKS = {
    "ours-bfloat16": ("#D55E00", "D"),
    "ours-float32": ("#0072B2", "o"),
    "ours-int8": ("#56B4E9", "P"),
    "fastapi": ("#F0E442", "*"),
    "litserve": ("#009E73", "s"),
    "bentoml": ("#E69F00", "^"),
    "ray": ("#CC79A7", "v"),
    "tutorial": ("#000000", "x"),
}


def main(source: str, target: str) -> None:
    """Draw one panel a model."""
    with open(source) as file:
        numbers = Medians(json.load(file)["runs"][0])
    figure, panels = plt.subplots(
        1, len(numbers.models), figsize=(max(9, 5.5 * len(numbers.models)), 4.6), squeeze=False
    )
    for panel, model in zip(panels[0], numbers.models, strict=True):
        payload = "four" if model == "numbers" else "small"
        for contestant, (color, marker) in LOOKS.items():
            loads = [(model, contestant, payload, clients) for clients in CLIENTS[model]]
            if points := [(load[-1], numbers.load("rps", *load)) for load in loads if load in numbers.loads]:
                panel.plot(*zip(*points, strict=True), color=color, marker=marker, label=TITLES[contestant])
        for precision in ("float32", "bfloat16", "int8"):
            if limit := if_measured(lambda: numbers.engine(model, precision)):  # noqa: B023
                color, _ = LOOKS[f"ours-{precision}"]
                panel.axhline(limit, color=color, linestyle="--", label=f"the engine alone, {precision}")
        panel.set_title(MODEL_TITLES[model])
        panel.set_xscale("log", base=2)
        panel.set_xticks(CLIENTS[model], [str(clients) for clients in CLIENTS[model]])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set_xlabel("clients")
        panel.set_ylabel("requests/s")
        panel.set_ylim(bottom=0)
        panel.grid(color="#dddddd")
        panel.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    figure.savefig(target, dpi=120)


if __name__ == "__main__":
    main(*sys.argv[1:])

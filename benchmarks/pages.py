"""Predictions a second alone, and beside 64 clients that fetch a page over and over.

    .venv/bin/python benchmarks/pages.py

The page's clients compute on the server's processors, too: what remains is less than what the server leaves.
"""

from __future__ import annotations

import subprocess
import sys

from soak import Server, closed_loop

PAGES = ("/healthz", "/metrics", "/docs", "/openapi.json")
CLIENTS, SECONDS = 64, 4


def main() -> int:
    """Measure and print. Returns 1 where less than half of the predictions remain."""
    server, kept = Server(model="bundled"), True
    closed_loop(server, 8, 2)
    for page in PAGES:
        before = closed_loop(server, 8, SECONDS)["rps"]
        url = f"http://127.0.0.1:{server.port}{page}"
        with subprocess.Popen(
            ["wrk", "-t1", f"-c{CLIENTS}", f"-d{SECONDS + 2}", url], stdout=subprocess.DEVNULL
        ) as fetching:
            beside = closed_loop(server, 8, SECONDS)["rps"]
            fetching.wait()
        alone = (before + closed_loop(server, 8, SECONDS)["rps"]) / 2
        kept = kept and beside >= alone / 2
        print(f"{page:15} alone {alone:6.1f}/s, beside {CLIENTS} clients {beside:6.1f}/s ({beside / alone:.2f})")
    server.end()
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())

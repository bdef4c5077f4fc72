"""Change one thing at a time in the sources, and see which changes no test notices: a sample, by module.

    make mutants                                    the whole table, in under an hour on two cores
    make mutants ARGS="--only front,api --seed 7"   other changes of two modules

What stands for a module, which tests concern it, and how many changes are tried: [tool.mutants] in pyproject.toml.
The operators are those of cosmic-ray, and one of our own, a lost line; each is tried in a copy of the tracked files.
"""

import argparse
import ast
import contextlib
import difflib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import parso
from cosmic_ray import plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Example, Operator

ROOT = Path(__file__).resolve().parent.parent
PYTHON = ROOT / ".venv/bin/python"
Position = tuple[tuple[int, int], tuple[int, int]]  # of its first and past its last character: line, column


class LostLine(Operator):
    """Take out a statement that does something: a call, or a change of an attribute, an element or a sum."""

    def mutation_positions(self, node: Any) -> Iterator[Position]:
        """Give the position of such a statement."""
        if node.parent is None or node.parent.type != "simple_stmt":
            return
        called = node.type in ("atom_expr", "await_expr") and node.get_last_leaf().value == ")"
        target = node.children[0] if node.type == "expr_stmt" else None
        if called or (target and (target.type == "atom_expr" or node.children[1].get_code().strip() != "=")):
            if target and node.children[1].type == "annassign":
                return  # a field of a class
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        """Return `pass`."""
        nothing = parso.parse("pass").get_first_leaf()
        nothing.prefix = node.get_first_leaf().prefix
        return nothing

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        """Return what it does, as the library wants it."""
        return (Example("f(x)", "pass"),)


@dataclass
class Module:
    """What is changed together, and the tests that should notice."""

    name: str
    sources: list[str]  # patterns of paths
    tests: list[str]  # the quickest first: the first that fails ends the run
    seconds: float = 0  # that the tests take where nothing is changed


@dataclass(frozen=True)
class Mutant:
    """One changed file."""

    module: Module
    path: str
    operator: str
    code: str
    diff: tuple[str, ...]  # the lines taken out and put in, with - and + before them

    def __str__(self) -> str:
        return "\n    ".join((f"{self.module.name}: {self.path}, {self.operator}", *self.diff))


@dataclass
class Count:
    """What became of a module's mutants."""

    possible: int = 0
    results: list[tuple[Mutant, str]] = field(default_factory=list)

    def of(self, *words: str) -> int:
        """Return how many ended so."""
        return sum(word in words for _, word in self.results)


def annotations(source: str) -> list[Position]:
    """Return where annotations stand, which nothing computes."""
    nodes: list[ast.expr | None] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.arg | ast.AnnAssign):
            nodes.append(node.annotation)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            nodes.append(node.returns)
    return [
        ((node.lineno, node.col_offset), (node.end_lineno or 0, node.end_col_offset or 0)) for node in nodes if node
    ]


def operators(skipped: str) -> dict[str, Operator]:
    """Return cosmic-ray's operators that need no arguments, without those whose whole name matches, and our own."""
    found = {name: plugins.get_operator(name) for name in plugins.operator_names()}
    return {"LostLine": LostLine()} | {
        name: operator()
        for name, operator in found.items()
        if not operator.arguments() and not re.fullmatch(skipped, name.rpartition("/")[2])
    }


def mutants(module: Module, wanted: int, seed: int, known: dict[str, Operator]) -> tuple[int, list[Mutant]]:
    """Return in how many places something could be changed, and a sample: each place once, with any of its changes."""
    places: dict[tuple[str, Position], list[tuple[str, int]]] = {}
    for path in sorted(str(path.relative_to(ROOT)) for pattern in module.sources for path in ROOT.glob(pattern)):
        source = (ROOT / path).read_text("utf-8")
        tree, annotated = get_ast(source), annotations(source)
        for name, operator in known.items():
            positions = (position for node in ast_nodes(tree) for position in operator.mutation_positions(node))
            for occurrence, (start, end) in enumerate(positions):
                if not any(first <= start and end <= last for first, last in annotated):
                    places.setdefault((path, (start, end)), []).append((name, occurrence))
    chance = random.Random(f"{seed} {module.name}")
    sample = []
    for place in chance.sample(sorted(places), min(wanted, len(places))):
        name, occurrence = chance.choice(places[place])
        source = (ROOT / place[0]).read_text("utf-8")
        code = mutate_code(source, known[name], occurrence)
        lines = difflib.ndiff(source.splitlines(), code.splitlines())
        diff = tuple(f"{line[0]} {line[1:].strip()}" for line in lines if line[0] in "-+")
        sample.append(Mutant(module, place[0], name.rpartition("/")[2], code, diff))
    return len(places), sample


class Copy:
    """A copy of the tracked files, in which tests run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
        for name in filter(None, listed.decode().split("\0")):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)

    def test(self, tests: list[str], limit: float | None = None, compiled: bool = False) -> int | None:
        """Return the exit status of the tests, or None where they did not end in time."""
        command = [str(PYTHON), "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not ray", *tests]
        environment = os.environ | ({} if compiled else {"PYTHONDONTWRITEBYTECODE": "1"})
        with (
            open(self.folder / "last.txt", "wb") as output,
            subprocess.Popen(
                command,
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            ) as process,
        ):
            try:
                return process.wait(limit)
            except subprocess.TimeoutExpired:
                return None
            finally:
                with contextlib.suppress(ProcessLookupError):  # with the servers that the tests have started
                    os.killpg(process.pid, signal.SIGKILL)

    def try_out(self, mutant: Mutant) -> str:
        """Return what became of a mutant."""
        path = self.folder / mutant.path
        path.write_text(mutant.code, "utf-8")
        try:
            status = self.test(mutant.module.tests, limit=60 + 4 * mutant.module.seconds)
        finally:
            shutil.copy(ROOT / mutant.path, path)
        if status is None:
            return "hung"
        return {0: "not noticed", 1: "failed"}.get(status, "crashed")  # the last: no test could even be collected


def run(modules: list[Module], wanted: int, seed: int, skipped: str, copies: list[Copy]) -> dict[str, Count]:
    """Try the samples of all modules."""
    free: SimpleQueue[Copy] = SimpleQueue()
    for copy in copies:
        free.put(copy)
    counts = {module.name: Count() for module in modules}
    lock = threading.Lock()

    def unchanged(module: Module) -> None:
        copy = free.get()
        try:
            began = time.monotonic()
            if status := copy.test(module.tests, compiled=True):
                output = (copy.folder / "last.txt").read_text("utf-8", "replace")
                sys.exit(f"The tests of {module.name} fail where nothing is changed ({status}):\n{output[-3000:]}")
            module.seconds = time.monotonic() - began
        finally:
            free.put(copy)

    def changed(mutant: Mutant) -> None:
        copy = free.get()
        try:
            word = copy.try_out(mutant)
        finally:
            free.put(copy)
        with lock:
            counts[mutant.module.name].results.append((mutant, word))
            print(f"{word:12}{mutant}", flush=True)

    known = operators(skipped)
    with ThreadPoolExecutor(len(copies)) as pool:
        list(pool.map(unchanged, modules))
        print("; ".join(f"{module.name} {module.seconds:.0f} s" for module in modules), flush=True)
        sample: list[Mutant] = []
        for module in modules:
            counts[module.name].possible, chosen = mutants(module, wanted, seed, known)
            sample += chosen
        list(pool.map(changed, sample))
    return counts


def table(counts: dict[str, Count], equal: list[dict[str, str]]) -> str:
    """Return the table of docs/testing.md."""

    def is_equal(mutant: Mutant) -> bool:
        return any(row["file"] == mutant.path and f"+ {row['becomes']}" in mutant.diff for row in equal)

    lines = [
        "| module | places | tried | changed nothing | noticed | of these crashed, hung |",
        "|---|---|---|---|---|---|",
    ]
    for name, count in counts.items():
        alike = sum(word == "not noticed" and is_equal(mutant) for mutant, word in count.results)
        noticed, tried = count.of("failed", "crashed", "hung"), len(count.results)
        share = 100 * noticed / max(tried - alike, 1)
        hung = f"{count.of('crashed')}, {count.of('hung')}"
        lines.append(f"| {name} | {count.possible} | {tried} | {alike} | {noticed} ({share:.0f} %) | {hung} |")
    return "\n".join(lines)


def main() -> None:
    """Try the mutants and print the table, with the survivors before it."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["mutants"]
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="modules, with commas; all by default")
    parser.add_argument("--seed", type=int, default=config["seed"])
    parser.add_argument("--sample", type=int, default=config["sample"], help="changes of each module")
    parser.add_argument("--jobs", type=int, default=2, help="copies of the tree in which tests run at the same time")
    options = parser.parse_args()
    modules = [Module(name, **row) for name, row in config["modules"].items()]
    only = options.only.split(",") if options.only else [module.name for module in modules]
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copies = [Copy(Path(folder) / str(number)) for number in range(options.jobs)]
        chosen = [module for module in modules if module.name in only]
        counts = run(chosen, options.sample, options.seed, config["skipped"], copies)
    print()
    for count in counts.values():
        for mutant, word in count.results:
            if word == "not noticed":
                print(mutant)
    print(f"\nSeed {options.seed}:\n\n{table(counts, config['equal'])}")


if __name__ == "__main__":
    main()

"""The lists that `make quick` and `make mutants` go by: nothing in them has gone, and no source is left out."""

import tomllib

from conftest import ROOT, SLOW

MUTANTS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["mutants"]
ON_RAY = {"keras_server/ray_app.py"}  # which only a cluster's tests can try


def test_every_source_is_changed_and_has_tests_that_concern_it() -> None:
    patterns = [pattern for module in MUTANTS["modules"].values() for pattern in module["sources"]]
    changed = [str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern)]
    assert len(changed) == len(set(changed))
    sources = {*ROOT.glob("*.py"), *ROOT.glob("keras_server/**/*.py")} - {*ROOT.glob("keras_server/**/__init__.py")}
    assert {str(path.relative_to(ROOT)) for path in sources} - set(changed) == ON_RAY
    for module in MUTANTS["modules"].values():
        for test in module["tests"]:
            file, _, name = test.partition("::")
            assert f"def {name}" in (ROOT / file).read_text("utf-8")


def test_what_is_said_to_change_nothing_is_said_why() -> None:
    for row in MUTANTS["equal"]:
        assert (ROOT / row["file"]).exists()
        assert row["becomes"]
        assert row["why"]


def test_what_takes_long_is_there() -> None:
    assert [name for name in SLOW if not (ROOT / name).exists()] == []

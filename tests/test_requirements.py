"""The image's lock files, and the extras of the package: they agree with the requirements."""

import re
import tomllib
from importlib import metadata

import pytest
from conftest import ROOT
from packaging.requirements import Requirement

LOCKS = ("requirements.lock", "requirements-serve.lock")


def locked(name: str) -> dict[str, str]:
    """Return the versions in a lock file, each with its hashes; the file holds no address."""
    text = (ROOT / name).read_text("utf-8")
    assert "make lock" in text.splitlines()[1]
    assert not re.search("://|index|find-links", text)
    rows = re.findall(r"^([a-z0-9-]+)==(\S+) \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", text, re.MULTILINE)
    assert len(rows) == len(re.findall("^[a-z]", text, re.MULTILINE))
    return {name: version for name, version, _ in rows}


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_file_has_what_the_requirements_ask_for_and_all_that_this_needs(name: str) -> None:
    versions = locked(name)
    wanted = [Requirement(line) for line in requirements_of(name.replace(".lock", ".txt"))]
    known = set[str]()
    while wanted:
        requirement = wanted.pop()
        package = re.sub("[-_.]+", "-", requirement.name).lower()
        if requirement.marker and not requirement.marker.evaluate({"extra": "", "python_version": "3.12"}):
            continue
        assert requirement.specifier.contains(versions[package], prereleases=True), requirement
        if package not in known:
            known.add(package)
            found = metadata.distribution(requirement.name)
            if found.version == versions[package]:  # or it may need others
                wanted += [Requirement(text) for text in found.requires or ()]


def test_the_image_serves_what_was_built_with_the_same_packages() -> None:
    built, served = map(locked, LOCKS)
    assert served.items() <= built.items()


def requirements_of(name: str) -> list[str]:
    """Return the lines of a file of requirements, those of the files that it names too, without comments."""
    lines = []
    for line in (ROOT / name).read_text("utf-8").splitlines():
        found = re.fullmatch(r"-r (\S+)", line)
        lines += requirements_of(found[1]) if found else [line.partition(" #")[0].rstrip()]
    return lines


@pytest.mark.parametrize(
    ("extra", "file"),
    [
        ("tensorflow", "requirements.txt"),
        ("ray", "requirements-ray.txt"),
        ("int8", "requirements-int8.txt"),
        ("resize", "requirements-resize.txt"),
    ],
)
def test_an_extra_asks_for_what_its_file_adds(extra: str, file: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    assert {*extras[extra]} == {*requirements_of(file)} - {*requirements_of("requirements-serve.txt")}


def test_spans_are_tested_with_what_their_extra_installs() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    assert {*extras["otel"]} <= {*requirements_of("requirements-dev.txt")}

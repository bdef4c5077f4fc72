"""An export, which is the folder of one converted model, and the cache of exports that later starts begin from.

    model.xml, model.bin   the model in OpenVINO's form; none where OpenVINO cannot run it
    int8.xml, int8.bin     the same quantized, where that was asked for and is worth it
    heat.xml, heat.bin     its heat maps: a picture and a direction (see explain/cam.py) to a map
    about.json             {"format": ..., "sha256": {"model.xml": ..., "model.bin": ..., "about": ...}, "about": {...}}

In the cache each export has a marker beside these, which holds the name of its folder. Whatever has none, or another's,
the cache did not make: it is neither counted nor changed, wherever --cache-dir points.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from keras_server import __version__
from keras_server.models.agreement import Tested
from keras_server.models.engines import openvino
from keras_server.models.source import Source
from keras_server.models.spec import Spec

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("keras_server")

FORMAT = "keras-server-export/7"  # to be changed whenever an export is made in another way, or holds other things
PACKAGES = ("openvino", "keras", "tensorflow", "tf_keras", "numpy")  # which take part in making one
MARKER = ".keras-server-cache"
OURS = re.compile(rf"[a-z0-9_]+\.(xml|bin)|about\.json|{re.escape(MARKER)}")  # the files that the cache itself makes


class ExportError(Exception):
    """A folder is no export, or a damaged one; the message says why."""


def write_export(folder: Path, models: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Write OpenVINO models, by their files' names ("model" for model.xml), and what JSON says about them.

    In place of a model an .xml file is copied with what belongs to it. Raises OSError or RuntimeError where they cannot
    be written whole.
    """
    for name, converted in models.items():
        if isinstance(converted, Path):
            for ending in (".xml", ".bin"):
                shutil.copyfile(converted.with_suffix(ending), folder / f"{name}{ending}")
        else:
            openvino().save_model(converted, folder / f"{name}.xml", compress_to_fp16=False)
    write_about(folder, about)


def write_about(folder: Path, about: Mapping[str, Any]) -> None:
    """Write what is said about the models in an export, and the checksums of all. Raises OSError."""
    sums = {file.name: sha256(file) for file in sorted(folder.iterdir()) if file.suffix in (".xml", ".bin")}
    about = json.loads(json.dumps(about))  # as it will be read
    content = {"format": FORMAT, "sha256": sums | {"about": sha256_of(about)}, "about": about}
    (folder / "about.json").write_text(json.dumps(content), "utf-8")


def read_export(folder: Path) -> dict[str, Any]:
    """Return what an export says about its model, after a look at every byte of it. Raises ExportError."""
    try:
        with open_own(folder / "about.json") as file:
            content = json.load(file)
        form, sums, about = content["format"], content["sha256"], content["about"]
        if form != FORMAT:
            raise ExportError(f"{folder} was exported by another version of the server ({form}, and not {FORMAT}).")
        actual = {name: sha256_of(about) if name == "about" else sha256(folder / name) for name in sums}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ExportError(f"{folder} is not a whole export ({error}).") from None
    if actual != sums or "about" not in sums or not isinstance(about, dict):
        raise ExportError(f"{folder} is damaged: what it holds is not what was written.")
    return about


@dataclass(frozen=True)
class Export:
    """A model as it was exported."""

    folder: Path
    spec: Spec  # as the model itself has it, without the settings
    why: str = ""  # OpenVINO cannot run it
    flaw: str = ""  # why there are no heat maps
    explained: int = 0  # the output that the heat maps are of
    settings: dict[str, str] = field(default_factory=dict)  # options that were given when it was exported
    tested: tuple[Tested, ...] = ()  # precisions that may stand in for float32, the fastest first
    declined: str = ""  # why others may not, where they were asked for

    @classmethod
    def of(cls, folder: Path, about: dict[str, Any]) -> Export:
        """Return what a folder's about.json describes. Raises ExportError."""
        try:
            export = msgspec.convert(about | {"folder": str(folder)}, cls, dec_hook=lambda kind, value: kind(value))
        except msgspec.ValidationError as error:
            raise ExportError(f"{folder} was exported by another version of the server ({error}).") from None
        if missing := asdict(export.spec).keys() - about["spec"].keys():  # whose defaults are ResNet50's
            raise ExportError(f"{folder} is not a whole export (it says nothing of {', '.join(sorted(missing))}).")
        outputs = range(len(export.spec.outputs))
        if not export.why and not (export.spec.output in outputs and export.explained in (-1, *outputs)):
            raise ExportError(f"{folder} is not a whole export (it has {len(outputs)} outputs).")
        return export

    @property
    def models(self) -> dict[str, Path]:
        """The .xml files in it, by their names."""
        return {file.stem: file for file in sorted(self.folder.glob("*.xml"))}

    @property
    def about(self) -> dict[str, Any]:
        """What its about.json says, as JSON."""
        return {name: value for name, value in asdict(self).items() if name != "folder"}

    @classmethod
    def read(cls, folder: Path) -> Export:
        """Return an export, after a look at every byte of it. Raises ExportError."""
        return cls.of(folder, read_export(folder))


def sha256(file: Path) -> str:
    """Return a file's checksum. A hundred megabytes take a fifth of a second at most. Raises OSError."""
    with open_own(file) as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def open_own(file: Path) -> io.BufferedReader:
    """Open a file of an export for reading, which is no link. Raises OSError."""
    return open(os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")


def sha256_of(about: Mapping[str, Any]) -> str:
    """Return the checksum of what JSON makes of a mapping."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def keep(folder: Path) -> io.BufferedReader | None:
    """Keep the cache from removing an export until what is returned is closed, where the system can do that.

    Heat maps are read from it later.
    """
    with contextlib.suppress(OSError), contextlib.ExitStack() as opening:
        file = opening.enter_context(open_own(folder / "about.json"))
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            opening.pop_all()
            return file
    return None


def in_use(folder: Path) -> bool:
    """Return whether a process keeps an export. Raises OSError."""
    if not fcntl:
        return False
    with open_own(folder / "about.json") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def copy_export(export: Export, folder: Path, spec: Spec, settings: Mapping[str, str]) -> None:
    """Write a copy of an export with another spec and settings, whole or not at all. Raises OSError."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.tmp-", dir=folder.parent) as name:
        new = Path(name, folder.name)
        new.mkdir()
        write_export(new, export.models, replace(export, spec=spec, settings=dict(settings)).about)
        os.replace(new, folder)  # which may be there and empty


class Cache:
    """A folder of exports, from which a start needs neither Keras nor the conversion.

    A model is found by its name and a hash of everything that its answers hang on: the way in which it is converted,
    the versions that take part, the bytes of its files, and the `options` that change what is written.
    """

    ENTRIES = 8  # those used last are kept, beside those in use
    OLD = 3600  # seconds, after which a folder that was never finished is swept away

    def __init__(self, folder: str, name: str, files: Iterable[Path], options: Mapping[str, str] | None = None):
        """Look for the model `name` that these files hold. Without a folder or files nothing is found or kept."""
        self.folder: Path | None = None
        self.entry = Path()
        self.was_read = False  # and was of no use, if write() is called all the same
        try:
            if folder and (files := sorted(files)):
                self.folder = Path(folder).expanduser()
                self.entry = self.folder / f"{plain(name)}-{key_of(name, files, options or {})}"
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: ~ stands for no folder
            self.folder = None
            log.info("There is no cache of converted models (%s).", error)

    @classmethod
    def of(cls, source: Source, folder: str, output: str) -> Cache:
        """Look for the export of a source, whose heat maps are of the output of this name."""
        files = [*source.files, *source.imports] if source.files else []
        options = {"unsafe": str(source.unsafe), "output": output, "labels": str(source.has_labels)}
        return cls(folder, source.name, files, options)

    def read(self) -> tuple[Path, dict[str, Any]] | None:
        """Return the folder of the export that is kept, and what it says of its model, or None."""
        if not self.folder or not is_trusted(self.folder) or not is_trusted(self.entry):
            return None
        if entry_made_as(self.entry) != self.entry.name:
            return None
        try:
            about = read_export(self.entry)
        except ExportError as error:
            log.info("The cache is passed over: %s", error)
            return None
        with contextlib.suppress(OSError):  # the time of its last use; the time of its making stays
            file = self.entry / "about.json"
            os.utime(file, ns=(time.time_ns(), file.stat().st_mtime_ns))
        self.was_read = True
        return self.entry, about

    def write(self, models: Mapping[str, Any], about: Mapping[str, Any]) -> bool:
        """Keep an export for the next start, in place of a damaged copy, and return whether it is there.

        A folder that cannot be written to is no reason not to serve: the log says so.
        """
        if not self.folder:
            return False
        temporary, done = None, False
        try:
            self.folder.mkdir(0o700, parents=True, exist_ok=True)
            if not is_trusted(self.folder):
                raise PermissionError("others may write there, or own it: chmod 700")
            temporary = Path(tempfile.mkdtemp(prefix=f"{self.entry.name}.tmp-", dir=self.folder))
            (temporary / MARKER).write_text(self.entry.name)
            write_export(temporary, models, about)
            self.put(temporary)
            done = True
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(getattr(error, "strerror", None) or error).split())
            log.info("The converted model could not be kept in %s (%s).", self.folder, reason)
        finally:
            if temporary:
                remove(temporary)
        with contextlib.suppress(OSError):
            self.sweep()
        return done

    def put(self, temporary: Path) -> None:
        """Give a finished folder its name, whole or not at all, whoever else does so just now. Raises OSError."""
        try:
            os.rename(temporary, self.entry)
            return
        except OSError:
            if not self.entry.exists():
                raise
        if not self.was_read and self.read():  # another process was quicker
            return
        if not is_own(self.entry) or not all(OURS.fullmatch(name) for name in os.listdir(self.entry)):
            raise FileExistsError(f"{self.entry.name} is there and holds what the cache did not make")
        aside = Path(tempfile.mkdtemp(prefix=f"{self.entry.name}.tmp-", dir=self.folder))
        try:
            os.rename(self.entry, aside)  # which takes the empty folder's place
            os.rename(temporary, self.entry)
        finally:
            remove(aside)

    def sweep(self) -> None:
        """Remove the entries used longest ago, and what unfinished writing left. Raises OSError."""
        entries: list[tuple[int, Path]] = []
        for path in self.folder.iterdir() if self.folder and is_trusted(self.folder) else ():
            name = entry_made_as(path)
            if name and path.name == name and path != self.entry:
                with contextlib.suppress(OSError):
                    if not in_use(path):
                        entries.append(((path / "about.json").stat().st_atime_ns, path))
            elif name and path.name.startswith(f"{name}.tmp-"):
                with contextlib.suppress(OSError):
                    if time.time() - max(p.lstat().st_mtime for p in (path, *path.iterdir())) > self.OLD:
                        remove(path)
        for _, path in sorted(entries, reverse=True)[self.ENTRIES - self.entry.exists() :]:  # this one is kept
            remove(path)


def key_of(name: str, files: list[Path], options: Mapping[str, str]) -> str:
    """Return the hash that a model's entry is found by. Raises OSError where a file cannot be read.

    A lone file may be called anything; of several the names say what each is for.
    """
    common = Path(os.path.commonpath([file.parent for file in files]))
    contents = [["" if len(files) == 1 else str(file.relative_to(common)), digest(file)] for file in files]
    versions = [__version__, *(version(package) for package in PACKAGES)]
    key = json.dumps([FORMAT, versions, name, contents, sorted(options.items())])
    return hashlib.sha256(key.encode()).hexdigest()[:32]


def digest(file: Path) -> str:
    """Return the checksum of a model's file, which may well be a link. Raises OSError."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def version(package: str) -> str:
    """Return a package's version, or nothing where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def plain(name: str) -> str:
    """Return a name that any file system takes."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)[:80]


def is_trusted(folder: Path) -> bool:
    """Return whether this is a folder that only this user can have written to."""
    try:
        return is_own(folder) and not folder.stat().st_mode & 0o022
    except OSError:
        return False


def is_own(folder: Path) -> bool:
    """Return whether this is a folder of this user."""
    try:
        status = folder.stat()
    except (OSError, ValueError):
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()


def entry_made_as(folder: Path) -> str:
    """Return the name under which the cache made a folder; empty for a folder, file or link that it did not make."""
    try:
        if not stat.S_ISDIR(folder.lstat().st_mode):
            return ""
        with open_own(folder / MARKER) as file:
            name = file.read(256).decode("ascii")
    except (OSError, ValueError):
        return ""
    return name if re.fullmatch(r"[A-Za-z0-9._-]*-[0-9a-f]{32}", name) else ""


def remove(folder: Path) -> None:
    """Remove a folder that the cache made, without whatever else somebody put into it. Follows no link."""
    with contextlib.suppress(OSError):
        # The marker goes last: what is left by a crash is still known to be the cache's.
        for name in sorted(os.listdir(folder), key=lambda name: name == MARKER):
            with contextlib.suppress(OSError):
                if OURS.fullmatch(name):
                    os.unlink(folder / name)
        os.rmdir(folder)

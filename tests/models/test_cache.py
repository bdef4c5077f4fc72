"""The cache of converted models: it touches nothing of others, changes no answer, and repairs itself."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keras_server.models import export
from keras_server.models.engines import openvino
from keras_server.models.export import MARKER, Cache, ExportError, read_export, write_export

ABOUT = {"name": "tiny", "labels": ["cat", "dög"], "shape": [None, 3], "scale": 0.1}
FILES = {"model.xml", "model.bin", "about.json", MARKER}


def tiny(factor: float = 2.0) -> Any:
    """A model of OpenVINO that multiplies three numbers."""
    openvino()  # without its telemetry
    from openvino import opset13 as ops

    x = ops.parameter([-1, 3], np.float32)
    return sys.modules["openvino"].Model([ops.multiply(x, np.full((1, 3), factor, np.float32))], [x])


def answer(folder: Path) -> list[float]:
    """What a kept model makes of 1, 2, 3."""
    compiled = openvino().Core().compile_model(folder / "model.xml" if folder.is_dir() else folder, "CPU")
    (row,) = compiled(np.array([[1, 2, 3]], np.float32)).to_tuple()
    return [float(value) for value in row[0]]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Stands for a model's file."""
    path = tmp_path / "own.keras"
    path.write_bytes(b"a model")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def kept(folder: Path, file: Path, name: str = "own", factor: float = 2.0) -> Cache:
    """A cache that holds the model."""
    Cache(str(folder), name, [file]).write({"model": tiny(factor)}, ABOUT)
    cache = Cache(str(folder), name, [file])
    assert cache.read()
    return cache


# ----------------------------------------------------------------------------------------------------------
# What is kept comes back
# ----------------------------------------------------------------------------------------------------------


def test_what_is_kept_comes_back(folder: Path, file: Path) -> None:
    cache = Cache(str(folder), "own", [file])
    assert cache.read() is None
    cache.write({"model": tiny()}, ABOUT)
    found, about = Cache(str(folder), "own", [file]).read() or pytest.fail("nothing was kept")
    assert about == ABOUT
    assert answer(found) == [2, 4, 6]
    assert [*folder.iterdir()] == [cache.entry]
    assert {path.name for path in cache.entry.iterdir()} == FILES
    assert re.fullmatch("own-[0-9a-f]{32}", cache.entry.name)
    assert [path.stat().st_mode & 0o777 for path in (folder, cache.entry)] == [0o700, 0o700]


def test_other_models_beside_it(folder: Path, file: Path) -> None:
    """An export can hold more than one graph, and all of them are watched over."""
    cache = Cache(str(folder), "own", [file])
    cache.write({"model": tiny(2), "heat": tiny(3)}, ABOUT)
    found, _ = cache.read() or pytest.fail("nothing was kept")
    assert (answer(found), answer(found / "heat.xml")) == ([2, 4, 6], [3, 6, 9])
    (found / "heat.bin").write_bytes(b"")
    assert cache.read() is None


@pytest.mark.parametrize("name", ["a/b", "..", "späte\udc80", "x" * 300, "", "my model"])
def test_any_name_will_do(name: str, folder: Path, file: Path) -> None:
    cache = kept(folder, file, name)
    assert cache.entry.parent == folder


def test_without_a_folder_or_files_nothing_is_kept(tmp_path: Path, file: Path) -> None:
    before = {*tmp_path.rglob("*")}
    for cache in (Cache("", "own", [file]), Cache(str(tmp_path / "cache"), "own", [])):
        cache.write({"model": tiny()}, ABOUT)
        assert cache.read() is None
    assert {*tmp_path.rglob("*")} == before


def test_a_model_file_that_cannot_be_read_is_for_keras_to_tell(folder: Path, tmp_path: Path) -> None:
    cache = Cache(str(folder), "own", [tmp_path / "none"])
    cache.write({"model": tiny()}, ABOUT)
    assert cache.read() is None


def test_no_home(monkeypatch: pytest.MonkeyPatch, file: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fail(_: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    caplog.set_level("INFO")
    monkeypatch.setattr(Path, "expanduser", fail)
    cache = Cache("~/x", "own", [file])
    cache.write({"model": tiny()}, ABOUT)
    assert cache.read() is None
    assert "home directory" in caplog.text


# ----------------------------------------------------------------------------------------------------------
# The key names everything that changes the answer
# ----------------------------------------------------------------------------------------------------------


def entry(*files: Path, name: str = "own", **options: str) -> str:
    return Cache("x", name, files, options).entry.name


def test_the_key_is_the_bytes_and_not_the_files_name(file: Path, tmp_path: Path) -> None:
    first = entry(file)
    other = tmp_path / "deeper" / "other.keras"
    other.parent.mkdir()
    other.write_bytes(file.read_bytes())
    assert entry(other) == first
    os.utime(file, (1, 1))
    assert entry(file) == first
    file.write_bytes(b"a modeL")
    assert entry(file) != first


def test_the_key_holds_the_name_the_options_and_the_recipe(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {entry(file), entry(file, precision="f16"), entry(file, precision="f32"), entry(file, layout="f32")}
    keys.add(entry(file, name="other").replace("other", "own"))
    monkeypatch.setattr(export, "FORMAT", "another")
    keys.add(entry(file))
    assert len(keys) == 6
    assert entry(file, a="1", b="2") == entry(file, b="2", a="1")


@pytest.mark.parametrize("package", ["openvino", "keras", "tensorflow", "tf_keras", "numpy", "keras_server"])
def test_the_key_holds_the_versions(package: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = entry(file)
    if package == "keras_server":
        monkeypatch.setattr(export, "__version__", "99")
    else:
        version = export.metadata.version
        monkeypatch.setattr(export.metadata, "version", lambda name: "99" if name == package else version(name))
    assert entry(file) != first


def test_of_several_files_the_names_count(tmp_path: Path) -> None:
    """A SavedModel's folder: moved it is the same, with two files exchanged it is not."""
    keys = []
    for folder, one, two in (("a", "1", "2"), ("b", "1", "2"), ("c", "2", "1")):
        files = [tmp_path / folder / "saved_model.pb", tmp_path / folder / "variables" / "variables.index"]
        files[1].parent.mkdir(parents=True)
        files[0].write_text(one)
        files[1].write_text(two)
        keys.append(entry(*files))
    assert keys[0] == keys[1] == entry(*reversed([*(tmp_path / "a").rglob("*.*")])) != keys[2]


# ----------------------------------------------------------------------------------------------------------
# Damage is seen, and repaired
# ----------------------------------------------------------------------------------------------------------


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def swap(entry: Path) -> None:
    """A label in about.json."""
    path = entry / "about.json"
    assert "cat" in path.read_text()
    path.write_text(path.read_text().replace("cat", "cow"))


def empty(entry: Path) -> None:
    for path in entry.iterdir():
        path.write_bytes(b"")


def link(entry: Path) -> None:
    """The same bytes, elsewhere, where others may change them."""
    os.rename(entry / "model.bin", entry.parent.parent / "elsewhere")
    os.symlink(entry.parent.parent / "elsewhere", entry / "model.bin")


def foreign_format(entry: Path) -> None:
    path = entry / "about.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": "keras-server-export/1"}))


def renamed(entry: Path) -> None:
    (entry / MARKER).write_text(entry.name[:-1] + "x")


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "a bit of the weights": lambda entry: flip(entry / "model.bin", 3),
    "the last bit of the weights": lambda entry: flip(entry / "model.bin", -1),
    "the weights cut": lambda entry: os.truncate(entry / "model.bin", 8),
    "a letter of the graph": lambda entry: flip(entry / "model.xml", 300),
    "a label": swap,
    "weights gone": lambda entry: (entry / "model.bin").unlink(),
    "about gone": lambda entry: (entry / "about.json").unlink(),
    "about no JSON": lambda entry: (entry / "about.json").write_bytes(b"broken"),
    "about of another kind": lambda entry: (entry / "about.json").write_text("[1, 2]"),
    "about without sums": lambda entry: (entry / "about.json").write_text('{"format": 1, "about": {}, "sha256": {}}'),
    "about endless": lambda entry: (entry / "about.json").write_text("[" * 100_000),
    "about no UTF-8": lambda entry: (entry / "about.json").write_bytes(b"\xff"),
    "another format": foreign_format,
    "no marker": lambda entry: (entry / MARKER).unlink(),
    "another's marker": renamed,
    "all empty": empty,
    "a link": link,
    "open to others": lambda entry: entry.chmod(0o770),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_entry_is_passed_over_and_replaced(name: str, folder: Path, file: Path) -> None:
    cache = kept(folder, file)
    DAMAGE[name](cache.entry)
    again = Cache(str(folder), "own", [file])
    assert again.read() is None
    again.write({"model": tiny(5)}, ABOUT)
    found, about = Cache(str(folder), "own", [file]).read() or pytest.fail("it was not repaired")
    assert (answer(found), about) == ([5, 10, 15], ABOUT)
    assert [*folder.iterdir()] == [again.entry]
    assert {path.name for path in again.entry.iterdir()} == FILES


def test_a_whole_entry_that_was_of_no_use_is_replaced(folder: Path, file: Path) -> None:
    cache = kept(folder, file)  # read, and then something went wrong with it
    cache.write({"model": tiny(5)}, ABOUT)
    assert answer(cache.entry) == [5, 10, 15]


def test_a_whole_entry_that_another_process_wrote_meanwhile_stays(folder: Path, file: Path) -> None:
    late = Cache(str(folder), "own", [file])
    assert late.read() is None
    kept(folder, file)
    late.write({"model": tiny(5)}, ABOUT)
    assert answer(late.entry) == [2, 4, 6]
    assert [*folder.iterdir()] == [late.entry]


def test_export_is_read_back_or_refused(tmp_path: Path) -> None:
    write_export(tmp_path, {"model": tiny(1 / 3)}, ABOUT | {1: ("a", 2)})
    assert read_export(tmp_path) == ABOUT | {"1": ["a", 2]}
    assert np.full(3, 1 / 3, np.float32).tobytes() in (tmp_path / "model.bin").read_bytes()  # to the last bit
    flip(tmp_path / "model.bin", 0)
    with pytest.raises(ExportError, match="is damaged"):
        read_export(tmp_path)
    with pytest.raises(ExportError, match="not a whole export"):
        read_export(tmp_path / "none")


# ----------------------------------------------------------------------------------------------------------
# What others own stays as it is
# ----------------------------------------------------------------------------------------------------------


def tree(folder: Path) -> dict[str, Any]:
    """All that a folder holds, with contents."""
    return {str(p): os.readlink(p) if p.is_symlink() else p.is_file() and p.read_bytes() for p in folder.rglob("*")}


def test_folders_of_others_stay(folder: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever they are called, and whatever lies in them, short of the marker with their own name."""
    monkeypatch.setattr(Cache, "ENTRIES", 1)
    hexadecimal = "0123456789abcdef" * 2
    names = [f"my-photos-{i}" for i in range(12)] + [f"own-{hexadecimal}", f"own-{hexadecimal}.tmp-12345678", "tmpabc"]
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "model.xml").write_text("mine")
        os.utime(folder / name, (1, 1))
    folder.chmod(0o700)
    (folder / "my-photos-0" / MARKER).write_text("")
    (folder / "my-photos-1" / MARKER).write_text("my-photos-1")
    (folder / "my-photos-2" / MARKER).write_text(f"own-{hexadecimal}")  # a copy of an entry under a name of its own
    (folder / "my-photos-3" / MARKER).mkdir()
    (folder / "my-photos-4" / MARKER).symlink_to(folder / "my-photos-1" / MARKER)
    os.mkfifo(folder / "my-photos-5" / MARKER)
    (folder / "a-file").write_text("mine")
    os.utime(folder / "my-photos-2", (1, 1))
    before = {**tree(folder)}
    first = kept(folder, file)
    second = kept(folder, file, "second")
    assert not first.entry.exists()
    after = tree(folder)
    assert {path: after.get(path) for path in before} == before
    assert {*after} - {*before} == {str(second.entry), *(str(second.entry / name) for name in FILES)}


def test_an_entry_that_somebody_put_files_into_loses_only_its_own(
    folder: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Cache, "ENTRIES", 1)
    first = kept(folder, file)
    (first.entry / "notes.txt").write_text("mine")
    (first.entry / "folder.xml").mkdir()
    kept(folder, file, "second")
    assert (first.entry / "notes.txt").read_text() == "mine"
    assert (first.entry / "folder.xml").is_dir()
    assert {path.name for path in first.entry.iterdir()} == {"notes.txt", "folder.xml"}


def test_a_folder_in_an_entrys_place_stays(folder: Path, file: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    cache = kept(folder, file)
    (cache.entry / "notes.txt").write_text("mine")
    flip(cache.entry / "model.bin", 0)
    before = tree(folder)
    again = Cache(str(folder), "own", [file])
    assert again.read() is None
    again.write({"model": tiny()}, ABOUT)
    assert tree(folder) == before
    assert "holds what the cache did not make" in caplog.text


@pytest.mark.parametrize("dangling", [False, True])
def test_links_are_not_followed_out(dangling: bool, folder: Path, file: Path, tmp_path: Path) -> None:
    """Neither one in an entry's place nor a marker that is one."""
    cache = kept(folder, file)
    outside = tmp_path / "outside"
    os.rename(cache.entry, outside)
    cache.entry.symlink_to(tmp_path / "nowhere" if dangling else outside)
    before = tree(tmp_path)
    again = Cache(str(folder), "own", [file])
    assert again.read() is None
    again.write({"model": tiny(5)}, ABOUT)
    assert tree(tmp_path) == before


def test_a_link_to_an_entry_is_no_entry(
    folder: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Cache, "ENTRIES", 1)
    cache = kept(folder, file)
    outside = tmp_path / "outside" / cache.entry.name
    outside.parent.mkdir()
    os.rename(cache.entry, outside)
    cache.entry.symlink_to(outside)
    kept(folder, file, "second")
    assert cache.entry.is_symlink()
    assert {path.name for path in outside.iterdir()} == FILES


# ----------------------------------------------------------------------------------------------------------
# Which entries stay, and what is swept
# ----------------------------------------------------------------------------------------------------------


def test_those_used_last_stay(folder: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which they are, not only how many: a model that is served every day stays, however old it is."""
    monkeypatch.setattr(Cache, "ENTRIES", 3)
    clock = [time.time_ns()]

    def tick() -> int:
        clock[0] += 1_000_000_000
        return clock[0]

    monkeypatch.setattr(export.time, "time_ns", tick)
    caches = {name: kept(folder, file, name) for name in ("a", "b", "c")}
    assert caches["a"].read()  # last
    caches["d"] = kept(folder, file, "d")
    assert {name for name, cache in caches.items() if cache.entry.exists()} == {"a", "c", "d"}
    assert caches["c"].read()
    caches["e"] = kept(folder, file, "e")
    assert {name for name, cache in caches.items() if cache.entry.exists()} == {"c", "d", "e"}


def test_one_that_was_just_written_stays_whatever_the_clock_says(
    folder: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Cache, "ENTRIES", 2)
    for name in ("a", "b"):
        os.utime(kept(folder, file, name).entry / "about.json", (2e9 + ord(name), 1))
    assert kept(folder, file, "c").read()
    assert sorted(path.name[0] for path in folder.iterdir()) == ["b", "c"]


def test_eight_are_kept() -> None:
    assert Cache.ENTRIES == 8


def test_use_is_told_by_a_time_that_changes_nothing_else(folder: Path, file: Path) -> None:
    cache = kept(folder, file)
    os.utime(cache.entry / "about.json", (1, 2))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert cache.read()
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert (cache.entry / "about.json").stat().st_atime > time.time() - 60


@pytest.mark.parametrize(("age", "swept"), [(3500, False), (3700, True)])
def test_what_unfinished_writing_left_is_swept_once_it_is_old(age: int, swept: bool, folder: Path, file: Path) -> None:
    cache = kept(folder, file)
    left = folder / f"{cache.entry.name}.tmp-abcdefgh"
    left.mkdir()
    (left / MARKER).write_text(cache.entry.name)
    (left / "model.bin").write_bytes(b"half")
    for path in (left / MARKER, left):
        os.utime(path, (1, 1))
    kept(folder, file, "second")
    assert left.exists(), "a file in it is new"
    os.utime(left / "model.bin", (time.time() - age,) * 2)
    kept(folder, file, "third")
    assert left.exists() != swept
    assert cache.read()


# ----------------------------------------------------------------------------------------------------------
# Folders that cannot be used
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o720, 0o702])
def test_a_folder_that_others_may_write_to_is_neither_read_nor_written(
    mode: int, folder: Path, file: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    cache = kept(folder, file)
    kept(folder, file, "second")
    monkeypatch.setattr(Cache, "ENTRIES", 1)
    folder.chmod(mode)
    before = tree(folder)
    assert cache.read() is None
    cache.write({"model": tiny(5)}, ABOUT)
    assert tree(folder) == before
    assert "chmod 700" in caplog.text
    folder.chmod(0o755)
    assert cache.read()


def test_a_file_in_the_folders_place(folder: Path, file: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    folder.write_text("mine")
    for place in (folder, folder / "deeper"):
        cache = Cache(str(place), "own", [file])
        assert cache.read() is None
        cache.write({"model": tiny()}, ABOUT)
    assert folder.read_text() == "mine"
    assert caplog.text.count("could not be kept") == 2


def test_a_folder_that_is_not_there_is_made_for_this_user(tmp_path: Path, file: Path) -> None:
    cache = kept(tmp_path / "a" / "b", file)
    assert cache.entry.parent.stat().st_mode & 0o777 == 0o700


def child(code: str, *arguments: str) -> str:
    """Run a few lines in a process of its own, with this file's names, and return what they print."""
    program = "import os, sys, logging, numpy as np; from pathlib import Path; from test_cache import *\n"
    program += "logging.basicConfig(level='INFO', stream=sys.stdout)\n" + code
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    return result.stdout


@pytest.fixture
def stranger(tmp_path: Path) -> Iterator[str]:
    """The lines that make a process that of somebody who is not root."""
    if os.geteuid():
        yield ""
        return
    opened = []
    for path in (tmp_path, *tmp_path.parents):  # pytest's folders are root's own
        if not path.stat().st_mode & 0o001:
            opened.append((path, path.stat().st_mode))
            path.chmod(path.stat().st_mode | 0o011)
    yield "os.seteuid(12345)\n"
    for path, mode in opened:
        path.chmod(mode)


def test_a_folder_that_cannot_be_written_to(stranger: str, folder: Path, file: Path) -> None:
    """It is no reason not to serve, and what it holds is read."""
    kept(folder, file)
    if stranger:
        for path in (folder, *folder.rglob("*")):
            os.chown(path, 12345, 12345)
    folder.chmod(0o500)
    code = f"""
model = tiny()
old, new = (Cache(sys.argv[1], name, [Path(sys.argv[2])]) for name in ("own", "new"))
{stranger}
print("old", old.read() is not None)
new.write({{"model": model}}, ABOUT)
print("new", new.read())
"""
    output = child(code, str(folder), str(file))
    folder.chmod(0o700)
    assert "old True" in output
    assert "new None" in output
    assert "could not be kept" in output
    assert "Permission denied" in output
    assert len([*folder.iterdir()]) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_folder_of_somebody_else_is_not_trusted(stranger: str, folder: Path, file: Path) -> None:
    cache = kept(folder, file)
    before = tree(folder)
    os.chown(folder, 12345, 12345)
    assert cache.read() is None, "its owner could have put anything there"
    cache.write({"model": tiny(5)}, ABOUT)
    os.chown(folder, 0, 0)
    os.chown(cache.entry, 12345, 12345)
    assert cache.read() is None
    assert tree(folder) == before


@pytest.mark.parametrize("limit", [100, 20_000, 2_000_000])
def test_a_disk_that_is_full(limit: int, folder: Path, file: Path) -> None:
    """Whatever file it is that finds no room: a half entry is never kept, and nothing is left behind."""
    code = """
import resource
openvino()
from openvino import opset13 as ops
x = ops.parameter([-1, 1000], np.float32)
large = sys.modules["openvino"].Model([ops.matmul(x, np.eye(1000, dtype=np.float32), False, False)], [x])
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
cache = Cache(sys.argv[1], "own", [Path(sys.argv[2])])
cache.write({"model": large}, ABOUT | {"labels": ["x" * 20] * 1000})
print("read", cache.read())
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
print("left", os.listdir(sys.argv[1]))
cache.write({"model": large}, ABOUT)
print("then", cache.read() is not None)
"""
    output = child(code, str(folder), str(file), str(limit))
    assert "could not be kept" in output
    assert "read None" in output
    assert "left []" in output
    assert "then True" in output


def test_processes_at_the_same_time(folder: Path, file: Path) -> None:
    """They write, damage and read one entry: whoever reads anything reads a whole model."""
    code = """
import contextlib, random
random.seed(sys.argv[3])
good = 0
for turn in range(60):
    cache = Cache(sys.argv[1], "own", [Path(sys.argv[2])])
    if found := cache.read():
        with contextlib.suppress(FileNotFoundError, RuntimeError):  # replaced since, by another
            good += answer(found[0]) in ([2, 4, 6], [3, 6, 9]) or sys.exit("a wrong answer")
    if not found or random.random() < 0.3:
        cache.write({"model": tiny(random.choice([2, 3]))}, ABOUT)
    if random.random() < 0.3:
        with contextlib.suppress(OSError):
            os.unlink(cache.entry / random.choice(["model.bin", "about.json", MARKER]))
print("good", good)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    program = "import os, sys; from pathlib import Path; from test_cache import *\n" + code
    runs = [
        subprocess.Popen([sys.executable, "-c", program, str(folder), str(file), str(seed)],
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for seed in range(3)
    ]  # fmt: skip
    for run in runs:
        output, errors = run.communicate(timeout=300)
        assert run.returncode == 0, errors
        assert int(output.split()[-1]) > 0
    assert kept(folder, file).read()
    assert [path.name.count(".tmp-") for path in folder.iterdir()] == [0]


# ----------------------------------------------------------------------------------------------------------
# The server's start
# ----------------------------------------------------------------------------------------------------------


def test_the_server_starts_from_a_cache_or_without_one(
    tmp_path: Path, setting: Callable[..., None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A damaged copy is replaced at the next start, and a folder that cannot be used is no reason not to serve."""
    import run_keras_server as server
    from keras_server.models import source

    keras: Any = pytest.importorskip("keras")
    caplog.set_level("INFO")
    monkeypatch.setattr(server, "model", None)
    keras.utils.set_random_seed(1)
    layers = [keras.Input((8, 8, 3)), keras.layers.Flatten(), keras.layers.Dense(4, "softmax")]
    keras.Sequential(layers).save(tmp_path / "own.keras")
    rows = np.random.default_rng(0).uniform(0, 1, (3, 8, 8, 3)).astype(np.float32)

    def start(folder: Path) -> np.ndarray:
        setting(model=str(tmp_path / "own.keras"), cache_dir=str(folder))
        server.load_model()
        outputs: np.ndarray = server.model.predict(rows)
        return outputs

    first = start(tmp_path / "cache")
    np.testing.assert_allclose(
        first, keras.saving.load_model(tmp_path / "own.keras").predict(rows, verbose=0), atol=1e-5
    )
    (entry,) = (tmp_path / "cache").iterdir()
    flip(entry / "model.bin", 0)
    np.testing.assert_array_equal(start(tmp_path / "cache"), first)
    assert "is damaged" in caplog.text
    with monkeypatch.context() as patch:
        patch.setattr(source.Source, "load", lambda self: pytest.fail("the damaged copy was not replaced"))
        np.testing.assert_array_equal(start(tmp_path / "cache"), first)
    (tmp_path / "file").write_text("mine")
    np.testing.assert_array_equal(start(tmp_path / "file"), first)
    assert f"could not be kept in {tmp_path / 'file'} (File exists)" in caplog.text

"""Labels: read from every form of file that people have, or refused by a sentence that says why."""

import json
import os
from pathlib import Path

import pytest
from conftest import ROOT

from keras_server.models.errors import StartupError
from keras_server.models.labels import MAX_BYTES, check_labels, read_labels

DATA = ROOT / "tests" / "data" / "labels"
PETS = ("cat", "dog", "bird")

GOOD: dict[str, tuple[str | bytes, tuple[str, ...]]] = {
    # a line each
    "lines": ("cat\ndog\nbird\n", PETS),
    "no end of the last line": ("cat\ndog\nbird", PETS),
    "byte order mark": (b"\xef\xbb\xbfcat\ndog\nbird\n", PETS),
    "lines of Windows": (b"cat\r\ndog\r\nbird\r\n", PETS),
    "lines of old Macs": (b"cat\rdog\rbird\r", PETS),
    "blank lines at the end": ("cat\ndog\nbird\n\n  \n\t\r\n", PETS),
    "spaces around": ("  cat\t\ndog \n bird\n", PETS),
    "UTF-16": ("cat\r\ndög\r\nbird".encode("utf-16"), ("cat", "dög", "bird")),
    "UTF-16 of the other order": (b"\xfe\xff" + "cat\ndog\nbird".encode("utf-16-be"), PETS),
    "other letters": ("猫\n개\nبوم\n", ("猫", "개", "بوم")),
    "a separator of Unicode is no line's end": ("c\u2028at\nd\x85og\nbi\x0crd", ("c\u2028at", "d\x85og", "bi\x0crd")),
    "twice the same": ("crane\ncat\ncrane", ("crane", "cat", "crane")),
    "one": ("cat", ("cat",)),
    # numbered
    "Teachable Machine": ("0 cat\n1 dog\n2 bird\n", PETS),
    "TensorFlow Lite": ("0  background\n1  tench, Tinca tinca\n", ("background", "tench, Tinca tinca")),
    "colons": ("0: cat\n1:dog\n2 : bird\n", PETS),
    "commas": ("0,cat\n1, dog\n2,bird\n", PETS),
    "semicolons": ("0;cat\n1;dog\n2;bird", PETS),
    "tabs": ("0\tcat\n1\tdog\n2\tbird", PETS),
    "leading zeros": ("00 cat\n01 dog\n02 bird", PETS),
    "numbers with themselves": ("0,0\n1,1\n2,2", ("0", "1", "2")),
    "numbered numbers": ("0 7\n1 8\n2 9", ("7", "8", "9")),
    "eleven": ("".join(f"{i} c{i}\n" for i in range(11)), tuple(f"c{i}" for i in range(11))),
    # no numbering
    "digits": ("0\n1\n2\n", ("0", "1", "2")),
    "counted from one": ("1 cat\n2 dog", ("1 cat", "2 dog")),
    "notes": ("5 euros\n10 euros\n20 euros", ("5 euros", "10 euros", "20 euros")),
    "not on every line": ("0 cat\ndog\n2 bird", ("0 cat", "dog", "2 bird")),
    "a gap": ("0 cat\n1 dog\n3 bird", ("0 cat", "1 dog", "3 bird")),
    "numbers of words": ("0cat\n1dog", ("0cat", "1dog")),
    "numbers of the names": ("class 0\nclass 1", ("class 0", "class 1")),
    "synsets": ("n1 tench, Tinca tinca\nn2 goldfish", ("n1 tench, Tinca tinca", "n2 goldfish")),
    "commas in names": ("cat, tabby\ndog, beagle", ("cat, tabby", "dog, beagle")),
    "brackets": ("[PAD]\n[UNK]\nthe", ("[PAD]", "[UNK]", "the")),
    "braces": ("{x}\n{y}", ("{x}", "{y}")),
    # JSON
    "list": ('["cat", "dog", "bird"]', PETS),
    "list with a mark and space": (b'\xef\xbb\xbf\r\n [ "cat" , "dog", "bird" ]\n\n', PETS),
    "list in UTF-16": ('["cat", "dog", "bird"]'.encode("utf-16"), PETS),
    "list with spaces in names": ('[" cat", "dog ", "bird"]', PETS),
    "both halves of a character": (r'["cat", "dog \ud83d\udc36"]', ("cat", "dog \N{DOG FACE}")),
    "list of digits": ('["0", "1"]', ("0", "1")),
    "list of the same": ('["crane", "cat", "crane"]', ("crane", "cat", "crane")),
    "by number": ('{"0": "cat", "1": "dog", "2": "bird"}', PETS),
    "by number, in any order": ('{"2": "bird", "0": "cat", "1": "dog"}', PETS),
    "by number, digits": ('{"0": "7", "1": "8"}', ("7", "8")),
    "class index": ('{"0": ["n1", "cat"], "1": ["n2", "dog"], "2": ["n3", "bird"]}', PETS),
    "class_indices": ('{"cat": 0, "dog": 1, "bird": 2}', PETS),
    "class_indices in any order": ('{"bird": 2, "cat": 0, "dog": 1}', PETS),
    "class_indices of folders 1 and 0": ('{"1": 0, "0": 1}', ("1", "0")),
    "eleven by number": (json.dumps({str(i): f"c{i}" for i in range(11)}), tuple(f"c{i}" for i in range(11))),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_forms_that_people_have(name: str, tmp_path: Path) -> None:
    """Whatever the file is called: its content decides."""
    content, expected = GOOD[name]
    for file in (tmp_path / "labels.txt", tmp_path / "labels.json"):
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        assert read_labels(file) == expected


@pytest.mark.parametrize("file", sorted(DATA.iterdir()), ids=lambda file: file.name)
def test_files_of_users(file: Path) -> None:
    assert read_labels(file) == PETS


BAD: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "is empty"),
    "only blank lines": ("\n \r\n", "is empty"),
    "only a mark": (b"\xef\xbb\xbf", "is empty"),
    "blank line in the middle": ("cat\n\nbird", "Line 2 of .* is blank"),
    "blank line at the start": ("\ncat\nbird", "Line 1 of .* is blank"),
    "number without a name": ("0 cat\n1\n2 bird", "Line 2 of .* has a number and no name"),
    "numbered out of order": ("1 dog\n0 cat\n2 bird", "out of order"),
    "Latin-1": ("cat\nMöwe\n".encode("latin-1"), r"is not UTF-8 \(0xF6 in line 2; perhaps Latin-1.*save it as UTF-8"),
    "Windows-1252": ("caf€\n".encode("cp1252"), r"is not UTF-8 \(0x80 in line 1; .*Windows-1252.*save it as UTF-8"),
    "UTF-16 without a mark": ("cat\ndog\n".encode("utf-16-le"), "UTF-16 without a byte order mark: save it as UTF-8"),
    "UTF-16BE without a mark": ("cät\ndög\n".encode("utf-16-be"), "UTF-16 without a byte order mark"),
    "UTF-16, half a letter": (b"\xff\xfec", "begins as UTF-16 and is damaged"),
    "UTF-32": ("cat\n".encode("utf-32"), "is in UTF-32: save it as UTF-8"),
    "a picture": (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", "is no text file"),
    "only zeros": (bytes(100), "is no text file"),
    "a zero byte": (b"cat\0dog\nbird", "is no text file"),
    "header": ("index,label\n0,cat\n1,dog", r"is a table \(CSV\) with the header 'index,label'"),
    "header of pandas": (",class_name\n0,cat\n1,dog", "is a table"),
    "header of three": ("index,mid,display_name\n0,/m/09x0r,Speech", "is a table"),
    "header with tabs": ("id\tname\n0\tcat", r"is a table \(tabs\) with the header"),
    "numbers behind": ("cat,0\ndog,1\nbird,2", "table .* of names with numbers"),
    "list of numbers": ("[1, 2, 3]", "Class 0 of .* is a number, not a name"),
    "list of pairs": ('[["n1", "cat"]]', "Class 0 of .* is a list, not a name"),
    "list of objects": ('["dog", {"id": 1, "name": "cat"}]', "Class 1 of .* is an object, not a name"),
    "list with null": ('["cat", null]', "Class 1 of .* is null, not a name"),
    "list of booleans": ("[true, false]", "Class 0 of .* is true or false, not a name"),
    "list with an empty name": ('["cat", " "]', "Class 1 of .* has an empty name"),
    "half a character": (r'["cat", "dog \ud83d"]', "name of class 1 of .* holds half a character"),
    "empty list": ("[]", "is an empty list"),
    "empty object": ("{}", "is an empty object"),
    "cut off": ('["cat", "dog"', r"begins as JSON and is damaged \(line 1"),
    "object cut off": ('{"0": "cat",\n', "begins as JSON and is damaged"),
    "more behind the list": ('["cat"] dog', "begins as JSON and is damaged"),
    "endless number": ("[" + "9" * 5000 + "]", "a number too long"),
    "deep": ("[" * 100_000, "it should hold"),
    "Python's list": ("['cat', 'dog']", "as Python prints it: write it with json.dump"),
    "Python's dict": ("{0: 'tench, Tinca tinca',\n 1: 'goldfish'}", "as Python prints it"),
    "Python's class_indices": ("{'cat': 0, 'dog': 1}", "as Python prints it"),
    "by number with a gap": ('{"0": "cat", "2": "bird"}', "2 names, and none of them has the number 1"),
    "by number from one": ('{"1": "cat", "2": "dog"}', "none of them has the number 0"),
    "by number twice": ('{"0": "cat", "0": "dog"}', "has '0' twice"),
    "by number spelled otherwise": ('{"00": "cat", "1": "dog"}', 'has "00" where a class\'s number should stand'),
    "by number with an empty name": ('{"0": "cat", "1": ""}', "Class 1 of .* has an empty name"),
    "by number with null": ('{"0": "cat", "1": null}', "Class 1 of .* is null"),
    "index and names mixed": ('{"0": "cat", "1": ["n2", "dog"]}', "Class 1 of .* is a list"),
    "index of three": ('{"0": ["n1", "cat", "x"]}', "Class 0 of .* is a list"),
    "class_indices with a gap": ('{"cat": 0, "dog": 2}', "none of them has the number 1"),
    "class_indices twice": ('{"cat": 0, "dog": 0}', "gives the number 0 to 'cat' and to 'dog'"),
    "class_indices below zero": ('{"cat": 0, "dog": -1}', "has -1 where a class's number should stand"),
    "class_indices in halves": ('{"cat": 0, "dog": 0.5}', "has 0.5 where a class's number should stand"),
    "class_indices of booleans": ('{"cat": false, "dog": true}', "has false where a class's number should stand"),
    "class_indices with an empty name": ('{"cat": 0, "": 1}', "Class 1 of .* has an empty name"),
    "something else": ('{"labels": ["cat", "dog"]}', 'has "labels" where a class\'s number should stand'),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_each_fault_has_a_sentence_of_its_own(name: str, tmp_path: Path) -> None:
    content, words = BAD[name]
    file = tmp_path / "names"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(StartupError, match=words) as error:
        read_labels(file)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400 + len(str(file))


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="is a folder"):
        read_labels(tmp_path)
    with pytest.raises(StartupError, match="There is no file"):
        read_labels(tmp_path / "none")
    with pytest.raises(StartupError, match="cannot be read"):
        read_labels(tmp_path / ("x" * 300))
    with pytest.raises(StartupError, match="cannot be read"):
        read_labels(Path("a\0b"))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StartupError, match="a device or a pipe"):
        read_labels(tmp_path / "pipe")
    (tmp_path / "file").write_text("cat")
    with pytest.raises(StartupError, match="cannot be read"):
        read_labels(tmp_path / "file" / "names")


def test_no_list_is_that_large(tmp_path: Path) -> None:
    file = tmp_path / "names"
    file.write_bytes(b"cat" + b"\n" * (MAX_BYTES - 3))
    assert read_labels(file) == ("cat",)
    with file.open("ab") as more:
        more.write(b"\n")
    with pytest.raises(StartupError, match="larger than 16 MiB"):
        read_labels(file)


@pytest.mark.parametrize(("count", "words"), [(2, "2 names are"), (4, "4 names are"), (1, "1 name is")])
def test_one_name_for_each_class(count: int, words: str) -> None:
    check_labels(PETS, "pets.txt", 3, "pets")
    with pytest.raises(StartupError, match=f"pets.txt: {words} in the file for the 3 classes of pets"):
        check_labels(["x"] * count, "pets.txt", 3, "pets")


@pytest.mark.parametrize("classes", [None, 0])
def test_names_for_no_classes_are_refused(classes: int | None) -> None:
    with pytest.raises(StartupError, match="tokens has no output with a fixed number of classes to name"):
        check_labels(PETS, "pets.txt", classes, "tokens")

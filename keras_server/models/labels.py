"""The names of the classes."""

from __future__ import annotations

import json
from pathlib import Path

from keras_server.models.errors import StartupError

IMAGENET = Path(__file__).resolve().parents[1] / "bundled" / "imagenet_classes.json"  # Keras' class index


def read_labels(path: Path) -> tuple[str, ...]:
    """Return the classes' names from a file: a line each, a JSON list, or Keras' class index. Raises StartupError."""
    try:
        text = path.read_text("utf-8")
        if path.suffix != ".json":
            return tuple(text.splitlines())
        names = json.loads(text)
        if isinstance(names, dict):
            return tuple(names[str(i)][1] for i in range(len(names)))
        return tuple(str(name) for name in names)
    except (OSError, ValueError, LookupError, TypeError):
        raise StartupError(f"{path} holds no labels: a line a class, a JSON list, or Keras' class index.") from None

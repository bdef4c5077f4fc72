"""The settings that say which model answers and how photos are prepared for it: options of every command."""

from __future__ import annotations

from keras_server.settings import SETTINGS, Setting

OTHERS = {
    "model", "weights", "sha256", "engine", "max_batch", "decode_threads", "engine_threads", "cache_dir", "top",
    "max_megapixels", "import_", "unsafe_model",
}  # fmt: skip
MODEL_SETTINGS: tuple[Setting, ...] = tuple(row for row in SETTINGS if row.of_model or row.name in OTHERS)

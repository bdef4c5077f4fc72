"""The settings that say which model answers and how photos are prepared for it: options of every command."""

from __future__ import annotations

from keras_server.settings import SETTINGS, Setting

NAMES = {
    "model", "weights", "labels", "preprocess", "activation", "output", "engine", "precision", "max_batch",
    "decode_threads", "engine_threads", "cache_dir", "top", "max_megapixels", "background", "unsafe_model",
}  # fmt: skip
MODEL_SETTINGS: tuple[Setting, ...] = tuple(row for row in SETTINGS if row.name in NAMES)

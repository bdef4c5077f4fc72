"""Settings: what a row of their table is, and how the command line and the environment are read by the table."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def one_of(*names: str) -> Callable[[str], str]:
    """Return a converter that takes one of `names` and nothing else."""

    def convert(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(names)}")
        return text

    return convert


def number(kind: type, least: float, most: float) -> Callable[[str], Any]:
    """Return a converter to `kind` (int or float) that takes `least` to `most`."""

    def convert(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if least <= kind(text) <= most:
                return kind(text)
        whole = "whole " if kind is int else ""
        raise argparse.ArgumentTypeError(f"{text!r} is not a {whole}number from {least:g} to {most:g}")

    return convert


def switch(text: str) -> bool:
    """Read on, true, yes, 1 and their opposites."""
    if text.lower() not in {"1", "on", "true", "yes", "0", "off", "false", "no"}:
        raise argparse.ArgumentTypeError(f"{text!r} is neither on nor off")
    return text.lower() in {"1", "on", "true", "yes"}


@dataclass(frozen=True)
class Setting:
    """A row of the table. --name and KERAS_SERVER_NAME set it; `read` turns their text into the value."""

    name: str
    default: Any
    help: str
    read: Callable[[str], Any] = str
    metavar: str | None = None

    @property
    def option(self) -> str:
        """The command line's spelling."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """The environment's spelling."""
        return "KERAS_SERVER_" + self.name.upper()


def shown_default(setting: Setting) -> str:
    """Return a default as help and README show it."""
    return "off" if setting.default is False else str(setting.default) if setting.default != () else ""


def parser_of(table: Iterable[Setting]) -> argparse.ArgumentParser:
    """Return the parser of a command line, whose defaults are what the environment says.

    Exits with status 2 and a sentence where the environment cannot be read.
    """
    parser = argparse.ArgumentParser(
        description="Serve a Keras model as a REST API: POST an image to /predict, get its labels as JSON.",
        epilog="Each option may stand in the environment instead: --port 8000 is KERAS_SERVER_PORT=8000.",
    )
    for setting in table:
        value, more = setting.default, dict[str, Any]()
        if given := os.environ.get(setting.variable):
            try:
                value = setting.read(given)
            except argparse.ArgumentTypeError as error:
                parser.error(f"{setting.variable}: {error}")
        if isinstance(setting.default, tuple):  # may be repeated
            value, more = [part.strip() for part in given.split(",")] if given else [], {"action": "append"}
        elif isinstance(setting.default, bool):  # --unsafe-model alone is on
            more = {"nargs": "?", "const": True}
        default = shown_default(setting)
        parser.add_argument(
            setting.option,
            default=value,
            type=setting.read,
            help=setting.help + (f" (default: {default})" if default else ""),
            metavar=setting.metavar or setting.name.rpartition("_")[2].upper(),
            **more,
        )
    return parser


COUNT = number(int, 1, 100_000)
THREADS = number(int, 0, 1024)
# fmt: off
SETTINGS = (
    Setting("model", "", "a classifier of keras.applications, a .keras or .h5 file, a SavedModel folder, or 'bundled'; "
            "if not given, resnet50, or the bundled one where its weights cannot be had"),
    Setting("weights", "", "weights file for the architecture that --model names, instead of a download",
            metavar="FILE"),
    Setting("labels", "", "names of the classes: a line each, a JSON list, or Keras' class index", metavar="FILE"),
    Setting("preprocess", "auto", "what the model was trained with: none, caffe, tf, torch, or an architecture's name; "
            "auto is the architecture's own, and none for a file", metavar="MODE"),
    Setting("activation", "auto", "none, softmax or sigmoid, on the model's output; auto finds out if it is logits",
            one_of("auto", "none", "softmax", "sigmoid")),
    Setting("engine", "auto", "auto, openvino or keras; auto is openvino on a CPU and keras on a GPU",
            one_of("auto", "openvino", "keras")),
    Setting("precision", "float32", "float32, or bfloat16 where the processor has it (faster, less exact)",
            one_of("float32", "bfloat16")),
    Setting("max_batch", 8, "most images that the model computes at once", COUNT, "N"),
    Setting("decode_threads", 0, "most images that are decoded at once; 0: one a processor", THREADS, "N"),
    Setting("engine_threads", 0, "threads that the model computes with; 0: one a processor", THREADS, "N"),
    Setting("cache_dir", "~/.cache/keras-server", "folder for converted models, for a faster start; empty: none",
            metavar="FOLDER"),
    Setting("host", "127.0.0.1", "address to listen on; 0.0.0.0 for all"),
    Setting("port", 5000, "port to listen on; 0: a free one", number(int, 0, 65_535)),
    Setting("top", 5, "rows in an answer, unless the request says ?top=N", COUNT, "N"),
    Setting("max_upload_mb", 16.0, "largest request body in MiB", number(float, 0.001, 4096), "MIB"),
    Setting("max_megapixels", 50.0, "largest picture in millions of pixels", number(float, 0.001, 10_000), "MP"),
    Setting("queue_size", 128, "most images that wait; past it requests are answered 503", COUNT, "N"),
    Setting("timeout", 30.0, "seconds from a request's arrival to its answer, else 504",
            number(float, 0.01, 86_400), "SECONDS"),
    Setting("drain_seconds", 2.0, "on SIGTERM or Ctrl-C, seconds in which new connections are still answered "
            "while /readyz says no", number(float, 0, 3600), "SECONDS"),
    Setting("api_key", (), "key that clients must send as 'Authorization: Bearer KEY'; may be repeated, "
            "in the environment with commas", metavar="KEY"),
    Setting("api_key_file", "", "file with one key a line", metavar="FILE"),
    Setting("cors_origin", "", "origin whose web pages may call the server, or *", metavar="ORIGIN"),
    Setting("log_format", "text", "text or json", one_of("text", "json")),
    Setting("unsafe_model", False, "on or off: load model files that carry Python code of their own", switch),
)
# fmt: on


def read_settings(arguments: Sequence[str] = ()) -> Settings:
    """Return the settings, the command line before the environment before the defaults.

    Exits with status 2 and a sentence where one cannot be read.
    """
    parser = parser_of(SETTINGS)
    found = parser.parse_args(arguments)
    if found.api_key_file:
        try:
            found.api_key += Path(found.api_key_file).read_text("ascii").split() or [""]
        except (OSError, UnicodeDecodeError):
            parser.error(f"--api-key-file {found.api_key_file}: there is no such file of ASCII keys")
    if not all(found.api_key):  # it would open the door to all
        parser.error("--api-key: a key is empty")
    return Settings(**vars(found))


class Settings(argparse.Namespace):
    """The settings; to be replaced."""

    def __init__(self, **values: Any):
        super().__init__(**{s.name: list(s.default) if s.default == () else s.default for s in SETTINGS} | values)

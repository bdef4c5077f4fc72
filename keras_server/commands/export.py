"""`keras-server export MODEL OUT`: write a model as a folder that is served without Keras and TensorFlow."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click
from click.core import ParameterSource

from keras_server.commands.options import MODEL_SETTINGS
from keras_server.models.beside import locate
from keras_server.models.errors import StartupError
from keras_server.models.export import Export, copy_export
from keras_server.models.meaning import check_options, final_spec
from keras_server.models.opening import export_of, is_for_openvino
from keras_server.models.registry import or_bundled
from keras_server.models.repository import has_several
from keras_server.models.source import Source
from keras_server.models.tracing import check_keras
from keras_server.settings import Settings, parse, values_of

log = logging.getLogger("keras_server")
ROWS = tuple(
    row
    for row in MODEL_SETTINGS
    if (row.of_model and row.name != "engine_threads")  # which is for a machine
    or row.name in ("weights", "sha256", "cache_dir", "import_", "unsafe_model")
)
# Of these the export holds what they lead to, and not the options.
RESOLVED = ("labels", "preprocess", "calibrate")


class NotExportable(StartupError):
    """OpenVINO cannot run the model."""


def command() -> click.Command:
    """Return what click reads the command line with."""
    return click.Command(
        "keras-server export",
        params=[
            click.Argument(["model"], metavar="MODEL"),
            click.Argument(["out"], type=Path, metavar="OUT"),
            *(row.parameter() for row in ROWS),
        ],
        help="Convert MODEL, with all options baked in, into the folder OUT: `keras-server --model OUT` serves it "
        "without Keras and TensorFlow.",
        context_settings={"max_content_width": 120},
    )


def main(arguments: Sequence[str]) -> int:
    """Write the export. Returns the exit status."""
    context = parse(command(), arguments, locate)
    out: Path = context.params["out"]
    settings = Settings(model=context.params["model"], **values_of(context, ROWS))
    chosen = {
        row.name: str(getattr(settings, row.name))
        for row in ROWS
        if row.of_model
        and row.name not in RESOLVED
        and context.get_parameter_source(row.name) != ParameterSource.DEFAULT
    }
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise StartupError(f"{out} is there already: name a folder that is not, or remove it.")
        source = Source.of(settings)
        export = write(source, settings, out, chosen)
    except StartupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {out} cannot be written: {error.strerror or error}.", file=sys.stderr)
        return 1
    size = sum(file.stat().st_size for file in out.iterdir()) / 1e6
    print(f"{out}: {export.spec.name}, {size:.1f} MB. Serve it: keras-server --model {out}")
    if export.flaw:
        print(f"It has no heat maps: {export.flaw}")
    for sentence in (*map(str, export.tested), *filter(None, [export.declined])):
        print(sentence)
    return 0


def write(source: Source, settings: Settings, out: Path, chosen: dict[str, str]) -> Export:
    """Write the export of a model with the options that were chosen. Raises NotExportable, StartupError or OSError."""
    check_options(settings)
    with contextlib.ExitStack() as cleaning:
        export = export_of(source, settings, cleaning)
        if export.why:
            raise NotExportable(
                f"{source.name} cannot be exported, since OpenVINO cannot run it ({export.why}): serve its own file, "
                "with Keras."
            )
        spec = final_spec(export.spec, settings)
        if settings.precision == "int8" and not export.tested:  # it is no faster, and stays as it is
            chosen = {name: value for name, value in chosen.items() if name != "precision"}
        # What the options make of the outputs is decided anew by who serves it.
        copy_export(export, out, replace(export.spec, labels=spec.labels, preprocess=spec.preprocess), chosen)
    return export


def exported(settings: Settings, folder: Path) -> Settings:
    """Have a model exported into a folder, once for several servers, and return the settings that they serve it with.

    These are the same where it needs no export or Keras has to compute it, and for several models, which each server
    opens by itself. Raises StartupError or OSError.
    """
    if has_several(settings):
        return settings
    source = Source.of(settings, settings.model or "resnet50")
    if source.is_export or source.is_foreign:
        return settings
    check_keras()
    if not is_for_openvino(source, settings):
        return settings
    try:
        or_bundled(source, lambda source: write(source, settings, folder, {}))
    except NotExportable as error:
        if settings.engine == "openvino":
            raise
        log.warning("%s", error)
        return settings
    inside = replace(settings, weights="", sha256="", labels="", preprocess="auto", import_=(), unsafe_model=False)
    return replace(inside, model=str(folder))

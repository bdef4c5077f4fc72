"""Which precision a model is served in, and what has to be made for it."""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
from pathlib import Path

from keras_server.machine import sums_bytes
from keras_server.models.agreement import Tested
from keras_server.models.child import quantize_in_child
from keras_server.models.engines import has_bfloat16
from keras_server.models.errors import StartupError
from keras_server.models.export import Export, ExportError
from keras_server.models.quantize import QuantizeJob, cache_of, check_nncf
from keras_server.models.source import Source
from keras_server.settings import SETTINGS, Precision, Settings

log = logging.getLogger("keras_server")

QUANTIZED = ("int8", "auto")  # of --precision, for which a model may have to be quantized
NEEDS_ROWS = (
    "--precision int8 needs --calibrate FOLDER, with a few hundred pictures of the kind that will be sent (or an .npz "
    "or .jsonl file of rows); only an export that was made with it has int8 in it."
)


def check_rows(source: Source, settings: Settings) -> None:
    """Raise StartupError where int8 is asked for with nothing to calibrate it, before the model is converted."""
    if settings.precision == "int8" and not settings.calibrate and not source.is_export:
        raise StartupError(NEEDS_ROWS)


def with_precision(export: Export, settings: Settings, cleaning: contextlib.ExitStack) -> Export:
    """Return an export with what --precision asks for, which another process may have to make. Raises StartupError."""
    if settings.precision not in QUANTIZED or export.why:
        return export
    name = export.spec.name
    if not settings.calibrate:
        if export.tested or settings.precision == "auto":
            return export
        raise StartupError(NEEDS_ROWS)
    kept = cache_of(export, settings).read()
    with contextlib.suppress(ExportError):
        if kept:
            return Export.of(*kept)
    check_nncf()
    elsewhere = tempfile.mkdtemp(prefix="keras-server-")
    cleaning.callback(shutil.rmtree, elsewhere, ignore_errors=True)
    values = {row.name: getattr(settings, row.name) for row in SETTINGS if row.of_model}
    values |= {"cache_dir": settings.cache_dir, "max_megapixels": settings.max_megapixels}
    quantized = Export.read(quantize_in_child(name, QuantizeJob(str(export.folder), values, elsewhere)))
    if quantized.folder != Path(elsewhere):  # the cache keeps it, with all that it was made of
        cleaning.close()
    return quantized


def choose(export: Export, settings: Settings) -> tuple[Precision, Tested | None]:
    """Return the precision that the settings ask for, and how it was tested, if it was. Raises StartupError."""
    tested = {each.precision: each for each in export.tested if each.agreement.keeps(settings.min_agreement)}
    if settings.precision == "auto":
        can = {"int8": sums_bytes, "bfloat16": has_bfloat16}
        if export.declined:
            log.info("%s", export.declined)
        return next(((name, each) for name, each in tested.items() if can[name]()), ("float32", None))
    if settings.precision != "int8":
        return settings.precision, tested.get(settings.precision)
    if export.declined:
        log.warning("%s", export.declined)
        return "float32", None
    if "int8" not in tested:
        raise StartupError(
            f"This export of {export.spec.name} does not keep --min-agreement {settings.min_agreement:g} in int8: "
            + " ".join(map(str, export.tested))
        )
    if not tested["int8"].portable and not sums_bytes():
        raise StartupError(
            f"This export of {export.spec.name} was quantized for processors with VNNI, which this one lacks, so sums "
            "would overflow: leave --precision at float32, or export it anew on this processor."
        )
    return "int8", tested["int8"]

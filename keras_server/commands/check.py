"""`keras-server check MODEL --expect PHOTO=LABEL ...`: what one runs before a deployment."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click
import numpy as np

from keras_server.api.context import App
from keras_server.api.uploads import decode
from keras_server.commands.options import MODEL_SETTINGS
from keras_server.images import PREPROCESS, ImageError
from keras_server.models.beside import locate
from keras_server.models.errors import StartupError
from keras_server.models.opening import Opened, open_model
from keras_server.models.served import Served
from keras_server.models.source import Source
from keras_server.models.spec import Spec, probabilities
from keras_server.settings import Settings, parse, values_of

ROWS = tuple(row for row in MODEL_SETTINGS if row.name not in ("model", "top"))


@dataclass(frozen=True)
class Expected:
    """A photo, and the label that the model is to answer first."""

    photo: Path
    label: str


def expectation(text: str) -> Expected:
    """Read PHOTO=LABEL. Both may hold a "=": the photo is then the longest name that is there."""
    parts = text.split("=")
    splits = [("=".join(parts[:i]), "=".join(parts[i:])) for i in range(len(parts) - 1, 0, -1)]
    splits = [(photo, label) for photo, label in splits if photo and label]
    if not splits:
        raise click.BadParameter(f"{text!r} is not PHOTO=LABEL, such as dog.jpg=German_shepherd.")
    photo, label = next((split for split in splits if os.path.isfile(split[0])), splits[0])
    return Expected(Path(photo), label)


def command() -> click.Command:
    """Return what click reads the command line with."""
    return click.Command(
        "keras-server check",
        params=[
            click.Argument(["model"], metavar="MODEL"),
            click.Option(["--expect"], type=expectation, multiple=True, required=True, metavar="PHOTO=LABEL",
                         help="the label that MODEL is to answer first for a photo; may be repeated"),
            *(row.parameter() for row in ROWS),
        ],
        help="Load MODEL as it would be served, and hold its answers against what is on photos. Exits with 1 where one "
        "differs.",
        context_settings={"max_content_width": 120},
    )  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """Compare. Returns the exit status: 0 where all labels are as expected."""
    context = parse(command(), arguments, locate)
    expected: tuple[Expected, ...] = context.params["expect"]
    import run_keras_server as service  # the file to edit, which imports this package

    service.configure()
    service.settings = settings = replace(service.settings, model=context.params["model"], **values_of(context, ROWS))
    try:
        photos = [read(each.photo) for each in expected]
        opened = open_model(Source.of(settings), settings)
        check_labels(opened.spec, expected)
        failed = [*compare(opened, settings, photos, expected)]
        for sentence in failed:
            print(sentence)
        if not failed:
            print(f"{opened.spec.name}: all {len(expected)} as expected.")
            return 0
        if fitting := [mode for mode in PREPROCESS if fits(mode, opened, settings, photos, expected)]:
            print(f"With --preprocess {' or '.join(fitting)} all {len(expected)} would be as expected.")
    except StartupError as error:
        print(f"error: {error}", file=sys.stderr)
    return 1


def fits(mode: str, opened: Opened, settings: Settings, photos: Sequence[bytes], expected: Sequence[Expected]) -> bool:
    """Return whether all labels were as expected with another preprocessing."""
    other = replace(opened, spec=replace(opened.spec, preprocess=mode))
    return mode != opened.spec.preprocess and not [*compare(other, settings, photos, expected)]


def read(photo: Path) -> bytes:
    """Return a photo's bytes. Raises StartupError."""
    try:
        return photo.read_bytes()
    except OSError as error:
        raise StartupError(f"--expect: {photo} cannot be read: {error.strerror or error}.") from None


def check_labels(spec: Spec, expected: Sequence[Expected]) -> None:
    """Raise StartupError for what the model can never answer."""
    if spec.kind != "classes":
        raise StartupError(
            spec.reason or f"{spec.name} answers with numbers, not with labels: there is none to expect."
        )
    labels = spec.names(spec.classes)
    for each in expected:
        if each.label not in labels:
            near = difflib.get_close_matches(each.label.replace(" ", "_"), labels, 1, cutoff=0)[0]
            raise StartupError(f"--expect: {each.label!r} is no label of {spec.name}: take one such as {near}.")


def compare(opened: Opened, settings: Settings, photos: Sequence[bytes], expected: Sequence[Expected]) -> Iterator[str]:
    """Yield a sentence for each photo whose first label is another. Raises StartupError for what is no photo."""
    import run_keras_server as service

    spec = opened.spec
    service.model = served = Served(spec, opened.engine, settings.max_batch, settings.queue_size, opened.explain)
    labels = spec.names(spec.classes)
    try:
        for data, each in zip(photos, expected, strict=True):
            row = first_row(service.app, served, data, each.photo)
            best = int(row.argmax())
            if labels[best] != each.label:
                of_it = max(float(row[i]) for i, label in enumerate(labels) if label == each.label)
                yield (
                    f"{each.photo}: {each.label} was expected ({of_it:.4f}), and {labels[best]} is answered "
                    f"({row[best]:.4f})."
                )
    finally:
        served.close()


def first_row(app: App, served: Served, data: bytes, photo: Path) -> np.ndarray:
    """Return the probabilities of a photo, float32, shape (classes,). Raises StartupError for what is no photo."""
    try:
        with app.app_context():
            picture = decode(data)
    except ImageError as error:
        raise StartupError(f"--expect: {photo}: {error}") from None
    row: np.ndarray = probabilities(served.predict(picture), served.spec)[0]
    return row

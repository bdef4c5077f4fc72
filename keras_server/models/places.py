"""Where models come from: what --model names, and what the folder of --model-dir holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import click

from keras_server.models.addresses import fetch
from keras_server.models.beside import beside
from keras_server.models.errors import StartupError
from keras_server.models.folder import models_in, versions_in
from keras_server.models.source import Source, named_path, reachable
from keras_server.readers import ModelOption
from keras_server.settings import Beside, Settings


@dataclass(frozen=True)
class Place:
    """Where a model comes from."""

    name: str
    model: str  # as Source takes it
    path: Path | None = None  # what can change
    own: Mapping[str, str] = field(default_factory=dict)  # settings that --model gives it
    listed: bool = False  # in the folder, and not by --model

    def versions(self) -> dict[int, Path | None]:
        """Return what there is to be served, by the numbers of versions; 1 where it has none. Raises OSError."""
        if not self.path:
            return {1: None}
        versions: dict[int, Path | None] = {**versions_in(self.path)}
        return versions or ({} if self.listed and not self.path.exists() else {1: self.path})

    @property
    def is_readable(self) -> bool:
        """Whether it can be seen what is there."""
        try:
            self.versions()
        except OSError:
            return False
        return True

    def beside(self) -> Beside:
        """Return the settings that stand beside it. Raises StartupError."""
        try:
            return beside(str(self.path)) if self.path else Beside()
        except click.UsageError as error:
            raise StartupError(error.message) from None


def places_of(settings: Settings) -> list[Place]:
    """Return the places of what --model names. Raises StartupError."""
    options = settings.models or ((ModelOption(settings.model, settings.model),) if settings.model else ())
    if settings.sha256 and len(options) > 1:
        raise StartupError("--sha256 is for one model, and --model names several.")
    places: list[Place] = []
    for option in options:
        model = fetch(option.model, settings.sha256, settings.cache_dir)
        path = None if model == "bundled" else named_path(model)
        name = option.name or (reachable(path) if path else Source(model).name)
        if any(place.name == name for place in places):
            raise StartupError(f"--model: two models are called {name}: give one another name, NAME={option.model}.")
        places.append(Place(name, model, path, option.values))
    return places


def places_in(folder: Path) -> list[Place]:
    """Return the places of the models in a folder, several of which may have one name. Raises StartupError."""
    try:
        found = models_in(folder)
    except OSError as error:
        raise StartupError(f"--model-dir: {folder} cannot be read ({error.strerror or error}).") from None
    return [Place(name, str(path), path, listed=True) for name, paths in found.items() for path in paths]

"""Several models and their versions: loads what the options name and a folder holds, and follows what changes there.

One thread loads one model after the other, also for whoever asks for one by the repository's API. A new version has
been converted, checked and warmed up before requests get it; those that have the old one end on it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import queue
import threading
from collections.abc import Callable, Container, Mapping
from dataclasses import replace
from pathlib import Path

from keras_server.machine import step_back
from keras_server.models import registry
from keras_server.models.beside import settings_for
from keras_server.models.engines import NICENESS
from keras_server.models.errors import StartupError
from keras_server.models.folder import Files, beside_of, state_of, versions_in
from keras_server.models.leaving import Leaving
from keras_server.models.orders import Order, Orders
from keras_server.models.places import Place, places_in, places_of
from keras_server.models.registry import Model, Registry, UnknownModel, in_words, serve_source, short, warn
from keras_server.models.served import Served
from keras_server.models.source import Source
from keras_server.settings import Beside, Settings
from keras_server.telemetry import LOADS, forget_loads

log = logging.getLogger("keras_server")

SETTLED_SECONDS = 1.0  # in which what is whole does not change
LAST_SECONDS = 5.0  # in which what is being loaded is finished, as the process ends
Key = tuple[str, int]  # a model and its version
State = tuple[Files, tuple[tuple[str, str], ...]]  # what a version is made from: its files, and the settings beside it
DYING = "Its thread has ended: it is being loaded again."


def load(settings: Settings) -> Served | Registry:
    """Return what the settings name: one model, or several. Raises StartupError."""
    return Repository(settings) if has_several(settings) else registry.load(settings)


def has_several(settings: Settings) -> bool:
    """Return whether the settings name several models or versions, or one that may change."""
    if settings.models or settings.model_dir:
        return True
    if not settings.model:
        return False  # what is served where none was named never changes
    several = settings.watch or settings.versions > 1
    return bool(several or (os.path.isdir(settings.model) and versions_in(Path(settings.model))))


class Repository(Registry):
    """A registry that is kept as the options say, and as the folder is."""

    def __init__(self, settings: Settings):
        """Load everything. Raises StartupError where something that --model names cannot be served, or nothing can."""
        super().__init__()
        self.settings = settings
        self.folder = Path(settings.model_dir) if settings.model_dir else None
        self.named = places_of(settings)
        self.loading = threading.RLock()  # what follows belongs to whoever has it
        self.loaded: dict[Key, State] = {}
        self.refused: dict[Key, tuple[State | None, str]] = {}  # and why; without a state it is tried again
        self.seen: dict[Key, State] = {}  # at the last look, and not loaded since
        self.beside: dict[str, tuple[Files, Beside]] = {}  # what stood beside each model, as those files were
        self.flaws: dict[str, str] = {}  # in that, as sentences
        self.unloaded: set[str] = set()  # by request
        self.said: set[str] = set()  # sentences that need no repeating
        self.unsaid: list[str] = []  # refusals that the log does not know of yet
        self.unsettled = False
        self.ending = False  # nothing is loaded any more
        self.leaving = Leaving(settings.timeout)
        self.last_resort: Callable[[], None] = lambda: None
        self.orders = Orders()
        try:
            self.begin()
        except BaseException:
            self.close()
            raise
        self.thread = threading.Thread(target=self.follow, name="repository", daemon=True)
        self.thread.start()

    def begin(self) -> None:
        """Load everything for the first time. Raises StartupError as the constructor."""
        for place in self.places():
            model = self.models.setdefault(place.name, Model())
            self.refresh(place, patient=False)
            if not model.versions and not place.listed:  # whoever starts it says so
                raise StartupError(self.reason(place.name))
            self.tell()
            if not model.versions:
                model.missing = self.reason(place.name)
                if not place.is_readable:  # nobody knows that it is one
                    del self.models[place.name]
        if not self.names():
            raise StartupError(f"--model-dir: there is no model in {self.folder} that can be served.")

    def places(self) -> list[Place]:
        """Return where all models come from. Raises StartupError, also where the folder has become empty."""
        places = {place.name: place for place in self.named}
        found = places_in(self.folder) if self.folder else []
        if not found and {name for name, _ in self.loaded} - {*places}:
            raise StartupError(f"--model-dir: {self.folder} has no model any more, or no disk: what is served stays.")
        for place in found:
            other = places.setdefault(place.name, place)
            if other is not place:
                self.say_once(f"{place.path} is not served, for {other.model} has the name {place.name}: rename it.")
        return [*places.values()]

    def say_once(self, sentence: str) -> None:
        """Warn of something that every look would find."""
        if sentence not in self.said:
            self.said.add(sentence)
            log.warning(sentence)

    def tell(self) -> None:
        """Log what has been refused."""
        for sentence in self.unsaid:
            log.error("%s", sentence)
        self.unsaid.clear()

    def look(self) -> None:
        """Load what is new or has changed, and remove what is gone."""
        with self.loading:
            self.unsettled = False
            try:
                places = self.places()
            except StartupError as error:  # the disk is away, perhaps: what is served stays
                self.say_once(str(error))
                return
            for place in places:
                if place.name not in self.unloaded:
                    self.refresh(place, patient=True)
                    self.tell()
            known = {*self.models} | self.unloaded | {name for name, _ in (*self.refused, *self.seen)}
            for name in known - {place.name for place in places}:
                log.info("%s is gone, and no longer served.", name)
                self.remove(name)
                self.unloaded.discard(name)
                forget_loads(name)

    def refresh(self, place: Place, patient: bool) -> None:
        """Serve the newest versions of a model that can be served, and no others.

        Where it is `patient`, what has changed since the last look is left alone until it does no more.
        """
        try:
            found, versions = self.settings_beside(place), place.versions()
        except (StartupError, OSError) as error:
            unreadable = f"{place.path} cannot be read ({getattr(error, 'strerror', None) or error})."
            self.flaws[place.name] = str(error) if isinstance(error, StartupError) else unreadable
            self.say_once(f"{place.name}: {self.flaws[place.name]}")
            return
        self.flaws.pop(place.name, None)
        self.forget(place.name, versions)
        kept: list[int] = []
        for number in sorted(versions, reverse=True):
            if len(kept) < self.settings.versions and self.bring(place, number, versions[number], found, patient):
                kept.append(number)
        self.label(place.name, found.version_labels)
        served = {number for name, number in self.loaded if name == place.name}
        if kept or (place.listed and not versions):  # else what is served stays until something takes its place
            for number in served - {*kept}:
                log.info("Version %d of %s is no longer served.", number, place.name)
                self.retire(place.name, number)

    def label(self, name: str, labels: Mapping[str, int]) -> None:
        """Have labels stand for versions of a model: each for its old one until the new one is served."""
        with self.lock:
            if model := self.models.get(name):
                model.labels = {
                    label: number if number in model.versions else model.labels.get(label, number)
                    for label, number in labels.items()
                }

    def settings_beside(self, place: Place) -> Beside:
        """Return what stands beside a model, read anew where it has changed. Raises StartupError."""
        state = state_of(*beside_of(place.path)) if place.path else frozenset()
        if self.beside.get(place.name, (None, None))[0] != state:
            self.beside[place.name] = state, place.beside()
        return self.beside[place.name][1]

    def reason(self, name: str) -> str:
        """Return why nothing is served of a model, as a sentence."""
        reasons = {number: reason for (other, number), (_, reason) in self.refused.items() if other == name}
        return self.flaws.get(name) or (reasons[max(reasons)] if reasons else "It has no version that is whole.")

    def bring(self, place: Place, number: int, path: Path | None, found: Beside, patient: bool) -> bool:
        """Serve a version as it is now, if it can be; returns whether it is served, be it as it was before."""
        key = place.name, number
        state = self.state_of(path, found)
        is_served = key in self.loaded
        if self.loaded.get(key) == state:
            self.refused.pop(key, None)  # what had taken its place is gone
            return True
        if self.ending:
            return is_served
        if patient and self.seen.get(key) != state:
            self.seen[key], self.unsettled = state, True
            return is_served
        if patient and self.refused.get(key, (None, ""))[0] == state:
            return is_served
        versioned = path != place.path
        title = f"version {number} of {place.name}" if versioned else place.name
        try:
            served = self.open(place, number if versioned else None, path, found)
        except (StartupError, OSError) as error:
            self.refused[key] = state, str(error)
            LOADS.labels(place.name, "refused").inc()
            self.unsaid.append(f"{title} is not served{', and the old one stays' if is_served else ''}: {error}")
            return is_served
        if patient and self.state_of(path, found) != state:
            served.close()
            self.unsettled = True
            return is_served
        served.batcher.on_death = functools.partial(self.died, place.name, number, served)
        self.refused.pop(key, None)
        self.seen.pop(key, None)
        self.loaded[key] = state
        old = self.put(place.name, number, served)
        LOADS.labels(place.name, "loaded").inc()
        log.info("Now served: %s, with %s.", title, served.spec.engine)
        if old:
            self.let_leave(old)
        return True

    def state_of(self, path: Path | None, found: Beside) -> State:
        """Return what tells whether a version has changed."""
        labels = found.values.get("labels")
        parts = [path, path.with_suffix(".bin"), *([Path(labels)] if labels else [])] if path else []
        return state_of(*parts), tuple(sorted(found.values.items()))

    def open(self, place: Place, version: int | None, path: Path | None, found: Beside) -> Served:
        """Load, convert and warm up a version. Raises StartupError."""
        settings = self.settings
        if version is not None:  # an export, say, has settings of its own
            own = Place(place.name, str(path), path).beside()
            found = replace(found, values={**own.values, **found.values}, where=found.where or own.where)
        model = str(path or place.model)
        own_settings = replace(settings_for(settings, found, place.own), model=model, models=())
        source = Source.of(settings, model)
        served = serve_source(source, settings, place.name, version, own_settings)
        warn(source, served, own_settings)
        return served

    def retire(self, name: str, number: int) -> None:
        """Serve a version no more, once the requests that have it are answered."""
        self.loaded.pop((name, number), None)
        if old := self.drop(name, number):
            self.let_leave(old)

    def let_leave(self, served: Served) -> None:
        """Have a version closed once no request has it; the thread then sees to its memory."""
        self.leaving.add(served)
        self.orders.give(self.leaving.tidy)

    def remove(self, name: str) -> None:
        """Serve a model no more, and forget it."""
        for number in [number for other, number in self.loaded if other == name]:
            self.retire(name, number)
        with self.lock:
            self.models.pop(name, None)
        self.forget(name)
        self.beside.pop(name, None)

    def forget(self, name: str, but: Container[int] = ()) -> None:
        """Forget what was seen or refused of a model's versions, but for those that are there."""
        self.refused = {key: value for key, value in self.refused.items() if key[0] != name or key[1] in but}
        self.seen = {key: value for key, value in self.seen.items() if key[0] != name or key[1] in but}

    # What others ask for

    def index(self) -> list[dict[str, str]]:
        """Return what there is, version by version, in the words of Triton's repository extension."""
        rows = super().index()
        rows += [
            {"name": name, "version": str(number), "state": "UNAVAILABLE", "reason": reason}
            for (name, number), (_, reason) in [*self.refused.items()]
            if (name, number) not in self.loaded
        ]
        return rows + [{"name": name, "state": "UNAVAILABLE", "reason": "unloaded"} for name in sorted(self.unloaded)]

    def load(self, name: str) -> None:
        """Serve a model of the folder, as it is now.

        Raises UnknownModel, StartupError where it cannot be served, or Overdue: then it is still loaded.
        """

        def load() -> None:
            with self.loading:
                place = self.listed(name)
                self.unloaded.discard(name)
                self.refresh(place, patient=False)
                self.tell()
            versions = [number for other, number in (*self.loaded, *self.refused) if other == name]
            if name in self.flaws or not self.versions(name) or (name, max(versions)) in self.refused:
                raise StartupError(self.reason(name))

        self.orders.have_done(load)

    def unload(self, name: str) -> None:
        """Serve a model of the folder no more, until it is loaded again. Raises UnknownModel, or as load()."""

        def unload() -> None:
            with self.loading:
                self.listed(name)
                self.unloaded.add(name)
                self.remove(name)

        self.orders.have_done(unload)

    def listed(self, name: str) -> Place:
        """Return the place of a model in the folder. Raises UnknownModel, or StartupError where that cannot be read."""
        places = {place.name: place for place in self.places() if place.listed}
        if name not in places:
            there = in_words([*places]) or "none"
            raise UnknownModel(f"There is no model {short(name)} in the folder of --model-dir: it has {there}.")
        return places[name]

    def look_again(self) -> None:
        """Look, and try again what was refused: want of room, or of a connection, may have passed."""
        with self.loading:
            self.refused = {key: (None, reason) for key, (_, reason) in self.refused.items()}
            self.look()

    def look_soon(self) -> None:
        """Have the thread look again at once; callable from anywhere."""
        self.orders.give(self.look_again)

    def on_death(self, do: Callable[[], None]) -> None:
        """Have it done where the thread of the only model ends; one of several is loaded again."""
        self.last_resort = do

    def died(self, name: str, number: int, served: Served) -> None:
        """Load a version again whose thread has ended, which calls this."""
        with self.lock:
            model = self.models.get(name)
            if not model or model.versions.get(number) is not served:
                return  # it is no longer served
            if len(self.models) == 1:
                self.last_resort()
                return
            del model.versions[number]
            model.missing = DYING
        log.critical("The thread of %s has ended: the model is loaded again.", name)
        self.orders.give(functools.partial(self.revive, name, number))
        served.retire()

    def revive(self, name: str, number: int) -> None:
        """Load a version again."""
        with self.loading:
            self.loaded.pop((name, number), None)
            places: list[Place] = []
            try:
                places = [place for place in self.places() if place.name == name and name not in self.unloaded]
            except StartupError as error:
                self.flaws[name] = str(error)
            for place in places:
                self.refresh(place, patient=False)
                self.tell()
            with self.lock:
                if name in self.models and self.models[name].missing == DYING:
                    self.models[name].missing = self.reason(name)

    def follow(self) -> None:
        """Carry out orders, and look at the folder from time to time, until the repository is closed."""
        step_back(NICENESS)  # and with it the processes that convert: who answers goes first
        while True:
            watch = self.settings.watch or None
            soon = min(watch or SETTLED_SECONDS, SETTLED_SECONDS)
            order: Order | None = self.look if watch or self.unsettled else self.leaving.tidy
            with contextlib.suppress(queue.Empty):
                order = self.orders.take(soon if self.unsettled or self.leaving.waiting else watch)
            if not order:
                return
            try:
                order()
                self.leaving.tidy()
            except Exception:
                log.exception("The models could not be looked at")

    def end(self) -> None:
        """Load nothing any more, and wait for the thread, for LAST_SECONDS at most.

        Where OpenVINO works for a thread while Python ends, the process is aborted. A process that converts is left.
        """
        self.ending = True
        self.orders.give(None)
        self.thread.join(LAST_SECONDS)

    def close(self) -> None:
        """Serve nothing any more, and let the thread end."""
        self.orders.give(None)
        super().close()

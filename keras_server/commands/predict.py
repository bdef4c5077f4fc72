"""`keras-server predict PHOTOS... --output FILE`: label thousands of photos, and go on where it was interrupted."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import click
from click.core import ParameterSource
from tqdm import tqdm

from keras_server.commands.answering import Answering, ModelAnswering, ServerAnswering
from keras_server.commands.options import MODEL_SETTINGS
from keras_server.commands.results import FORMATS, Results, ResultsError, key
from keras_server.commands.sheet import write_sheet
from keras_server.models.beside import locate
from keras_server.models.errors import StartupError
from keras_server.readers import number, stop
from keras_server.settings import parse, values_of
from simple_request import Answer, PredictionError, find_images, predict_url, printable, read_image

MOST_LABELS = 20  # in the summary
ROWS = tuple(row for row in MODEL_SETTINGS if row.name != "output")  # --output is the file here
(OUTPUT,) = {*MODEL_SETTINGS} - {*ROWS}


def ending(text: str) -> Path:
    """Read the name of the file for the results."""
    path = Path(text)
    if path.suffix.lower() not in FORMATS:
        raise click.BadParameter(f"{text!r} ends neither in .csv nor in .jsonl.")
    return path


def server_url(text: str) -> str:
    """Read the address of a server."""
    try:
        return predict_url(text)
    except PredictionError as error:
        raise click.BadParameter(f"{error}.") from None


def command() -> click.Command:
    """Return what click reads the command line with."""
    own = [
        click.Argument(["photos"], nargs=-1, required=True, metavar="PHOTOS..."),
        click.Option(["--output", "file"], type=ending, required=True, metavar="FILE",
                     help="where the results go, a line a photo: a .csv with the first label, or a .jsonl with all"),
        click.Option(["--resume"], is_flag=True, help="go on with that file, and skip the photos that it has"),
        click.Option(["--unsure"], type=number(float, 0, 1), metavar="P", help="write only those whose first label is "
                     "less probable; the others go into FILE.sure.jsonl, so that --resume knows them"),
        click.Option(["--sheet"], type=Path, metavar="HTML", help="also make one page of thumbnails, by label"),
        click.Option(["--url"], type=server_url, metavar="URL", help="ask this server; else the model is loaded here"),
        click.Option(["--explain"], metavar="FOLDER", help="with --url: also save in this folder where each photo "
                     "speaks for its first label"),
        click.Option(["--workers"], type=number(int, 1, 1024), default="8", show_default=True, metavar="N",
                     help="photos that are on their way to the server at once"),
        click.Option(["--api-key"], metavar="KEY", envvar="KERAS_SERVER_API_KEY", help="key that the server asks for"),
        click.Option(["--model-output"], default="", metavar="NAME", envvar=OUTPUT.variable, help=OUTPUT.help),
    ]  # fmt: skip
    return click.Command(
        "keras-server predict",
        params=[*own, *(row.parameter() for row in ROWS)],
        help="Label photos, and all that are in folders, into a file that can be gone on with.",
        context_settings={"max_content_width": 120},
    )


@dataclass
class Run:
    """What one run has done, for its summary."""

    results: Results
    sure: Results | None
    unsure: float | None
    overlays: dict[str, Path] = field(default_factory=dict)  # where the heat maps of photos go
    already: int = 0
    left_out: list[str] = field(default_factory=list)
    asked: int = 0
    unanswered: Counter[str] = field(default_factory=Counter)  # sentences that a later try may not hear again
    left: int = 0
    stopped: bool = False  # by Ctrl-C
    seconds: float = 0.0

    def add(self, result: Answer) -> None:
        """Write a result where it belongs. Raises ResultsError."""
        self.asked += 1
        if self.sure and result["success"] and result["predictions"][0]["probability"] >= (self.unsure or 0):
            self.sure.add(result)
        else:
            self.results.add(result)


def main(arguments: Sequence[str]) -> int:
    """Label the photos. Returns the exit status: 0, 1 where any has no label, 130 after Ctrl-C."""
    context = parse(command(), arguments, locate)
    options = context.params
    model_values = values_of(context, ROWS) | {OUTPUT.name: options["model_output"]}
    if options["url"]:
        for row in ROWS:
            if row.name != "top" and context.get_parameter_source(row.name) is ParameterSource.COMMANDLINE:
                stop(f"{row.option} is for a model that is loaded here: leave it out with --url.")
    elif options["explain"]:
        stop("--explain asks a server for heat maps: give its --url.")
    # While the model loads; from then on the first Ctrl-C lets what is under way end.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    try:
        with ExitStack() as files:
            run = open_files(options, files)
            names, run.left_out = find_images(options["photos"])
            photos = {key(name): name for name in names}
            known = run.results.done | (run.sure.done if run.sure else set())
            todo = [name for each, name in photos.items() if each not in known]
            run.already = len(photos) - len(todo)
            if options["explain"]:
                run.overlays = overlays(options["explain"], [*photos.values()])
            if todo:
                label_all(todo, answering(context, model_values), run)
            if options["sheet"] and not run.stopped:
                write_sheet(options["sheet"], run.results.read(), model_values["max_megapixels"])
            return summarize(run)
    except (StartupError, ResultsError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
    except OSError as error:
        print(f"error: {options['sheet']} cannot be written: {error.strerror or error}.", file=sys.stderr)
    return 1


def open_files(options: dict[str, Any], files: ExitStack) -> Run:
    """Open the file of results, and that of the photos which --unsure leaves out. Raises ResultsError."""
    path: Path = options["file"]
    results = files.enter_context(closing(Results(path, options["resume"])))
    sure = None
    if options["unsure"] is not None:
        sure = files.enter_context(closing(Results(Path(f"{path}.sure.jsonl"), options["resume"])))
    return Run(results, sure, options["unsure"])


def answering(context: click.Context, model_values: dict[str, Any]) -> Answering:
    """Return what answers. Raises StartupError."""
    options = context.params
    if not options["url"]:
        return ModelAnswering(model_values)
    typed = context.get_parameter_source("top") is not ParameterSource.DEFAULT
    top = model_values["top"] if typed else None
    api_key = (options["api_key"] or "").partition(",")[0]  # the server takes several, with commas
    return ServerAnswering(options["url"], options["workers"], tell, top=top, api_key=api_key)


def overlays(folder: str, names: Sequence[str]) -> dict[str, Path]:
    """Return a file in the folder for each photo's heat map, none of them twice. Raises ResultsError."""
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise ResultsError(f"{folder} cannot be a folder: {error.strerror}.") from None
    found: dict[str, Path] = {}
    taken: set[str] = set()
    for name in names:
        stem = Path(name).stem
        numbered = (f"{stem}-{i}" for i in itertools.count(2))
        free = next(each for each in itertools.chain([stem], numbered) if each not in taken)
        taken.add(free)
        found[name] = Path(folder, f"{free}.explained.png")
    return found


def tell(sentence: str) -> None:
    """Print a sentence beside the progress bar."""
    tqdm.write(printable(sentence), file=sys.stderr)


def label_all(names: Sequence[str], source: Answering, run: Run) -> None:
    """Have all photos answered and written, in order, until Ctrl-C or an error that all would share."""

    def stop_softly(*_: int | FrameType | None) -> None:
        # The system's own way from now on: a handler of Python's waits for a main thread that may just begin to sleep.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        run.stopped = True
        source.give_up()
        tell("Stopping: what is under way is still written. Ctrl-C again ends at once.")

    signal.signal(signal.SIGINT, stop_softly)
    since = time.monotonic()
    with tqdm(total=len(names), unit=" photos", disable=None) as bar, ThreadPoolExecutor(source.workers) as pool:
        for name, answer in answers(names, source, pool, run):
            bar.update()
            if not isinstance(answer, PredictionError):
                if run.sure and "values" in answer:
                    raise ResultsError("--unsure needs labels: this model answers with values.")
                run.add({"filename": name, "success": True, **answer})
            elif answer.for_all or answer.passing:
                run.unanswered[str(answer)] += 1
                if answer.for_all:
                    source.give_up()
                    pool.shutdown(cancel_futures=True)
                    break
            else:
                run.add({"filename": name, "success": False, "model": None, "error": str(answer)})
    run.seconds = time.monotonic() - since
    run.left = len(names) - run.asked


def answers(
    names: Iterable[str], source: Answering, pool: ThreadPoolExecutor, run: Run
) -> Iterator[tuple[str, Answer | PredictionError]]:
    """Yield each photo with its answer or why there is none, in order. Few are ahead, none is begun after Ctrl-C."""

    def answer(name: str) -> Answer | PredictionError | None:
        if run.stopped:
            return None
        try:
            photo = read_image(name)
            found = source.answer(photo)
            if run.overlays and isinstance(source, ServerAnswering):
                found["explanation"] = save(run.overlays[name], source.explain(photo))
        except PredictionError as error:
            return error
        return found

    pending: deque[tuple[str, Future[Answer | PredictionError | None]]] = deque()
    upcoming = iter(names)
    while True:
        while not run.stopped and len(pending) < 2 * source.workers and (name := next(upcoming, None)) is not None:
            pending.append((name, pool.submit(answer, name)))
        if not pending:
            return
        name, future = pending.popleft()
        if (result := future.result()) is not None:
            yield name, result


def save(path: Path, picture: bytes) -> str:
    """Write a heat map, and return its path. Raises PredictionError."""
    try:
        path.write_bytes(picture)
    except OSError as error:
        raise PredictionError(f"The heat map cannot be saved as {path}: {error.strerror or error}.") from None
    return str(path)


def summarize(run: Run) -> int:
    """Print what was done. Returns the exit status."""
    labels, failures, values = Counter[str](), Counter[str](), 0
    for result in run.results.read():
        if not result["success"]:
            failures[result["error"]] += 1
        elif "predictions" in result:
            labels[result["predictions"][0]["label"]] += 1
        else:
            values += 1
    total = len(run.results.done)
    rate = f", {run.asked} of them now, {run.asked / run.seconds:.1f} a second" if run.asked else ""
    print(f"{run.results.path}: {total} photo{'s' * (total != 1)}{rate}.")
    for label, count in labels.most_common(MOST_LABELS):
        print(f"{count:8}  {printable(label)}")
    if len(labels) > MOST_LABELS:
        print(f"{sum(labels.values()) - sum(n for _, n in labels.most_common(MOST_LABELS)):8}  with "
              f"{len(labels) - MOST_LABELS} other labels")  # fmt: skip
    if values:
        print(f"{values:8}  with values")
    for sentence, count in failures.most_common():
        print(f"{count:8}  failed: {printable(sentence)}")
    if run.sure:
        print(f"{len(run.sure.done):8}  surer than {run.unsure:g}, in {run.sure.path}")
    if run.already:
        print(f"{run.already:8}  skipped: the file has them already")
    if run.left_out:
        kinds = {os.path.splitext(name)[1].lower() or os.path.basename(name) for name in run.left_out}
        print(f"{len(run.left_out):8}  skipped: not called like images ({printable(', '.join(sorted(kinds)[:8]))})")
    for sentence, count in run.unanswered.most_common():
        print(f"{count:8}  without an answer: {printable(sentence)}")
    if run.left:
        print(f"{run.left} are left: give the same command with --resume.", file=sys.stderr)
    if run.stopped:
        return 130
    return 1 if failures or run.left else 0

"""The queue before an engine: threads of the model's own compute whatever has queued while they were busy.

Where computing takes less than handing over to another thread, the one that brings a job computes it itself.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable

import numpy as np

from keras_server.telemetry import ModelMetrics
from keras_server.ticket import LOOK_SECONDS, TICKET

QUICK = 0.001  # seconds for rows below which handing them to another thread would cost about as much
LATELY = 1.0  # seconds since the last short job: more are expected
RECENT = 0.2  # the part of the last batch in the pace
STRETCH = 0.02  # seconds that a lane then computes rows of long jobs at a stretch, about; a short job takes no longer

Compute = Callable[[list[np.ndarray]], list[np.ndarray]]  # an array for each input to one for each output


class Overdue(Exception):
    """The answer was not ready in time."""


class QueueFull(Exception):
    """More rows wait than queue_size allows; those of long jobs are counted apart, to leave short ones their place."""


class ModelDied(Exception):
    """A thread of the model has ended: nothing is computed any more."""


class ModelError(Exception):
    """The model answered with something that is no answer to its rows; the message is a sentence for the log."""


class Job:
    """The rows of one request, which may be computed in several batches."""

    def __init__(self, inputs: list[np.ndarray]):
        self.inputs = inputs
        self.rows = len(inputs[0])
        self.kind = [(a.shape[1:], a.dtype) for a in inputs]  # only equal kinds share a batch
        self.taken = self.done = 0
        self.long = False  # it holds up others
        self.parts: list[tuple[int, list[np.ndarray]]] = []  # outputs for some rows, and the first of these
        self.outputs: list[np.ndarray] = []
        self.error: Exception | None = None
        self.finished = threading.Event()
        self.ticket = TICKET.get()
        self.since = time.monotonic()
        self.filling = threading.Lock()

    def fill(self, rows: slice, outputs: list[np.ndarray]) -> None:
        """Take the outputs for some of the rows, and finish with the last. Raises ModelError where parts do not fit."""
        with self.filling:
            self.parts.append((rows.start, outputs))
            self.done += rows.stop - rows.start
            if self.done < self.rows:
                return
        parts = [part for _, part in sorted(self.parts, key=lambda part: part[0])]
        first, *others = ([output.shape[1:] for output in part] for part in parts)
        for other in others:
            if other != first:  # which numpy might stretch to fit
                raise ModelError(f"One batch has outputs of the shapes {first}, another {other}.")
        self.outputs = joined(parts)
        self.finish()

    def note(self, rows: slice, started: float, ended: float) -> None:
        """Note in the request's ticket when these rows were computed, and with the first how long they waited."""
        if self.ticket:
            if rows.start == 0:
                self.ticket.note("queue", self.since, started)
            self.ticket.note("compute", started, ended)

    def finish(self, error: Exception | None = None) -> None:
        """Wake the waiting request, with the first thing that went wrong if anything did."""
        if not self.finished.is_set():
            self.error = error
            self.finished.set()


class Batcher:
    """Stands where the tutorial's model stood: predict() from any thread, computed in batches by the model's own.

    They are as many as the model computes batches side by side, its lanes: on a GPU one. An idle one computes a lone
    row at once; while all are busy rows queue up and form the next batches. Of a quick model the thread that finds an
    idle lane takes it itself.
    """

    def __init__(
        self, run: Compute, max_batch: int, queue_size: int, lanes: int = 1, metrics: ModelMetrics | None = None
    ):
        self.run, self.queue_size, self.lanes, self.metrics = run, queue_size, lanes, metrics
        self.max_batch = max(1, max_batch // lanes)  # of one lane
        self.jobs: deque[Job] = deque()
        self.waiting = self.waiting_long = 0  # rows in all, and those of long jobs
        self.least = math.inf  # seconds that a batch has taken
        self.pace = 0.0  # seconds that a lane took for each further row of a batch, lately
        self.short = -math.inf  # when the last short job came
        self.looked = 0.0  # when it was looked for what nobody waits for
        self.busy: dict[int, float] = {}  # threads that compute, one a lane, since when
        self.dead = self.closed = False
        self.on_death: Callable[[], None] = lambda: None
        self.changed = threading.Condition()
        self.threads = [threading.Thread(target=self.loop, name="model", daemon=True) for _ in range(lanes)]
        for thread in self.threads:
            thread.start()

    def close(self) -> None:
        """Take no more rows; the threads end once what waits is computed."""
        with self.changed:
            self.closed = True
            self.wake()

    def busy_seconds(self) -> float:
        """Return for how long the slowest batch is being computed already."""
        now = time.monotonic()
        return now - min(self.busy.copy().values(), default=now)

    def check_room(self, rows: int) -> None:
        """Raise QueueFull where so many more rows find no place, also before work is spent on making them."""
        if self.has_room(rows):
            return
        with self.changed:
            if time.monotonic() > self.looked + LOOK_SECONDS:
                self.looked = time.monotonic()
                self.jobs = deque(job for job in self.jobs if not self.is_left(job))
            if not self.has_room(rows):
                raise QueueFull

    def has_room(self, rows: int) -> bool:
        """Whether so many more rows find a place."""
        long = self.waiting_long
        return rows + (long if self.is_long(rows) else self.waiting - long) <= self.queue_size

    def is_left(self, job: Job) -> bool:
        """Whether nobody waits for a job of the queue any more; its rows then take no place."""
        left = job.finished.is_set() or bool(job.ticket and job.ticket.over)
        if left:
            self.count(job, job.taken - job.rows)
            job.finish(Overdue())
        return left

    def compute(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """Return the model's outputs for its inputs, all with the same first axis.

        Raises QueueFull at once, Overdue at the request's deadline, ModelDied, or what the model raised.
        """
        job = Job(inputs)
        if not job.rows:
            raise ValueError("There are no rows to compute.")
        with self.changed:
            if self.dead or self.closed:
                raise ModelDied
            self.check_room(job.rows)
            leads = self.least + job.rows * self.pace < QUICK and not self.jobs and self.idle
            self.jobs.append(job)
            job.long = self.is_long(job.rows)
            self.count(job, job.rows)
            if not job.long:
                self.short = job.since
            batch = self.begin() if leads else None
            self.wake()
        if batch is not None:
            try:
                self.end(batch)
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                raise ModelDied from error
        if not job.finished.wait(job.ticket.left if job.ticket else None):
            raise Overdue
        if job.error:
            raise job.error
        return job.outputs

    def loop(self) -> None:
        """Compute batch after batch, for as long as the process lives."""
        while True:
            with self.changed:
                while not self.jobs or not self.idle:
                    if self.closed and not self.jobs:
                        return
                    self.changed.wait()
                batch = self.begin()
                self.wake()
            self.end(batch)

    @property
    def idle(self) -> int:
        """How many lanes compute nothing."""
        return self.lanes - len(self.busy)

    def begin(self) -> list[tuple[Job, slice]]:
        """Take the next batch off the queue, and a lane for it until end()."""
        batch = self.take()
        self.busy[threading.get_ident()] = time.monotonic()
        return batch

    def end(self, batch: list[tuple[Job, slice]]) -> None:
        """Compute a batch, and let the next have the lane."""
        try:
            if batch:
                self.work(batch)
        except BaseException:  # none is expected here: the process is to end, but nobody is left waiting
            with self.changed:
                self.dead = True
                for job in {job for job, _ in batch} | {*self.jobs}:
                    job.finish(ModelDied())
            self.on_death()
            raise
        finally:
            with self.changed:
                del self.busy[threading.get_ident()]
                self.wake()

    def wake(self) -> None:
        """Have one of the model's threads compute what waits, where a lane is idle; once closed all look, and end."""
        if self.closed:
            self.changed.notify_all()
        elif self.jobs and self.idle:
            self.changed.notify()

    @property
    def most(self) -> int:
        """Rows of a batch at most: max_batch, or of a quick model as many as it computes in QUICK."""
        quick = self.pace and self.least < QUICK
        return max(self.max_batch, int((QUICK - self.least) / self.pace) if quick else 0)

    def is_long(self, rows: int) -> bool:
        """Whether a job of so many rows holds up others: several that take longer than a stretch."""
        return rows > 1 and rows * self.pace > STRETCH

    def learn(self, seconds: float, rows: int) -> None:
        """Learn how much longer a batch takes for each row beyond the first: where it is nothing, no job is long."""
        self.least = min(self.least, seconds)
        if rows > 1:
            further = (seconds - self.least) / (rows - 1)
            self.pace += (further - self.pace) * (RECENT if self.pace else 1)

    def count(self, job: Job, rows: int) -> None:
        """Count so many rows of a job more, or less, among those that wait."""
        self.waiting += rows
        self.waiting_long += rows if job.long else 0

    def take(self) -> list[tuple[Job, slice]]:
        """Take the next batch off the queue, of rows of one kind, and no more than this lane's part.

        Each waiting job gives an equal share in turn and goes to the back, so that a long one starves nobody. Where
        short ones come, long ones give no more than a stretch in all: one that comes next waits for no full batch.
        """
        batch: list[tuple[Job, slice]] = []
        others: list[Job] = []
        room = min(self.most, -(-self.waiting // self.idle))  # idle lanes share, rounded up
        share = max(1, room // len(self.jobs))
        stretch = room  # rows of long jobs
        if self.pace and time.monotonic() - self.short < LATELY:
            stretch = max(1, int(STRETCH / self.pace))
        while self.jobs and room:
            job = self.jobs.popleft()
            if self.is_left(job):
                continue
            rows = min(share, room, job.rows - job.taken, stretch if job.long else room)
            if not rows or (batch and job.kind != batch[0][0].kind):
                others.append(job)
                continue
            stretch -= rows if job.long else 0
            batch.append((job, slice(job.taken, job.taken + rows)))
            job.taken += rows
            room -= rows
            self.count(job, -rows)
            if job.taken < job.rows:
                self.jobs.append(job)
        self.jobs.extendleft(reversed(others))
        return batch

    def work(self, batch: list[tuple[Job, slice]]) -> None:
        """Compute a batch and hand out its rows. Where the model fails on it, each part is tried alone."""
        inputs = joined([[array[rows] for array in job.inputs] for job, rows in batch])
        started = time.monotonic()
        try:
            outputs = [np.asarray(output) for output in self.run(inputs)]
            check(outputs, len(inputs[0]))
        except Exception as error:  # noqa: BLE001 - an engine may raise anything
            if len(batch) == 1:
                ((job, rows),) = batch
                job.note(rows, started, time.monotonic())
                job.finish(error)
            else:
                for job_and_rows in batch:
                    self.work([job_and_rows])
            return
        ended = time.monotonic()
        self.learn(ended - started, len(inputs[0]))
        if self.metrics:
            self.metrics.inference.observe(ended - started)
            self.metrics.batch.observe(len(inputs[0]))
            for job, _ in batch:
                self.metrics.queued.observe(started - job.since)
        first = 0
        for job, rows in batch:
            last = first + rows.stop - rows.start
            job.note(rows, started, ended)
            try:
                job.fill(rows, [output[first:last] for output in outputs])
            except ModelError as error:
                job.finish(error)
            first = last


def joined(parts: list[list[np.ndarray]]) -> list[np.ndarray]:
    """Return for each input, or output, the array with the rows of all parts; of a lone part its own."""
    return [arrays[0] if len(arrays) == 1 else np.concatenate(arrays) for arrays in zip(*parts, strict=True)]


def check(outputs: list[np.ndarray], rows: int) -> None:
    """Raise ModelError unless each output has one row for each that went in."""
    for number, output in enumerate(outputs):
        if output.ndim == 0 or len(output) != rows:
            raise ModelError(f"Output {number} of the model has shape {output.shape} for a batch of {rows}.")

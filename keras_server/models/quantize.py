"""The program that quantizes a converted model and ends: python -m keras_server.models.quantize, see task.py.

Post-training quantization by NNCF (https://github.com/openvinotoolkit/nncf), which the server itself does not need.
What it makes is held against float32 on rows that it has not seen, and declined where it is no faster.
"""

from __future__ import annotations

import logging
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from keras_server.machine import sums_bytes
from keras_server.models.agreement import GAIN, Agreement, Tested, least_sure
from keras_server.models.calibration import Row, Samples, look, read_samples
from keras_server.models.compare import Answers, answers_of, compare
from keras_server.models.engines import Engine, OpenVINOEngine, batched, has_bfloat16, openvino, processor
from keras_server.models.errors import StartupError
from keras_server.models.export import Cache, Export, sha256_of, version, write_export
from keras_server.models.meaning import final_spec
from keras_server.models.spec import Spec
from keras_server.models.task import Stage, perform
from keras_server.models.tracing import reason_of
from keras_server.settings import Precision, Settings

log = logging.getLogger("keras_server")

TIMED_ROWS = 8
TIMED_SECONDS = 2.0
TIMED_ROUNDS = 7  # at least, of which the median counts
RANKED = 100  # rows by which layers are ranked, at most
RESTORED = 10  # layers that are left in float32, at most


@dataclass(frozen=True)
class QuantizeJob:
    """What is to be quantized, and where to write the new export."""

    export: str  # the folder of the model in float32
    settings: dict[str, Any]  # those that say what the model takes and gives, and what is promised
    elsewhere: str  # an empty folder


@dataclass(frozen=True)
class Candidate:
    """A model quantized in one way."""

    model: Any
    how: str
    portable: bool  # whether its sums fit on processors without VNNI, too


class Declined(Exception):
    """A precision does not keep what was promised, or is not worth it; the message says why, with the figures."""


class NotKept(Declined):
    """It does not keep what was promised."""


def check_nncf() -> None:
    """Raise StartupError where NNCF is not installed; it is not imported."""
    if not find_spec("nncf"):
        raise StartupError(
            "nncf must be installed to quantize a model (pip install -r requirements-int8.txt); what `keras-server "
            "export MODEL FOLDER --precision int8 --calibrate PICTURES` has written is served without."
        )


def nncf() -> Any:
    """Import NNCF, quietly and without the telemetry package that openvino() keeps out, which reports to its makers."""
    openvino()
    import nncf

    nncf.nncf_logger.setLevel(logging.ERROR)
    return nncf


# ----------------------------------------------------------------------------------------------------------
# Quantizing
# ----------------------------------------------------------------------------------------------------------


class Quantizer:
    """Quantizes one model with the rows that calibrate."""

    def __init__(self, model: Any, spec: Spec, samples: Samples, least: float):
        """Take an OpenVINO model, which stays as it is, and --min-agreement."""
        self.model, self.spec, self.rows, self.least = model, spec, samples.calibrating, least
        self.nncf = nncf()
        self.data = self.nncf.Dataset([filled(row, spec.batch) for row in self.rows])

    def candidates(self) -> Iterator[Callable[[], Candidate]]:
        """Yield what quantizes the model, the quickest way first.

        Weights of 7 bits keep sums from overflowing on processors without VNNI. All 8 bits are exacter, and only taken
        where the processor has it.
        """
        yield lambda: Candidate(self.quantized(portable=True, fast=True), "weights of 7 bits", portable=True)
        yield lambda: Candidate(
            self.quantized(portable=True, fast=False), "weights of 7 bits, accurate bias correction", portable=True
        )
        if sums_bytes():
            yield lambda: Candidate(
                self.quantized(portable=False, fast=False), "accurate bias correction", portable=False
            )
        yield self.with_layers_in_float32

    def parameters(self, portable: bool) -> Any:
        """Return NNCF's parameters for weights that fit any processor, or only those with VNNI.

        The range of activations is the mean of the rows' ranges, which suits pictures with their thousands of numbers,
        and cuts off most of what rows of a few hold: of theirs it is the widest.
        """
        from nncf.quantization.range_estimator import RangeEstimatorParameters, RangeEstimatorParametersSet

        fix = self.nncf.OverflowFix.ENABLE if portable else self.nncf.OverflowFix.DISABLE
        ranges = RangeEstimatorParameters() if self.spec.image else RangeEstimatorParametersSet.MINMAX
        return self.nncf.AdvancedQuantizationParameters(overflow_fix=fix, activations_range_estimator_params=ranges)

    def quantized(self, portable: bool, fast: bool) -> Any:
        """Return the model quantized whole, with fast bias correction or the accurate one."""
        return self.nncf.quantize(
            self.model,
            self.data,
            preset=self.nncf.QuantizationPreset.MIXED,
            subset_size=len(self.rows),
            fast_bias_correction=fast,
            advanced_parameters=self.parameters(portable),
        )

    def with_layers_in_float32(self) -> Candidate:
        """Return the model without the layers in float32 that change its answers the most.

        NNCF ranks them by rows that calibrate, since those that are kept out have to stay unseen.
        """
        rows = self.rows[:RANKED]
        expected = answers_of(engine_of(self.model, self.spec), rows)
        portable = not sums_bytes()

        def validate(compiled: Any, items: Any) -> tuple[float, list[float]]:
            scores = []
            for number, inputs in items:
                outputs = [np.asarray(output)[:1] for output in compiled(inputs).to_tuple()]
                one = compare(self.spec, [expected[number]], [outputs])
                scores.append(one.same - min(one.mean_change, 1))  # 1 where nothing changes, -1 at the worst
            return float(np.mean(scores)), scores

        items = [(number, filled(row, self.spec.batch)) for number, row in enumerate(rows)]
        model = self.nncf.quantize_with_accuracy_control(
            self.model,
            self.data,
            self.nncf.Dataset(items),
            validate,
            max_drop=(1 - self.least) / 2,
            preset=self.nncf.QuantizationPreset.MIXED,
            subset_size=len(self.rows),
            fast_bias_correction=False,
            advanced_quantization_parameters=self.parameters(portable),
            advanced_accuracy_restorer_parameters=self.nncf.AdvancedAccuracyRestorerParameters(
                max_num_iterations=RESTORED, ranking_subset_size=len(rows)
            ),
        )
        return Candidate(model, "accurate bias correction, single layers in float32", portable)


def filled(row: Row, batch: int | None) -> Row:
    """Return a row as often as a model of a fixed batch takes it."""
    return [np.repeat(array, batch, axis=0) for array in row] if batch else row


def engine_of(model: Any, spec: Spec, precision: Precision = "float32") -> Engine:
    """Return what computes a model on one thread."""
    return batched(OpenVINOEngine(model, precision, 1, 1), spec.batch)


def gain(slow: Engine, fast: Engine, row: Row) -> float:
    """Return how many times as fast one engine computes a batch of a row as another.

    Medians of processor time, in turn: whatever else the machine does changes little of their ratio.
    """
    batch = [np.repeat(array, TIMED_ROWS, axis=0) for array in row]
    seconds: dict[Engine, list[float]] = {slow: [], fast: []}
    end = time.monotonic() + TIMED_SECONDS
    while len(seconds[fast]) < TIMED_ROUNDS or time.monotonic() < end:
        for engine, found in seconds.items():
            begin = time.process_time()
            engine(batch)
            found.append(time.process_time() - begin)
    return statistics.median(seconds[slow][1:]) / statistics.median(seconds[fast][1:])


# ----------------------------------------------------------------------------------------------------------
# Testing
# ----------------------------------------------------------------------------------------------------------


class Trial:
    """A model in float32, and the rows that another precision is held against it on."""

    def __init__(self, model: Any, spec: Spec, samples: Samples, settings: Settings):
        """Compute the answers in float32. Raises StartupError where they are none to compare with."""
        self.model, self.spec, self.samples, self.least = model, spec, samples, settings.min_agreement
        self.engine = engine_of(model, spec)
        try:
            self.expected: Answers = answers_of(self.engine, samples.held)
            compare(spec, self.expected, self.expected)
        except ValueError as error:
            raise StartupError(f"--calibrate: {error}, for rows of {settings.calibrate}.") from None

    def int8(self, stage: Stage) -> tuple[Any, Tested]:
        """Return the model in int8, in the first way that keeps --min-agreement. Raises Declined."""
        stage("quantizing it")
        quantizer, failed = Quantizer(self.model, self.spec, self.samples, self.least), list[str]()
        for make in quantizer.candidates():
            try:
                candidate = make()
            except Exception as error:  # noqa: BLE001 - NNCF raises anything where a layer does not suit it
                failed.append(f"it cannot be had ({reason_of(error)})")
                continue
            stage(f"comparing int8 with float32 ({candidate.how})")
            engine = engine_of(candidate.model, self.spec, "int8")
            agreement = self.agreement(engine)
            if agreement.keeps(self.least):
                tested = self.tested("int8", engine, agreement, candidate.how, candidate.portable)
                return candidate.model, tested
            failed.append(f"it gives {agreement} ({candidate.how})")
            stage("quantizing it more accurately")
        raise NotKept(
            f"In int8 {self.spec.name} does not keep --min-agreement {self.least:g} (and {least_sure(self.least):g} of "
            f"the rows that float32 is sure of): {'; '.join(failed)}."
        )

    def bfloat16(self) -> Tested:
        """Return how the model does in bfloat16. Raises Declined."""
        engine = engine_of(self.model, self.spec, "bfloat16")
        agreement = self.agreement(engine)
        if not agreement.keeps(self.least):
            raise NotKept(f"In bfloat16 it does not keep --min-agreement {self.least:g}, either: it gives {agreement}.")
        return self.tested("bfloat16", engine, agreement)

    def agreement(self, engine: Engine) -> Agreement:
        """Return how far an engine agrees with float32. Raises NotKept where it answers with no numbers."""
        try:
            return compare(self.spec, self.expected, answers_of(engine, self.samples.held))
        except ValueError as error:
            raise NotKept(str(error)) from None

    def tested(
        self, precision: Precision, engine: Engine, agreement: Agreement, how: str = "", portable: bool = True
    ) -> Tested:
        """Return a precision that keeps what was promised, with its gain. Raises Declined where that is too little."""
        times = gain(self.engine, engine, self.samples.held[0])
        if times < GAIN:
            raise Declined(
                f"In {precision} {self.spec.name} computes {times:.2f} times as fast on this processor, and under "
                f"{GAIN:g} it is not worth it: it stays as it is."
            )
        calibrated = len(self.samples.calibrating) if precision == "int8" else 0
        return Tested(precision, agreement, round(times, 2), calibrated, how, portable)


def do(job: QuantizeJob, stage: Stage) -> Path:
    """Quantize a model, and return the folder of its new export. Raises StartupError."""
    settings, export = Settings(**job.settings), Export.read(Path(job.export))
    spec = final_spec(export.spec, settings)
    stage("reading what calibrates it")
    samples = read_samples(settings, spec)
    model = openvino().Core().read_model(export.folder / "model.xml")
    if any(operation.get_type_name() == "FakeQuantize" for operation in model.get_ops()):
        raise StartupError(f"{spec.name} is quantized already: serve it as it is, without --precision int8.")
    trial = Trial(model, spec, samples, settings)
    models, tested, declined = dict[str, Any](), list[Tested](), list[str]()
    try:
        models["int8"], found = trial.int8(stage)
        tested.append(found)
    except Declined as error:
        if isinstance(error, NotKept) and settings.precision == "int8":
            raise StartupError(
                f"{error} Leave --precision at float32, give --calibrate more pictures or rows of the kind that will "
                "be sent, or lower --min-agreement."
            ) from None
        declined.append(str(error))
    if declined and settings.precision == "auto" and has_bfloat16():
        stage("comparing bfloat16 with float32")
        try:
            tested.append(trial.bfloat16())
        except Declined as error:
            declined.append(str(error))
    stage("writing it")
    about = replace(export, tested=tuple(tested), declined=" ".join(declined)).about
    cache = cache_of(export, settings)
    if cache.write(export.models | models, about):
        return cache.entry
    folder = Path(job.elsewhere)
    try:
        write_export(folder, export.models | models, about)
    except (OSError, RuntimeError) as error:
        raise StartupError(
            f"The quantized model cannot be written to {folder} ({reason_of(error)}): make room."
        ) from None
    return folder


def cache_of(export: Export, settings: Settings) -> Cache:
    """Look for what a model became with the same rows and settings, on such a processor. Raises StartupError."""
    spec = asdict(final_spec(export.spec, settings))
    names = ("precision", "min_agreement", "crop", "interpolation", "background", "max_megapixels")
    options = {name: str(getattr(settings, name)) for name in names}
    options |= {"spec": sha256_of(spec), "rows": look(Path(settings.calibrate)), "nncf": version("nncf")}
    options["processor"] = processor()  # on which it was faster, or not
    files = [export.folder / "model.xml", export.folder / "model.bin"]
    return Cache(settings.cache_dir, export.spec.name, files, options)


if __name__ == "__main__":
    sys.exit(perform(QuantizeJob, do))

"""The contestants: how each is started, with which model, and what has to be made for it once."""

import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from plan import PEERS
from servers import HERE

ROOT = HERE.parent
PEERS_FOLDER = HERE / "peers"
PEERS_PYTHON = ROOT / ".venv-bench" / "bin" / "python"
BUILD = HERE / "build"
RANDOM_WEIGHTS = BUILD / "resnet50_random.weights.h5"
NUMBERS = BUILD / "numbers.keras"
BUNDLED = ROOT / "keras_server" / "bundled" / "efficientnet_lite0.keras"
MODEL_FILES = {"resnet50": RANDOM_WEIGHTS, "bundled": BUNDLED, "numbers": NUMBERS}
CROPS = 100  # of the sample photo, as many as calibration takes at least: a benchmark asks for speed, not for labels


def quiet() -> dict[str, str]:
    """Return the environment in which TensorFlow finds no GPU and says little."""
    return os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}


def output_of(command: list[str]) -> str:
    """Run a short program without a GPU and return what it prints."""
    done = subprocess.run(command, env=quiet(), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def arguments_of(model: str) -> list[str]:
    """Return the options with which this server serves a model."""
    if model == "resnet50":
        return ["--model", model, "--weights", str(RANDOM_WEIGHTS)]
    return ["--model", "bundled" if model == "bundled" else str(MODEL_FILES[model])]


def export_of(model: str) -> Path:
    """Return the export of a model for pictures, which holds it in float32 and in int8."""
    return BUILD / f"{model}-int8"


def command_of(contestant: str, model: str, port: int, peers_python: Path) -> list[str]:
    """Return the command that starts a contestant."""
    if contestant.startswith("ours-"):
        precision = contestant.removeprefix("ours-")
        served = ["--model", str(export_of(model))] if precision == "int8" else arguments_of(model)
        command = [sys.executable, str(ROOT / "run_keras_server.py"), "--port", str(port)]
        return [*command, "--precision", precision, *served]
    if contestant == "bentoml":
        command = [str(peers_python), "-m", "bentoml", "serve", "bentoml_server:KerasService"]
        return [*command, "--working-dir", str(PEERS_FOLDER), "--host", "127.0.0.1", "--port", str(port)]
    python = sys.executable if contestant == "tutorial" else str(peers_python)
    return [python, str(PEERS_FOLDER / f"{contestant}_server.py")]


def environment_of(model: str, port: int, folder: Path) -> dict[str, str]:
    """Return the environment of a contestant: no GPU, nothing sent home, whatever it writes in one folder."""
    return quiet() | {
        "BENCH_MODEL": model,
        "BENCH_WEIGHTS": str(MODEL_FILES[model]),
        "BENCH_PORT": str(port),
        "KERAS_SERVER_CACHE_DIR": str(folder / "cache"),
        "BENTOML_DO_NOT_TRACK": "True",
        "BENTOML_HOME": str(folder / "bentoml"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": str(folder),
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",  # as Serve's documentation advises
    }


def why_not(contestant: str, peers_python: Path) -> str:
    """Return why a contestant cannot run here, or nothing."""
    if contestant == "ours-bfloat16":
        import openvino

        if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            return "this processor does not compute in bfloat16"
    if contestant == "ours-int8":
        try:
            import nncf  # noqa: F401
        except ImportError:
            return "quantizing needs requirements-int8.txt"
    if contestant in PEERS and not peers_python.exists():
        return "its environment is missing; `make bench` sets it up"
    return ""


# ----------------------------------------------------------------------------------------------------------------------
# What is made once
# ----------------------------------------------------------------------------------------------------------------------


def make_with_keras(target: Path, code: str, python: str = sys.executable) -> None:
    """Have a Python with Keras make a file of which the code knows the name as `path`, unless it is there."""
    if target.exists():
        return
    target.parent.mkdir(exist_ok=True)
    unfinished = target.with_name(f"unfinished_{target.name}")
    begin = "import keras, sys; keras.utils.set_random_seed(0); path = sys.argv[1]; "
    output_of([python, "-c", begin + code, str(unfinished)])
    unfinished.rename(target)


def make_weights(python: str = sys.executable) -> None:
    """Save ResNet50 with random weights: the work is that of trained ones."""
    make_with_keras(RANDOM_WEIGHTS, "keras.applications.ResNet50(weights=None).save_weights(path)", python)


def make_model_of_numbers() -> None:
    """Save a model of four numbers to three probabilities, as people make for tables."""
    layers = "keras.Input((4,)), keras.layers.Dense(16, 'relu'), keras.layers.Dense(3, 'softmax')"
    make_with_keras(NUMBERS, f"keras.Sequential([{layers}]).save(path)")


def make_export(model: str) -> None:
    """Export a model for pictures with int8 in it, calibrated with crops of one photo, whatever it then answers."""
    sys.path.append(str(ROOT))
    from keras_server.models.export import Export, ExportError

    try:
        Export.read(export_of(model))
        return
    except ExportError:  # there is none, or one of another version
        shutil.rmtree(export_of(model), ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        write_crops(Path(folder))
        command = [sys.executable, str(ROOT / "run_keras_server.py"), "export", *arguments_of(model)[1:]]
        output_of(
            [*command, str(export_of(model)), "--precision", "int8", "--calibrate", folder, "--min-agreement", "0"]
        )


def write_crops(folder: Path) -> None:
    """Write different squares of the sample photo."""
    chance = random.Random(0)
    with Image.open(ROOT / "dog.jpg") as photo:
        for number in range(CROPS):
            side = chance.randrange(photo.height // 3, photo.height)
            x, y = chance.randrange(photo.width - side), chance.randrange(photo.height - side)
            photo.crop((x, y, x + side, y + side)).convert("RGB").save(folder / f"{number}.jpg")

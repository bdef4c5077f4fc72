"""Settings: one table, the fields of Settings, that the command line, the environment and the README's list follow.

To add one, add a field and its row in the README.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar

import click
from click.core import ParameterSource

from keras_server import __version__
from keras_server.keys import read_key_file, read_keys, read_metrics_key
from keras_server.readers import (
    PREFIX,
    ModelOption,
    Several,
    checksum,
    colour,
    host_name,
    model_option,
    network,
    number,
    one_of,
    origin,
    stop,
    switch,
)

T = TypeVar("T")
Precision = Literal["float32", "bfloat16", "int8"]  # what a model is computed in
# What Kubernetes tells each container of a service that is called keras-server.
KUBERNETES = re.compile(PREFIX + r"(SERVICE_(HOST|PORT)|PORT_[0-9]+_(TCP|UDP)).*")


def setting(
    default: T,
    help: str,
    read: Callable[[str], Any] = str,
    metavar: str = "",
    empty: bool = False,
    of_model: bool = False,
) -> T:
    """Return a field of Settings that is a row of the table.

    `empty` says that an empty variable is a value, and not the same as none; `of_model`, that it belongs to a model and
    not to a server, and so may stand beside the model's file.
    """
    metadata = {"help": help, "read": read, "metavar": metavar, "empty": empty, "of_model": of_model}
    result: T = field(default=default, metadata=metadata)
    return result


COUNT = number(int, 1, 100_000)
THREADS = number(int, 0, 1024)


# fmt: off
@dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings, with their defaults."""

    model: str = setting("", "a classifier of keras.applications, a file (.keras, .h5, .onnx, .tflite, .xml) or "
        "folder with a model, an https:// or hf:// address of one, or 'bundled'; if not given, resnet50, or the "
        "bundled one where its weights cannot be had. NAME=MODEL gives it a name, and settings of its own may follow "
        "it, as in cats=cats.keras,preprocess=tf; may be repeated, in the environment with semicolons, and the first "
        "is the default", model_option)
    model_dir: str = setting("", "folder of which every model is served: files, folders, and versions of a model as "
        "TensorFlow Serving has them, NAME/1, NAME/2", metavar="FOLDER")
    versions: int = setting(1, "newest versions that are served of a model that has several", COUNT, "N")
    watch: float = setting(0.0, "seconds between two looks for new, changed and removed models and versions; 0: none "
        "but on SIGHUP", number(float, 0, 86_400), "SECONDS")
    weights: str = setting("", "weights file for the architecture that --model names, instead of a download",
        metavar="FILE")
    sha256: str = setting("", "checksum that the file or the https:// address which --model names must have", checksum,
        "DIGITS")
    labels: str = setting("", 'names of the classes: a line each, a JSON list, {"0": "cat"}, {"cat": 0}, or '
        "Keras' class index", metavar="FILE", of_model=True)
    preprocess: str = setting("auto", "what the model was trained with: none (0 to 255), unit (0 to 1), tf (-1 to 1), "
        "caffe, torch, or an architecture's name; auto is the architecture's own, and none for a file",
        metavar="MODE", of_model=True)
    crop: str = setting("none", "none, which squeezes pictures into the model's shape, or centre, which cuts their "
        "middle out", one_of("none", "centre"), of_model=True)
    interpolation: str = setting("bicubic", "how pictures are resized: bicubic, bilinear, nearest, lanczos, box or "
        "hamming, as Pillow does, or tensorflow, as image_dataset_from_directory does",
        one_of("bicubic", "bilinear", "nearest", "lanczos", "box", "hamming", "tensorflow"), of_model=True)
    activation: str = setting("auto", "none, softmax or sigmoid, on the model's output; auto finds out if it is logits",
        one_of("auto", "none", "softmax", "sigmoid"), of_model=True)
    output: str = setting("", "name of the output that /predict answers from, where the model has several",
        metavar="NAME", of_model=True)
    engine: str = setting("auto", "auto, openvino or keras; auto is openvino on a CPU and keras on a GPU",
        one_of("auto", "openvino", "keras"))
    precision: Precision | Literal["auto"] = setting("float32", "float32; bfloat16 where the processor has it; int8, "
        "several times faster, with --calibrate; or auto, the fastest that keeps --min-agreement on this processor",
        one_of("float32", "bfloat16", "int8", "auto"), of_model=True)
    calibrate: str = setting("", "folder of pictures, or .npz or .jsonl file of rows, as those that will be sent: some "
        "calibrate int8, others show whether its answers stay the same", metavar="PATH", of_model=True)
    min_agreement: float = setting(0.95, "least share of those others whose first label int8 leaves as it is in "
        "float32; of those that float32 is sure of (over 0.5) only a fifth as many may differ",
        number(float, 0, 1), "SHARE", of_model=True)
    max_batch: int = setting(8, "most images that the model computes at once; more where all take less than a "
        "millisecond", COUNT, "N")
    decode_threads: int = setting(0, "most images that are decoded at once; 0: one a processor", THREADS, "N")
    engine_threads: int = setting(0, "threads that the model computes with; 0: one a processor", THREADS, "N",
        of_model=True)
    cache_dir: str = setting("~/.cache/keras-server", "folder for converted models, for a faster start; empty: none",
        metavar="FOLDER", empty=True)
    host: str = setting("localhost", "address to listen on: localhost for 127.0.0.1 and ::1, 0.0.0.0 for all of IPv4, "
        ":: for all of IPv4 and IPv6")
    port: int = setting(5000, "port to listen on; 0: a free one", number(int, 0, 65_535))
    top: int = setting(5, "rows in an answer, unless the request says ?top=N", COUNT, "N")
    max_upload_mb: float = setting(16.0, "largest request body in MiB", number(float, 0.001, 4096), "MIB")
    max_megapixels: float = setting(50.0, "largest picture in millions of pixels", number(float, 0.001, 10_000), "MP")
    memory: int = setting(0, "most memory that the server takes, in MiB; 0: half of the container's or the machine's",
        number(int, 0, 2**24), "MIB")
    background: str = setting("white", "colour that shows through what is transparent: a name, or #rrggbb", colour,
        "COLOUR", of_model=True)
    queue_size: int = setting(128, "most images that wait, those of large requests counted apart; past it 503",
        COUNT, "N")
    timeout: float = setting(30.0, "seconds from a request's arrival to its answer, else 504",
        number(float, 0.01, 86_400), "SECONDS")
    keep_alive: float = setting(75.0, "seconds that a connection is kept for its next request",
        number(float, 0.1, 86_400), "SECONDS")
    connections_per_address: int = setting(1024, "most connections of one address, or of one /64 of IPv6, but for "
        "this machine's own, and most requests under way of one that trusted proxies tell; 0: any number",
        number(int, 0, 100_000), "N")
    drain_seconds: float = setting(2.0, "on SIGTERM or Ctrl-C, seconds in which new connections are still answered "
        "while /readyz says no", number(float, 0, 3600), "SECONDS")
    api_key: tuple[str, ...] = setting((), "key that clients must send as 'Authorization: Bearer KEY'; may be "
        "repeated, in the environment with commas", metavar="KEY")
    api_key_file: str = setting("", "file with one key a line; a line that begins with # is a comment", metavar="FILE")
    metrics_key: str = setting("", "key of its own for whoever scrapes /metrics, which opens nothing else; where there "
        "is one, /metrics asks for it or for an --api-key", metavar="KEY")
    trusted_proxies: tuple[str, ...] = setting((), "address or network, such as 10.0.0.0/8, of proxies whose "
        "X-Forwarded-For says who asks, for the log and --connections-per-address; may be repeated, in the "
        "environment with commas", network)
    cors_origin: tuple[str, ...] = setting((), "origin whose web pages may call the server, or *; may be repeated, in "
        "the environment with commas", origin)
    allowed_hosts: tuple[str, ...] = setting((), "name or address under which clients reach the server, such as "
        "example.org, or .example.org with all below it, or *; where none is given, any, but on localhost those of "
        "this machine alone; may be repeated, in the environment with commas", host_name)
    log_format: str = setting("text", "text or json", one_of("text", "json"))
    log_level: str = setting("info", "debug, info, warning or error; probes are logged at debug, all other requests at "
        "info", one_of("debug", "info", "warning", "error"))
    import_: tuple[str, ...] = setting((), "file of Python to run before the model is loaded, which registers its "
        "layers with Keras; may be repeated, in the environment with commas", metavar="FILE")
    unsafe_model: bool = setting(False, "on or off: load model files that carry Python code of their own", switch)

    # No rows of the table: what the options have said of several models, or of one by another name; then `model` is "".
    models: tuple[ModelOption, ...] = ()
    # The settings of a model that options or the environment give, whatever stands beside it.
    given: frozenset[str] = field(default=frozenset(), compare=False)

    def environment(self) -> dict[str, str]:
        """Return the variables from which another process on this machine reads the same settings."""
        values = {
            row.variable: getattr(self, row.name)
            for row in SETTINGS
            # What is as by default may stand otherwise beside the model.
            if getattr(self, row.name) != row.default or row.name in self.given
        }
        if self.models:
            values[f"{PREFIX}MODEL"] = ";".join(option.text for option in self.models)
        # A key with a comma can only have come from the file, which is named as well.
        return {
            variable: ",".join(key for key in value if "," not in key) if isinstance(value, tuple) else str(value)
            for variable, value in values.items()
            if not isinstance(value, tuple) or any("," not in key for key in value)
        }
# fmt: on


@dataclass(frozen=True)
class Setting:
    """A row of the table. --name and KERAS_SERVER_NAME set it."""

    name: str
    default: Any
    help: str
    read: Callable[[str], Any]
    metavar: str
    empty: bool
    of_model: bool

    @property
    def option(self) -> str:
        """The command line's spelling."""
        return "--" + self.name.rstrip("_").replace("_", "-")

    @property
    def variable(self) -> str:
        """The environment's spelling."""
        return PREFIX + self.name.rstrip("_").upper()

    @property
    def shown_default(self) -> str:
        """The default as help and README show it."""
        return "off" if self.default is False else "" if self.default == () else str(self.default)

    def parameter(self) -> click.Option:
        """Return it as click reads it."""
        more: dict[str, Any] = {}
        kind: Any = self.read
        if isinstance(self.default, tuple) or self.read is model_option:
            more, kind = {"multiple": True}, Several(self.read, ";" if self.read is model_option else ",")
        elif isinstance(self.default, bool):  # the option alone is on
            more = {"is_flag": False, "flag_value": "on"}
        return click.Option(
            [self.option, self.name],
            type=kind,
            default=() if "multiple" in more else self.shown_default,
            show_default=self.shown_default != "",
            envvar=self.variable,
            show_envvar=True,
            help=self.help,
            metavar=self.metavar or ("[on|off]" if self.default is False else self.name.rpartition("_")[2].upper()),
            **more,
        )


SETTINGS = tuple(Setting(row.name, row.default, **row.metadata) for row in fields(Settings) if row.metadata)


@dataclass(frozen=True)
class Beside:
    """What stands beside a model: settings by name, and the file that they were found in, for sentences."""

    values: Mapping[str, str] = field(default_factory=dict)
    where: str = ""
    model: str = ""  # where on this machine the model lies; empty: where it was said to
    version_labels: Mapping[str, int] = field(
        default_factory=dict
    )  # such as stable, to the version that they stand for


FindBeside = Callable[[Mapping[str, Any]], Beside]  # from the options read; raises click.UsageError with a sentence


def read_settings(arguments: Sequence[str] = (), beside: FindBeside = lambda parameters: Beside()) -> Settings:
    """Return the settings: the command line before the environment, what stands beside the model, and the defaults.

    `beside` finds that, and the model itself. Exits with status 2 and one line where a setting cannot be read, with
    status 0 after --help and --version.
    """
    command = click.Command(
        "keras-server",
        params=[*(row.parameter() for row in SETTINGS), version_option(), no_arguments()],
        help="Serve a Keras model as a REST API: POST an image to /predict, get its labels as JSON.",
        epilog="Each option may stand in the environment instead: --port 8000 is KERAS_SERVER_PORT=8000.",
        context_settings={"max_content_width": 120},
    )
    context = parse(command, arguments, beside)
    values = values_of(context, SETTINGS)
    sources = {row.name: context.get_parameter_source(row.name) for row in SETTINGS}
    typed = values["api_key"] if sources["api_key"] is ParameterSource.COMMANDLINE else ()
    values["api_key"] = (*read_keys(typed), *read_key_file(values["api_key_file"], sources["api_key_file"]))
    values["metrics_key"] = read_metrics_key(values["metrics_key"], sources["metrics_key"])
    explicit = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)
    given = frozenset(row.name for row in SETTINGS if row.of_model and sources[row.name] in explicit)
    return Settings(**values, given=given)


def parse(
    command: click.Command, arguments: Sequence[str], beside: FindBeside = lambda parameters: Beside()
) -> click.Context:
    """Return what a command line holds, and what stands beside its parameter `model`. Exits as read_settings does."""
    found = Beside()
    try:
        context = command.make_context(command.name, [*arguments])
        model, models = divided(context.params["model"])
        found = Beside() if models else beside(context.params | {"model": model})
        if found.values:
            context = command.make_context(command.name, [*arguments], default_map=found.values)
        context.params |= {"model": found.model or model, "models": models}
    except click.exceptions.Exit as end:
        sys.exit(end.exit_code)
    except click.UsageError as error:
        where = spelling(error, found.where)
        stop(f"{where}{error.message if where else error.format_message()}")
    return context


def divided(asked: str | tuple[ModelOption, ...]) -> tuple[str, tuple[ModelOption, ...]]:
    """Return the model that is asked for, where it is one under its own name, or all of them."""
    if isinstance(asked, str):
        return asked, ()
    asked = tuple(option for option in asked if option.text)
    if len(asked) < 2 and not any(option.name or option.values for option in asked):
        return "".join(option.model for option in asked), ()
    return "", asked


def values_of(context: click.Context, rows: Sequence[Setting]) -> dict[str, Any]:
    """Return the values of these settings by name, the keys aside, which have a file as well."""
    values = {row.name: context.params[row.name] for row in rows}
    if "model" in values:
        values["models"] = context.params["models"]
    for row in rows:
        unset = context.get_parameter_source(row.name) is ParameterSource.DEFAULT
        if row.empty and unset and os.environ.get(row.variable) == "":
            values[row.name] = ""
    return values


def version_option() -> click.Option:
    """Return the option that prints the version."""

    def show(context: click.Context, _: click.Parameter, wanted: bool) -> None:
        if wanted:
            click.echo(f"keras-server {__version__}")
            context.exit()

    return click.Option(["--version"], is_flag=True, expose_value=False, is_eager=True, callback=show,
                        help="Show the version and exit.")  # fmt: skip


def no_arguments() -> click.Argument:
    """Return what refuses words that belong to no option, as a model's name alone."""

    def refuse(context: click.Context, _: click.Parameter, words: tuple[str, ...]) -> None:
        if words:
            raise click.UsageError(f"{words[0]!r} belongs to no option: a model is named with --model.", context)

    return click.Argument(["words"], nargs=-1, expose_value=False, callback=refuse, metavar="")


def spelling(error: click.UsageError, beside: str) -> str:
    """Return where a value that cannot be read stands: as "--port: ", "KERAS_SERVER_PORT: " or "my.toml: crop: ".

    Else nothing.
    """
    row = next((row for row in SETTINGS if isinstance(error, click.BadParameter) and error.param
                and error.param.name == row.name), None)  # fmt: skip
    if not row or not error.ctx or isinstance(error, click.MissingParameter):
        return ""
    source = error.ctx.get_parameter_source(row.name)
    if source is ParameterSource.DEFAULT_MAP:
        return f"{beside}: {row.name}: "
    return f"{row.variable if source is ParameterSource.ENVIRONMENT else row.option}: "


def unknown_variables(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Return a sentence for each variable that looks like a setting and is none."""
    known = [row.variable for row in SETTINGS]
    sentences = []
    for name in sorted(environment):
        if name.startswith(PREFIX) and name not in known and not KUBERNETES.fullmatch(name):
            near = difflib.get_close_matches(name, known, 1, cutoff=0)[0]
            sentences.append(f"{name} in the environment is no setting: did you mean {near}?")
    return sentences

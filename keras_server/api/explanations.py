"""Why this label? Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391) over the picture that a request brings.

    curl -F image=@dog.jpg 'http://localhost:5000/explain?label=beagle' -o why.png

Each channel of the last convolutional features is weighted with how much the label's score grows with it; where the
weighted sum is positive, the picture speaks for the label. That needs gradients, hence the Keras model, which a server
that runs on OpenVINO loads at the first explanation. One thread explains, one picture at a time: it shares nothing
with the thread that predicts but the processors.
"""

from __future__ import annotations

import difflib
import functools
import io
import logging
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import flask
import numpy as np
from PIL import Image

log = logging.getLogger("keras_server")

SIDE = 1024  # most pixels of an overlay's longer side
STRENGTH = 0.75  # how much of the photo the strongest spot hides

Cam = Callable[[np.ndarray, int], np.ndarray]  # a picture, (1, h, w, 3), and a class to their map, (rows, columns)


class Unexplainable(Exception):
    """The model that is served cannot be explained; the message is a sentence for the client."""


# ----------------------------------------------------------------------------------------------------------
# The model, cut in two at its last convolutional features
# ----------------------------------------------------------------------------------------------------------


def producer(tensor: Any) -> Any:
    """Return the layer, nested model or other operation that a symbolic tensor comes out of."""
    return tensor._keras_history.operation


def parents(tensor: Any) -> list[Any]:
    """Return the symbolic tensors that a symbolic tensor is computed from."""
    return producer(tensor)._inbound_nodes[tensor._keras_history.node_index].input_tensors


def is_graph(operation: Any) -> bool:
    """Return whether this is a model with layers to look into, from one input to one output."""
    import keras

    return isinstance(operation, keras.Model) and all(
        len(getattr(operation, ends, None) or ()) == 1 for ends in ("inputs", "outputs")
    )


def bottlenecks(output: Any) -> Iterator[tuple[Any, list[Any]]]:
    """Yield from the last to the first each tensor that everything after it depends on, with all that lies before it.

    Between two of them the model may branch as it likes; at one of them it can be cut in two.
    """
    ordered: dict[int, Any] = {}  # each tensor after those that it is computed from
    stack = [(output, False)]
    while stack:
        tensor, done = stack.pop()
        if done:
            ordered.setdefault(id(tensor), tensor)
        elif id(tensor) not in ordered:
            stack += [(tensor, True), *((parent, False) for parent in parents(tensor))]
    rest = [*ordered.values()]
    wanted = {id(output)}
    while rest:
        if len(wanted) == 1:
            yield rest[-1], rest[:-1]
        tensor = rest.pop()
        wanted = wanted - {id(tensor)} | {id(parent) for parent in parents(tensor)}


def is_map(tensor: Any) -> bool:
    """Return whether a symbolic tensor is a picture of features: batch, height, width, channels, and not one pixel."""
    return len(tensor.shape) == 4 and tensor.shape[1:3] != (1, 1)


def has_kernel(tensor: Any) -> bool:
    """Return whether the operation behind a symbolic tensor convolves: its kernel has four axes."""
    return any(len(weight.shape) == 4 for weight in getattr(producer(tensor), "weights", ()))


def only_pools(tensor: Any) -> bool:
    """Return whether a map is merely a coarser copy of the one before it."""
    before = parents(tensor)
    return (
        len(before) == 1
        and is_map(before[0])
        and not getattr(producer(tensor), "weights", ())
        and tensor.shape[1:3] != before[0].shape[1:3]
    )


def logits(output: Any) -> Any:
    """Return the scores before the softmax or sigmoid that ends in `output`; `output` itself where there is none.

    The gradient of a probability says what separates a label from the others, and fades where the model is sure; the
    paper takes the score.
    """
    import keras

    last = producer(output)
    squashes = (keras.activations.softmax, keras.activations.sigmoid)
    if is_graph(last):
        scores = logits(last.outputs[0])
        return output if scores is last.outputs[0] else keras.Model(last.inputs[0], scores)(parents(output)[0])
    if getattr(last, "activation", None) in squashes and last.weights:  # a twin of the layer that stops before it
        twin = type(last).from_config(last.get_config() | {"activation": "linear"})
        scores = twin(parents(output)[0])
        twin.set_weights(last.get_weights())
        return scores
    if getattr(last, "activation", None) in squashes or type(last).__name__ in ("Softmax", "Sigmoid"):
        return parents(output)[0]
    return output


def cut(source: Any, output: Any) -> tuple[list[Any], list[Any]] | None:
    """Return the models that lead to the last convolutional features and those that follow, each to be run in turn.

    The features are the last map that everything after depends on, before it is merely pooled. None: there are none.
    """
    import keras

    for tensor, before in bottlenecks(output):
        after = [] if tensor is output else [keras.Model(tensor, output)]
        inner = producer(tensor)
        if is_graph(inner) and (found := cut(inner.inputs[0], inner.outputs[0])):
            (start,) = parents(tensor)
            return [keras.Model(source, start), *found[0]], [*found[1], *after]
        if is_map(tensor) and not only_pools(tensor) and any(has_kernel(t) for t in (tensor, *before)):
            return [keras.Model(source, tensor)], after
    return None


def grad_cam(keras_model: Any, name: str) -> Cam:
    """Return the function that explains an image classifier. Raises Unexplainable."""
    import keras

    if keras.backend.backend() != "tensorflow":
        raise Unexplainable(
            f"Explanations need Keras on TensorFlow, and this server runs it on {keras.backend.backend()}."
        )
    import tensorflow as tf

    (source,), output = keras_model.inputs, keras_model.outputs[0]
    parts = cut(source, logits(output))
    if not parts or not parts[1]:
        raise Unexplainable(f"{name} has no convolutional features before its labels, so it cannot be explained.")

    def run(models: list[Any], tensor: Any) -> Any:
        for part in models:
            tensor = part(tensor, training=False)
        return tensor

    @tf.function(input_signature=[tf.TensorSpec((1, *source.shape[1:]), source.dtype), tf.TensorSpec((), tf.int32)])
    def explain(picture: Any, label: Any) -> Any:
        features = run(parts[0], picture)  # (1, rows, columns, channels)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(features)
            scores = run(parts[1], features)  # (1, classes)
            if output.shape[-1] == 1:  # which speaks for the second of two classes, or against it for the first
                scores = tf.concat([-scores, scores], axis=-1)
            score = scores[0, label]
        gradients = tape.gradient(score, features)
        weights = tf.reduce_mean(tf.cast(gradients, tf.float32), axis=(0, 1, 2))  # (channels,)
        return tf.nn.relu(tf.linalg.matvec(tf.cast(features[0], tf.float32), weights))  # (rows, columns)

    return lambda picture, label: explain(tf.constant(picture), tf.constant(label, tf.int32)).numpy()


# ----------------------------------------------------------------------------------------------------------
# The thread that explains
# ----------------------------------------------------------------------------------------------------------


class Explainer:
    """Loads the Keras model behind what is served at the first use, and explains one picture after the other."""

    def __init__(self, server: Any):
        """Take the module run_keras_server, under whatever name it runs."""
        self.server = server
        self.starting = threading.Lock()
        self.batcher: Any = None
        self.spec: Any = None  # of the model that is loaded
        self.cam: Cam | None = None
        self.flaw = ""  # why that model cannot be explained

    def heat(self, picture: np.ndarray, label: int) -> np.ndarray:
        """Return the map of a prepared picture, between 0 and 1, shape (rows, columns).

        Raises Unexplainable, and what Batcher.compute does.
        """
        with self.starting:
            if not self.batcher:
                settings = self.server.settings
                # Who waits here holds one of the front's threads; this many leave the predictions enough of them.
                most = min(settings.max_batch, settings.queue_size)
                self.batcher = self.server.Batcher(self.run, 1, most)
        return self.batcher.compute([picture, np.array([label], np.int32)])[0][0]

    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """Compute one map, as the Batcher calls it: with one row in, and one row out."""
        spec = self.server.spec
        if self.spec is not spec:
            self.cam, self.flaw = None, ""
            try:
                if not spec.image or spec.image[3]:
                    raise Unexplainable(
                        f"{spec.name} takes no pictures with their channels last, so it cannot be explained."
                    )
                self.cam = grad_cam(self.load(), spec.name)
            except Unexplainable as error:
                self.flaw = str(error)
            self.spec = spec
        if not self.cam:
            raise Unexplainable(self.flaw)
        heat = self.cam(inputs[0], inputs[1][0])
        if not np.isfinite(heat).all():
            raise ValueError(f"{spec.name} has gradients that are not finite")
        return [(heat / (heat.max() or 1))[np.newaxis]]

    def load(self) -> Any:
        """Return the Keras model behind what is served. Raises Unexplainable."""
        server, name = self.server, self.server.spec.name
        if keras_model := getattr(getattr(server.model, "run", None), "model", None):
            return keras_model  # which Keras itself runs already
        try:
            if server.source:
                return server.source.load()
            reason = "it came from no file or architecture"
        except server.StartupError as error:
            reason = str(error)
        log.warning("%s cannot be explained: %s", name, reason)
        raise Unexplainable(f"The Keras model of {name} cannot be loaded; the server's log says why.")


# ----------------------------------------------------------------------------------------------------------
# The picture of a map
# ----------------------------------------------------------------------------------------------------------


@functools.cache
def ramp(steps: int = 256) -> np.ndarray:
    """Return the colours from nothing to most, shape (steps, 3), uint8.

    They rise evenly in lightness, violet over red to yellow, so that they read alike in grey and to the colour-blind.
    Each is as colourful as a screen can show, up to a limit: OKLCh by Bjoern Ottosson.
    """
    t = np.linspace(0, 1, steps)[:, np.newaxis]
    lightness, hue = 0.32 + 0.6 * t, np.radians(290 + 175 * t)
    chroma = np.linspace(0.19, 0, 256)  # shape (steps, 256): the first that the screen can show is taken
    a, b = chroma * np.cos(hue), chroma * np.sin(hue)
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    middle = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    cones = np.stack([long, middle, short], axis=-1)
    to_rgb = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear = cones @ to_rgb.T  # (steps, 256, 3)
    first = ((linear > -1e-4) & (linear < 1 + 1e-4)).all(axis=-1).argmax(axis=1)
    linear = linear[np.arange(steps), first].clip(0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.rint(255 * encoded).astype(np.uint8)


def overlay(picture: Image.Image, heat: np.ndarray) -> Image.Image:
    """Return the RGB picture under its map: the more a spot speaks for the label, the more of it is coloured."""
    smooth = Image.fromarray(heat.astype(np.float32)).resize(picture.size, Image.Resampling.BICUBIC)
    values = np.asarray(smooth).clip(0, 1)
    colours = Image.fromarray(ramp()[np.rint(255 * values).astype(np.uint8)])
    mask = Image.fromarray(np.rint(255 * STRENGTH * values).astype(np.uint8))
    return Image.composite(colours, picture, mask)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return a picture's width and height once its EXIF orientation is followed."""
    try:
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    except Exception:  # noqa: BLE001 - as in prepare_image: EXIF that cannot be read says nothing
        turned = False
    return (image.height, image.width) if turned else (image.width, image.height)


def upright(server: Any, data: bytes) -> Image.Image:
    """Return the upload as RGB, turned as prepare_image turns it, of at most SIDE pixels a side. Raises ImageError."""
    image = server.decode_pixels(server.open_image(data), SIDE, "RGB")
    image.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC, reducing_gap=3.0)
    return image


# ----------------------------------------------------------------------------------------------------------
# Web
# ----------------------------------------------------------------------------------------------------------


def blueprint(server: Any) -> flask.Blueprint:
    """Return the route of the explanations, for the app of the module run_keras_server."""
    routes = flask.Blueprint("explain", __name__)
    explainer = Explainer(server)

    @routes.post("/explain")
    def explain() -> Any:
        """Answer with the picture under the heat map of one label, or with the bare map."""
        uploads = server.read_uploads()
        if len(uploads) > 1:
            flask.abort(400, f"There are {len(uploads)} images: send one at a time to have it explained.")
        data = uploads[0][1]
        try:
            picture = server.decode(data)
            row = server.probabilities(server.model.predict(picture))[0]
            label = choose(server, row, flask.request.args.get("label"))
            heat = explainer.heat(picture, label)
            accepted = flask.request.accept_mimetypes.best_match(["image/png", "application/json"], "image/png")
            if accepted == "image/png":
                return flask.Response(draw(server, data, heat), content_type="image/png", headers={"Vary": "Accept"})
            width, height = upright_size(server.open_image(data))
        except server.ImageError as error:
            flask.abort(400, str(error))
        except Unexplainable as error:
            flask.abort(422, str(error))
        answer = {"success": True, "model": server.spec.name, "label": server.class_names(len(row))[label]}
        answer |= {"probability": float(row[label]), "map": np.round(heat.astype(float), 6).tolist()}
        return answer | {"width": width, "height": height}, {"Vary": "Accept"}

    return routes


def choose(server: Any, row: np.ndarray, wanted: str | None) -> int:
    """Return the class that a request asks for by its label or number, or else the most probable one."""
    if wanted is None:
        return int(row.argmax())
    labels = server.class_names(len(row))
    same = [i for i, label in enumerate(labels) if label == wanted]
    if same:  # ImageNet has two cranes: the one that /predict shows first is meant
        return max(same, key=lambda i: row[i])
    if not re.fullmatch("0|[1-9][0-9]{0,8}", wanted) or int(wanted) >= len(row):
        near = difflib.get_close_matches(wanted[:80].replace(" ", "_"), labels, 1, cutoff=0)[0]
        flask.abort(400, f"There is no label {wanted[:80]!r}: take one as /predict spells it, such as {near}, or the "
                         f"number of a class, 0 to {len(row) - 1}.")  # fmt: skip
    return int(wanted)


def draw(server: Any, data: bytes, heat: np.ndarray) -> bytes:
    """Return the PNG of an upload under its map. Raises ImageError, or Overdue."""
    with server.decoder():
        picture = overlay(upright(server, data), heat)
    out = io.BytesIO()
    picture.save(out, "PNG", compress_level=1)  # more takes its time, and photos hardly get smaller
    return out.getvalue()

"""POST /explain: the heat map of a label over the picture that a request brings.

curl -F image=@dog.jpg 'http://localhost:5000/explain?label=beagle' -o why.png
"""

from __future__ import annotations

import difflib
import io
import re
from collections.abc import Sequence

import flask
import numpy as np
from flask.typing import ResponseReturnValue
from PIL import Image

from keras_server.api.context import current_app, current_model, model_settings
from keras_server.api.uploads import decode, look, read_uploads
from keras_server.explain.cam import Unexplainable
from keras_server.explain.heatmap import SIDE, overlay
from keras_server.images import ImageError, Picture, seen, upright_size
from keras_server.images import decode as decode_image
from keras_server.models.served import Served
from keras_server.models.spec import probabilities

routes = flask.Blueprint("explanations", __name__)


@routes.post("/explain")
def explain() -> ResponseReturnValue:
    """Answer with the picture under the heat map of one label, or with the bare map."""
    served, uploads = current_model(), read_uploads()
    if len(uploads) > 1:
        flask.abort(400, f"There are {len(uploads)} images: send one at a time to have it explained.")
    if served.spec.kind != "classes":
        flask.abort(422, f"{served.spec.name} answers with numbers, not with labels, so there is none to explain.")
    ((_, data),) = uploads
    try:
        with current_app().budget.map_turn(served):
            return explain_one(served, data)
    except ImageError as error:
        flask.abort(400, str(error))
    except Unexplainable as error:
        flask.abort(422, str(error))


def explain_one(served: Served, data: bytes) -> ResponseReturnValue:
    """Answer for one picture. Raises ImageError, Unexplainable, QueueFull or Overdue."""
    prepared = decode(data)
    (row,) = probabilities(served.predict(prepared), served.spec)
    labels = served.spec.names(len(row))
    label = choose(row, labels, flask.request.args.get("label"))
    heat = served.explainer.heat(prepared, label)
    picture = look(data)
    accepted = flask.request.accept_mimetypes.best_match(["image/png", "application/json"], "image/png")
    if accepted == "image/png":
        return flask.Response(
            draw(picture, heat, served.spec.target), content_type="image/png", headers={"Vary": "Accept"}
        )
    width, height = upright_size(picture.image())
    answer = {"success": True, **served.title, "label": labels[label], "probability": float(row[label])}
    answer |= {"map": np.round(heat.astype(float), 6).tolist(), "width": width, "height": height}
    answer["seen"] = seen((width, height), served.spec.target, model_settings().crop)
    return answer, {"Vary": "Accept"}


def choose(row: np.ndarray, labels: Sequence[str], requested: str | None) -> int:
    """Return the class that a request asks for by its label or number, or else the most probable one."""
    if requested is None:
        return int(row.argmax())
    same = [i for i, label in enumerate(labels) if label == requested]
    if same:  # ImageNet has two cranes: the one that /predict shows first is meant
        return max(same, key=lambda i: row[i])
    if not re.fullmatch("0|[1-9][0-9]{0,8}", requested) or int(requested) >= len(row):
        near = difflib.get_close_matches(requested[:80].replace(" ", "_"), labels, 1, cutoff=0)[0]
        flask.abort(
            400,
            f"There is no label {requested[:80]!r}: take one as /predict spells it, such as {near}, or the number of a "
            f"class, 0 to {len(row) - 1}.",
        )
    return int(requested)


def draw(encoded: Picture, heat: np.ndarray, target: tuple[int, int]) -> bytes:
    """Return the PNG of a picture under its map, for a model that takes pictures of the target's width and height.

    Raises ImageError, QueueFull or Overdue.
    """
    settings = model_settings()
    with current_app().budget.turn(encoded.work(SIDE)):
        picture = decode_image(encoded.image(), SIDE, "RGB", settings.background)
        picture.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC, reducing_gap=3.0)
        picture = overlay(picture, heat, seen(picture.size, target, settings.crop))
    out = io.BytesIO()
    picture.save(out, "PNG", compress_level=1)  # more takes its time, and photos hardly get smaller
    return out.getvalue()

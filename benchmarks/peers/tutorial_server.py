"""The server of the article, written anew for today's Keras: `model.predict` in the request, Flask's own server."""

import io
import os
from typing import Any

import flask
import keras_model
import numpy as np
from keras.applications import imagenet_utils
from keras.utils import img_to_array
from PIL import Image

app = flask.Flask(__name__)
model: Any = None


def load_model():
    """Load the model before the server starts, so that no request comes without one."""
    global model
    model = keras_model.load_model()


def prepare_image(image, target):
    """Return the image as a batch of one, as the model was trained to see it."""
    if image.mode != "RGB":
        image = image.convert("RGB")
    image = image.resize(target)
    image = img_to_array(image)
    image = np.expand_dims(image, axis=0)
    if keras_model.is_resnet:
        image = imagenet_utils.preprocess_input(image)
    return image


@app.route(keras_model.route, methods=["POST"])
def predict():
    """Classify the uploaded image, or compute the row of numbers."""
    data = {"success": False}
    if keras_model.takes_numbers:
        rows = np.array(flask.request.get_json()["instances"], dtype="float32")
        data = keras_model.answer_of(model.predict(rows)[0])
    if flask.request.files.get("image"):
        image = flask.request.files["image"].read()
        image = Image.open(io.BytesIO(image))
        image = prepare_image(image, target=(224, 224))
        preds = model.predict(image)
        # decode_predictions would download its labels.
        data = keras_model.answer_of(preds[0])
    return flask.jsonify(data)


if __name__ == "__main__":
    load_model()
    app.run(port=int(os.environ["BENCH_PORT"]))

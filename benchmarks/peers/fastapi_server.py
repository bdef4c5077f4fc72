"""The same Keras model behind FastAPI, as a compiled tf.function, on Uvicorn: one request at a time, no batches."""

import os
from typing import Any

import tensorflow as tf
import uvicorn
from fastapi import FastAPI, UploadFile
from keras_model import answer_of, load_model, prepare_image, prepare_numbers, route, takes_numbers
from PIL import Image
from pydantic import BaseModel

app = FastAPI()
model = load_model()
compute = tf.function(
    lambda batch: model(batch, training=False), input_signature=[tf.TensorSpec((None, *model.input_shape[1:]))]
)


class Body(BaseModel):
    """The body of TensorFlow Serving's REST API."""

    instances: list[list[float]]


# In a thread, as FastAPI does with functions that are not async: reading goes on while a picture is computed.
def predict_picture(image: UploadFile) -> dict[str, Any]:
    """Classify one upload."""
    batch = prepare_image(Image.open(image.file))[None]
    return answer_of(compute(tf.constant(batch)).numpy()[0])


# On the loop: four numbers take less than handing them to a thread.
async def predict_numbers(body: Body) -> dict[str, Any]:
    """Compute one row."""
    batch = prepare_numbers(body.instances)[None]
    return answer_of(compute(tf.constant(batch)).numpy()[0])


app.post(route)(predict_numbers if takes_numbers else predict_picture)

if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(os.environ["BENCH_PORT"]), log_level="warning")

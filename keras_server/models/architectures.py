"""The classifiers of keras.applications, by the names that --model takes, and what their pixels go through.

In figures, for the server itself has no Keras to ask; a test holds them against Keras' own.
"""

from __future__ import annotations

import difflib
import os
import re
import urllib.error
import urllib.request
from pathlib import Path

from keras_server.models.errors import DownloadError, StartupError

# The keys of PREPROCESS in images.py, and who was trained with them.
TRAINED_WITH = {
    "caffe": "resnet50 resnet101 resnet152 vgg16 vgg19",
    "tf": "inceptionresnetv2 inceptionv3 mobilenet mobilenetv2 nasnetlarge nasnetmobile resnet50v2 resnet101v2 "
    "resnet152v2 xception",
    "torch": "densenet121 densenet169 densenet201",
    "none": "convnexttiny convnextsmall convnextbase convnextlarge convnextxlarge efficientnetb0 efficientnetb1 "
    "efficientnetb2 efficientnetb3 efficientnetb4 efficientnetb5 efficientnetb6 efficientnetb7 efficientnetv2b0 "
    "efficientnetv2b1 efficientnetv2b2 efficientnetv2b3 efficientnetv2s efficientnetv2m efficientnetv2l "
    "mobilenetv3small mobilenetv3large",
}
PREPROCESS_OF = {name: mode for mode, names in TRAINED_WITH.items() for name in names.split()}

WEIGHTS = "https://storage.googleapis.com/tensorflow/keras-applications/"  # where Keras fetches nearly all
PATIENCE = 3.0  # seconds for an answer from there


def check_architecture(name: str) -> str:
    """Return the name of a classifier of keras.applications. Raises StartupError for any other."""
    if name in PREPROCESS_OF:
        return name
    near = difflib.get_close_matches(name, PREPROCESS_OF, 1) or ["resnet50"]
    raise StartupError(f"{name} is neither a file nor a classifier of keras.applications, such as {near[0]}.")


def cached_weights(name: str) -> list[Path]:
    """Return the weights files of a classifier that Keras has downloaded already."""
    folder = Path(os.environ.get("KERAS_HOME") or "~/.keras").expanduser() / "models"
    # Keras keeps MobileNetV2 in mobilenet_v2_weights_....h5.
    return sorted(file for file in folder.glob("*.h5") if name in re.sub("[-_]", "", file.name.lower()))


def check_download(name: str) -> None:
    """Raise DownloadError where the server of the weights of a classifier cannot be reached."""
    try:
        with urllib.request.urlopen(urllib.request.Request(WEIGHTS, method="HEAD"), timeout=PATIENCE):
            pass
    except urllib.error.HTTPError:  # it has no page there, and it answers
        pass
    except (OSError, ValueError) as error:
        raise DownloadError(name, str(getattr(error, "reason", error))) from None

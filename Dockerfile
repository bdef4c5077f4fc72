# syntax=docker/dockerfile:1
# The plain server in a container, without Keras and TensorFlow:
#   docker build -t keras-server . && docker run --read-only --tmpfs /tmp -p 5000:5000 keras-server --top 3
# Another model: keras-server export my.keras out, and -v ./out:/opt/model:ro
# The base image is that of one day, for all processors, and packages are those of the lock files (make lock): what is
# built today is what was built when they were written. Renew both from time to time, for what was mended since.
ARG PYTHON=python:3.12-slim@sha256:dddfd7e07f9d15aeeca61529320492139d21cac7f0070c00609243e51e4e0016

FROM ${PYTHON} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /srv/keras-server
COPY requirements.lock requirements-serve.lock ./
# What OpenVINO brings for other devices than the processor takes 60 MB.
RUN pip install --require-hashes -r requirements.lock \
    && python -m venv --without-pip /opt/venv \
    && pip --python /opt/venv/bin/python install --require-hashes -r requirements-serve.lock \
    && rm /opt/venv/lib/python3.12/site-packages/openvino/libs/libopenvino_intel_[gn]pu_plugin.so \
    && rm /opt/venv/lib/python3.12/site-packages/openvino/libs/cache.json
COPY run_keras_server.py simple_request.py LICENSE dog.jpg ./
COPY keras_server keras_server
# The bundled model is converted here, so that the container starts in a second and never needs to write.
RUN CUDA_VISIBLE_DEVICES="" python run_keras_server.py export bundled /opt/model \
    && rm keras_server/bundled/efficientnet_lite0.keras

FROM ${PYTHON}
RUN useradd --uid 10001 --create-home --home-dir /home/server server
COPY --from=build /opt/venv /opt/venv
COPY --from=build /opt/model /opt/model
COPY --from=build /srv/keras-server /srv/keras-server
WORKDIR /srv/keras-server
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    KERAS_SERVER_HOST=0.0.0.0 KERAS_SERVER_PORT=5000 KERAS_SERVER_MODEL=/opt/model KERAS_SERVER_LOG_FORMAT=json
USER 10001
EXPOSE 5000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen(f\"http://127.0.0.1:{os.environ['KERAS_SERVER_PORT']}/healthz\", timeout=4)"]
# As a list, so that SIGTERM reaches the server itself, which drains; docker run adds options to it.
ENTRYPOINT ["python", "run_keras_server.py"]

# syntax=docker/dockerfile:1
# The plain server in a container: docker build -t keras-server . && docker run --read-only --tmpfs /tmp -p 5000:5000 keras-server
# Other weights: -v ~/.keras:/home/server/.keras:ro -e KERAS_SERVER_MODEL=resnet50

FROM python:3.12-slim AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
WORKDIR /srv/keras-server
COPY requirements.txt .
RUN /opt/venv/bin/pip install -r requirements.txt
COPY run_keras_server.py simple_request.py LICENSE ./
COPY keras_server keras_server
# The bundled model is converted here, so that the container starts in a second and never needs to write.
RUN KERAS_SERVER_MODEL=bundled KERAS_SERVER_CACHE_DIR=/opt/cache CUDA_VISIBLE_DEVICES="" \
    /opt/venv/bin/python -c "import run_keras_server as server; server.create_app()" \
    && test -n "$(find /opt/cache -name model.xml)"

FROM python:3.12-slim
RUN useradd --uid 10001 --create-home --home-dir /home/server server
COPY --from=build /opt/venv /opt/venv
# Its owner is who serves: a cache that others could have written is not read.
COPY --from=build --chown=10001:10001 --chmod=700 /opt/cache /opt/cache
COPY --from=build /srv/keras-server /srv/keras-server
WORKDIR /srv/keras-server
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    KERAS_SERVER_HOST=0.0.0.0 KERAS_SERVER_PORT=5000 KERAS_SERVER_MODEL=bundled \
    KERAS_SERVER_CACHE_DIR=/opt/cache KERAS_SERVER_LOG_FORMAT=json
USER 10001
EXPOSE 5000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen(f\"http://127.0.0.1:{os.environ['KERAS_SERVER_PORT']}/healthz\", timeout=4)"]
# As a list, so that SIGTERM reaches the server itself, which drains.
CMD ["python", "run_keras_server.py"]

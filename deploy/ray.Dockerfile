# The image of deploy/rayservice.yaml, on Ray's own, which has what KubeRay's probes call; no Keras, no TensorFlow:
# docker build -f deploy/ray.Dockerfile -t keras-server-ray:1.0.0 .
# Another model: keras-server export my.keras out, and a volume of it at /opt/model.

FROM python:3.12-slim AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /srv/keras-server
COPY requirements.txt requirements-serve.txt ./
RUN pip install -r requirements.txt
COPY run_keras_server.py dog.jpg LICENSE ./
COPY keras_server keras_server
# The bundled model is converted here, so that a replica starts in a second or two.
RUN CUDA_VISIBLE_DEVICES="" python run_keras_server.py export bundled /opt/model \
    && rm keras_server/bundled/efficientnet_lite0.keras

FROM rayproject/ray:2.60.0-py312-cpu
COPY requirements-serve.txt requirements-ray.txt /srv/keras-server/
RUN pip install --no-cache-dir -r /srv/keras-server/requirements-ray.txt
COPY --from=build /opt/model /opt/model
COPY --from=build /srv/keras-server /srv/keras-server
ENV PYTHONPATH=/srv/keras-server

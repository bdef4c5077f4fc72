# The image of deploy/rayservice.yaml, on Ray's own, which has what KubeRay's probes call:
# docker build -f deploy/ray.Dockerfile -t keras-server-ray:1.0.0 .
FROM rayproject/ray:2.60.0-py312-cpu
COPY requirements.txt requirements-serve.txt requirements-ray.txt /srv/keras-server/
RUN pip install --no-cache-dir -r /srv/keras-server/requirements-ray.txt
COPY . /srv/keras-server
ENV PYTHONPATH=/srv/keras-server

"""Serves a Keras model as a REST API: what stands behind run_keras_server.py, in layers."""

__version__ = "1.0.0"

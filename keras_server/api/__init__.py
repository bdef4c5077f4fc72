"""The Flask side: routes, protocols, pages."""

from keras_server.api.app import create_app
from keras_server.api.context import App, body_limit, cors_of, decode_threads
from keras_server.api.pages import probes

__all__ = ["App", "body_limit", "cors_of", "create_app", "decode_threads", "probes"]

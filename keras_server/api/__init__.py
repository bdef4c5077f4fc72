"""The Flask side: routes, protocols, pages."""

from keras_server.api.app import create_app
from keras_server.api.context import App, body_limit, decode_threads

__all__ = ["App", "body_limit", "create_app", "decode_threads"]

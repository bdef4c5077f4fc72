"""The Flask side: routes, protocols, pages."""

from keras_server.api.app import create_app
from keras_server.api.context import App, bodies_limit, body_limit, cors_of, group_of, threads
from keras_server.api.pages import probes

__all__ = ["App", "bodies_limit", "body_limit", "cors_of", "create_app", "group_of", "probes", "threads"]

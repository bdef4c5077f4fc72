"""What keeps a model from being served, as sentences for the person who started the server."""

from __future__ import annotations


class StartupError(Exception):
    """The server cannot start; the message is a sentence for the person who started it."""


class DownloadError(StartupError):
    """An architecture's weights cannot be downloaded; `reason` says why in a few words."""

    def __init__(self, name: str, reason: str):
        super().__init__(
            f"The weights of {name} are not in Keras' cache and cannot be downloaded ({reason}): connect to the "
            "internet, give a file with --weights FILE, or take --model bundled."
        )
        self.reason = reason

"""What `keras-server NAME` does besides serving: one function a command, from its arguments to the exit status."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def predict(arguments: Sequence[str]) -> int:
    """Label thousands of photos, into a file."""
    from keras_server.commands.predict import main  # only here: a server starts without it

    return main(arguments)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"predict": predict}

"""What `keras-server NAME` does besides serving: one function a command, from its arguments to the exit status."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def predict(arguments: Sequence[str]) -> int:
    """Label thousands of photos, into a file."""
    from keras_server.commands.predict import main  # only here: a server starts without it

    return main(arguments)


def export(arguments: Sequence[str]) -> int:
    """Write a model as a folder that is served without Keras."""
    from keras_server.commands.export import main

    return main(arguments)


def check(arguments: Sequence[str]) -> int:
    """Hold a model's answers against what is on photos."""
    from keras_server.commands.check import main

    return main(arguments)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"predict": predict, "export": export, "check": check}

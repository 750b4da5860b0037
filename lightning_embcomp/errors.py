"""Errors that several parts of the package raise."""


class NonFiniteLossError(RuntimeError):
    """The training loss is NaN or infinite."""

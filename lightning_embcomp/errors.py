"""Errors that several parts of the package raise."""


class NonFiniteLossError(RuntimeError):
    """The training loss is NaN or infinite."""


class SetupError(RuntimeError):
    """A callback cannot work in this trainer or on this module."""

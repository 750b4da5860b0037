"""Errors of the exchange of gradients."""


class NonFiniteGradientError(RuntimeError):
    """A gradient of some worker is NaN or infinite."""


class ExchangeError(RuntimeError):
    """Another process has ended, or does not answer."""

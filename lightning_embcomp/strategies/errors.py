"""Errors of sharded training."""


class ShardingError(RuntimeError):
    """A model, or a setting of the trainer, that sharded training cannot honour."""

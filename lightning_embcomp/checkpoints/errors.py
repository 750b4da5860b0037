"""Errors of distributed checkpoints."""

from __future__ import annotations


class CheckpointSaveError(RuntimeError):
    """A checkpoint could not be written; raised on every rank, and names the ranks that failed."""

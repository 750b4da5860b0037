"""Distributed checkpoint directories: written by all ranks, atomic, read by any number of ranks."""

from lightning_embcomp.checkpoints.consolidation import consolidate
from lightning_embcomp.checkpoints.directory import is_checkpoint, remove_checkpoint
from lightning_embcomp.checkpoints.errors import CheckpointSaveError
from lightning_embcomp.checkpoints.names import COMPRESSED, STATE_DICT
from lightning_embcomp.checkpoints.ranks import saving_group
from lightning_embcomp.checkpoints.reading import CheckpointReader, read_common, read_rank, world_size_of
from lightning_embcomp.checkpoints.saving import save_checkpoint
from lightning_embcomp.checkpoints.slices import Slice, Slices, as_slices
from lightning_embcomp.report.checkpoint import CheckpointError

__all__ = [
    "COMPRESSED",
    "STATE_DICT",
    "CheckpointError",
    "CheckpointReader",
    "CheckpointSaveError",
    "Slice",
    "Slices",
    "as_slices",
    "consolidate",
    "is_checkpoint",
    "read_common",
    "read_rank",
    "remove_checkpoint",
    "save_checkpoint",
    "saving_group",
    "world_size_of",
]

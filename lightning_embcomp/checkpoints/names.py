"""Names in the checkpoints of a Lightning run."""

from __future__ import annotations

STATE_DICT = "state_dict/"
"""Before the names of a LightningModule's ``state_dict``; the rest of the name is the key there."""

COMPRESSED = "compressed/"
"""Before the names that modules give themselves, through ``distributed_state``; the rest begins with their path."""

RESUME_ONLY = ("optimizer_states", "lr_schedulers", "dense_optimizers", "fused_rates")
"""Values in ``common`` that describe the optimizers of a sharded run, and mean nothing without their tensors."""

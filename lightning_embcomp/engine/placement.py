"""Where the rows of fused tables live on a GPU: in its memory, or in unified memory that device and host share.

Unified memory is host memory that kernels reach over the bus, so tables may be larger than the device. FBGEMM
allocates it (``cudaMallocManaged``, preferably in host memory, mapped on the device). As in FBGEMM's own tables, what
an optimizer keeps per weight lives with the weights, and what it keeps per row stays on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import EmbeddingLocation
from torch import Tensor

from lightning_embcomp.engine.optimizer import FusedOptimizerSpec, UnsupportedOptimizerError

Placement = Literal["device", "managed", "managed_caching"]
PLACEMENTS: tuple[Placement, ...] = ("device", "managed", "managed_caching")
CACHED_KINDS = ("sgd", "rowwise_adagrad")
"""Fused optimizers that FBGEMM tests together with its cache."""

_LOCATIONS = {
    "device": EmbeddingLocation.DEVICE,
    "managed": EmbeddingLocation.MANAGED,
    "managed_caching": EmbeddingLocation.MANAGED_CACHING,
}


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """Device memory in front of rows with ``placement: managed_caching``.

    Args:
        load_factor: Rows of the cache over rows in storage, over 0 and at most 1.
        algorithm: Which row makes room: ``lru`` the one that was not looked up for longest, ``lfu`` the one that was
            looked up least often.
    """

    load_factor: float = 0.2
    algorithm: Literal["lru", "lfu"] = "lru"

    def __post_init__(self) -> None:
        if not 0 < self.load_factor <= 1:
            raise ValueError(f"load_factor must be over 0 and at most 1, not {self.load_factor}")
        if self.algorithm not in ("lru", "lfu"):
            raise ValueError(f"algorithm must be 'lru' or 'lfu', not {self.algorithm!r}")


@dataclass(frozen=True, kw_only=True)
class RowPlacement:
    """Where the rows of an engine live once it is on a GPU; on the CPU it changes nothing.

    Args:
        kind: ``device``, ``managed`` (unified memory) or ``managed_caching`` (unified memory behind a cache of rows).
        cache: The cache of ``managed_caching``.

    Raises:
        ValueError: If there is no such placement.

    Example:
        >>> RowPlacement(kind="managed").is_unified(torch.device("cuda"))
        True
    """

    kind: Placement = "device"
    cache: CacheSettings = field(default_factory=CacheSettings)

    def __post_init__(self) -> None:
        if self.kind not in PLACEMENTS:
            raise ValueError(f"placement must be one of {', '.join(map(repr, PLACEMENTS))}, not {self.kind!r}")

    def is_unified(self, device: torch.device) -> bool:
        """Whether weights on that device are in unified memory."""
        return self.kind != "device" and device.type == "cuda"

    def location(self, device: torch.device) -> EmbeddingLocation:
        """FBGEMM's name."""
        return EmbeddingLocation.HOST if device.type == "cpu" else _LOCATIONS[self.kind]

    def empty(self, size: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised tensor for rows.

        Args:
            size: ``(rows, width)``, or ``(rows,)`` for one number per row, which stays on the device.
            dtype: Its dtype.
            device: Device of the engine.
        """
        # Unified memory cannot be allocated by zero bytes.
        if not self.is_unified(device) or len(size) == 1 or 0 in size:
            return torch.empty(tuple(size), dtype=dtype, device=device)
        found: Tensor = torch.ops.fbgemm.new_managed_tensor(torch.empty(0, dtype=dtype, device=device), list(size))
        return found

    def carry(self, tensor: Tensor, device: torch.device) -> Tensor:
        """A tensor of rows where it belongs on a device; the tensor itself if it is there already."""
        if tensor.device.type == device.type and device.index in (None, tensor.device.index):
            return tensor
        if not self.is_unified(device):
            return tensor.to(device)
        return self.empty(tensor.shape, tensor.dtype, device).copy_(tensor)


def check_placement(placement: RowPlacement, optimizer: FusedOptimizerSpec | None, what: str) -> None:
    """Refuse placements that an optimizer cannot be used with.

    Args:
        placement: Where the rows are to live on a GPU.
        optimizer: Their fused optimizer, if they have one.
        what: Name for the message.

    Raises:
        UnsupportedOptimizerError: With what to change.
    """
    if placement.kind == "device":
        return
    if optimizer is None:
        raise UnsupportedOptimizerError(
            f"placement={placement.kind!r} needs a fused optimizer, but {what} is trained by an optimizer of"
            " configure_optimizers, whose gradients and state are as large as the table and on the device. Use"
            " apply_optimizer_in_backward or placement='device', or leave the table out of the callback"
        )
    if placement.kind == "managed_caching" and optimizer.kind not in CACHED_KINDS:
        raise UnsupportedOptimizerError(
            f"{what} has fused {optimizer.kind}, but rows with placement='managed_caching' are trained by"
            f" FBGEMM, whose cache is tested with {' and '.join(CACHED_KINDS)} only. Use one of these, or"
            " placement='managed'"
        )

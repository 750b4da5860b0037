"""Rows in unified memory behind a cache of FBGEMM's in device memory."""

from __future__ import annotations

from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import CacheAlgorithm
from torch import Tensor

from lightning_embcomp.engine.optimizer import FusedOptimizerSpec
from lightning_embcomp.engine.placement import RowPlacement
from lightning_embcomp.engine.row_class import FusedRows, Storage
from lightning_embcomp.kernels.update import UpdateRule

_ALGORITHMS = {"lru": CacheAlgorithm.LRU, "lfu": CacheAlgorithm.LFU}


class StaleCacheError(RuntimeError):
    """The cache has changed between a lookup and its backward pass."""


class CachedRows(FusedRows):
    """Rows that FBGEMM's table looks up and updates through its cache; on the CPU there is none.

    Rows in the cache are newer than those in storage. :meth:`storages` writes them back and empties the cache, so that
    whoever reads, moves, saves or sets rows sees and leaves one version of them. The cache takes device memory of its
    own, ``load_factor`` of the rows, which the accounts of tables leave out.

    FBGEMM remembers where in the cache a batch found its rows. Its update would hit others if the cache changed before,
    so a backward pass after another lookup of the same class is refused.

    Args:
        width: Columns of the class.
        optimizer: The fused optimizer, one that FBGEMM has for cached rows.
        dtype: Weight dtype, float32 or float16.
        device: Device of the table.
        placement: Placement of the kind ``managed_caching``.
    """

    def __init__(
        self,
        width: int,
        optimizer: FusedOptimizerSpec,
        dtype: torch.dtype,
        device: torch.device,
        placement: RowPlacement,
    ) -> None:
        self._version = 0
        self._filled = False
        super().__init__(width, optimizer, dtype, device, placement)

    def __getstate__(self) -> dict[str, Any]:
        self.flush()  # copies have no cache
        return super().__getstate__()

    def direct_rule(self) -> UpdateRule | None:
        """None on a GPU: our own kernels know of no cache."""
        return super().direct_rule() if self.device.type == "cpu" else None

    def storages(self) -> dict[str, Storage]:
        """Weights and optimizer state, up to date."""
        self.flush()
        return super().storages()

    def flush(self) -> None:
        """Write the rows of the cache back and forget them."""
        if not self._filled or self._table is None:
            return
        self._table.flush()
        self._table.reset_cache_states()  # what is written to storage next must not be hidden by old copies
        self._filled = False
        self._version += 1

    def lookup(self, slots: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:
        """Pooled lookup through the cache.

        Raises:
            StaleCacheError: In the backward pass, if the class was looked up again or flushed in between.
        """
        pooled = super().lookup(slots, offsets, weights)
        if self.device.type == "cpu":
            return pooled
        self._filled = True
        self._version += 1
        if pooled.requires_grad:
            version = self._version

            def check(grad: Tensor) -> None:
                if version != self._version:
                    raise StaleCacheError(
                        "rows with placement='managed_caching' were looked up again, read or set between a lookup and"
                        " its backward pass: run backward first, or use placement='managed'"
                    )

            pooled.register_hook(check)
        return pooled

    def _table_options(self) -> dict[str, Any]:
        options = super()._table_options()
        if self.device.type != "cpu":
            cache = self.placement.cache
            options |= {"cache_load_factor": cache.load_factor, "cache_algorithm": _ALGORITHMS[cache.algorithm]}
        return options


def fused_rows(
    width: int,
    optimizer: FusedOptimizerSpec,
    dtype: torch.dtype,
    device: torch.device,
    placement: RowPlacement,
) -> FusedRows:
    """Rows of a fused table, of the class that their placement needs; arguments as those of :class:`FusedRows`."""
    kind = CachedRows if placement.kind == "managed_caching" else FusedRows
    return kind(width, optimizer, dtype, device, placement)

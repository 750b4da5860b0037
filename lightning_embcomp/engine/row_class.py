"""Storage and lookup of one row class: laid out as an FBGEMM table, or a parameter that the user's optimizer drives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own habit
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    BoundsCheckMode,
    ComputeDevice,
    PoolingMode,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor, nn

from lightning_embcomp.compat import table_over
from lightning_embcomp.engine.optimizer import FusedOptimizerSpec
from lightning_embcomp.engine.placement import RowPlacement
from lightning_embcomp.kernels.update import UpdateRule

WEIGHT = "weight"
FBGEMM_EPS = 1e-8  # FBGEMM's default
_COUNTER_STATE = ("prev_iter", "row_counter")  # state that FBGEMM takes no preallocated buffers for


@dataclass(frozen=True)
class Storage:
    """One tensor of a row class.

    Args:
        tensor: ``(rows, width)``, or ``(rows,)`` if ``rowwise``.
        rowwise: Whether it holds one number per row.
    """

    tensor: Tensor
    rowwise: bool


class RowClass(Protocol):
    """What the engine needs from a row class."""

    @property
    def width(self) -> int:
        """Stored columns."""

    @property
    def rows(self) -> int:
        """Rows of the class."""

    def storages(self) -> dict[str, Storage]:
        """Tensors of the class, weights first; all of them follow a row when it moves."""

    def allocate(self, rows: int, device: torch.device) -> dict[str, Storage]:
        """Uninitialised tensors for another number of rows."""

    def adopt(self, rows: int, storages: Mapping[str, Storage]) -> None:
        """Take over tensors that :meth:`allocate` made, and let the old ones go."""

    def lookup(self, slots: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:
        """Sum the rows of each bag into float32 ``(bags, width)``."""

    def carry(self, device: torch.device) -> None:
        """Move what is not a parameter to another device."""


def carried(
    storages: Mapping[str, Storage], device: torch.device, placement: RowPlacement | None = None
) -> dict[str, Storage]:
    """The same tensors on another device, in its own memory unless a placement says otherwise."""
    to = (placement or RowPlacement()).carry
    return {name: Storage(to(storage.tensor, device), storage.rowwise) for name, storage in storages.items()}


class FusedRows:
    """Rows in the layout of an FBGEMM training table; the optimizer runs inside the backward pass.

    Where :meth:`direct_rule` names a rule, the engine looks rows up and updates them with its own kernels; elsewhere
    :meth:`lookup` builds FBGEMM's table over the same tensors.

    Args:
        width: Columns of the class.
        optimizer: The fused optimizer.
        dtype: Weight dtype, float32 or float16.
        device: Device of the table.
        placement: Where tensors live on a GPU; on the device by default.
    """

    def __init__(
        self,
        width: int,
        optimizer: FusedOptimizerSpec,
        dtype: torch.dtype,
        device: torch.device,
        placement: RowPlacement | None = None,
    ) -> None:
        self.width = width
        self.placement = placement or RowPlacement()
        self.rows = 0
        self.optimizer = optimizer
        self.dtype = dtype
        self.device = device
        self.learning_rate = float(optimizer.options.get("learning_rate", 0.01))
        self.rate_scale = 1.0
        self.step = 0
        self._table: SplitTableBatchedEmbeddingBagsCodegen | None = None
        self._storages = self.allocate(0, device)

    def __getstate__(self) -> dict[str, Any]:
        # FBGEMM's table cannot be pickled, and a copy of it would not look at the copied tensors.
        return {**self.__dict__, "_table": None}

    def storages(self) -> dict[str, Storage]:
        """Weights and optimizer state of the class."""
        return dict(self._storages)

    def allocate(self, rows: int, device: torch.device) -> dict[str, Storage]:
        """Uninitialised weights and optimizer state for ``rows`` rows."""
        weights = self.placement.empty((rows, self.width), self.dtype, device)
        storages = {WEIGHT: Storage(weights, rowwise=False)}
        for name, rowwise in self.optimizer.state.items():
            if rowwise:
                state = torch.empty(rows, device=device)
            else:
                state = self.placement.empty((rows, self.width), torch.float32, device)
            storages[name] = Storage(state, rowwise=rowwise)
        return storages

    def adopt(self, rows: int, storages: Mapping[str, Storage]) -> None:
        """Take over tensors; the FBGEMM table over them is built when it is first needed."""
        self._storages = dict(storages)
        self.rows = rows
        self._table = None

    def carry(self, device: torch.device) -> None:
        """Move weights and optimizer state."""
        storages = self.storages()
        self.device = device
        self.adopt(self.rows, carried(storages, device, self.placement))

    def direct_rule(self) -> UpdateRule | None:
        """The optimizer as our kernels know it; None where only FBGEMM can run it."""
        kind, options = self.optimizer.kind, self.optimizer.options
        if self.device.type not in ("cpu", "cuda") or set(options) - self.optimizer.direct_options:
            return None
        if kind == "counter_sgd":
            return None
        rate = self.learning_rate * self.rate_scale
        given = {name: value for name, value in options.items() if name != "learning_rate"}
        return UpdateRule(kind=kind, learning_rate=rate, **{"eps": FBGEMM_EPS, **given})

    def _build_table(self) -> SplitTableBatchedEmbeddingBagsCodegen:
        """Build the FBGEMM table over the tensors of the class."""
        on_cpu = self.device.type == "cpu"
        if on_cpu:
            self.optimizer.check_on_cpu()
        compute = ComputeDevice.CPU if on_cpu else ComputeDevice.CUDA
        table = table_over(
            SplitTableBatchedEmbeddingBagsCodegen,
            [(self.rows, self.width, self.placement.location(self.device), compute)],
            {
                ("weights" if name == WEIGHT else name): storage.tensor.view(-1)
                for name, storage in self._storages.items()
                if not on_cpu or name not in _COUNTER_STATE
            },
            optimizer=self.optimizer.fbgemm,
            pooling_mode=PoolingMode.SUM,
            weights_precision=SparseType.FP16 if self.dtype == torch.float16 else SparseType.FP32,
            device=self.device,
            bounds_check_mode=BoundsCheckMode.NONE,  # the router hands out valid slots only
            **self._table_options(),
        )
        for name in _COUNTER_STATE if on_cpu else ():
            if name in self._storages:
                getattr(table, f"{name}_host").data = self._storages[name].tensor
        self._table = table
        self._set_step(self.step)
        return table

    def _table_options(self) -> dict[str, Any]:
        """What FBGEMM is told beside shapes and tensors."""
        options = {**self.optimizer.options, "learning_rate": self.learning_rate * self.rate_scale}
        if self.device.type != "cpu":
            options.setdefault("stochastic_rounding", False)  # as in our own kernels; FBGEMM's default is on
        return options

    def lookup(self, slots: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:
        """Pooled lookup; FBGEMM counts forward passes, but only backward passes are steps."""
        table = self._table or self._build_table()
        if self.device.type != "cpu":
            slots, offsets = slots.long(), offsets.long()  # the integers that FBGEMM is used with on GPUs
        pooled = table(slots, offsets, per_sample_weights=weights)
        self._set_step(self.step)
        return pooled

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the rate of the next backward pass."""
        self.learning_rate = learning_rate
        if self._table is not None:
            self._table.set_learning_rate(learning_rate * self.rate_scale)

    def restore_step(self, step: int) -> None:
        """Continue counting optimizer steps from a saved number."""
        self.step = step
        self._set_step(step)

    def _set_step(self, step: int) -> None:
        table = self._table
        if table is None:
            return
        for name in ("iter", "iter_cpu"):
            counter = getattr(table, name, None)
            if counter is not None:
                counter.fill_(step)


class TrainedRows:
    """Rows in a parameter with ordinary gradients; an optimizer of ``configure_optimizers`` updates them.

    The parameter object stays the same when rows move, so the optimizer keeps its handle; its state moves along
    through ``companions``.

    Args:
        width: Columns of the class.
        sparse: Whether gradients are sparse, as in ``nn.EmbeddingBag(sparse=True)``.
        dtype: Weight dtype.
        device: Device of the parameter.
    """

    def __init__(self, width: int, *, sparse: bool, dtype: torch.dtype, device: torch.device) -> None:
        self.width = width
        self.sparse = sparse
        self.parameter = nn.Parameter(torch.empty(0, width, dtype=dtype, device=device))
        self.learning_rate: float | None = None  # of the optimizer that trains them, where a method needs to know
        self.companions: dict[str, Storage] = {}

    @property
    def rows(self) -> int:
        """Rows of the class."""
        return self.parameter.shape[0]

    def storages(self) -> dict[str, Storage]:
        """The parameter, and the optimizer state that is to move with it."""
        return {WEIGHT: Storage(self.parameter.data, rowwise=False), **self.companions}

    def allocate(self, rows: int, device: torch.device) -> dict[str, Storage]:
        """Uninitialised tensors for ``rows`` rows."""
        return {
            name: Storage(
                storage.tensor.new_empty(rows if storage.rowwise else (rows, self.width), device=device),
                rowwise=storage.rowwise,
            )
            for name, storage in self.storages().items()
        }

    def adopt(self, rows: int, storages: Mapping[str, Storage]) -> None:
        """Put the tensors behind the parameter; gradients of the old rows are dropped."""
        self.parameter.grad = None
        self.parameter.data = storages[WEIGHT].tensor
        self.companions = {name: storage for name, storage in storages.items() if name != WEIGHT}

    def carry(self, device: torch.device) -> None:
        """Move optimizer state that goes with the rows."""
        self.companions = carried(self.companions, device)

    def lookup(self, slots: Tensor, offsets: Tensor, weights: Tensor | None, parameter: Tensor | None = None) -> Tensor:
        """Pooled lookup with autograd; ``parameter`` is a view of the rows whose gradients pass through a method."""
        dtype = self.parameter.dtype
        return F.embedding_bag(
            slots,
            self.parameter if parameter is None else parameter,
            offsets,
            mode="sum",
            sparse=self.sparse,
            include_last_offset=True,
            per_sample_weights=None if weights is None else weights.to(dtype),
        ).float()

"""The routed embedding engine: logical tables in, ordinary FBGEMM tables behind, one padded pooled output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_embcomp.engine import state
from lightning_embcomp.engine.attached import RowValues, TableState
from lightning_embcomp.engine.bag_layout import FeatureShapes, pooled_layout
from lightning_embcomp.engine.bags import pool_rows
from lightning_embcomp.engine.cached_rows import CachedRows, fused_rows
from lightning_embcomp.engine.devices import carry, target_of
from lightning_embcomp.engine.extent import check_extent
from lightning_embcomp.engine.interrupts import interrupts_held
from lightning_embcomp.engine.layout import ClassMap, LogicalTable, row_numbers
from lightning_embcomp.engine.lookups import AssembleClasses, Call, DirectLookup, ScaleRowGradients
from lightning_embcomp.engine.optimizer import FusedOptimizerSpec, UnsupportedOptimizerError
from lightning_embcomp.engine.optimizer_state import UnmovableStateError
from lightning_embcomp.engine.placement import RowPlacement, check_placement
from lightning_embcomp.engine.plan import MoveSummary, RowPlan, WithoutZeroWidths
from lightning_embcomp.engine.precision import TablePrecision
from lightning_embcomp.engine.rates import RowCounting
from lightning_embcomp.engine.relocation import relocate
from lightning_embcomp.engine.router import Router
from lightning_embcomp.engine.row_access import RowAccess
from lightning_embcomp.engine.row_class import WEIGHT, FusedRows, RowClass, TrainedRows
from lightning_embcomp.engine.statistics import RowUtility
from lightning_embcomp.kernels.graphs import capturing
from lightning_embcomp.kernels.route import IdOutOfRangeError, route
from lightning_embcomp.kernels.route.watch import check
from lightning_embcomp.kernels.types import BagLayout, RoutedBatch
from lightning_embcomp.kernels.update import UpdateRule


@dataclass(frozen=True, kw_only=True)
class RoutedOptions:
    """How rows are stored and trained.

    Args:
        optimizer: Optimizer fused into the backward pass; None leaves the rows to the user's own optimizer.
        dtype: Weight dtype, float32 or float16.
        device: Device of the tables.
        sparse: Whether gradients for the user's own optimizer are sparse.
        placement: Where rows with a fused optimizer live on a GPU.
    """

    optimizer: FusedOptimizerSpec | None = None
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")
    sparse: bool = False
    placement: RowPlacement = field(default_factory=RowPlacement)

    def __post_init__(self) -> None:
        if self.dtype not in (torch.float32, torch.float16):
            raise ValueError(f"row classes hold float32 or float16 weights, not {self.dtype}")
        check_placement(self.placement, self.optimizer, "this engine")


class RoutedEmbeddings(RowAccess, nn.Module):
    """Several logical tables behind one lookup with the call signature of FBGEMM's training tables.

    ``forward(indices, offsets, per_sample_weights)`` takes the ids of all features, feature by feature, and returns
    ``(B, ΣD)`` as if every logical row were stored in full; columns that a row does not store read as zero, and their
    gradients are dropped. Tables start without storage: call :meth:`move` with a first plan.

    Args:
        tables: Logical tables.
        feature_tables: Table index of each feature, in the order of the output; each table once by default.
        mean: Whether each feature is pooled by MEAN instead of SUM.
        options: Storage and optimizer.

    Example:
        >>> from lightning_embcomp.engine.plan import FixedPlan
        >>> engine = RoutedEmbeddings([LogicalTable(name="t", rows=3, dim=8, chunks=2)])
        >>> _ = engine.move(FixedPlan([1]))
        >>> engine.load_rows(0, 0, torch.ones(3, 8))
        >>> engine(torch.tensor([0, 2]), torch.tensor([0, 1, 2])).detach()[0]
        tensor([1., 1., 1., 1., 0., 0., 0., 0.])
    """

    def __init__(
        self,
        tables: Sequence[LogicalTable],
        feature_tables: Sequence[int] | None = None,
        mean: Sequence[bool] | None = None,
        options: RoutedOptions | None = None,
    ) -> None:
        super().__init__()
        self.options = options or RoutedOptions()
        self.tables = tuple(tables)
        self.feature_tables = tuple(range(len(tables)) if feature_tables is None else feature_tables)
        self.mean = tuple(mean) if mean is not None else (False,) * len(self.feature_tables)
        if len(self.mean) != len(self.feature_tables):
            raise ValueError(f"{len(self.feature_tables)} features but {len(self.mean)} pooling modes")
        self.class_map = ClassMap.of(self.tables)
        self.router = Router(self.tables, self.class_map, self.options.device)
        self.columns = self.class_map.tensors(self.options.device)
        self.classes: list[RowClass] = [
            self._new_class(self.class_map.width(c)) for c in range(len(self.class_map.columns))
        ]
        for c, rows in enumerate(self.classes):
            if isinstance(rows, TrainedRows):
                self.register_parameter(f"class_{c}", rows.parameter)
        self.table_rows = torch.zeros(len(self.tables), len(self.classes), dtype=torch.int64)
        self.utility: RowUtility | None = None
        self.attached: dict[str, TableState] = {}
        self.values: RowValues | None = None
        self.counting = RowCounting(row_numbers(self.tables))
        self.whole_norms: Callable[[], Tensor | None] | None = None  # of gradients that it sees some columns of
        dims = tuple(self.tables[t].dim for t in self.feature_tables)
        self.features = FeatureShapes(self.feature_tables, dims, self.mean, self.options.device)
        self.loss_scaler: torch.amp.GradScaler | None = None  # of the trainer, while it multiplies the loss
        self.moves = 0
        self.damaged = False
        self.rate_power: float | None = None

    def _new_class(self, width: int) -> RowClass:
        options = self.options
        if options.optimizer is not None:
            return fused_rows(width, options.optimizer, options.dtype, options.device, options.placement)
        return TrainedRows(width, sparse=options.sparse, dtype=options.dtype, device=options.device)

    @property
    def output_dim(self) -> int:
        """Columns of the pooled output."""
        return sum(self.tables[t].dim for t in self.feature_tables)

    def forward(self, indices: Tensor, offsets: Tensor, per_sample_weights: Tensor | None = None) -> Tensor:
        """Pool the rows of every bag.

        Args:
            indices: Logical ids, int32 or int64 ``(N,)``, feature by feature.
            offsets: Bag boundaries, int32 or int64 ``(features · B + 1,)``.
            per_sample_weights: Float ``(N,)``, or None.

        Returns:
            float32 tensor of shape ``(B, ΣD)`` over the features.

        Raises:
            IndexError: If an id is outside its table.
            TypeError: If ids or offsets are not integers.
        """
        features = len(self.feature_tables)
        if (offsets.numel() - 1) % features:
            raise ValueError(f"{offsets.numel() - 1} bags cannot be split over {features} features")
        layout = pooled_layout(self.features, (offsets.numel() - 1) // features)
        if self.values is None:
            return self._lookup(indices, offsets, per_sample_weights, layout)
        offsets = check_extent(indices, offsets, per_sample_weights)
        single = self.features.single_rows(layout, offsets, indices.numel())
        rows = self._lookup_values(indices, single, bags=layout.shape[0])
        return pool_rows(rows, offsets, per_sample_weights, layout, self.features)

    def lookup_rows(self, indices: Tensor, ids_per_feature: Sequence[int]) -> Tensor:
        """Look single rows up, unpooled; all features must have the same dim.

        Args:
            indices: Logical ids ``(N,)``, feature by feature.
            ids_per_feature: How many of them belong to each feature.

        Returns:
            float32 tensor of shape ``(N, D)``.
        """
        dims = {self.tables[t].dim for t in self.feature_tables}
        if len(dims) != 1:
            raise ValueError(f"unpooled lookups need one dim for all tables, not {sorted(dims)}")
        return self._lookup_values(indices, self.features.sequence(ids_per_feature), bags=max(ids_per_feature))

    def _lookup_values(self, indices: Tensor, layout: BagLayout, bags: int) -> Tensor:
        """Single rows ``(N, largest D)`` as they are used: rounded, if rows are."""
        offsets = torch.arange(indices.numel() + 1, device=indices.device)
        rows = self._lookup(indices, offsets, None, layout)
        if self.values is None:
            return rows
        return self.values.apply(rows, indices, layout, bags=bags, training=self.training)

    def _lookup(self, indices: Tensor, offsets: Tensor, weights: Tensor | None, layout: BagLayout) -> Tensor:
        if torch.is_inference_mode_enabled():
            # FBGEMM registers its CPU training kernels for autograd only, which inference mode bypasses.
            with torch.inference_mode(False), torch.no_grad():
                return self._lookup(indices, offsets, weights, layout)
        if capturing(indices.device):
            raise RuntimeError(
                "tables that train cannot be part of a CUDA graph: rows move, and rates and steps change while it would"
                " repeat what was captured. Capture the layers around them, or an exported model"
            )
        for name, tensor in (("ids", indices), ("offsets", offsets)):
            if tensor.dtype not in (torch.int32, torch.int64):
                raise TypeError(f"{name} must be int32 or int64, not {tensor.dtype}")
        offsets = check_extent(indices, offsets, weights)
        self.check_intact()
        training = torch.is_grad_enabled()
        observer = self.utility if training and self.training else None
        call = Call(self, layout, indices, offsets, weights, observer, self.moves, self.training)
        # The anchor makes the backward pass run even where no id of the batch has storage: utilities need it.
        anchor = torch.zeros((), requires_grad=training)
        try:
            rules = self._direct_rules(weights)
            if rules is not None:
                found: Tensor = DirectLookup.apply(call, rules, anchor)
                return found
            if self.counting.rates and self.options.optimizer is not None and training:
                if self.options.placement.kind == "managed_caching":
                    raise UnsupportedOptimizerError(
                        "rows with step sizes of their own cannot be trained with placement='managed_caching', where"
                        " FBGEMM updates them: use placement='managed'"
                    )
                raise UnsupportedOptimizerError(
                    "rows with step sizes of their own cannot be looked up with per-sample weights that are trained:"
                    " detach the weights, or train the tables from configure_optimizers"
                )
            batch = route(indices, offsets, layout, self.router.tensors, len(self.classes))
        except IdOutOfRangeError as error:
            table = self.tables[self.feature_tables[error.feature]]
            raise IndexError(
                f"id {error.value} at position {error.position} of the batch is outside table {table.label!r} with"
                f" {table.rows} rows; map unknown values to an out-of-vocabulary id first"
            ) from error
        pooled = [self._class_lookup(c, batch, call) for c in range(len(self.classes))]
        out: Tensor = AssembleClasses.apply(call, batch, anchor, *[rows for rows in pooled if rows is not None])
        return out

    def _direct_rules(self, weights: Tensor | None) -> list[UpdateRule] | None:
        """Update rules if our own kernels can serve this lookup without FBGEMM, else None."""
        if weights is not None and weights.requires_grad:
            return None
        rules = [rows.direct_rule() for rows in self.classes if isinstance(rows, FusedRows)]
        found = [rule for rule in rules if rule is not None]
        return found if len(found) == len(self.classes) else None

    def count_step(self) -> None:
        """Count one backward pass of the fused optimizer."""
        for rows in self.classes:
            if isinstance(rows, FusedRows):
                rows.restore_step(rows.step + 1)

    def _class_lookup(self, c: int, batch: RoutedBatch, call: Call) -> Tensor | None:
        first, last = batch.id_start[c], batch.id_start[c + 1]
        if first == last:
            return None
        offsets = batch.offsets[batch.bag_start[c] + c : batch.bag_start[c + 1] + c + 1]
        chosen = None if call.weights is None else call.weights.float()[batch.positions[first:last].long()]
        rows = self.classes[c]
        if isinstance(rows, TrainedRows) and self.counting.rates:
            scaled = ScaleRowGradients.apply(rows.parameter, call, c)
            return rows.lookup(batch.slots[first:last], offsets, chosen, scaled)
        return rows.lookup(batch.slots[first:last], offsets, chosen)

    @torch.no_grad()
    def move(self, plan: RowPlan, optimizers: Sequence[torch.optim.Optimizer] = ()) -> MoveSummary:
        """Bring every row to the code that the plan gives it; columns new to a row start at zero.

        Rows that are rounded to 0 bits store nothing, whatever the plan says.

        Weights, fused optimizer state and the state of the user's optimizers follow their rows. Rows stream through in
        order: beside the old and the new live bytes, of which the dead part is released on the way, only slabs exist.

        Args:
            plan: New codes.
            optimizers: Optimizers whose state belongs to rows of this engine.

        Returns:
            How many rows changed.
        """
        self.check_intact()
        if self.values is not None:
            plan = WithoutZeroWidths(plan, [self.precision(t) for t in range(len(self.tables))])
        self.moves += 1
        with interrupts_held():
            try:
                return relocate(self, plan, optimizers)
            except (ValueError, UnmovableStateError):
                raise  # refused before the first row moved
            except BaseException:
                self.damaged = True
                raise

    def check_intact(self) -> None:
        """Raise if a move failed half-way.

        Raises:
            RuntimeError: If rows and router do not belong together any more.
        """
        if self.damaged:
            raise RuntimeError(
                "a move of rows failed half-way, so these tables are lost: build the module again and load the last"
                " checkpoint"
            )

    def track_utility(self, utility: RowUtility | None) -> None:
        """Let training steps move these utilities."""
        self.utility = utility

    def attach(self, name: str, table_state: TableState) -> None:
        """Save, restore and count a method's state with the tables.

        Args:
            name: Part of the keys in checkpoints; one state per name.
            table_state: The state.

        Raises:
            ValueError: If the name is taken.
        """
        if name in self.attached:
            raise ValueError(f"the engine holds a {name!r} already")
        self.attached[name] = table_state

    def round_values(self, values: RowValues) -> None:
        """Let lookups go through a rounding of the rows, which is saved with the tables."""
        self.attach("precision", values)
        self.values = values

    def precision(self, table: int) -> TablePrecision | None:
        """How the rows of a table are rounded; None if they are not."""
        return None if self.values is None else self.values.precision(table)

    # FBGEMM's own names, so that callers written for its training tables find what they expect.

    def split_embedding_weights(self) -> list[Tensor]:
        """Weights of the row classes, ``(rows, width)`` each."""
        return [rows.storages()[WEIGHT].tensor for rows in self.classes]

    def get_optimizer_state(self) -> list[dict[str, Tensor]]:
        """Fused optimizer state of the row classes."""
        return [
            {name: storage.tensor for name, storage in rows.storages().items() if name != WEIGHT}
            for rows in self.classes
        ]

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the rate of the fused optimizer.

        Raises:
            RuntimeError: If the rows are trained by the user's own optimizer.
        """
        for rows in self.classes:
            if not isinstance(rows, FusedRows):
                raise RuntimeError(
                    "these tables are trained by an optimizer of configure_optimizers: set the rate there"
                )
            rows.set_learning_rate(learning_rate)

    def scale_rates(self, power: float) -> None:
        r"""Let narrow rows learn faster: the fused rate of a class with w of D columns becomes :math:`\eta (D/w)^p`.

        One update with rate :math:`\eta` moves the model's output in proportion to the columns that a row stores, so a
        pruned row would learn more slowly than a full one; :math:`p = 1` evens that out. Rows that store every column
        keep their rate.

        Args:
            power: The exponent p; 0 keeps one rate for all.
        """
        self.rate_power = power
        for c, rows in enumerate(self.classes):
            if isinstance(rows, FusedRows):
                rows.rate_scale = self.class_map.share(c) ** -power
                rows.set_learning_rate(rows.learning_rate)

    def flush(self) -> None:
        """Write rows back that are cached on a device; elsewhere nothing is cached outside the tables."""
        for rows in self.classes:
            if isinstance(rows, CachedRows):
                rows.flush()

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:  # noqa: ANN401 - PyTorch's signature
        target = target_of(fn, self.options.device)
        if target != self.options.device:
            self.check_intact()
            carry(self, target)
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.check_intact()
        check(self.options.device, wait=True)
        state.save(self, destination, prefix)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        state.load(self, state_dict, prefix, missing_keys, unexpected_keys, error_msgs)

    def extra_repr(self) -> str:
        """Tables and optimizer."""
        optimizer = self.options.optimizer.kind if self.options.optimizer else "configure_optimizers"
        return ", ".join([*(f"{t.name}: {t.rows}×{t.dim}/{t.chunks}" for t in self.tables), f"optimizer={optimizer}"])

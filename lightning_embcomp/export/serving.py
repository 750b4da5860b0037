"""Served tables: an export expanded for lookups, without gradients."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lightning_embcomp.engine.bag_layout import FeatureShapes, pooled_layout
from lightning_embcomp.engine.extent import check_extent
from lightning_embcomp.engine.router import BLOCK, slabs, words_per_block
from lightning_embcomp.export.expansion import Expanded
from lightning_embcomp.export.operator import pool_served_op, tensors_of
from lightning_embcomp.kernels.dequantize import ServedClasses, ServedRouter, pool_served
from lightning_embcomp.kernels.relocate import pack
from lightning_embcomp.kernels.route import IdOutOfRangeError
from lightning_embcomp.kernels.types import NO_CLASS, BagLayout, ClassColumns, RouterTensors


class ServedTables(nn.Module):
    """Some tables of an export behind one lookup, with the call signature of FBGEMM's inference tables.

    ``forward(indices, offsets, per_sample_weights)`` takes the ids of all features, feature by feature, and returns
    ``(B, ΣD)``. There are no parameters, and nothing in ``state_dict``: an export is loaded from its folder.

    Args:
        expanded: The export; rows are shared with other modules of the same export.
        tables: Indices of the tables to serve.
        feature_tables: Position in ``tables`` of each feature, in the order of the output; each once by default.
        device: Where lookups run; there are kernels for CPUs and CUDA.
    """

    def __init__(
        self,
        expanded: Expanded,
        tables: Sequence[int],
        feature_tables: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.tables = tuple(expanded.manifest.tables[t] for t in tables)
        self.feature_tables = tuple(range(len(tables)) if feature_tables is None else feature_tables)
        self.device = torch.device(device)
        needed = sorted({c for table in self.tables for c in table.classes})
        local = {c: i for i, c in enumerate(needed)}
        self.class_of_code = [(-1, *(local[c] for c in table.classes)) for table in self.tables]
        self.router = self._router(expanded, tables)
        self.classes = self._classes(expanded, tables, needed)
        self._move(self.device)

    @property
    def output_dim(self) -> int:
        """Columns of the pooled output."""
        return sum(self.tables[t].dim for t in self.feature_tables)

    def _router(self, expanded: Expanded, tables: Sequence[int]) -> ServedRouter:
        """Number the slots, table by table, in the order in which the export stores rows."""
        ends, classes, bases, first_run = [], [], [], [0]
        blocks = [-(-table.rows // BLOCK) if table.planes else 0 for table in self.tables]
        strides = [words_per_block(len(table.classes) + 1) if table.planes else 0 for table in self.tables]
        sizes = [count * stride for count, stride in zip(blocks, strides, strict=True)]
        most = max((len(codes) for codes in self.class_of_code), default=1)
        packed = RouterTensors(
            words=torch.zeros(sum(sizes), dtype=torch.int64),
            start=torch.tensor([sum(sizes[:t]) for t in range(len(sizes))]),
            stride=torch.tensor(strides),
            planes=torch.tensor([table.planes for table in self.tables]),
            rows=torch.tensor([table.rows for table in self.tables]),
            class_of_code=torch.tensor(
                [[*codes, *[-1] * (most - len(codes))] for codes in self.class_of_code], dtype=torch.int32
            ),
        )
        for local, t in enumerate(tables):
            table, codes = self.tables[local], self.class_of_code[local]
            # Slots follow the tables of the whole export, whichever of them are served here.
            slots = torch.zeros(max(codes) + 1 if len(codes) > 1 else 1, dtype=torch.int64)
            for code, c in enumerate(table.classes, start=1):
                slots[codes[code]] = expanded.first_slot(t, c)
            if table.planes:
                for start, stop in slabs(table.rows):
                    pack(packed, local, start, expanded.codes(t, start, stop), slots)
            else:
                run_end, run_code = expanded.runs(t)
                start = 0
                for end, code in zip(run_end.tolist(), run_code.tolist(), strict=True):
                    c = codes[code]
                    ends.append(end)
                    classes.append(c if c >= 0 else NO_CLASS)
                    bases.append(int(slots[c]) - start if c >= 0 else 0)
                    if c >= 0:
                        slots[c] += end - start
                    start = end
            first_run.append(len(ends))
        hints = [_hints(ends[first:last]) for first, last in pairwise(first_run)]
        # 32 bits do unless a table or a class is huge: bases reach from minus the rows to the slots.
        huge = max([*(table.rows for table in self.tables), *(rows.shape[0] for rows in expanded.rows), 0]) >= 2**31
        rows_dtype = torch.int64 if huge else torch.int32
        return ServedRouter(
            first_run=torch.tensor(first_run),
            run_end=torch.tensor(ends, dtype=rows_dtype),
            run_class=torch.tensor(classes, dtype=torch.uint8),
            run_base=torch.tensor(bases, dtype=rows_dtype),
            hint=torch.tensor([run for found, _ in hints for run in found], dtype=torch.int16),
            first_hint=torch.tensor([sum(len(found) for found, _ in hints[:t]) for t in range(len(hints))]),
            hint_shift=torch.tensor([shift for _, shift in hints]),
            class_of_code=torch.where(packed.class_of_code < 0, NO_CLASS, packed.class_of_code).to(torch.uint8),
            packed=packed,
        )

    def _classes(self, expanded: Expanded, tables: Sequence[int], needed: Sequence[int]) -> ServedClasses:
        formats = [expanded.manifest.classes[c].format for c in needed]
        rows = tuple(expanded.rows[c] for c in needed)
        runs = [run for row_format in formats for run in row_format.columns]
        first = [0]
        for row_format in formats:
            first.append(first[-1] + len(row_format.columns))
        offsets = [expanded.offset(t) for t in tables]
        starts, size = [], 0
        for offset in offsets:
            starts.append(-1 if offset is None else size)
            size += 0 if offset is None else offset.numel()
        present = [offset for offset in offsets if offset is not None]

        def as_tensor(values: Sequence[int]) -> Tensor:
            return torch.tensor(list(values), dtype=torch.int64)

        return ServedClasses(
            rows=rows,
            address=as_tensor([r.data_ptr() for r in rows]),
            bits=as_tensor([row_format.container for row_format in formats]),
            stride=as_tensor([r.shape[1] for r in rows]),
            shifted=as_tensor([int(row_format.shared) for row_format in formats]),
            whole=as_tensor([int(row_format.columns == ((0, row_format.dim),)) for row_format in formats]),
            columns=ClassColumns(
                width=as_tensor([row_format.width for row_format in formats]),
                first_run=as_tensor(first),
                column=as_tensor([column for column, _ in runs]),
                length=as_tensor([length for _, length in runs]),
            ),
            first_offset=as_tensor(starts),
            offsets=torch.cat(present) if present else torch.empty(0),
        )

    def _move(self, device: torch.device) -> None:
        if device.type == "cpu":
            return
        self.router, self.classes = _moved(self.router, device), _moved(self.classes, device)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:  # noqa: ANN401 - PyTorch's signature
        # Only a change of device concerns these tensors: `half()` must not reach into rows of bytes.
        device = fn(torch.empty(0)).device
        if device != self.device:
            self.device = device
            self.router, self.classes = _moved(self.router, device), _moved(self.classes, device)
        return super()._apply(fn, recurse)

    def __deepcopy__(self, memo: dict[int, Any]) -> ServedTables:
        # Rows are never written: a copy may share them.
        copy = self.__class__.__new__(self.__class__)
        nn.Module.__init__(copy)
        copy.__dict__.update(self.__dict__)
        memo[id(self)] = copy
        return copy

    def __getstate__(self) -> dict[str, Any]:
        # What the kernel has prepared for this process is of no use in another.
        return {**self.__dict__, "router": replace(self.router)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        addresses = torch.tensor([rows.data_ptr() for rows in self.classes.rows], dtype=torch.int64)
        self.classes = replace(self.classes, address=addresses.to(self.device))

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
            ValueError: If offsets fall or do not go from 0 to N, or weights are not as many as ids.
        """
        features = len(self.feature_tables)
        if (offsets.numel() - 1) % features:
            raise ValueError(f"{offsets.numel() - 1} bags cannot be split over {features} features")
        dims = [self.tables[t].dim for t in self.feature_tables]
        mean = [int(self.tables[t].mean) for t in self.feature_tables]
        if torch.compiler.is_compiling():
            weights = None if per_sample_weights is None else per_sample_weights.float()
            router, classes = tensors_of(self.router), tensors_of(self.classes)
            tables = list(self.feature_tables)
            rows = list(self.classes.rows)
            found: Tensor = pool_served_op(indices, offsets, weights, rows, router, classes, tables, dims, mean)
            return found
        batch_size = (offsets.numel() - 1) // features
        shapes = FeatureShapes(self.feature_tables, tuple(dims), tuple(map(bool, mean)), self.device)
        layout = pooled_layout(shapes, batch_size)
        return self._lookup(indices, offsets, per_sample_weights, layout)

    def lookup_rows(self, indices: Tensor, ids_per_feature: Sequence[int]) -> Tensor:
        """Look single rows up, unpooled; all features must have the same dim.

        Args:
            indices: Logical ids ``(N,)``, feature by feature.
            ids_per_feature: How many of them belong to each feature.

        Returns:
            float32 tensor of shape ``(N, D)``.
        """
        offsets = torch.arange(indices.numel() + 1, device=indices.device)
        starts = [sum(ids_per_feature[:f]) for f in range(len(ids_per_feature) + 1)]
        dims = {self.tables[t].dim for t in self.feature_tables}
        if len(dims) != 1:
            raise ValueError(f"unpooled lookups need one dim for all tables, not {sorted(dims)}")
        layout = self._layout(starts, starts[:-1], [0] * len(ids_per_feature), (starts[-1], dims.pop()))
        return self._lookup(indices, offsets, None, layout)

    def _lookup(self, indices: Tensor, offsets: Tensor, weights: Tensor | None, layout: BagLayout) -> Tensor:
        for name, tensor in (("ids", indices), ("offsets", offsets)):
            if tensor.dtype not in (torch.int32, torch.int64):
                raise TypeError(f"{name} must be int32 or int64, not {tensor.dtype}")
        offsets = check_extent(indices, offsets, weights)
        try:
            floats = None if weights is None else weights.float()
            return pool_served(indices, offsets, floats, layout, self.router, self.classes)
        except IdOutOfRangeError as error:
            table = self.tables[self.feature_tables[error.feature]]
            raise IndexError(
                f"id {error.value} at position {error.position} of the batch is outside table {table.name!r} with"
                f" {table.rows} rows; map unknown values to an out-of-vocabulary id first"
            ) from error

    def _layout(
        self, bag_start: list[int], row_start: list[int], column: list[int], shape: tuple[int, int]
    ) -> BagLayout:
        def as_tensor(values: Sequence[int]) -> Tensor:
            return torch.tensor(list(values), dtype=torch.int64, device=self.device)

        return BagLayout(
            table=as_tensor(self.feature_tables),
            bag_start=as_tensor(bag_start),
            row_start=as_tensor(row_start),
            column=as_tensor(column),
            width=as_tensor([self.tables[t].dim for t in self.feature_tables]),
            mean=as_tensor([int(self.tables[t].mean) for t in self.feature_tables]),
            shape=shape,
        )

    def read_rows(self, table: int, start: int, stop: int) -> Tensor:
        """Values of consecutive logical rows, zero where nothing is stored.

        Args:
            table: Position of the table.
            start: First row.
            stop: Row after the last.

        Returns:
            float32 ``(stop - start, D)``.
        """
        spec = self.tables[table]
        ids = torch.arange(start, stop, device=self.device)
        offsets = torch.arange(stop - start + 1, device=self.device)
        layout = BagLayout(
            table=torch.tensor([table], device=self.device),
            bag_start=torch.tensor([0, stop - start], device=self.device),
            row_start=torch.zeros(1, dtype=torch.int64, device=self.device),
            column=torch.zeros(1, dtype=torch.int64, device=self.device),
            width=torch.tensor([spec.dim], device=self.device),
            mean=torch.zeros(1, dtype=torch.int64, device=self.device),
            shape=(stop - start, spec.dim),
        )
        return pool_served(ids, offsets, None, layout, self.router, self.classes)

    def extra_repr(self) -> str:
        """Tables and widths."""
        return ", ".join(f"{t.name}: {t.rows}×{t.dim}" for t in self.tables)


def _hints(ends: Sequence[int]) -> tuple[list[int], int]:
    """For every :math:`2^k` rows of a table the run of the first one, and k: about four hints per run.

    Example:
        >>> _hints([4, 10]), _hints([9])
        (([0, 0, 1, 1, 1], 1), ([0], 62))
    """
    if len(ends) < 2:
        return [0], 62
    shift = max(0, (ends[-1] // (4 * len(ends))).bit_length())
    return [bisect_right(ends, first) for first in range(0, ends[-1], 1 << shift)], shift


def _moved(record: Any, device: torch.device) -> Any:  # noqa: ANN401 - one of the kernels' records
    """Copy of a record of tensors on another device."""
    changes: dict[str, Any] = {}
    for item in fields(record):
        value = getattr(record, item.name)
        if isinstance(value, Tensor):
            changes[item.name] = value.to(device)
        elif isinstance(value, tuple):
            changes[item.name] = tuple(entry.to(device) for entry in value)
        else:
            changes[item.name] = _moved(value, device)
    if "address" in changes:
        changes["address"] = torch.tensor(
            [rows.data_ptr() for rows in changes["rows"]], dtype=torch.int64, device=device
        )
    return replace(record, **changes)

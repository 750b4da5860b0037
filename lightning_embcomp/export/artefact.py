"""From tables to the tensors of an export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from lightning_embcomp.engine.planes import encode
from lightning_embcomp.engine.precision import MAX_WIDTH, TablePrecision
from lightning_embcomp.engine.router import slabs
from lightning_embcomp.export.bits import pack_bits
from lightning_embcomp.export.errors import ExportError
from lightning_embcomp.export.manifest import ClassSpec, FileFormat, HostSpec, Manifest, TableSpec
from lightning_embcomp.export.plan import TablePlan, classes_of, plan_table
from lightning_embcomp.export.rows import PRECISIONS, quantize_rows, shared_rows
from lightning_embcomp.export.tables import ExportHost, ExportTable

RUN_END, RUN_CODE, PLANES, STEPS, OFFSETS = "run_end", "run_code", "planes", "steps", "offsets"
"""Tensors that all tables share, one after the other."""
_LIBRARIES = ("lightning-embcomp", "torch", "torchrec", "fbgemm-gpu-cpu", "fbgemm-gpu", "safetensors")


@dataclass(frozen=True, kw_only=True)
class Artefact:
    """An export in memory.

    Args:
        manifest: What the tensors mean.
        tensors: Tensors of the tables.
        dense: State dict of the rest of the model; empty if it was not exported.
    """

    manifest: Manifest
    tensors: Mapping[str, Tensor]
    dense: Mapping[str, Tensor] = field(default_factory=dict)


def class_key(c: int, packed: bool) -> str:
    """Name of the tensor that holds a served table.

    Example:
        >>> class_key(0, packed=False), class_key(1, packed=True)
        ('class.0.rows', 'class.1.values')
    """
    return f"class.{c}.{'values' if packed else 'rows'}"


def build(
    hosts: Sequence[ExportHost],
    bits: Mapping[str, int] | int = 8,
    *,
    format: FileFormat = "fbgemm",
    row_alignment: int = 1,
    dense: Mapping[str, Tensor] | None = None,
    source: Mapping[str, Any] | None = None,
) -> Artefact:
    """Round and lay out tables.

    Tables that were rounded in training keep their widths; everything else is rounded row by row to ``bits``.

    Args:
        hosts: Modules with their tables, from :mod:`~lightning_embcomp.export.sources` or
            :mod:`~lightning_embcomp.export.checkpoint`.
        bits: Bits of rows that were not rounded in training: 2, 4, 8, 16 or 32; for all tables, or by unique name.
        format: ``fbgemm`` stores rows as they are served, ``packed`` as few bits as there are.
        row_alignment: Bytes that a served row is filled up to a multiple of.
        dense: State dict of the rest of the model.
        source: Where the weights came from, for the manifest.

    Returns:
        The export; nothing is written yet.

    Raises:
        ExportError: If a table holds what cannot be stored, or a setting is none.
    """
    if row_alignment < 1:
        raise ExportError(f"row_alignment must be at least 1 byte, not {row_alignment}")
    if format not in ("fbgemm", "packed"):
        raise ExportError(f"format must be 'fbgemm' or 'packed', not {format!r}")
    tables = [(host.full_name(table), table) for host in hosts for table in host.tables]
    wanted = {name: bits if isinstance(bits, int) else bits[name] for name, _ in tables}
    for name, width in wanted.items():
        if width not in PRECISIONS:
            raise ExportError(f"table {name!r} cannot have {width} bits; choose one of {PRECISIONS}")
    plans = [plan_table(table, wanted[name]) for name, table in tables]
    classes = classes_of(plans)
    index = {row_format: c for c, row_format in enumerate(classes)}
    counts = [0] * len(classes)
    for plan in plans:
        per_code = torch.bincount(plan.codes, minlength=len(plan.formats) + 1).tolist()
        for code, row_format in enumerate(plan.formats, start=1):
            counts[index[row_format]] += per_code[code]

    as_codes = [format == "packed" and row_format.shared for row_format in classes]
    stored = [
        torch.zeros(
            rows,
            row_format.width if coded else row_format.row_bytes(row_alignment if format == "fbgemm" else 1),
            dtype=torch.uint8,
        )
        for row_format, rows, coded in zip(classes, counts, as_codes, strict=True)
    ]
    next_slot = [0] * len(classes)
    for (name, table), plan in zip(tables, plans, strict=True):
        try:
            _fill(table, plan, [index[row_format] for row_format in plan.formats], stored, as_codes, next_slot)
        except ExportError as error:
            raise ExportError(f"table {name!r} {error}") from error

    tensors = {
        class_key(c, packed): pack_bits(stored[c], row_format.bits) if packed else stored[c]
        for c, (row_format, packed) in enumerate(zip(classes, as_codes, strict=True))
    }
    tensors |= _router_tensors(plans) | _rounding_tensors([table for _, table in tables])
    specs = iter([_table_spec(table, plan, index) for (_, table), plan in zip(tables, plans, strict=True)])
    manifest = Manifest(
        format=format,
        row_alignment=row_alignment,
        hosts=tuple(_host_spec(host, tuple(next(specs) for _ in host.tables)) for host in hosts),
        classes=tuple(ClassSpec(format=f, rows=n) for f, n in zip(classes, counts, strict=True)),
        libraries=_versions(),
        source=dict(source or {}),
    )
    return Artefact(manifest=manifest, tensors=tensors, dense=dict(dense or {}))


def _fill(
    table: ExportTable,
    plan: TablePlan,
    classes: Sequence[int],
    stored: Sequence[Tensor],
    as_codes: Sequence[bool],
    next_slot: list[int],
) -> None:
    """Write the rows of a table behind those that its classes hold already."""
    for start, stop in slabs(table.rows):
        codes = plan.codes[start:stop]
        if not bool(codes.any()):
            continue
        values = table.read_rows(start, stop)
        for code, (c, row_format) in enumerate(zip(classes, plan.formats, strict=True), start=1):
            mine = (codes == code).nonzero().flatten()
            if mine.numel() == 0:
                continue
            rows = values[mine]
            kept = torch.cat([torch.arange(first, first + n) for first, n in row_format.columns])
            if row_format.shared:
                found = _shared_codes(table, rows, row_format.bits)[:, kept]
                if not as_codes[c]:
                    assert table.precision is not None
                    found = shared_rows(found, row_format.bits, table.precision.steps[row_format.bits])
            else:
                found = quantize_rows(rows[:, kept].contiguous(), row_format.bits)
            stored[c][next_slot[c] : next_slot[c] + mine.numel(), : found.shape[1]] = found
            next_slot[c] += mine.numel()


def _shared_codes(table: ExportTable, rows: Tensor, bits: int) -> Tensor:
    if not bool(torch.isfinite(rows).all()):
        raise ExportError("holds NaN or infinite weights: export an earlier checkpoint, from before the run diverged")
    assert table.precision is not None
    return table.precision.codes(rows, bits)


def _router_tensors(plans: Sequence[TablePlan]) -> dict[str, Tensor]:
    ends = torch.cat([plan.run_end for plan in plans])
    tensors = {}
    if ends.numel():
        wide = int(ends.max()) >= 2**31
        tensors[RUN_END] = ends if wide else ends.int()
        tensors[RUN_CODE] = torch.cat([plan.run_code for plan in plans])
    planes = [encode(plan.codes, plan.planes).flatten() for plan in plans if plan.planes]
    if planes:
        tensors[PLANES] = torch.cat(planes)
    return tensors


def _rounding_tensors(tables: Sequence[ExportTable]) -> dict[str, Tensor]:
    tensors = {}
    rounded = [table.precision for table in tables if table.precision is not None]
    if rounded:
        steps = torch.tensor([[p.steps.get(b, 0.0) for b in range(MAX_WIDTH + 1)] for p in rounded])
        tensors[STEPS] = steps.half()
    offsets = [precision.offset.float() for precision in rounded if _shifted(precision)]
    if offsets:
        tensors[OFFSETS] = torch.cat(offsets)
    return tensors


def _shifted(precision: TablePrecision | None) -> bool:
    return precision is not None and bool((precision.offset != 0).any())


def _table_spec(table: ExportTable, plan: TablePlan, index: Mapping[Any, int]) -> TableSpec:
    return TableSpec(
        name=table.name,
        rows=table.rows,
        dim=table.dim,
        classes=tuple(index[row_format] for row_format in plan.formats),
        runs=plan.run_end.numel(),
        mean=table.mean,
        features=table.features,
        stepped=table.precision is not None,
        shifted=_shifted(table.precision),
        dtype=str(table.dtype).removeprefix("torch."),
    )


def _host_spec(host: ExportHost, tables: tuple[TableSpec, ...]) -> HostSpec:
    return HostSpec(
        path=host.path,
        kind=host.kind,
        tables=tables,
        is_weighted=host.is_weighted,
        need_indices=host.need_indices,
        include_last_offset=host.include_last_offset,
        padding_idx=host.padding_idx,
    )


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found

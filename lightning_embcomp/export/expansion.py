"""Bring an export into the form that lookups use, whatever format its files have."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_embcomp.engine.planes import decode
from lightning_embcomp.engine.router import BLOCK, slabs
from lightning_embcomp.export.artefact import (
    OFFSETS,
    PLANES,
    RUN_CODE,
    RUN_END,
    STEPS,
    Artefact,
    class_key,
)
from lightning_embcomp.export.bits import unpack_bits
from lightning_embcomp.export.errors import ExportError
from lightning_embcomp.export.manifest import Manifest
from lightning_embcomp.export.rows import shared_rows


@dataclass(frozen=True, kw_only=True)
class Expanded:
    """An export as it is served.

    Args:
        manifest: What was exported.
        rows: Rows of each class in FBGEMM's layout, aligned, uint8 ``(n, bytes)``.
        tensors: The other tensors of the export: routers, steps, offsets.
        counts: Rows of each table in each class, int64 ``(T, C)``.
    """

    manifest: Manifest
    rows: tuple[Tensor, ...]
    tensors: dict[str, Tensor]
    counts: Tensor

    def first_slot(self, table: int, row_class: int) -> int:
        """Slot of the first row of a table in a class."""
        return int(self.counts[:table, row_class].sum())

    def runs(self, table: int) -> tuple[Tensor, Tensor]:
        """Ends and codes of the runs of a table."""
        return _runs(self.manifest, self.tensors, table)

    def codes(self, table: int, start: int, stop: int) -> Tensor:
        """Codes of rows ``start`` (a multiple of 64) to ``stop``, uint8."""
        return _codes(self.manifest, self.tensors, table, start, stop)

    def offset(self, table: int) -> Tensor | None:
        """Offset of a table, float32 ``(D,)``, or None."""
        tables = self.manifest.tables
        if not tables[table].shifted:
            return None
        first = sum(spec.dim for spec in tables[:table] if spec.shifted)
        return self.tensors[OFFSETS][first : first + tables[table].dim]


def expand(artefact: Artefact) -> Expanded:
    """Check that an export fits together, and bring its rows into the layout that is served.

    Args:
        artefact: The export; tensors of the ``fbgemm`` format are used as they are.

    Returns:
        The same, ready for lookups.

    Raises:
        ExportError: If a tensor is missing or has another size than the manifest says.
    """
    manifest, tensors = artefact.manifest, dict(artefact.tensors)
    _check(manifest, tensors)
    counts = _counts(manifest, tensors)
    for c, spec in enumerate(manifest.classes):
        if int(counts[:, c].sum()) != spec.rows:
            raise ExportError(f"class {c} holds {spec.rows} rows, but the routers name {int(counts[:, c].sum())}")
    rows = tuple(_class_rows(manifest, tensors, counts, c) for c in range(len(manifest.classes)))
    kept = {name: tensor for name, tensor in tensors.items() if name in (RUN_END, RUN_CODE, PLANES, STEPS, OFFSETS)}
    return Expanded(manifest=manifest, rows=rows, tensors=kept, counts=counts)


def _class_rows(manifest: Manifest, tensors: dict[str, Tensor], counts: Tensor, c: int) -> Tensor:
    spec = manifest.classes[c]
    row_format, size = spec.format, spec.format.row_bytes(manifest.row_alignment)
    if manifest.format == "fbgemm":
        return tensors[class_key(c, packed=False)]
    if not row_format.shared:
        tight = tensors[class_key(c, packed=False)]
        if tight.shape[1] == size:
            return tight
        rows = torch.zeros(spec.rows, size, dtype=torch.uint8)
        rows[:, : tight.shape[1]] = tight
        return rows
    codes = unpack_bits(tensors[class_key(c, packed=True)], spec.rows * row_format.width, row_format.bits)
    codes = codes.view(spec.rows, row_format.width)
    rows = torch.zeros(spec.rows, size, dtype=torch.uint8)
    slot = 0
    stepped = [table.stepped for table in manifest.tables]
    for t, count in enumerate(counts[:, c].tolist()):
        if count:
            step = float(tensors[STEPS][sum(stepped[:t]), row_format.bits])
            for start, stop in slabs(count):
                part = shared_rows(codes[slot + start : slot + stop], row_format.bits, step)
                rows[slot + start : slot + stop, : part.shape[1]] = part
            slot += count
    return rows


def _counts(manifest: Manifest, tensors: dict[str, Tensor]) -> Tensor:
    counts = torch.zeros(len(manifest.tables), len(manifest.classes), dtype=torch.int64)
    for t, table in enumerate(manifest.tables):
        per_code = torch.zeros(256, dtype=torch.int64)
        if table.runs:
            run_end, run_code = _runs(manifest, tensors, t)
            lengths = run_end.diff(prepend=run_end.new_zeros(1))
            if int(run_end[-1]) != table.rows or bool((lengths <= 0).any()):
                raise ExportError(f"the runs of table {table.name!r} do not cover its {table.rows} rows")
            per_code.index_add_(0, run_code.long(), lengths)
        else:
            for start, stop in slabs(table.rows):
                per_code += torch.bincount(_codes(manifest, tensors, t, start, stop), minlength=256)
        if bool(per_code[len(table.classes) + 1 :].any()):
            raise ExportError(f"table {table.name!r} has rows of a class that it does not have")
        for code, c in enumerate(table.classes, start=1):
            counts[t, c] = per_code[code]
    return counts


def _runs(manifest: Manifest, tensors: dict[str, Tensor], table: int) -> tuple[Tensor, Tensor]:
    first = sum(spec.runs for spec in manifest.tables[:table])
    last = first + manifest.tables[table].runs
    return tensors[RUN_END][first:last].long(), tensors[RUN_CODE][first:last]


def _codes(manifest: Manifest, tensors: dict[str, Tensor], table: int, start: int, stop: int) -> Tensor:
    specs = manifest.tables
    first = sum(-(-spec.rows // BLOCK) * spec.planes for spec in specs[:table])
    planes = specs[table].planes
    words = tensors[PLANES][first + start // BLOCK * planes : first + -(-stop // BLOCK) * planes].view(-1, planes)
    return decode(words, stop - start)


def _check(manifest: Manifest, tensors: dict[str, Tensor]) -> None:
    """Every tensor is there and has the size that the manifest says."""
    tables = manifest.tables
    wanted: dict[str, tuple[int, ...]] = {}
    runs = sum(table.runs for table in tables)
    if runs:
        wanted |= {RUN_END: (runs,), RUN_CODE: (runs,)}
    planes = sum(-(-table.rows // BLOCK) * table.planes for table in tables)
    if planes:
        wanted[PLANES] = (planes,)
    stepped = sum(table.stepped for table in tables)
    if stepped:
        wanted[STEPS] = (stepped, 9)
    shifted = sum(table.dim for table in tables if table.shifted)
    if shifted:
        wanted[OFFSETS] = (shifted,)
    for c, spec in enumerate(manifest.classes):
        row_format = spec.format
        if manifest.format == "packed" and row_format.shared:
            wanted[class_key(c, packed=True)] = (-(-spec.rows * row_format.width * row_format.bits // 8),)
        else:
            alignment = manifest.row_alignment if manifest.format == "fbgemm" else 1
            wanted[class_key(c, packed=False)] = (spec.rows, row_format.row_bytes(alignment))
    for name, shape in wanted.items():
        if name not in tensors:
            raise ExportError(f"tensor {name!r} is missing from the export: export again")
        if tuple(tensors[name].shape) != shape:
            raise ExportError(
                f"tensor {name!r} has shape {tuple(tensors[name].shape)} instead of {shape}: export again"
            )

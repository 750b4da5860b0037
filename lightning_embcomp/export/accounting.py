"""Count the bytes of an export: on disk and held for serving, from files and storages themselves."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_embcomp.export.artefact import OFFSETS, PLANES, RUN_CODE, RUN_END, STEPS, Artefact
from lightning_embcomp.export.files import DENSE, folder_bytes
from lightning_embcomp.export.manifest import Manifest
from lightning_embcomp.export.rows import HEADER_BYTES
from lightning_embcomp.export.serving import ServedTables


@dataclass(frozen=True, kw_only=True)
class TableBytes:
    """Bytes of all tables of an export, by kind.

    Args:
        values: The values.
        row_parameters: Scale and bias of rows.
        padding: What rows are filled up with.
        shared_parameters: Steps and offsets of tables.
        router: Where rows are.
        description: Manifest and headers of files; nothing while serving.
    """

    values: int
    row_parameters: int
    padding: int
    shared_parameters: int
    router: int
    description: int = 0

    @property
    def total(self) -> int:
        """All bytes."""
        return sum(self.by_kind().values())

    def by_kind(self) -> dict[str, int]:
        """Bytes by name of the kind."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def plain_bytes(manifest: Manifest) -> int:
    """Bytes of all tables in full, each in the dtype that its weights had."""
    return sum(table.plain_bytes for table in manifest.tables)


def stored_bytes(artefact: Artefact) -> TableBytes:
    """Bytes of the tensors of an export as they are stored, without what describes them."""
    manifest, tensors = artefact.manifest, artefact.tensors
    values, headers, padding = _row_bytes(manifest, packed=manifest.format == "packed")
    return TableBytes(
        values=values,
        row_parameters=headers,
        padding=padding,
        shared_parameters=_size(tensors, STEPS, OFFSETS),
        router=_size(tensors, RUN_END, RUN_CODE, PLANES),
    )


def disk_bytes(artefact: Artefact, dirpath: str | os.PathLike[str]) -> tuple[TableBytes, int]:
    """Bytes of an export on disk.

    Args:
        artefact: The export.
        dirpath: Its folder.

    Returns:
        Bytes of the tables, manifest and file headers included, and bytes of the dense part.
    """
    files = folder_bytes(Path(dirpath))
    stored = stored_bytes(artefact)
    dense = files.get(DENSE, 0)
    rest = sum(files.values()) - dense - stored.total
    return TableBytes(**{**stored.by_kind(), "description": rest}), dense


def serving_bytes(module: nn.Module, manifest: Manifest) -> TableBytes:
    """Bytes that the served modules of an export hold.

    Args:
        module: What :func:`~lightning_embcomp.export.loading.load` returned, or a model with it inside.
        manifest: That of the export.
    """
    served = [part for part in module.modules() if isinstance(part, ServedTables)]
    values, headers, padding = _row_bytes(manifest, packed=False)
    rows = _storages(part.classes.rows for part in served)
    shared = _storages([part.classes.offsets] for part in served)
    router = sum(_record_bytes(part.router) for part in served)
    router += sum(_record_bytes(part.classes) for part in served) - _storages(
        [*part.classes.rows, part.classes.offsets] for part in served
    )
    return TableBytes(
        values=values,
        row_parameters=headers,
        padding=padding + rows - values - headers - padding,
        shared_parameters=shared,
        router=router,
    )


def _row_bytes(manifest: Manifest, *, packed: bool) -> tuple[int, int, int]:
    """Values, headers and padding of all classes."""
    values = headers = padding = 0
    for spec in manifest.classes:
        row_format = spec.format
        if packed and row_format.shared:
            values += -(-spec.rows * row_format.width * row_format.bits // 8)
            continue
        size = spec.rows * row_format.row_bytes(1 if packed else manifest.row_alignment)
        mine = -(-spec.rows * row_format.width * row_format.container // 8)
        header = spec.rows * HEADER_BYTES if row_format.container < 16 else 0
        values, headers, padding = values + mine, headers + header, padding + size - mine - header
    return values, headers, padding


def _size(tensors: Mapping[str, Tensor], *names: str) -> int:
    return sum(tensors[name].nbytes for name in names if name in tensors)


def _storages(groups: Iterable[Iterable[Tensor]]) -> int:
    """Bytes of tensors, each counted once."""
    tensors = {t.data_ptr(): t.nbytes for group in groups for t in group if t.numel()}
    return sum(tensors.values())


def _record_bytes(record: Any) -> int:  # noqa: ANN401 - one of the kernels' records
    total = 0
    for item in fields(record):
        value = getattr(record, item.name)
        if isinstance(value, Tensor):
            total += value.nbytes
        elif isinstance(value, tuple):
            total += sum(entry.nbytes for entry in value)
        else:
            total += _record_bytes(value)
    return total

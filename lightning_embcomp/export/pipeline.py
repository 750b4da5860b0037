"""From a model or a checkpoint to a folder: choose bits, guard, write, account."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_embcomp.export.accounting import TableBytes, disk_bytes, plain_bytes, serving_bytes, stored_bytes
from lightning_embcomp.export.artefact import Artefact, build
from lightning_embcomp.export.errors import ExportError
from lightning_embcomp.export.evaluation import Predict, predict
from lightning_embcomp.export.files import check_target, write
from lightning_embcomp.export.guard import GuardResult, guarded_build
from lightning_embcomp.export.loading import serve_tables
from lightning_embcomp.export.manifest import FileFormat, Manifest
from lightning_embcomp.export.rows import PRECISIONS
from lightning_embcomp.export.sources import dense_state, hosts_of
from lightning_embcomp.export.tables import ExportHost
from lightning_embcomp.tables import UnknownTableError


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """How tables leave training.

    Args:
        format: ``fbgemm`` stores rows as they are served, ``packed`` as few bits as there are.
        bits: Bits of rows that were not rounded in training: 2, 4, 8, 16 or 32.
        tables: Bits of single tables by glob of their names; the last one that matches counts.
        row_alignment: Bytes that a served row is filled up to a multiple of.
        overwrite: Replace an earlier export.
        max_ne_loss: Relative increase of validation NE that is allowed; 0.0005 is 0.05 %.
        strict: Fail where NE rises more, instead of giving tables more bits.

    Raises:
        ExportError: If a number is not allowed.
    """

    format: FileFormat = "fbgemm"
    bits: int = 8
    tables: Mapping[str, int] = field(default_factory=dict)
    row_alignment: int = 1
    overwrite: bool = False
    max_ne_loss: float = 0.0005
    strict: bool = False

    def __post_init__(self) -> None:
        for name, bits in [("bits", self.bits), *self.tables.items()]:
            if bits not in PRECISIONS:
                raise ExportError(f"{name} is {bits}; choose one of {', '.join(map(str, PRECISIONS))} bits")
        if self.row_alignment < 1:
            raise ExportError(f"row_alignment must be at least 1 byte, not {self.row_alignment}")
        if self.max_ne_loss < 0:
            raise ExportError(f"max_ne_loss must not be negative, got {self.max_ne_loss}")
        if self.format not in ("fbgemm", "packed"):
            raise ExportError(f"format must be 'fbgemm' or 'packed', not {self.format!r}")

    def bits_of(self, hosts: Sequence[ExportHost]) -> dict[str, int]:
        """Bits of every table by unique name.

        Raises:
            UnknownTableError: If a glob matches no table.
        """
        names = [(host, table.name, host.full_name(table)) for host in hosts for table in host.tables]
        found = {full: self.bits for _, _, full in names}
        for pattern, bits in self.tables.items():
            matching = [
                full
                for host, own, full in names
                if any(fnmatchcase(name, pattern) for name in (full, own, host.path.rpartition(".")[2]) if name)
            ]
            if not matching:
                raise UnknownTableError(f"export: no embedding table matches {pattern!r}. Tables: {', '.join(found)}")
            found |= dict.fromkeys(matching, bits)
        return found


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What was written.

    Args:
        folder: Where.
        manifest: What it holds.
        plain: Bytes of the tables in full, each in the dtype that its weights had.
        disk: Bytes of the tables on disk, manifest included.
        dense: Bytes of the dense part on disk.
        serving: Bytes that served tables hold in memory.
        guard: What the NE guard measured; None if it did not run.
    """

    folder: Path
    manifest: Manifest
    plain: int
    disk: TableBytes
    dense: int
    serving: TableBytes
    guard: GuardResult | None

    @property
    def disk_ratio(self) -> float:
        """Plain bytes over all bytes of the tables on disk."""
        return self.plain / max(1, self.disk.total)

    @property
    def serving_ratio(self) -> float:
        """Plain bytes over all bytes of the tables while they are served."""
        return self.plain / max(1, self.serving.total)


def export_module(
    module: nn.Module,
    dirpath: str | os.PathLike[str],
    options: ExportOptions | None = None,
    *,
    batches: Iterable[Any] | None = None,
    predictions: Predict = predict,
    source: Mapping[str, Any] | None = None,
) -> ExportReport:
    """Export a model in memory.

    Args:
        module: The model; afterwards as it was.
        dirpath: Folder to write.
        options: How.
        batches: Validation batches for the NE guard, which does not run without them.
        predictions: Maps (model, batch) to logits and labels; by default
            :func:`~lightning_embcomp.export.evaluation.predict`.
        source: Where the weights came from, for the manifest.

    Returns:
        What was written.

    Raises:
        ExportError: If something cannot be exported, or the guard refuses it; nothing is written then.
    """
    options = options or ExportOptions()
    check_target(Path(dirpath), options.overwrite)
    hosts = hosts_of(module)
    bits = options.bits_of(hosts)
    dense = dense_state(module)

    def make(chosen: Mapping[str, int]) -> Artefact:
        return build(
            hosts, chosen, format=options.format, row_alignment=options.row_alignment, dense=dense, source=source
        )

    if batches is None:
        return finish(make(bits), dirpath, options, None)
    if any(not host.path for host in hosts):
        raise ExportError("the NE guard needs the model around the tables, not the tables alone")
    artefact, result = guarded_build(
        make,
        bits,
        module,
        batches,
        max_ne_loss=options.max_ne_loss,
        strict=options.strict,
        predictions=predictions,
    )
    return finish(artefact, dirpath, options, result)


def export_tables(
    hosts: Sequence[ExportHost],
    dense: Mapping[str, Tensor],
    dirpath: str | os.PathLike[str],
    options: ExportOptions | None = None,
    *,
    source: Mapping[str, Any] | None = None,
) -> ExportReport:
    """Export tables without their model: there is no NE guard.

    Args:
        hosts: Modules with their tables.
        dense: State dict of the rest of the model.
        dirpath: Folder to write.
        options: How.
        source: Where the weights came from, for the manifest.

    Returns:
        What was written.
    """
    options = options or ExportOptions()
    check_target(Path(dirpath), options.overwrite)
    artefact = build(
        hosts,
        options.bits_of(hosts),
        format=options.format,
        row_alignment=options.row_alignment,
        dense=dense,
        source=source,
    )
    return finish(artefact, dirpath, options, None)


def finish(
    artefact: Artefact, dirpath: str | os.PathLike[str], options: ExportOptions, guard: GuardResult | None
) -> ExportReport:
    """Write an export with its measurements, and account for it."""
    serving = serving_bytes(serve_tables(artefact), artefact.manifest)
    plain = plain_bytes(artefact.manifest)
    manifest = artefact.manifest.with_(
        metrics=guard.metrics() if guard else {},
        fallbacks=dict(guard.fallbacks) if guard else {},
        bytes={"plain": plain, "stored": stored_bytes(artefact).total, "serving": serving.total},
    )
    artefact = Artefact(manifest=manifest, tensors=artefact.tensors, dense=artefact.dense)
    folder = write(artefact, dirpath, overwrite=options.overwrite)
    disk, dense = disk_bytes(artefact, folder)
    return ExportReport(
        folder=folder, manifest=manifest, plain=plain, disk=disk, dense=dense, serving=serving, guard=guard
    )

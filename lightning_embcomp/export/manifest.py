"""The manifest of an export: what its tensors mean. Numbers per row or per group are in the tensor files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

from lightning_embcomp.export.errors import ExportError
from lightning_embcomp.export.rows import RowFormat
from lightning_embcomp.export.tables import DTYPES, HostKind, full_name

SCHEMA = 1
"""Version of the layout of the folder; readers refuse newer ones."""
FileFormat = Literal["fbgemm", "packed"]


@dataclass(frozen=True, kw_only=True)
class TableSpec:
    """One logical table.

    Args:
        name: Name inside its module; empty for a stand-alone embedding.
        rows: Logical rows.
        dim: Columns.
        classes: Served table of the rows of each code, from code 1 on; code 0 has no storage.
        runs: Runs of rows of one code; 0 if every row has a code of its own, as bit planes.
        mean: Whether bags are averaged.
        features: Feature names; empty for a stand-alone embedding, or where the source did not say.
        stepped: Whether it has shared steps.
        shifted: Whether it has an offset that is added to every rounded row.
        dtype: Dtype of its weights before the export.
    """

    name: str
    rows: int
    dim: int
    classes: tuple[int, ...]
    runs: int = 0
    mean: bool = False
    features: tuple[str, ...] = ()
    stepped: bool = False
    shifted: bool = False
    dtype: str = "float32"

    @property
    def planes(self) -> int:
        """Bits of a row's code; 0 where runs are stored."""
        return 0 if self.runs else max(1, len(self.classes).bit_length())

    @property
    def plain_bytes(self) -> int:
        """Bytes of all its rows and columns in its own dtype."""
        return DTYPES[self.dtype].itemsize * self.rows * self.dim


@dataclass(frozen=True, kw_only=True)
class HostSpec:
    """A module that holds tables; see :class:`~lightning_embcomp.export.tables.ExportHost`."""

    path: str
    kind: HostKind
    tables: tuple[TableSpec, ...]
    is_weighted: bool = False
    need_indices: bool = False
    include_last_offset: bool = False
    padding_idx: int | None = None

    def table_names(self) -> list[str]:
        """Unique names of its tables."""
        return [full_name(self.path, table.name) for table in self.tables]


@dataclass(frozen=True, kw_only=True)
class ClassSpec:
    """One served table.

    Args:
        format: Its rows.
        rows: How many.
    """

    format: RowFormat
    rows: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What an export folder says about itself.

    Args:
        format: How values lie in the files.
        row_alignment: Bytes that rows of served tables are filled up to a multiple of.
        hosts: Modules and their tables.
        classes: Served tables.
        libraries: Versions that wrote it.
        source: Where the weights came from: checkpoint, epoch, step.
        metrics: Measured at the export: NE before and after, and what else the exporter knew.
        fallbacks: Bits by table name that the NE guard raised, as ``[wanted, used]``.
        bytes: Bytes by kind, on disk and for serving.
        files: Size and sha256 of each tensor file.
    """

    format: FileFormat
    row_alignment: int
    hosts: tuple[HostSpec, ...]
    classes: tuple[ClassSpec, ...]
    libraries: Mapping[str, str] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    fallbacks: Mapping[str, Any] = field(default_factory=dict)
    bytes: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tables(self) -> list[TableSpec]:
        """All tables, host by host."""
        return [table for host in self.hosts for table in host.tables]

    def with_(self, **changes: Any) -> Manifest:  # noqa: ANN401 - values of the fields
        """Copy with other fields."""
        return replace(self, **changes)

    def dumps(self) -> str:
        """Write as compact JSON; fields at their defaults are left out."""
        record: dict[str, Any] = {"schema": SCHEMA}
        record |= {f.name: getattr(self, f.name) for f in fields(self)}
        record["hosts"] = [{**_given(host), "tables": [_given(table) for table in host.tables]} for host in self.hosts]
        record["classes"] = [
            {
                "dim": spec.format.dim,
                "columns": spec.format.columns,
                "bits": spec.format.bits,
                "shared": spec.format.shared,
                "rows": spec.rows,
            }
            for spec in self.classes
        ]
        return json.dumps(record, separators=(",", ":"))


def loads(text: str) -> Manifest:
    """Read a manifest.

    Args:
        text: JSON.

    Returns:
        The manifest, checked for what a reader relies on.

    Raises:
        ExportError: If it is damaged, or of a newer schema.
    """
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise ExportError(f"the manifest is damaged ({error}): export again, or copy the folder again") from error
    if not isinstance(record, dict) or not isinstance(record.get("schema"), int):
        raise ExportError("the manifest is damaged (it has no schema version): export again")
    if record["schema"] > SCHEMA:
        raise ExportError(
            f"this export has schema version {record['schema']}; this version of lightning-embcomp reads up to"
            f" {SCHEMA}: update it"
        )
    try:
        return _parse(record)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ExportError(f"the manifest is damaged ({reason}): export again, or copy the folder again") from error


def _parse(record: Mapping[str, Any]) -> Manifest:
    if record["format"] not in get_args(FileFormat):
        raise ValueError(f"unknown format {record['format']!r}")
    classes = tuple(
        ClassSpec(
            format=RowFormat(
                dim=int(entry["dim"]),
                columns=tuple((int(first), int(length)) for first, length in entry["columns"]),
                bits=int(entry["bits"]),
                shared=bool(entry["shared"]),
            ),
            rows=int(entry["rows"]),
        )
        for entry in record["classes"]
    )
    hosts = tuple(
        HostSpec(**{**entry, "tables": tuple(_table(table, len(classes)) for table in entry["tables"])})
        for entry in record["hosts"]
    )
    if not all(host.kind in get_args(HostKind) for host in hosts):
        raise ValueError("a module has an unknown kind")
    if int(record["row_alignment"]) < 1:
        raise ValueError("row_alignment is not positive")
    known = {f.name for f in fields(Manifest)}
    return Manifest(**{**{k: v for k, v in record.items() if k in known}, "hosts": hosts, "classes": classes})


def _table(entry: Mapping[str, Any], classes: int) -> TableSpec:
    features = entry.get("features", ())
    spec = TableSpec(**{**entry, "classes": tuple(entry["classes"]), "features": tuple(features)})
    if spec.dtype not in DTYPES:
        raise ValueError(f"table {spec.name!r} has an unknown dtype {spec.dtype!r}")
    if spec.rows < 1 or spec.dim < 1 or not all(0 <= c < classes for c in spec.classes):
        raise ValueError(f"table {spec.name!r} does not fit together")
    return spec


def _given(record: Any) -> dict[str, Any]:  # noqa: ANN401 - a dataclass
    """Fields that differ from their default."""
    return {f.name: value for f in fields(record) if (value := getattr(record, f.name)) != f.default}

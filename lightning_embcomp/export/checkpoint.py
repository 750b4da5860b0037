"""The tables of a checkpoint file, read without the module that wrote it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_embcomp.engine.layout import PLAIN_TABLE, LogicalTable
from lightning_embcomp.engine.planes import decode
from lightning_embcomp.engine.precision import MAX_WIDTH, SEARCHED, TablePrecision
from lightning_embcomp.engine.router import BLOCK, SLAB
from lightning_embcomp.engine.row_class import WEIGHT
from lightning_embcomp.export.errors import STILL_SEARCHED, ExportError
from lightning_embcomp.export.sources import rows_of
from lightning_embcomp.export.tables import ExportHost, ExportTable, HostKind
from lightning_embcomp.report.routed import DamagedTableError, SavedTable, read_engines

_COLLECTIONS: dict[str, HostKind] = {"embedding_bags": "bag_collection", "embeddings": "collection"}
_ENGINE = "engine."


def hosts_of_checkpoint(
    checkpoint: Mapping[str, Any], path: str | os.PathLike[str]
) -> tuple[list[ExportHost], dict[str, Tensor]]:
    """Collect the tables and the dense part of a checkpoint.

    A checkpoint does not hold the features of its tables. They are known where its hyperparameters have records of
    ``features`` with a ``name``, as those of ``ClickModel``, and the tables are called ``t_<name>``.

    Args:
        checkpoint: From :func:`~lightning_embcomp.report.checkpoint.open_checkpoint`.
        path: Its file, for errors.

    Returns:
        Modules with their tables, and everything else.

    Raises:
        ExportError: If there is no table, or one that does not fit together.
    """
    state = checkpoint["state_dict"]
    known = _Features(checkpoint.get("hyper_parameters"))
    try:
        engines = read_engines(state)
    except DamagedTableError as error:
        raise ExportError(f"{os.fspath(path)}: damaged or not readable: {error}") from error
    hosts, taken = [], []
    for prefix, saved in engines.items():
        hosts.append(_engine_host(prefix.removesuffix(_ENGINE).removesuffix("."), prefix, saved, state, known))
        taken.append(prefix)
    plain: dict[tuple[str, HostKind], list[ExportTable]] = {}
    for key, weight in state.items():
        parts = key.rsplit(".", 3)
        if len(parts) < 3 or parts[-3] not in _COLLECTIONS or parts[-1] != "weight":
            continue
        if not isinstance(weight, Tensor) or weight.dim() != 2:
            continue
        name = parts[-2]
        host = key[: -len(f"{parts[-3]}.{name}.weight")].removesuffix(".")
        table = ExportTable(
            name=name,
            rows=weight.shape[0],
            dim=weight.shape[1],
            read_rows=rows_of(weight),
            dtype=weight.dtype,
            **known.of(name),
        )
        plain.setdefault((host, _COLLECTIONS[parts[-3]]), []).append(table)
        taken.append(key)
    hosts += [ExportHost(path=host, kind=kind, tables=tuple(tables)) for (host, kind), tables in plain.items()]
    if not hosts:
        raise ExportError(
            f"{os.fspath(path)}: it holds no embedding table that can be recognised: neither a compressed one nor an"
            " EmbeddingBagCollection or EmbeddingCollection. For plain nn.Embedding and nn.EmbeddingBag give the"
            " configuration of the run (-c), or export the module with lightning_embcomp.export"
        )
    prefixes = tuple(taken)
    dense = {
        key: value.detach().clone()
        for key, value in state.items()
        if isinstance(value, Tensor) and not key.startswith(prefixes)
    }
    return hosts, dense


def describe_checkpoint(checkpoint: Any, path: str | os.PathLike[str]) -> dict[str, Any]:  # noqa: ANN401 - from a file
    """What the manifest says of a checkpoint.

    Args:
        checkpoint: The open checkpoint.
        path: Its file.
    """
    found: dict[str, Any] = {"checkpoint": os.path.basename(os.fspath(path))}
    for key in ("epoch", "global_step"):
        if isinstance(checkpoint.get(key), int):
            found[key] = checkpoint[key]
    return found


class _Features:
    """Features by table name, as far as hyperparameters tell."""

    def __init__(self, hparams: object) -> None:
        records = hparams.get("features") if isinstance(hparams, Mapping) else None
        self.mean = isinstance(hparams, Mapping) and hparams.get("pooling") == "mean"
        listed = records if isinstance(records, list | tuple) else []
        self.names = {str(record["name"]) for record in listed if isinstance(record, Mapping) and "name" in record}

    def of(self, table: str) -> dict[str, Any]:
        """Arguments of an :class:`ExportTable`."""
        name = table.removeprefix("t_")
        return {"features": (name,), "mean": self.mean} if name != table and name in self.names else {}


def _engine_host(
    path: str, prefix: str, saved: list[SavedTable], state: Mapping[str, Any], known: _Features
) -> ExportHost:
    tables = tuple(_engine_table(prefix, table, state, known) for table in saved)
    # What kind of module an engine stood for is known by its settings only.
    kind: HostKind = "bag_collection" if all(table.features for table in tables) else "unknown"
    return ExportHost(path=path, kind=kind, tables=tables)


def _engine_table(prefix: str, saved: SavedTable, state: Mapping[str, Any], known: _Features) -> ExportTable:
    logical = saved.logical
    key = f"{prefix}tables.{logical.name}."
    reader = _EngineRows(saved, state[key + "codes"])
    return ExportTable(
        name="" if logical.name == PLAIN_TABLE else logical.name,
        rows=logical.rows,
        dim=logical.dim,
        read_rows=reader.rows,
        columns=tuple(logical.columns_of(code) for code in range(logical.codes)),
        read_codes=reader.codes,
        precision=_precision(state, key + "precision.", logical),
        dtype=saved.dtype,
        **known.of(logical.name),
    )


class _EngineRows:
    """Rows of a saved table, by range."""

    def __init__(self, saved: SavedTable, planes: Tensor) -> None:
        self.saved, self.planes = saved, planes
        blocks = -(-saved.logical.rows // BLOCK)
        # Rows of each code before every slab: ranges may be asked for in any order.
        counts = [torch.zeros(saved.logical.codes, dtype=torch.int64)]
        for first in range(0, blocks, SLAB // BLOCK):
            codes = self._codes(first, min(first + SLAB // BLOCK, blocks))
            counts.append(counts[-1] + torch.bincount(codes, minlength=saved.logical.codes))
        self.before = counts

    def _codes(self, first: int, last: int) -> Tensor:
        return decode(self.planes[first:last], min(last * BLOCK, self.saved.logical.rows) - first * BLOCK)

    def codes(self, start: int, stop: int) -> Tensor:
        """Codes of rows ``start`` (a multiple of 64) to ``stop``."""
        return self._codes(start // BLOCK, -(-stop // BLOCK))[: stop - start]

    def rows(self, start: int, stop: int) -> Tensor:
        """Full-width rows ``start`` (a multiple of 64) to ``stop``, float32."""
        logical = self.saved.logical
        slab = start // SLAB
        earlier = self._codes(slab * SLAB // BLOCK, start // BLOCK)
        slots = self.before[slab] + torch.bincount(earlier, minlength=logical.codes)
        codes = self.codes(start, stop)
        values = torch.zeros(stop - start, logical.dim)
        for code in range(1, logical.codes):
            mine = (codes == code).nonzero().flatten()
            first = int(slots[code])
            kept = self.saved.rows[code - 1][WEIGHT][first : first + mine.numel()].float()
            stored = 0
            for column, length in logical.columns_of(code):
                values[mine, column : column + length] = kept[:, stored : stored + length]
                stored += length
        return values


def _precision(state: Mapping[str, Any], key: str, logical: LogicalTable) -> TablePrecision | None:
    if key + "bits" not in state:
        return None
    if bool((state[key + "bits"] == SEARCHED).any()):
        raise ExportError(STILL_SEARCHED.format(name=logical.name))
    try:
        steps = state[key + "steps"].tolist()
        return TablePrecision(
            bounds=state[key + "bounds"],
            bits=state[key + "bits"],
            steps={bits: steps[bits] for bits in range(1, MAX_WIDTH + 1) if steps[bits] > 0},
            offset=state[key + "offset"].float(),
            group=state.get(key + "group"),
        )
    except (KeyError, IndexError, AttributeError, ValueError) as error:
        raise ExportError(f"the precision of table {logical.name!r} is damaged: {error!r}") from error

"""Put quantizers between the rows of a collection and their use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_embcomp.engine.host import EngineHost, HeldTable, TableShard, group_of
from lightning_embcomp.engine.router import SLAB
from lightning_embcomp.methods.mpe.groups import GroupBounds, RowGroups, TablePart
from lightning_embcomp.methods.mpe.module import RowQuantizer
from lightning_embcomp.methods.mpe.state import RoundingState


def new_state(
    tables: Sequence[HeldTable],
    groups: GroupBounds,
    widths: Sequence[int],
    features: Sequence[int],
    *,
    offset: bool,
    temperature: float | None,
) -> RoundingState:
    """State of tables of one collection that were not rounded so far.

    Args:
        tables: The tables to round.
        groups: Their groups.
        widths: Candidate widths, rising.
        features: Features that look up each table of the collection.
        offset: See :class:`RoundingState`.
        temperature: See :class:`RoundingState`.
    """
    host = tables[0].host
    spread = host.group.size > 1
    return RoundingState(
        groups,
        [table.dim for table in host.logical_tables],
        widths,
        offset=offset,
        temperature=temperature,
        features=features if spread else None,
        device=host.options.device,
        leads=[t.index for t in tables if spread and host.row_owners(t.index)[0] == host.group.rank],
    )


def put_in(host: EngineHost, state: RoundingState, unordered: Mapping[int, Tensor]) -> None:
    """Let the lookups of a collection round its rows.

    Args:
        host: The collection.
        state: State of its rounded tables.
        unordered: Group of each row of the whole tables whose ids are not numbered by falling frequency.
    """
    for engine in host.engines:
        shards = ((t, shard) for t in range(len(host.logical_tables)) for shard in host.shards(t))
        held = sorted((item for item in shards if item[1].engine is engine), key=lambda item: item[1].index)
        speaking = {_counts(host, t, shard) for t, shard in held if t in state.groups.bounds}
        if not speaking:
            continue
        parts = [_part(t, shard) for t, shard in held]
        # All tables of an engine are sharded in one way, so that all of them are copies or none is.
        (counts,) = speaking
        row_groups = RowGroups(state.groups, parts, unordered, state.device)
        engine.round_values(RowQuantizer(engine, row_groups, state, counts=counts))


def mean_magnitudes(tables: Sequence[HeldTable]) -> dict[int, float]:
    """Mean absolute value of the first rows of tables, by index; all processes call it together."""
    group = group_of(tables)
    if group.size == 1:
        return {table.index: float(_first_rows(table.shards[0]).abs().mean()) for table in tables}
    found = torch.zeros(len(tables), 2, dtype=torch.float64)
    for i, table in enumerate(tables):
        for shard in table.counted_shards:
            rows = _first_rows(shard).abs()
            found[i] += torch.tensor([float(rows.double().sum()), rows.numel()])
    total, count = group.sum(found).unbind(1)
    return dict(zip([table.index for table in tables], (total / count).tolist(), strict=True))


def _first_rows(shard: TableShard) -> Tensor:
    """Those of the first rows of a table that a shard holds, float32."""
    return shard.engine.read_rows(shard.index, 0, max(0, min(shard.logical.rows, SLAB - shard.first_row))).float()


def _counts(host: EngineHost, table: int, shard: TableShard) -> bool:
    return shard.primary or host.is_cut_by_columns(table)


def _part(table: int, shard: TableShard) -> TablePart:
    logical = shard.logical
    column = 0 if logical.shard is None else logical.shard.first_column
    return TablePart(table=table, rows=logical.rows, first_row=shard.first_row, first_column=column, dim=logical.dim)

"""Bytes that a budget is about: held in training, and held when the tables are served."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_embcomp.engine.host import HeldTable
from lightning_embcomp.engine.memory import table_memory
from lightning_embcomp.engine.router import BLOCK, slabs, words_per_block
from lightning_embcomp.export.plan import TablePlan, plan_table
from lightning_embcomp.export.rows import RowFormat
from lightning_embcomp.export.sources import hosts_of

PLAIN_BITS = 8
"""Bits of rows that no method rounds, as exports have by default."""
_RUN_BYTES = 9  # last row, class and base of a run of equal rows, while serving


@dataclass(frozen=True, kw_only=True)
class TablesBytes:
    """Bytes of some tables, and of the same tables when plain.

    Args:
        held: Bytes held.
        plain: Bytes of the plain tables.
    """

    held: int
    plain: int

    def __add__(self, other: TablesBytes) -> TablesBytes:
        return TablesBytes(held=self.held + other.held, plain=self.plain + other.plain)


def training_bytes(tables: Sequence[HeldTable]) -> TablesBytes:
    """Weights, fused optimizer state, router and statistics; plain are weights with the same optimizer's state."""
    found = [table_memory(shard.engine, shard.index) for table in tables for shard in table.counted_shards]
    return TablesBytes(held=sum(memory.total for memory in found), plain=sum(memory.plain_total for memory in found))


def serving_bytes(module: nn.Module, names: Collection[str], bits: int = PLAIN_BITS) -> TablesBytes:
    """Rows and router of exported tables in memory, format ``fbgemm``; plain are full weights.

    They are counted, not exported: tables may still be searched for widths, and count with ``bits`` then. A few hundred
    bytes per table that do not depend on its rows are left out.

    Args:
        module: The model.
        names: Unique names of the tables that count.
        bits: Bits of rows that no method rounds.
    """
    total = TablesBytes(held=0, plain=0)
    for host in hosts_of(module, trained=False):
        for table in host.tables:
            if host.full_name(table) in names:
                plan = plan_table(table, bits)
                counts = torch.bincount(plan.codes, minlength=len(plan.formats) + 1).tolist()
                rows = sum(n * f.row_bytes(1) for n, f in zip(counts[1:], plan.formats, strict=True))
                total += TablesBytes(
                    held=rows + _router_bytes(plan, table.rows), plain=table.rows * table.dim * table.dtype.itemsize
                )
    return total


def _router_bytes(plan: TablePlan, rows: int) -> int:
    if plan.run_end.numel():
        return _RUN_BYTES * plan.run_end.numel()
    return 8 * words_per_block(len(plan.formats) + 1) * -(-rows // BLOCK)


def group_rows(table: HeldTable) -> Tensor:
    """Rows of each group and code of a rounded table, int64 ``(G, codes)``."""
    [shard] = table.shards
    engine, t = shard.engine, shard.index
    precision = engine.precision(t)
    assert precision is not None
    codes, groups = table.logical.codes, precision.bits.numel()
    counts = torch.zeros(groups * codes, dtype=torch.int64)
    for start, stop in slabs(table.logical.rows):
        cell = precision.group_of(start, stop) * codes + engine.router.read(t, start, stop)[0].cpu().long()
        counts += torch.bincount(cell, minlength=groups * codes)
    return counts.view(groups, codes)


def bytes_by_width(table: HeldTable, rows: Tensor, widths: Sequence[int]) -> Tensor:
    """Bytes of the served rows of each group at each width, int64 ``(G, K)``.

    Args:
        table: The table.
        rows: Rows of each group and code, from :func:`group_rows`.
        widths: Candidate widths.
    """
    logical = table.logical
    sizes = torch.zeros(logical.codes, len(widths), dtype=torch.int64)
    for code in range(1, logical.codes):
        for k, bits in enumerate(widths):
            if bits:
                row = RowFormat(dim=logical.dim, columns=logical.columns_of(code), bits=bits, shared=True)
                sizes[code, k] = row.row_bytes(1)
    return rows @ sizes

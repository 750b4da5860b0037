"""A memory report as tables for the terminal."""

from __future__ import annotations

import os
from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from lightning_embcomp.engine.memory import TableMemory
from lightning_embcomp.report.account import KINDS, MemoryReport, TableReport


def render(report: MemoryReport) -> RenderableType:
    """Lay a report out for ``rich``, within 80 columns: bytes by kind, then the comparison with the plain model.

    Args:
        report: The report.

    Returns:
        What ``Console.print`` takes.
    """
    names = _without_common_path([table.name for table in report.tables])
    total = report.total
    held = _table("Bytes held in training", "rows × dim", "weights", "optimizer", "router", "statistics", "all")
    plain = _table("Against the plain model", "plain", "held", "ratio", "nominal", "% of rows stored, by chunk")
    for name, table in zip(names, report.tables, strict=True):
        held.add_row(name, f"{table.memory.rows:,} × {table.memory.dim}", *_kinds(table.memory))
        plain.add_row(name, *_ratios(table.memory, table.nominal_ratio), _live(table))
    held.add_section()
    held.add_row("total", f"{total.rows:,}", *_kinds(total), style="bold")
    plain.add_section()
    plain.add_row("total", *_ratios(total, report.nominal_ratio), "", style="bold")
    lines = [
        "ratio: weights and optimizer state of the plain tables over all bytes held.",
        "nominal: weights alone, as often quoted.",
        *report.notes,
    ]
    rounded = [_rounded(names, report)] if any(table.bits for table in report.tables) else []
    return Group(Text(_title(report), style="bold"), held, plain, *rounded, Text("\n".join(lines), style="dim"))


def size(value: int) -> str:
    """Bytes for people, in powers of ten.

    Example:
        >>> size(999), size(12_800_000)
        ('999 B', '12.8 MB')
    """
    return decimal(value).replace(" bytes", " B").replace(" byte", " B")


def times(ratio: float | None) -> str:
    """A ratio for people; a dash if there is none.

    Example:
        >>> times(6.684), times(None)
        ('6.68×', '–')
    """
    return "–" if ratio is None else f"{ratio:.2f}×"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("table", overflow="fold", min_width=5)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _title(report: MemoryReport) -> str:
    parts = [os.path.basename(report.checkpoint)]
    parts += [] if report.epoch is None else [f"epoch {report.epoch}"]
    parts += [] if report.global_step is None else [f"step {report.global_step:,}"]
    return " · ".join(parts)


def _kinds(memory: TableMemory) -> list[str]:
    return [*(size(getattr(memory, kind)) for kind in KINDS), size(memory.total)]


def _ratios(memory: TableMemory, nominal: float | None) -> list[str]:
    return [size(memory.plain_total), size(memory.total), times(memory.ratio), times(nominal)]


def _rounded(names: Sequence[str], report: MemoryReport) -> Table:
    title = "Bits per value, as the tables are rounded when they are used"
    table = _table(title, "average", "rows by bits", "by tenth of the rows, popular first")
    for name, entry in zip(names, report.tables, strict=True):
        if entry.bits is None:
            continue
        if entry.bits.average is None:
            table.add_row(name, "searched", "", "")
            continue
        rows = " ".join(f"{width}: {count:,}" for width, count in entry.bits.rows.items())
        table.add_row(name, f"{entry.bits.average:.2f}", rows, " ".join(f"{mean:.2g}" for mean in entry.bits.tenths))
    return table


def _live(table: TableReport) -> str:
    return " ".join(
        f"{100 * share:.0f}" if share >= 0.1 or share == 0 else f"{100 * share:.1f}" for share in table.live
    )


def _without_common_path(names: Sequence[str]) -> list[str]:
    """Leave out the path that all names share; what is left may not be empty.

    Example:
        >>> _without_common_path(["model.bags.user", "model.bags.item"]), _without_common_path(["a.b"])
        (['user', 'item'], ['b'])
    """
    parts = [name.split(".") for name in names]
    shared = 0
    while all(len(p) > shared + 1 for p in parts) and len({p[shared] for p in parts}) == 1:
        shared += 1
    return [".".join(p[shared:]) for p in parts]

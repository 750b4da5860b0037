"""Plans as tables for the terminal."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lightning_embcomp.planners.comparison import PlanOutcome
from lightning_embcomp.planners.footprint import TableFootprint
from lightning_embcomp.planners.summary import Placement, PlanSummary
from lightning_embcomp.report.view import size
from lightning_embcomp.tables import TableView

_MOST_RANKS = 16  # of more, only the extremes are listed


def render(
    title: str,
    tables: Sequence[TableView],
    outcomes: Mapping[str, PlanOutcome],
    footprints: Mapping[str, TableFootprint],
    notes: Sequence[str],
) -> RenderableType:
    """Lay plans out for ``rich``.

    Args:
        title: What was planned.
        tables: The tables.
        outcomes: Plans by name, such as ``plain`` and ``compressed``.
        footprints: What compressed tables take.
        notes: What a reader must know.

    Returns:
        What ``Console.print`` takes.
    """
    found = {name: outcome.summary for name, outcome in outcomes.items() if outcome.summary is not None}
    parts: list[RenderableType] = [Text(title, style="bold")]
    if found:
        parts += [_by_rank(found), _by_table(tables, found, footprints)]
    for name, outcome in outcomes.items():
        if outcome.refusal is not None:
            parts.append(Text(f"{name}: {outcome.refusal}\n", style="yellow"))
    return Group(*parts, Text("\n".join(notes), style="dim"))


def _by_rank(plans: Mapping[str, PlanSummary]) -> Table:
    table = _table("Ranks", "rank", *(f"{name}, {what}" for name in plans for what in ("held", "ms a step")))
    count = len(next(iter(plans.values())).ranks)
    for rank in range(count) if count <= _MOST_RANKS else ():
        cells: list[str] = []
        for plan in plans.values():
            load = plan.ranks[rank]
            cells += [_held(load.device_bytes, load.host_bytes), f"{load.milliseconds:.3g}"]
        table.add_row(str(rank), *cells)
    table.add_section()
    most, balance = [], []
    for plan in plans.values():
        most += [size(plan.most_bytes), f"{plan.milliseconds:.3g}"]
        balance += [f"{plan.byte_balance:.2f}", f"{plan.time_balance:.2f}"]
    table.add_row("largest", *most, style="bold")
    table.add_row("largest over mean", *balance)
    return table


def _by_table(
    tables: Sequence[TableView], plans: Mapping[str, PlanSummary], footprints: Mapping[str, TableFootprint]
) -> Table:
    headings = [f"{name}, {what}" for name in plans for what in ("placed", "bytes")]
    table = _table("Tables", "name", "rows × dim", *headings, *(["weights kept"] if footprints else []))
    placed = {name: {place.name: place for place in plan.tables} for name, plan in plans.items()}
    common = _common_path([view.name for view in tables])
    for view in tables:
        cells: list[str] = []
        for by_name in placed.values():
            place = by_name[view.name]
            cells += [_where(place), size(place.bytes)]
        if footprints:
            cells.append(f"{100 * footprints.get(view.name, TableFootprint()).kept:.1f} %")
        table.add_row(view.name[common:], f"{view.rows:,} × {view.dim}", *cells)
    table.add_section()
    totals: list[str] = []
    for plan in plans.values():
        totals += ["", size(plan.bytes)]
    table.add_row("total", f"{sum(view.rows for view in tables):,}", *totals, style="bold")
    return table


def _common_path(names: Sequence[str]) -> int:
    """Length of the path that all names start with, the last dot included."""
    return os.path.commonprefix([name[: name.rfind(".") + 1] for name in names]).rfind(".") + 1


def _where(place: Placement) -> str:
    ranks = sorted(set(place.ranks))
    numbers = f"{ranks[0]}–{ranks[-1]}" if len(ranks) > 3 else ", ".join(map(str, ranks))
    kernel = "" if place.kernel in ("fused", "dense") else f" {place.kernel}"
    return f"{place.sharding}{kernel} on {numbers}"


def _held(device: int, host: int) -> str:
    return size(device or host) if not (device and host) else f"{size(device)} + {size(host)} host"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 or column.endswith("placed") else "right")
    return table

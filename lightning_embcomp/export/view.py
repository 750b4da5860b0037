"""What an export is, as tables for the terminal."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lightning_embcomp.export.manifest import Manifest
from lightning_embcomp.export.pipeline import ExportReport
from lightning_embcomp.report.view import size, times

NOT_RUN = "NE guard: not run, for want of validation batches."
SWITCHED_OFF = "NE guard: switched off (max_ne_loss is null)."
CHECKPOINT_ALONE = (
    "NE guard: not run, since a checkpoint alone has no validation data. Give the configuration of the run (-c) to run"
    " it."
)


def render(report: ExportReport, unguarded: str = NOT_RUN) -> RenderableType:
    """Lay a report out for ``rich``, within 80 columns.

    Args:
        report: The report.
        unguarded: What to say where the NE guard did not run.

    Returns:
        What ``Console.print`` takes.
    """
    held = _table("Bytes of the tables", "kind", "on disk", "serving")
    disk, serving = report.disk.by_kind(), report.serving.by_kind()
    for kind, value in disk.items():
        held.add_row(kind.replace("_", " "), size(value), size(serving[kind]))
    held.add_section()
    held.add_row("all", size(report.disk.total), size(report.serving.total), style="bold")
    dtypes = sorted({table.dtype for table in report.manifest.tables})
    held.add_row(f"plain, {', '.join(dtypes)}", size(report.plain), size(report.plain))
    held.add_row("ratio", times(report.disk_ratio), times(report.serving_ratio), style="bold")
    if report.dense:
        held.add_row("dense part (not counted)", size(report.dense), "")
    classes = _table("Served tables", "bits", "columns", "rows", "step")
    for spec in report.manifest.classes:
        kind = "shared" if spec.format.shared else "per row" if spec.format.bits < 16 else "float"
        columns = f"{spec.format.width} of {spec.format.dim}"
        classes.add_row(str(spec.format.bits), columns, f"{spec.rows:,}", kind)
    dead = _dead_rows(report.manifest)
    if dead:
        classes.add_row("0", "0", f"{dead:,}", "no storage")
    title = f"{report.folder} · {report.manifest.format} · rows aligned to {report.manifest.row_alignment} B"
    return Group(Text(title, style="bold"), held, classes, *_guard(report, unguarded))


def _guard(report: ExportReport, unguarded: str) -> list[RenderableType]:
    guard = report.guard
    if guard is None:
        return [Text(unguarded, style="yellow")]
    table = _table(f"Validation, {guard.rows:,} rows", "", "source", "exported", "difference")
    table.add_row("NE", f"{guard.ne_before:.6f}", f"{guard.ne_after:.6f}", f"{100 * guard.ne_loss:+.4f} %")
    change = guard.auc_after - guard.auc_before
    table.add_row("AUC", f"{guard.auc_before:.6f}", f"{guard.auc_after:.6f}", f"{change:+.6f}")
    table.add_row("largest |Δ logit|", "", "", f"{guard.max_logit_difference:.3g}")
    lines = [f"{name}: {wanted} bits cost too much, {used} used" for name, (wanted, used) in guard.fallbacks.items()]
    return [table, *([Text("\n".join(lines), style="yellow")] if lines else [])]


def _dead_rows(manifest: Manifest) -> int:
    return sum(table.rows for table in manifest.tables) - sum(spec.rows for spec in manifest.classes)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    return table

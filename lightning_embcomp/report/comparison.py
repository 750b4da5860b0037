"""A plain and a compressed run side by side: what is shown, printed and written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

from lightning_embcomp.engine.memory import TableMemory
from lightning_embcomp.report.popularity import PopularityGroups
from lightning_embcomp.report.view import size, times


@dataclass(frozen=True, kw_only=True)
class Run:
    """One trained and tested model.

    Args:
        name: Name for people.
        auc: AUC on the test rows.
        ne: Normalised entropy on the test rows.
        memory: Embedding bytes in training, measured.
        seconds_per_step: Median seconds of a training step after the warm-up.
        mean_seconds: Mean seconds of the same steps.
        curve: Optimizer step and validation NE of every validation.
    """

    name: str
    auc: float
    ne: float
    memory: TableMemory
    seconds_per_step: float
    mean_seconds: float
    curve: tuple[tuple[int, float], ...]

    @property
    def tested_step(self) -> int:
        """Step of the best validation, whose weights were tested."""
        return min(self.curve, key=lambda point: point[1])[0]

    def as_dict(self) -> dict[str, float | int]:
        """The figures of merit, for JSON."""
        return {
            "auc": self.auc,
            "ne": self.ne,
            "embedding_bytes": self.memory.total,
            "seconds_per_step": self.seconds_per_step,
        }


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The same model, trained on the same batches, with and without compression.

    Args:
        plain: The run without compression.
        compressed: The run with it.
        popularity: What rows of the compressed run store, by popularity.
        auc_error: Standard error of the plain run's test AUC.
        facts: What was run: data, model, settings, versions, by name.
    """

    plain: Run
    compressed: Run
    popularity: PopularityGroups
    auc_error: float
    facts: Mapping[str, str]

    @property
    def runs(self) -> tuple[Run, Run]:
        """Plain, then compressed."""
        return self.plain, self.compressed

    @property
    def ratio(self) -> float:
        """Bytes of the plain run over those of the compressed run."""
        return self.plain.memory.total / self.compressed.memory.total

    def as_dict(self) -> dict[str, Any]:
        """Both runs and the ratio, for JSON."""
        return {"plain": self.plain.as_dict(), "compressed": self.compressed.as_dict(), "ratio": self.ratio}


def comparison_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """Cells of the table of results: a head, one row per run, and the difference.

    Args:
        comparison: Both runs.

    Returns:
        Rows of equally many cells.
    """
    head = ("run", "test AUC", "test NE", "embedding bytes in training", "ratio", "ms per step")
    rows = [
        (
            run.name,
            f"{run.auc:.4f}",
            f"{run.ne:.4f}",
            size(run.memory.total),
            times(comparison.plain.memory.total / run.memory.total),
            f"{1e3 * run.seconds_per_step:.1f}",
        )
        for run in comparison.runs
    ]
    plain, compressed = comparison.runs
    difference = (
        "difference",
        f"{compressed.auc - plain.auc:+.4f}",
        f"{compressed.ne - plain.ne:+.4f}",
        f"{100 * (compressed.memory.total / plain.memory.total - 1):+.0f} %",
        "",
        f"{100 * (compressed.seconds_per_step / plain.seconds_per_step - 1):+.0f} %",
    )
    return [head, *rows, difference]


def render_comparison(comparison: Comparison) -> Table:
    """The table of results for ``rich``.

    Args:
        comparison: Both runs.

    Returns:
        What ``Console.print`` takes.
    """
    head, plain, compressed, difference = comparison_rows(comparison)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if i else "left", overflow="fold")
    table.add_row(*plain)
    table.add_row(*compressed, style="bold")
    table.add_section()
    table.add_row(*difference, style="dim")
    return table

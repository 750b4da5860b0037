"""The figures of the comparison, as SVG that refers to nothing outside itself."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from lightning_embcomp.engine.memory import TableMemory
from lightning_embcomp.report.account import KINDS
from lightning_embcomp.report.popularity import PopularityGroups
from lightning_embcomp.report.view import size

INK, FAINT = "#1f2933", "#9aa5b1"
RUN_COLORS = ("#8793a0", "#0b6e99")
"""Plain, compressed."""
KIND_COLORS = dict(zip(KINDS, ("#0b6e99", "#74b3ce", "#e09f3e", "#9e2a2b"), strict=True))
KIND_LABELS = dict(zip(KINDS, ("weights", "optimizer state", "router", "statistics"), strict=True))

_STYLE: Any = {
    # Text stays text: it can be selected, read aloud and searched.
    "svg.fonttype": "none",
    "font.family": ["sans-serif"],
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#e4e7eb",
}


def plot_bytes(runs: Mapping[str, TableMemory]) -> Figure:
    """Draw the bytes of each run as one horizontal bar, stacked by kind.

    Args:
        runs: Bytes by name of the run, from top to bottom.

    Returns:
        The figure.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _new_figure(height=0.9 + 0.6 * len(runs))
        for y, memory in enumerate(runs.values()):
            left = 0
            for kind in KINDS:
                value = getattr(memory, kind)
                label = KIND_LABELS[kind] if y == 0 else None
                axes.barh(y, value / 1e6, left=left / 1e6, height=0.6, color=KIND_COLORS[kind], label=label)
                left += value
            axes.annotate(size(left), (left / 1e6, y), xytext=(6, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(runs)), list(runs))
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("MB held while training")
        axes.margins(x=0.12)
        figure.legend(ncols=len(KINDS), frameon=False, loc="outside upper center", columnspacing=1.5)
        return figure


def plot_popularity(groups: PopularityGroups) -> Figure:
    """Draw what rows store against how popular they are, with the share of lookups that each group gets.

    Args:
        groups: Groups of rows, the most popular first.

    Returns:
        The figure.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _new_figure()
        places = range(1, len(groups.live) + 1)
        axes.bar(
            [p - 0.2 for p in places], groups.lookups, width=0.4, color=RUN_COLORS[0], label="share of all lookups"
        )
        axes.bar(
            [p + 0.2 for p in places], groups.live, width=0.4, color=RUN_COLORS[1], label="share of columns stored"
        )
        for place, live in zip(places, groups.live, strict=True):
            text = f"{live:.0%}" if live >= 0.01 else "<1%" if live else "0"
            axes.annotate(text, (place + 0.2, live), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=8)
        axes.set_xticks(list(places))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_ylim(0, 1.08)
        axes.set_xlabel("rows by popularity, in tenths (1: looked up most)")
        axes.grid(visible=True, axis="y")
        axes.set_axisbelow(True)
        axes.legend(frameon=False, loc="upper right")
        return figure


def plot_curves(curves: Mapping[str, Sequence[tuple[int, float]]]) -> Figure:
    """Draw validation NE over optimizer steps; the best value of each run is marked.

    Args:
        curves: Step and NE of every validation, by name of the run; the plain run first.

    Returns:
        The figure.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _new_figure()
        for (name, curve), color in zip(curves.items(), RUN_COLORS, strict=True):
            steps, values = [step for step, _ in curve], [value for _, value in curve]
            axes.plot(steps, values, color=color, linewidth=1.8, label=name)
            best = min(curve, key=lambda point: point[1])
            axes.plot(*best, marker="o", markersize=8, color=color, markeredgecolor="white", linestyle="none")
        axes.set_xlabel("optimizer steps")
        axes.set_ylabel("validation NE (lower is better)")
        axes.grid(visible=True, axis="y")
        axes.legend(frameon=False, loc="upper center")
        return figure


def to_svg(figure: Figure, description: str) -> str:
    """Write a figure as an SVG element to be put into HTML.

    Args:
        figure: The figure.
        description: What it shows, for those who do not see it.

    Returns:
        One ``<svg>`` element, scaled to the width of its parent.
    """
    buffer = io.StringIO()
    # The salt keeps identifiers of several figures on one page apart, and the same from run to run.
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": description}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # Licence data of the drawing program: links that nobody needs.
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    used = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(r' id="([\w.-]+)"', lambda match: match[0] if match[1] in used else "", svg)
    head, rest = svg.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    return head.replace("<svg", f'<svg role="img" aria-label="{escape(description)}"', 1) + ">" + rest


def _new_figure(height: float = 3.2) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.2, height), layout="constrained")
    return figure, figure.add_subplot()

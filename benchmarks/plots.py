"""Draws all figures from the results, byte for byte the same each time.

python -m benchmarks plots                 # into docs/images
python -m benchmarks plots --out FOLDER
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import FuncFormatter, NullFormatter  # noqa: E402

from benchmarks.peers.fronts import LABELS, OWN, TRAINED_FORMS  # noqa: E402
from benchmarks.quality import RESULTS  # noqa: E402

IMAGES = RESULTS.parents[1] / "docs" / "images"
TITLES = {
    "criteo_80k": "Criteo, 80 000 rows",
    "book_crossing": "Book-Crossing, 1.15 M rows",
    "movielens_1m": "MovieLens-1M",
    "us_flights": "US flights, 0.56 M rows",
    "large": "made-up log, 10 M rows, 5 M ids",
}
INK = "#7d8590"
"""Readable on white and on black."""
STYLE: dict[str, Any] = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "none",
    "grid.color": INK,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "savefig.facecolor": "none",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "font.size": 10,
    "svg.fonttype": "none",
}
COLOURS = (
    *("#0b9e77", "#2f81f7", "#b58900", "#8f6fe0", "#e0701f"),
    *("#d9508f", "#c0392b", "#5a9bb8", "#8a8a3a", "#b07aa1", "#4f9d3a", "#996644", "#7d8590"),
)
MARKERS = "os^Dvp*XhP<>d"
LOWEST = 0.04
"""AUC below the plain model's by more than this is not drawn: it would squeeze all that matters."""


def front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points that none is ahead of in both ratio and AUC, by falling ratio.

    Example:
        >>> front([(2.0, 0.7), (4.0, 0.8), (5.0, 0.6)])
        [(5.0, 0.6), (4.0, 0.8)]
    """
    best: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda one: (-one[0], -one[1])):
        if not best or point[1] > best[-1][1]:
            best.append(point)
    return best


def pareto(found: dict[str, Any], title: str) -> Figure:
    """AUC against both ratios, a line per method; this project's are drawn solid.

    Args:
        found: Results of one data set.
        title: Its name.
    """
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.6), sharey=True, layout="constrained")
    plain = next(point["auc"] for point in found["points"] if point["family"] == "plain")
    for axis, name, trained in zip(axes, ("training", "serving"), (True, False), strict=True):
        _panel(axis, found["points"], name, trained, plain)
    axes[0].set_ylabel("test AUC")
    axes[0].set_xlabel("times fewer bytes in training, weights and state")
    axes[1].set_xlabel("times fewer bytes while serving")
    figure.suptitle(title, fontsize=11)
    handles = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8.5)
    return figure


def _panel(axis: Axes, points: list[dict[str, Any]], name: str, trained: bool, plain: float) -> None:
    axis.axhline(plain, color=INK, linewidth=1, linestyle=":")
    families = [family for family in LABELS if family != "plain"]
    for index, family in enumerate(sorted(families, key=lambda one: one not in OWN)):
        mine = [
            (point[f"{name}_ratio"], point["auc"])
            for point in points
            if point["family"] == family and (not trained or point["form"] in TRAINED_FORMS)
        ]
        shown = [point for point in front(mine) if point[1] > plain - LOWEST]
        if shown:
            axis.plot(
                *zip(*shown, strict=True),
                label=LABELS[family],
                color=COLOURS[index],
                marker=MARKERS[index],
                linestyle="-" if family in OWN else "--",
                linewidth=1.8 if family in OWN else 1.1,
                markersize=5,
            )
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def figures_of(results: Path) -> dict[str, Callable[[], Figure]]:
    """All figures that there are results for, by name.

    Args:
        results: Folder of the results.
    """
    figures: dict[str, Callable[[], Figure]] = {}
    path = results / "pareto.json"
    if path.exists():
        for dataset, found in json.loads(path.read_text())["results"].items():
            figures[f"pareto-{dataset}"] = partial(pareto, found, TITLES.get(dataset, dataset))
    return figures


def draw(results: Path, out: Path) -> list[Path]:
    """Write all figures as SVG, the same bytes for the same results.

    Args:
        results: Folder of the results.
        out: Folder of the figures.

    Returns:
        The files.
    """
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure_of in figures_of(results).items():
        settings: Any = STYLE | {"svg.hashsalt": name}
        with plt.rc_context(settings):
            figure = figure_of()
            figure.savefig(out / f"{name}.svg", metadata={"Date": None, "Creator": None})
            plt.close(figure)
        written.append(out / f"{name}.svg")
    return written


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--out", type=Path, default=IMAGES, help="folder of the figures")
    args = parser.parse_args()
    for path in draw(args.results, args.out):
        print(path)


if __name__ == "__main__":
    main()

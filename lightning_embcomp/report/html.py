"""The comparison as one HTML file that needs nothing else."""

from __future__ import annotations

from html import escape

from lightning_embcomp.report.comparison import Comparison, Run, comparison_rows
from lightning_embcomp.report.plots import plot_bytes, plot_curves, plot_popularity, to_svg
from lightning_embcomp.report.view import size, times

_CSS = """
:root { color-scheme: light; --ink: #1f2933; --soft: #52606d; --line: #e4e7eb; --accent: #0b6e99; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f7fa; color: var(--ink); }
body { font: 16px/1.55 system-ui, "Segoe UI", Helvetica, sans-serif; }
main { max-width: 54rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.15rem; margin: 0 0 .35rem; }
p { margin: .35rem 0; }
.lead { font-size: 1.08rem; color: var(--soft); max-width: 46rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .75rem; margin: 1.5rem 0; }
.card, section { background: #fff; border: 1px solid var(--line); border-radius: .6rem; }
.card { padding: .9rem 1rem; }
.card b { display: block; font-size: 1.6rem; line-height: 1.2; color: var(--accent); }
.card span { color: var(--soft); font-size: .88rem; }
section { padding: 1.25rem 1.4rem; margin: 1rem 0; overflow-x: auto; }
section p { color: var(--soft); }
svg { display: block; width: 100%; height: auto; margin-top: .6rem; }
svg text { font-family: system-ui, "Segoe UI", Helvetica, sans-serif !important; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .45rem .6rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
th { font-weight: 600; color: var(--soft); font-size: .88rem; }
tr.chosen td { font-weight: 650; }
tr.difference td { color: var(--soft); border-bottom: 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.2rem; margin: .5rem 0 0; font-size: .93rem; }
dt { color: var(--soft); }
dd { margin: 0; }
"""


def render_html(comparison: Comparison) -> str:
    """Write a comparison as a page: the result in words, a table, three figures with how to read them, what was run.

    Args:
        comparison: Both runs.

    Returns:
        HTML; styles and figures are inside, nothing is loaded from anywhere.
    """
    plain, compressed = comparison.runs
    runs = {run.name: run for run in comparison.runs}
    bytes_figure = to_svg(
        plot_bytes({name: run.memory for name, run in runs.items()}),
        f"Embedding bytes while training: {_described(plain)}; {_described(compressed)}",
    )
    first, last = comparison.popularity.live[0], comparison.popularity.live[-1]
    popularity_figure = to_svg(
        plot_popularity(comparison.popularity),
        f"Share of columns stored by popularity: {first:.0%} in the most popular tenth, {last:.0%} in the least",
    )
    curves_figure = to_svg(
        plot_curves({name: run.curve for name, run in runs.items()}),
        f"Validation NE over steps; best values at step {plain.tested_step} and {compressed.tested_step}",
    )
    title = f"{times(comparison.ratio)} less embedding memory while training"
    sections = [
        _section("Result", _RESULT.format(error=_error(comparison)), _results(comparison)),
        _section("Where the bytes are", _BYTES.format(nominal=_nominal(compressed)), bytes_figure),
        _section("Who keeps memory", _POPULARITY.format(top=comparison.popularity.lookups[0]), popularity_figure),
        _section("How the runs went", _CURVES, curves_figure),
        _section("What was run", _RUN, _facts(comparison)),
    ]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{_CSS}</style></head><body><main>",
            f"<h1>{escape(title)}</h1>",
            f'<p class="lead">{escape(_lead(comparison))}</p>',
            _cards(comparison),
            *sections,
            "</main></body></html>",
            "",
        ]
    )


_RESULT = (
    "Both runs start from the same weights and see the same batches. Each is tested once, with the weights of its best"
    " validation. AUC: 1 is perfect, 0.5 is chance. NE (normalised entropy): log loss over that of always predicting"
    " the click-through rate; lower is better. {error}"
)
_BYTES = (
    "All memory that training the tables takes, measured from the allocated storages: the weights, the optimizer's"
    " state, the router that says where the stored part of each row is, and the statistics that decide what is stored."
    " The gain counts all of them. Of the weights alone the run stores {nominal}, but what keeps track of them is not"
    " free."
)
_POPULARITY = (
    "Rows of all tables, from the most to the least looked up, in ten equal groups. The first tenth gets {top:.0%} of"
    " all lookups. Every row keeps as many leading columns as it is worth; what is not stored reads as zero."
)
_CURVES = (
    "Validation NE after every quarter of an epoch; the dot is the best one, whose weights were tested. A curve that"
    " rises again overfits: it learns the training rows by heart."
)
_RUN = "Enough to run it again. Times depend on the machine and on what else it is doing."


def _section(title: str, text: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2><p>{escape(text)}</p>{content}</section>"


def _lead(comparison: Comparison) -> str:
    plain, compressed = comparison.runs
    return (
        f"The same model, trained twice: with ordinary embedding tables ({size(plain.memory.total)} with optimizer"
        f" state) and with {compressed.name} ({size(compressed.memory.total)} with everything it needs)."
        f" Test AUC {plain.auc:.4f} and {compressed.auc:.4f}."
    )


def _cards(comparison: Comparison) -> str:
    plain, compressed = comparison.runs
    cards = [
        (times(comparison.ratio), "fewer embedding bytes"),
        (f"{compressed.auc - plain.auc:+.4f}", "test AUC"),
        (f"{compressed.ne - plain.ne:+.4f}", "test NE (lower is better)"),
        (f"{100 * (compressed.seconds_per_step / plain.seconds_per_step - 1):+.0f} %", "time per step"),
    ]
    inside = "".join(
        f'<div class="card"><b>{escape(value)}</b><span>{escape(text)}</span></div>' for value, text in cards
    )
    return f'<div class="cards">{inside}</div>'


def _results(comparison: Comparison) -> str:
    head, *rows = comparison_rows(comparison)
    lines = ["<table><tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    for row, kind in zip(rows, ("plain", "chosen", "difference"), strict=True):
        lines.append(f'<tr class="{kind}">' + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>")
    plain, compressed = comparison.runs
    note = (
        f"Time per step is the median. The mean, pruning events included, is {1e3 * plain.mean_seconds:.1f} ms and"
        f" {1e3 * compressed.mean_seconds:.1f} ms."
    )
    return "\n".join(lines) + f"</table><p>{escape(note)}</p>"


def _facts(comparison: Comparison) -> str:
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in comparison.facts.items())
    return f"<dl>{items}</dl>"


def _error(comparison: Comparison) -> str:
    if comparison.auc_error != comparison.auc_error:  # NaN: a class is missing in the test rows
        return ""
    return f"With this many test rows an AUC has a standard error of {comparison.auc_error:.4f}."


def _nominal(run: Run) -> str:
    return f"{run.memory.weights / run.memory.plain_weights:.0%}"


def _described(run: Run) -> str:
    return f"{run.name} {size(run.memory.total)}"

"""Popularity groups, step times and the page."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console

from lightning_embcomp.engine.memory import TableMemory
from lightning_embcomp.report.comparison import Comparison, Run, render_comparison
from lightning_embcomp.report.html import render_html
from lightning_embcomp.report.popularity import PopularityGroups, by_popularity
from lightning_embcomp.report.recorder import RunRecorder, auc_standard_error

VOID = {"meta", "br", "link", "img"}


def memory(weights: int, router: int) -> TableMemory:
    return TableMemory(
        name="total",
        rows=10,
        dim=0,
        weights=weights,
        optimizer_state=100,
        router=router,
        statistics=router,
        plain_weights=8000,
        plain_optimizer_state=500,
    )


@pytest.fixture
def comparison() -> Comparison:
    def run(name: str, auc: float, held: TableMemory) -> Run:
        curve = ((10, 0.9), (20, 0.85), (30, 0.88))
        return Run(name=name, auc=auc, ne=0.85, memory=held, seconds_per_step=0.01, mean_seconds=0.02, curve=curve)

    return Comparison(
        plain=run("plain", 0.78, memory(8000, 0)),
        compressed=run("a <b> & c", 0.79, memory(1500, 200)),
        popularity=by_popularity(np.linspace(1, 0, 20), np.arange(20, 0, -1)),
        auc_error=0.002,
        facts={"Data": "made <up>"},
    )


def test_result_has_the_promised_keys(comparison: Comparison) -> None:
    assert comparison.as_dict() == {
        "plain": {"auc": 0.78, "ne": 0.85, "embedding_bytes": 8100, "seconds_per_step": 0.01},
        "compressed": {"auc": 0.79, "ne": 0.85, "embedding_bytes": 2000, "seconds_per_step": 0.01},
        "ratio": 4.05,
    }
    assert comparison.plain.tested_step == 20


class Page(HTMLParser):
    """Checks that elements close in order, and collects what could load something."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        named = ("src", "href", "xlink:href", "data", "action", "poster", "srcset")
        self.references += [value or "" for name, value in attrs if name in named]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_whole_and_loads_nothing(comparison: Comparison) -> None:
    html = render_html(comparison)
    page = Page()
    page.feed(html)
    assert page.open == []
    assert page.tags.count("svg") == 3
    assert all(reference.startswith("#") for reference in page.references)
    assert "script" not in page.tags and "link" not in page.tags
    assert "@import" not in html and not re.search(r"url\((?!#)", html.replace('"', ""))
    assert "a &lt;b&gt; &amp; c" in html and "made &lt;up&gt;" in html and "<b> &" not in html
    for text in ("4.05×", "0.7900", "router", "statistics", "How the runs went"):
        assert text in html


def test_figures_are_well_formed_and_described(comparison: Comparison) -> None:
    figures = re.findall(r"<svg.*?</svg>", render_html(comparison), flags=re.DOTALL)
    for figure in figures:
        root = ElementTree.fromstring(figure)
        assert root.attrib["aria-label"] and "viewBox" in root.attrib and "width" not in root.attrib
    identifiers = [name for figure in figures for name in re.findall(r' id="([^"]+)"', figure)]
    assert identifiers and len(identifiers) == len(set(identifiers))


def test_terminal_table_names_both_runs(comparison: Comparison) -> None:
    console = Console(width=100)
    with console.capture() as capture:
        console.print(render_comparison(comparison))
    text = capture.get()
    assert "plain" in text and "4.05×" in text and "+0.0100" in text


def test_deciles_against_sorting_by_hand() -> None:
    rng = np.random.default_rng(0)
    counts, live = rng.permutation(1000), rng.random(1000)  # all different
    groups = by_popularity(live, counts)
    order = np.argsort(counts)[::-1]
    np.testing.assert_allclose(groups.live, live[order].reshape(10, 100).mean(axis=1))
    np.testing.assert_allclose(groups.lookups, counts[order].reshape(10, 100).sum(axis=1) / counts.sum())


def test_equal_rows_share_what_they_store() -> None:
    groups = by_popularity(np.array([1.0, 1.0, 0.0, 0.0]), np.zeros(4, dtype=np.int64), groups=2)
    assert groups == PopularityGroups(live=(0.5, 0.5), lookups=(0.0, 0.0))


def test_mismatched_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="one length"):
        by_popularity(np.zeros(3), np.zeros(4))
    with pytest.raises(ValueError, match="3 rows cannot be divided into 10 groups"):
        by_popularity(np.zeros(3), np.zeros(3))


def test_warm_up_steps_do_not_count() -> None:
    recorder = RunRecorder()
    recorder.seconds = [100.0, 100.0, 1.0, 2.0]  # a short run gives up half
    assert recorder.median_seconds == 1.5
    recorder.seconds = [100.0] * 20 + [1.0] * 30 + [7.0] * 10
    assert recorder.median_seconds == 1.0
    assert recorder.mean_seconds == 2.5


def test_standard_error_of_an_auc_against_resampling() -> None:
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    label = np.repeat([0, 1], [400, 100])
    aucs = [roc_auc_score(label, rng.normal(size=500) + label) for _ in range(300)]
    assert auc_standard_error(float(np.mean(aucs)), 100, 400) == pytest.approx(np.std(aucs), rel=0.15)
    assert math.isnan(auc_standard_error(0.5, 0, 10))

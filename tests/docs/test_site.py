"""The documentation builds without a warning, and what it links to is there."""

from __future__ import annotations

import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from filelock import FileLock

import lightning_embcomp
from docs.hooks import api, messages, results, sources
from tests.pages import ROOT

_SCHEMES_OF_DATA = ("data", "mailto")


class Links(HTMLParser):
    """Anchors of a page, and what it links to."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.anchors = {""}
        self.targets: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.anchors |= {given[name] or "" for name in ("id", "name") if name in given}
        self.targets += [given[name] or "" for name in ("href", "src") if name in given]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.getbasetemp()
    # Processes that share the tests share the site, which takes some seconds to build.
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "site"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            build(folder)
    return folder


def build(folder: Path) -> None:
    # A proxy that is not there: whatever is fetched fails.
    nowhere = "http://127.0.0.1:9"
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "http_proxy": nowhere, "https_proxy": nowhere}
    unfinished = folder.with_name("unfinished")
    # Not --quiet: it hides warnings from --strict as well.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(unfinished)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    unfinished.rename(folder)


@pytest.fixture(scope="module")
def links(site: Path) -> dict[Path, Links]:
    return {page: Links(page) for page in site.rglob("*.html")}


def test_links_lead_somewhere(site: Path, links: dict[Path, Links]) -> None:
    broken = []
    for page, found in links.items():
        for target in found.targets:
            parts = urlsplit(target)
            if parts.scheme in _SCHEMES_OF_DATA:
                continue
            if parts.scheme or parts.netloc:
                if parts.scheme != "https" or "." not in parts.netloc or " " in target:
                    broken.append(f"{page.name}: {target} is no address of https")
                continue
            # The page for what does not exist is shown anywhere: its links start at the root.
            start = site if parts.path.startswith("/") and page.name == "404.html" else page.parent
            path = (start / unquote(parts.path).lstrip("/" if start == site else "")).resolve() if parts.path else page
            if path.is_dir():
                path /= "index.html"
            if not path.is_file() or site not in path.parents:
                broken.append(f"{page.name}: {target} does not exist")
            elif path.suffix == ".html" and unquote(parts.fragment) not in links[path].anchors:
                broken.append(f"{page.name}: {target} has no such anchor")
    assert not broken, "\n".join(broken)


def test_readers_fetch_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert "fonts.googleapis" not in text
        assert '<script src="http' not in text and '<link rel="stylesheet" href="http' not in text


def test_every_public_name_is_in_the_reference(links: dict[Path, Links]) -> None:
    anchors = set().union(*(found.anchors for page, found in links.items() if page.parent.name == "api"))
    modules = ["", ".callbacks", ".checkpoints", ".data", ".export", ".metrics", ".models", ".planners", ".report"]
    names = [
        f"lightning_embcomp{module}.{name}"
        for module in [*modules, ".strategies", ".methods.dct.codecs"]
        for name in api.public_names(f"lightning_embcomp{module}")
    ]
    # A name that several modules export is described once.
    described = {api.origin(name) for name in names if name in anchors}
    assert [name for name in names if api.origin(name) not in described] == []
    assert set(api.public_names("lightning_embcomp")) == set(lightning_embcomp.__all__)
    assert {name for name in names if name.count(".") == 1} <= anchors


def test_cards_fragments_results_and_commands_are_in_the_site(site: Path) -> None:
    def page(name: str) -> str:
        return (site / f"{name}.html").read_text(encoding="utf-8")

    for uri in sources.cards():
        assert (site / uri.replace(".md", ".html")).is_file()
    for fragment in (ROOT / "callbacks").glob("*.yaml"):
        assert f"callbacks/{fragment.name}" in page("configuration"), f"{fragment.name} is not shown"
    for script in (ROOT / "examples").glob("*.py"):
        assert f"examples/{script.name}" in page("examples")
    for file in results.files():
        assert f"benchmarks/results/{file.name}" in page("benchmarks") + page("distributed") + page("serving")
    for command in ("fit", "plan", "export", "report", "consolidate"):
        assert f"usage: embcomp {command}" in page("commands")
    assert "works in one process only so far" in page("messages")
    assert "router-figure" in page("how-it-works")


def test_figures_come_from_the_results() -> None:
    memory = results.load("memory")["results"]
    shown = results.render("memory")
    for name, row in memory.items():
        assert f"| {name} |" in shown and f"{row['peak_rss'] / 1e9:.2f}" in shown


def test_links_between_files_become_links_between_pages(tmp_path: Path) -> None:
    known = {"methods/a.md": "lightning_embcomp/methods/mpe/README.md", "format.md": "lightning_embcomp/cli.py"}
    source = "lightning_embcomp/methods/fiited/README.md"

    def relink(text: str) -> str:
        return sources.relink(text, "methods/b.md", source, known)

    assert relink("[x](../mpe/README.md#bytes)") == "[x](a.md#bytes)"
    assert relink("[x](../../cli.py)") == "[x](../format.md)"
    assert relink("[x](../../../examples/dlrm.yaml)") == "[x](../examples.md#dlrmyaml)"
    assert relink("[`x`](../../tables.py) [y](https://a.b)") == "`x` [y](https://a.b)"
    with pytest.raises(Exception, match="leads nowhere"):
        relink("[x](nothing.md)")


def test_messages_are_read_from_the_source(tmp_path: Path) -> None:
    (tmp_path / "area.py").write_text(
        'raise SetupError(f"table {name!r} is" " gone" + why)\nraise ValueError(text)\nraise OSError\n'
    )
    assert list(messages.collect(tmp_path)) == [("area", "SetupError", "table … is gone…")]

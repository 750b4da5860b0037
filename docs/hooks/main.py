"""Hooks of MkDocs: add the generated pages, and fill the marks of hand-written ones.

A mark is a line ``<!-- docs:NAME ARGUMENT -->``. One that nobody knows, or that names a missing file, stops the build.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

# MkDocs loads this file by its path, from any folder.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from docs.hooks import ROOT, api, checks, commands, examples, messages, results, sources  # noqa: E402

_MARK = re.compile(r"^<!-- docs:(\w+)(?: (.+?))? -->$", flags=re.MULTILINE)
_METHODS, _API = "Methods", "Python API"
"""Sections of the navigation that end with generated pages."""
_FILLS: dict[str, Callable[[str], str]] = {
    "check": checks.render,
    "commands": lambda _: commands.render(),
    "conformance": lambda _: conformance(),
    "examples": lambda _: examples.render(),
    "figure": lambda name: figure(name),
    "file": lambda path: examples.listing(path),
    "messages": lambda _: messages.render(),
    "methods": lambda _: api.method_table(),
    "plots": lambda _: results.plots(),
    "results": results.render,
    "results_others": lambda _: results.others(),
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Complete the navigation.

    Args:
        config: Configuration of the build.

    Returns:
        The same.
    """
    extend(config.nav or [], _METHODS, sorted(sources.cards()))
    extend(config.nav or [], _API, sorted(api.pages()))
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages and plots.

    Args:
        files: Files of the documentation folder.
        config: Configuration of the build.

    Returns:
        All files.
    """
    for uri, text in {**sources.pages(), **api.pages()}.items():
        files.append(File.generated(config, uri, content=text))
    for uri, path in results.plot_files().items():
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill the marks of a page.

    Args:
        markdown: Text of the page.
        page: The page.
        config: Configuration of the build.
        files: All files.

    Returns:
        The text without marks.

    Raises:
        PluginError: If a mark cannot be filled.
    """

    def fill(mark: re.Match[str]) -> str:
        name, argument = mark.groups(default="")
        if name not in _FILLS:
            raise PluginError(f"{page.file.src_uri}: nothing fills {mark[0]}; known are {', '.join(_FILLS)}")
        try:
            return _FILLS[name](argument)
        except (OSError, KeyError, ValueError, subprocess.CalledProcessError) as error:
            raise PluginError(f"{page.file.src_uri}: {mark[0]} cannot be filled: {error!r}") from error

    return _MARK.sub(fill, markdown)


def conformance() -> str:
    """Tables of what the conformance suite asserts: every callback with every check, and with every other callback.

    Returns:
        Markdown.
    """
    command = [sys.executable, "-W", "ignore", "-m", "tests.conformance.table"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return done.stdout


def figure(name: str) -> str:
    """Put an SVG into the page itself, where it takes the page's colours.

    Args:
        name: File below ``docs/images``.

    Returns:
        HTML.
    """
    svg = (ROOT / "docs" / "images" / name).read_text(encoding="utf-8")
    # Markdown ends a block of HTML at an empty line.
    lines = [line for line in svg.splitlines() if line.strip() and not line.startswith("<?xml")]
    return "<figure>\n" + "\n".join(lines) + "\n</figure>"


def extend(nav: list[Any], title: str, uris: list[str]) -> None:
    """Append pages to a section of the navigation, unless they are in it.

    Args:
        nav: Navigation as in ``mkdocs.yml``.
        title: Name of the section.
        uris: Pages to append.

    Raises:
        PluginError: If there is no such section.
    """
    for entry in nav:
        if isinstance(entry, dict) and title in entry:
            listed = [next(iter(page.values())) if isinstance(page, dict) else page for page in entry[title]]
            entry[title] = entry[title] + [uri for uri in uris if uri not in listed]
            return
    raise PluginError(f"mkdocs.yml: the navigation has no section {title!r}")

"""Pages whose text lies elsewhere in the repository: method cards, the export format, the guide to the benchmarks."""

from __future__ import annotations

import posixpath
import re

from mkdocs.exceptions import PluginError

from docs.hooks import ROOT

_METHODS = "lightning_embcomp/methods"
_OTHERS = {"format.md": "lightning_embcomp/export/README.md", "measuring.md": "benchmarks/README.md"}
_TITLES = {"format.md": "The export format", "measuring.md": "Running the benchmarks"}
"""Where the title of the file is that of another page."""
_ELSEWHERE = {"README.md": "index.md", "callbacks": "configuration.md", "examples": "examples.md"}
"""Pages that stand for files of the repository which have none."""
_HEADING = re.compile(r"^# .*$", flags=re.MULTILINE)
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)")


def cards() -> dict[str, str]:
    """Method cards.

    Returns:
        Path in the repository by page.
    """
    found = sorted((ROOT / _METHODS).glob("*/README.md"))
    return {f"methods/{card.parent.name}.md": card.relative_to(ROOT).as_posix() for card in found}


def pages() -> dict[str, str]:
    """Texts of all pages that lie elsewhere, with links that lead to pages.

    Returns:
        Markdown by page.
    """
    sources = {**_OTHERS, **cards()}
    made = {}
    for uri, source in sources.items():
        text = relink((ROOT / source).read_text(encoding="utf-8"), uri, source, sources)
        made[uri] = _HEADING.sub(f"# {_TITLES[uri]}", text, count=1) if uri in _TITLES else text
    return made


def relink(text: str, uri: str, source: str, sources: dict[str, str]) -> str:
    """Turn links between files of the repository into links between pages.

    A file that is on no page keeps its name and loses the link.

    Args:
        text: Markdown.
        uri: Page that it becomes.
        source: Path of its file in the repository.
        sources: Path in the repository by page.

    Returns:
        Markdown.

    Raises:
        PluginError: If a link leads nowhere.
    """
    page_of = {path: page for page, path in sources.items()}

    def link(found: re.Match[str]) -> str:
        label, target = found.groups()
        if target.startswith(("https://", "#")):
            return found[0]
        path, mark, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if not (ROOT / path).exists():
            raise PluginError(f"{source}: {found[0]} leads nowhere")
        page = page_of.get(path) or _ELSEWHERE.get(path) or _ELSEWHERE.get(path.partition("/")[0])
        if path.startswith("docs/"):
            page = path.removeprefix("docs/")
        if page is None:
            return label
        if path.startswith("examples/") and path.endswith((".py", ".yaml")):
            mark, anchor = "#", posixpath.basename(path).replace(".", "")
        return f"[{label}]({posixpath.relpath(page, posixpath.dirname(uri) or '.')}{mark}{anchor})"

    return _LINK.sub(link, text)

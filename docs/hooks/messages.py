"""Every message that the package can refuse something with, read from its source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from docs.hooks import ROOT

_PACKAGE = ROOT / "lightning_embcomp"
_SPECIAL = str.maketrans({character: f"\\{character}" for character in "\\`*_{}[]<>#|!"})


class Message(NamedTuple):
    """One ``raise`` with a text."""

    area: str
    """Folder or module below the package."""

    error: str
    """Name of its class."""

    text: str
    """Its text; what is filled in at run time is an ellipsis."""


def render() -> str:
    """All messages, by area.

    Returns:
        Markdown.
    """
    by_area: dict[str, list[Message]] = {}
    for message in collect(_PACKAGE):
        by_area.setdefault(message.area, []).append(message)
    parts = []
    for area, found in sorted(by_area.items()):
        lines = [f"- **{message.error}**: {message.text.translate(_SPECIAL)}" for message in sorted(set(found))]
        parts.append("\n".join([f"## {area}", "", *lines]))
    return "\n\n".join(parts)


def collect(package: Path) -> Iterator[Message]:
    """Messages of all modules of a package.

    Args:
        package: Its folder.

    Yields:
        Messages in the order of files and lines.
    """
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        area = "/".join(parts[:2]) if parts[0] == "methods" else parts[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                error = ast.unparse(node.exc.func).rpartition(".")[2]
                text = template(node.exc.args[0])
                if error.endswith("Error") and text.strip("… "):
                    yield Message(area, error, text)


def template(node: ast.expr) -> str:
    """Text of an expression that makes a string.

    Args:
        node: The expression.

    Returns:
        Its constant parts, with an ellipsis for each of the others.
    """
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(template(value) for value in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left) + template(node.right)
    return "…"

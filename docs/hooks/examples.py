"""Files of the repository, shown in full."""

from __future__ import annotations

import ast
from pathlib import Path

from docs.hooks import ROOT

_LANGUAGES = {".py": "python", ".yaml": "yaml", ".txt": "text"}


def listing(path: str) -> str:
    """One file as a block of code.

    Args:
        path: Its path in the repository.

    Returns:
        Markdown.
    """
    text = (ROOT / path).read_text(encoding="utf-8").strip()
    return f'````{_LANGUAGES[Path(path).suffix]} title="{path}"\n{text}\n````'


def render() -> str:
    """All scripts and configurations of ``examples/``, each with its first sentence.

    Returns:
        Markdown.
    """
    parts = []
    for path in sorted((ROOT / "examples").rglob("*")):
        if path.suffix not in (".py", ".yaml") or path.name == "__init__.py":
            continue
        name = path.relative_to(ROOT).as_posix()
        about = ""
        if path.suffix == ".py":
            about = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0]
        collapsed = "\n".join("    " + line if line else "" for line in listing(name).splitlines())
        parts.append(f'## {path.name}\n\n{about}\n\n??? example "{name}"\n\n{collapsed}')
    return "\n\n".join(parts)

"""Docstrings as griffe should see them: an example is a section, Sphinx's roles are code, notes have numbers."""

from __future__ import annotations

import re

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc|obj):`~?([^`]+)`")
_NOTE = re.compile(r"(?:\.\. )?(\[\d+\])_?")
_EXAMPLE = re.compile(r"^( *)Example:$", flags=re.MULTILINE)


class PlainDocstrings(griffe.Extension):
    """Rewrites the docstrings of a package when it is loaded."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """Rewrite one docstring.

        Args:
            obj: Module, class, function or attribute.
            **kwargs: Not used.
        """
        if obj.docstring is not None:
            obj.docstring.value = plain(obj.docstring.value)


def plain(text: str) -> str:
    """Rewrite a docstring.

    Args:
        text: Google style, with roles.

    Returns:
        Google style that griffe knows.
    """
    text = _ROLE.sub(r"`\1`", text)
    text = "\n".join(line if ">>>" in line or "... " in line else _NOTE.sub(_mark, line) for line in text.split("\n"))
    return _EXAMPLE.sub(r"\1Examples:", text)


def _mark(note: re.Match[str]) -> str:
    """A number in brackets is a note only where reStructuredText marks it."""
    marked = note[0] != note[1]
    return f"\\{note[1]}" if marked else note[0]

"""The matrix as Markdown: ``python -m tests.conformance.table``.

It says what the tests assert: a cell with ``works`` is a test that passes, and a refusal one that meets it.
"""

from __future__ import annotations

from .checks import CHECKS
from .matrix import MATRIX, PAIRS, SHARDED, Refusal


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(refusal: Refusal | None) -> str:
    return "works" if refusal is None else f"refused: {refusal.why}"


def table() -> str:
    """Checks by callbacks."""
    lines = [_row("Check", *(f"`{name}`" for name in MATRIX)), _row(*["---"] * (1 + len(MATRIX)))]
    for check in (*CHECKS, SHARDED):
        lines.append(_row(check, *(_cell(case.refuses.get(check)) for case in MATRIX.values())))
    return "\n".join(lines)


def pair_table() -> str:
    """Callbacks by callbacks on the same tables, in both orders of the list; the diagonal is two instances of one."""
    names = list(MATRIX)
    lines = [_row("Together with", *(f"`{name}`" for name in names)), _row(*["---"] * (1 + len(names)))]
    for i, one in enumerate(names):
        cells = [_cell(PAIRS.get(frozenset({one, other}))) if j <= i else "" for j, other in enumerate(names)]
        lines.append(_row(f"`{one}`", *cells))
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(), pair_table(), sep="\n\n")

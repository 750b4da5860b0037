"""Tables of the Pareto runs: the best of this project against every peer, by data, bytes and level."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]
_BYTES = {"training": "Bytes while training", "serving": "Bytes while serving"}


def pareto(found: Row, data: dict[str, str]) -> list[str | list[Row]]:
    """What was measured against what, and by how much ours is ahead or behind.

    Args:
        found: What the file holds.
        data: Titles of the data sets.

    Returns:
        Rows of tables, and their titles between them.
    """
    parts: list[str | list[Row]] = []
    for name, result in found["results"].items():
        points = {point["name"]: point for point in result["points"]}
        for axis, title in _BYTES.items():
            rows = _levels([row for row in result["comparisons"] if row["axis"] == axis], points, axis)
            if rows:
                parts += [f"**{data.get(name, name)}**, {title[0].lower()}{title[1:]}, {result['runs']} runs:", rows]
    return parts


def _levels(comparisons: list[Row], points: dict[str, Row], axis: str) -> list[Row]:
    """A row for each level, with a column for each peer that has a point at any of them."""
    peers = {row["family"]: points[row["theirs"]]["label"] for row in comparisons if row["theirs"] in points}
    rows = []
    for level in dict.fromkeys(row["level"] for row in comparisons):
        here = {row["family"]: row for row in comparisons if row["level"] == level}
        ours = points.get(next(iter(here.values()))["ours"])
        row: Row = {"at least": f"{level}×", "ours": _point(ours, axis, own=True)}
        row |= {label: _against(here.get(family), points, axis) for family, label in peers.items()}
        rows.append(row)
    return [row for row in rows if any(row[label] for label in peers.values())]


def _against(row: Row | None, points: dict[str, Row], axis: str) -> str | None:
    theirs = points.get(row["theirs"]) if row else None
    if row is None or theirs is None:
        return None
    point = _point(theirs, axis, own=False)
    if "difference" not in row:
        return f"none of ours; {point}"
    return f"{row['difference']['auc']:+.4f} {row['verdict']}; {point}"


def _point(point: Row | None, axis: str, *, own: bool) -> str | None:
    if point is None:
        return None
    seeds = len(point["seeds"])
    name = f"{point['label']}, " if own else ""
    more = f", {seeds} seeds" if own and seeds > 1 else ""
    return f"{name}{point['form']} {point[axis + '_ratio']:.1f}× {point['auc']:.4f}{more}"

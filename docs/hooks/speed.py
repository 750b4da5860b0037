"""Tables of the speed benchmark: lookups over dims, pooling and dtypes, whole steps, pruning events."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]


def speed(found: Row) -> list[str | list[Row]]:
    """Ratios to plain tables.

    Args:
        found: What the file holds.

    Returns:
        Rows of tables, and titles between them, of the parts that were run.
    """
    parts: list[str | list[Row]] = []
    for title, name, rows_of in (
        ("Lookup, backward and update, ratio to plain at shares of the bytes:", "embedding", _lookups),
        ("The same over dims, pooling and dtypes:", "matrix", _lookups),
        ("A whole training step:", "step", _steps),
        ("A pruning event:", "event", _events),
    ):
        if name in found:
            parts += [title, rows_of(found[name])]
    return parts


def _lookups(found: list[Row]) -> list[Row]:
    """A row for each case, a column for each share of the bytes."""
    cases: dict[tuple[Any, ...], Row] = {}
    for row in found:
        case = (row["tables"], row["rows"], row["dim"], row["pooling"], row["batch"], row["dtype"])
        mine = cases.setdefault(
            case,
            {
                "tables": row["tables"],
                "rows × columns": f"{row['rows']:,} × {row['dim']}".replace(",", " "),
                "dtype": row["dtype"],
                "ids per bag": row["pooling"],
                "batch": row["batch"],
                "plain, ms": f"{row['plain_ms']:.2f}",
            },
        )
        mine[f"{row['bytes_share']:.0%}"] = f"{row['ratio']:.2f}"
    return list(cases.values())


def _steps(found: list[Row]) -> list[Row]:
    return [
        {
            "model": row["model"],
            "columns": row["dim"],
            "batch": row["batch"],
            "target": row["target"],
            "ratio of a step": f"{row['ratio']:.2f}",
            "with events": f"{row['ratio_with_events']:.2f}",
        }
        for row in found
    ]


def _events(found: list[Row]) -> list[Row]:
    return [
        {
            "rows × columns": f"{row['rows']:,} × {row['dim']}".replace(",", " "),
            "seconds": f"{row['seconds']:.2f}",
            "extra peak, MB": f"{row['extra_peak_bytes'] / 1e6:.1f}",
        }
        for row in found
    ]

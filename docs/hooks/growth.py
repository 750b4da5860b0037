"""Tables of two files of results: what bounds the hot paths, and how costs grow."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]


def profile(found: Row) -> list[str | list[Row]]:
    """Hot paths against the bandwidth of the memory.

    Args:
        found: What the file holds.

    Returns:
        Rows of a table.
    """
    return [
        [
            {
                "path": row["path"],
                "items": f"{_count(row['items'])} {row['unit']}",
                "ms": f"{row['seconds'] * 1e3:.2f}",
                "MB in order": f"{row['streamed_bytes'] / 1e6:.1f}",
                "random lines": row["lines"] or None,
                "GB/s": f"{row['bytes_per_second'] / 1e9:.2f}",
                "of the limit": f"{row['share_of_limit']:.0%}",
            }
            for row in found["paths"]
        ]
    ]


def scale(found: Row) -> list[str | list[Row]]:
    """How costs grow.

    Args:
        found: What the file holds.

    Returns:
        Rows of tables, and text between them, of the parts that were run.
    """
    rows = found.get("rows")
    sweeps = [
        _growth(name, found[name], found[name]["sizes"], found[name]["seconds"])
        for name in ("tables", "dim", "batch", "pooling")
        if name in found
    ]
    if rows:
        sweeps += [
            _growth(f"rows, {k.replace('_', ' ')}", fit, rows["sizes"], rows[k]) for k, fit in rows["fit"].items()
        ]
    parts: list[str | list[Row]] = [sweeps] if sweeps else []
    if found.get("routing"):
        parts += ["Routing alone:", [_route(row) for row in found["routing"]]]
    if found.get("ranks"):
        cores = found["ranks"]["cores"]
        parts += [f"Sharded compressed tables, {cores} cores shared by all processes:", _ranks(found["ranks"])]
    return parts


def _route(row: Row) -> Row:
    return {
        "rows": row["rows"],
        "router, MB": f"{row['router_bytes'] / 1e6:.1f}",
        "million ids per second": f"{row['route_ids_per_second'] / 1e6:.0f}",
        "of a gather": f"{row['share_of_limit']:.0%}",
    }


def _ranks(found: Row) -> list[Row]:
    kinds = {"per_rank": f"{found['batch_per_rank']} per process", "whole": f"{found['batch_whole']} in all"}
    return [
        {
            "batch": text,
            "processes": count,
            "step, ms": f"{found[kind]['seconds'][i] * 1e3:.0f}",
            "processor time of a process, ms": f"{found[kind]['cpu_seconds'][i] * 1e3:.0f}",
        }
        for kind, text in kinds.items()
        for i, count in enumerate(found["sizes"])
    ]


def _growth(what: str, fit: Row, sizes: list[int], seconds: list[float]) -> Row:
    return {
        "what grows": what,
        "from": sizes[0],
        "to": sizes[-1],
        "ms, first": f"{seconds[0] * 1e3:.2f}",
        "ms, last": f"{seconds[-1] * 1e3:.2f}",
        "exponent": f"{fit['exponent']:.2f}",
        "R²": f"{fit['r_squared']:.2f}",
        "largest deviation": f"{fit['worst_factor'] - 1:.0%}",
    }


def _count(number: int) -> str:
    return f"{number:,}".replace(",", " ")

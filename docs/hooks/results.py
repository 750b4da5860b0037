"""Tables of the benchmarks page, made from ``benchmarks/results/*.json``, so that figures are those of the last run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from docs.hooks import ROOT, checks, growth, peers, speed

_RESULTS = ROOT / "benchmarks" / "results"
_IMAGES = ROOT / "docs" / "images"
_DATA = {
    "criteo_80k": "Criteo, 80 000 rows",
    "book_crossing": "Book-Crossing, 1.15 M rows",
    "movielens_1m": "MovieLens-1M",
    "us_flights": "US flights, 0.56 M rows",
    "large": "Made-up log, 10 M rows, 5 M ids",
}
_OWN_PAGES = {"pruned-rows.svg", "router.svg"}
"""Pictures that are not plots of results."""
_WIDEST = 12
"""Columns of a table that is made without knowing what it shows."""
Row = dict[str, Any]


def render(name: str) -> str:
    """Tables of one file of results.

    Args:
        name: Of the file, without its ending.

    Returns:
        Markdown, with a line that says what was measured on.
    """
    found = load(name)
    return "\n\n".join([_TABLES[name](found), provenance(name, found)])


def load(name: str) -> Any:  # noqa: ANN401
    """Read one file of results.

    Args:
        name: Of the file, without its ending.

    Returns:
        What it holds.
    """
    return json.loads((_RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def provenance(name: str, found: Row) -> str:
    """What a file of results was measured on.

    Args:
        name: Of the file, without its ending.
        found: What it holds.

    Returns:
        One line of Markdown.
    """
    machine = found.get("machine") if isinstance(found, dict) else None
    return f"*`benchmarks/results/{name}.json`{': ' + checks.where(machine) if machine else ''}*"


def others() -> str:
    """Tables of all files that have no section of their own.

    Returns:
        Markdown; empty if there are none.
    """
    parts = []
    for path in files():
        if path.stem in _TABLES:
            continue
        found = load(path.stem)
        tables = [f"{title}\n\n{table(rows)}" if title else table(rows) for title, rows in flat_lists(found)]
        parts.append("\n\n".join([f"### {path.stem}", *tables, provenance(path.stem, found)]))
    return "\n\n".join(parts)


def files() -> list[Path]:
    """All files of results.

    Returns:
        Their paths.
    """
    return sorted(_RESULTS.glob("*.json"))


def plot_files() -> dict[str, Path]:
    """Plots beside the results.

    Returns:
        File by its place in the site.
    """
    return {f"images/{path.name}": path for path in sorted(_RESULTS.rglob("*.svg"))}


def plots() -> str:
    """All plots of results.

    Returns:
        Markdown.
    """
    names = {path.name for path in _IMAGES.glob("*.svg")} - _OWN_PAGES | {path.name for path in _RESULTS.rglob("*.svg")}
    return "\n\n".join(
        f"![{_title(Path(name).stem)}](images/{name}){{ .plot }}\n\n*{_title(Path(name).stem)}*"
        for name in sorted(names)
    )


def table(rows: list[Row]) -> str:
    """A table with the keys of the first row as its head.

    Args:
        rows: Cells by column; missing ones stay empty.

    Returns:
        Markdown.
    """
    head = list(rows[0])
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(cell(row.get(key)) for key in head) + " |" for row in rows]
    return "\n".join(lines)


def cell(value: object) -> str:
    """A value as people read it.

    Args:
        value: A number, text, or nothing.

    Returns:
        Markdown for one cell.
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace(",", " ")
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}".replace(",", " ")
    return str(value).replace("|", "\\|")


def flat_lists(found: object, title: str = "") -> Iterator[tuple[str, list[Row]]]:
    """Lists of flat records anywhere in a result.

    Args:
        found: What a file holds.
        title: Where in it this is.

    Yields:
        Place, and rows of numbers and words.
    """
    if isinstance(found, dict):
        rows = [flat(found)] if title and all(is_value(value) for value in found.values()) else []
        for key, value in found.items():
            if key not in ("machine", "settings", "trace") and not rows:
                yield from flat_lists(value, f"{title}, {_title(key)}" if title else _title(key))
    elif isinstance(found, list) and found and all(isinstance(row, dict) for row in found):
        rows = [flat(row) for row in found]
    else:
        rows = []
    if rows and rows[0]:
        yield title, [dict(list(row.items())[:_WIDEST]) for row in rows]


def flat(row: Row) -> Row:
    """A record with what its inner records hold, one level down.

    Args:
        row: The record.

    Returns:
        Numbers and words by name.
    """
    inner = {f"{key}, {k}": v for key, value in row.items() if isinstance(value, dict) for k, v in value.items()}
    return {_title(key): value for key, value in {**row, **inner}.items() if is_value(value)}


def is_value(value: object) -> bool:
    """Whether something fits into a cell.

    Args:
        value: Anything.

    Returns:
        Whether it is a number or a text.
    """
    return isinstance(value, int | float | str)


def _title(key: str) -> str:
    return _DATA.get(key, key.replace("_", " ").replace("-", " "))


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}×"


def _difference(row: Row, metric: str) -> str:
    if not row.get("interval") or row["name"].startswith("plain"):
        return ""
    low, high = row["interval"][metric]
    return f"{row['delta_' + metric]:+.4f} [{low:+.4f}, {high:+.4f}]"


def _over_seeds(row: Row) -> str:
    spread = f" ± {row['auc_std']:.4f}" if len(row["seeds"]) > 1 else ""
    return f"{row['auc']:.4f}{spread}"


def _measured(row: Row) -> Row:
    return {
        "seeds": len(row["seeds"]),
        "test AUC": _over_seeds(row),
        "ΔAUC [95 %]": _difference(row, "auc"),
        "NE": f"{row['ne']:.4f}",
        "ΔNE": "" if row["name"].startswith("plain") else f"{row['delta_ne']:+.4f}",
    }


def _by_data(found: Row, line: Callable[[Row], Row], rows_of: Callable[[Any], list[Row]] = list) -> str:
    parts = []
    for data, group in found["results"].items():
        rows = sorted(rows_of(group), key=lambda row: _order(row["name"]))
        parts.append(f"**{_title(data)}**\n\n{table([line(row) for row in rows])}")
    return "\n\n".join(parts)


def _order(name: str) -> tuple[bool, list[tuple[float, str]]]:
    """The plain run first, then by name, with the numbers in it by size."""
    parts = [(float(part), "") if part[0].isdigit() else (-1.0, part) for part in re.findall(r"\d+\.?\d*|[^\d]+", name)]
    return not name.startswith(("plain", "dense")), parts


def _quality(found: Row) -> str:
    return _by_data(
        found,
        lambda row: {
            "run": f"`{row['name']}`",
            **_measured(row),
            "weights": _ratio(row["nominal_ratio"]),
            "all bytes held": _ratio(row["true_ratio"]),
        },
    )


def _precision(found: Row) -> str:
    return _by_data(
        found,
        lambda row: {
            "run": f"`{row['name']}`",
            **_measured(row),
            "bits per value": f"{row['average_bits']:.2f}",
            "on disk": _ratio(row["disk_ratio"]),
            "serving": _ratio(row["serving_ratio"]),
        },
    )


def _frequency_lr(found: Row) -> str:
    return _by_data(
        found,
        lambda row: {
            "run": f"`{row['name']}`",
            "rate": row["lr"],
            "test AUC": _over_seeds(row),
            "log loss": row["log_loss"],
            "state, bytes per row": row["state_bytes_per_row"],
        },
        lambda group: group["rows"],
    )


def _dct(found: Row) -> str:
    return _by_data(
        found,
        lambda row: {
            "run": f"`{row['name']}`",
            "seeds": len(row["seeds"]),
            "test AUC": f"{row['auc']:.4f}",
            "ΔAUC [95 %]": "" if row["feedback"] == "dense" else _difference(row, "auc"),
            "ΔNE": "" if row["feedback"] == "dense" else f"{row['delta_ne']:+.4f}",
            "fewer bytes after warm-up": _ratio(row["fewer_bytes_after_warmup"]),
        },
    )


def _memory(found: Row) -> str:
    return table(
        [
            {
                "case": name,
                "plain weights, GB": f"{row['plain_weight_bytes'] / 1e9:.2f}",
                "peak resident, GB": f"{row['peak_rss'] / 1e9:.2f}",
                "of it beside the imports, GB": f"{row['peak_over_import'] / 1e9:.2f}",
            }
            for name, row in found["results"].items()
        ]
    )


def _serving(found: Row) -> str:
    lookups = [
        {
            "tables": row["tables"],
            "rows × columns": f"{cell(row['rows'])} × {row['dim']}",
            "ids per bag": row["pooling"],
            "rows are": row["kind"].replace("_", " "),
            "ratio to FBGEMM's float32": f"{row['ratio_to_inference_fp32']:.2f}",
        }
        for row in found["lookup"]
    ]
    loads = [
        {
            "rows are": row["table"],
            "format": row["format"],
            "float32, MB": f"{row['plain_bytes'] / 1e6:.0f}",
            "on disk, MB": f"{row['disk_bytes'] / 1e6:.1f}",
            "resident, MB": f"{row['resident_bytes'] / 1e6:.1f}",
            "seconds": f"{row['load_seconds']:.2f}",
        }
        for row in found["load"]
    ]
    return "\n\n".join(["Lookups:", table(lookups), "Loading:", table(loads)])


def _communication(found: Row) -> str:
    rows = [
        {
            "link": "unshaped" if link["mbit"] is None else f"{link['mbit']} Mbit/s",
            "what travels": _title(part),
            "how": f"`{how}`",
            "bytes per step": int(row["sent_bytes"]),
            "fewer": _ratio(row["fewer_bytes"]),
            "step, ms": f"{row['step_ms']:.0f}",
            "faster": _ratio(row["faster"]),
        }
        for link in found["links"]
        for part in ("data_parallel", "model_parallel", "whole")
        for how, row in link[part].items()
    ]
    return table(rows)


def _strategy(found: Row) -> str:
    return table(
        [
            {
                "processes": processes,
                "hand-written loop, ms": f"{row['hand'] * 1e3:.1f}",
                "`TorchRecStrategy`, ms": f"{row['strategy'] * 1e3:.1f}",
                "longer by": f"{found['overhead'][processes]:.1%}",
            }
            for processes, row in found["seconds_per_step"].items()
        ]
    )


def _plans(found: Row) -> str:
    rows = []
    for machine, plans in found["plans"].items():
        for kind, made in plans.items():
            plan = made["plan"]
            rows.append(
                {
                    "devices": machine,
                    "tables": kind,
                    "all ranks, GB": f"{plan['bytes'] / 1e9:.1f}" if plan else "no plan",
                    "fullest rank, GB": f"{plan['bytes_of_fullest_rank'] / 1e9:.1f}" if plan else "",
                }
            )
    return table(rows)


def _joined(parts: list[str | list[Row]]) -> str:
    return "\n\n".join(part if isinstance(part, str) else table(part) for part in parts)


_TABLES: dict[str, Callable[[Any], str]] = {
    "communication": _communication,
    "dct": _dct,
    "frequency_lr": _frequency_lr,
    "memory": _memory,
    "pareto": lambda found: _joined(peers.pareto(found, _DATA)),
    "plans": _plans,
    "precision": _precision,
    "profile": lambda found: _joined(growth.profile(found)),
    "quality": _quality,
    "scale": lambda found: _joined(growth.scale(found)),
    "serving": _serving,
    "speed-1-threads": lambda found: _joined(speed.speed(found)),
    "speed-2-threads": lambda found: _joined(speed.speed(found)),
    "strategy": _strategy,
}

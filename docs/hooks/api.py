"""Pages of the Python API: every public name once, at the place from which it is imported first."""

from __future__ import annotations

import ast
from functools import cache
from typing import NamedTuple

from mkdocs.exceptions import PluginError

from docs.hooks import ROOT

_PACKAGE = "lightning_embcomp"


class Area(NamedTuple):
    """One page."""

    module: str
    """Module whose ``__all__`` is shown."""

    title: str
    """Heading of the page."""

    intro: str
    """What it is for."""

    more: tuple[str, ...] = ()
    """Further names, with their modules."""


_AREAS = {
    "index": Area(
        _PACKAGE,
        "lightning_embcomp",
        "What a user imports: callbacks, their settings, the strategy and the planner.",
    ),
    "callbacks": Area(f"{_PACKAGE}.callbacks", "callbacks", "The callbacks alone, under one name."),
    "checkpoints": Area(
        f"{_PACKAGE}.checkpoints", "checkpoints", "Checkpoint directories of sharded runs, read and written."
    ),
    "codecs": Area(
        f"{_PACKAGE}.methods.dct.codecs", "methods.dct.codecs", "How pooled rows and their gradients travel."
    ),
    "data": Area(f"{_PACKAGE}.data", "data", "Click logs as batches."),
    "export": Area(f"{_PACKAGE}.export", "export", "Low-precision tables: written, read, served."),
    "metrics": Area(f"{_PACKAGE}.metrics", "metrics", "Metrics of click models, as functions and for torchmetrics."),
    "models": Area(f"{_PACKAGE}.models", "models", "The reference model."),
    "planners": Area(f"{_PACKAGE}.planners", "planners", "Sharding plans that know what compressed tables take."),
    "report": Area(
        f"{_PACKAGE}.report",
        "report",
        "Bytes of a checkpoint, and of a live module.",
        (f"{_PACKAGE}.report.live.measure",),
    ),
    "strategies": Area(f"{_PACKAGE}.strategies", "strategies", "Training with sharded tables."),
    "surgery": Area(
        _PACKAGE,
        "surgery and engine",
        "`lightning_embcomp.engine` and `lightning_embcomp.kernels` are internal: they may change in any release. These"
        " few names of theirs, and of `lightning_embcomp.surgery`, are used on other pages and kept.",
        (
            f"{_PACKAGE}.surgery.to_plain",
            f"{_PACKAGE}.surgery.replace",
            f"{_PACKAGE}.surgery.UnsupportedTableError",
            f"{_PACKAGE}.tables.UnknownTableError",
            f"{_PACKAGE}.engine.memory.TableMemory",
            f"{_PACKAGE}.engine.memory.table_memory",
            f"{_PACKAGE}.engine.counters.share_counters",
            f"{_PACKAGE}.engine.counter_sgd.counter_sgd_fused_params",
        ),
    ),
}
_ERRORS = "Errors"
_MEMBERS = {"TorchRecStrategy": ("planner", "codec_registry", "sharded_paths", "sharded_modules", "shard")}
"""Members to show, where most of them are Lightning's to call."""
_GROUPS = {
    "Callbacks": (
        "DimensionPruning",
        "MixedPrecisionSearch",
        "FrequencyAwareLR",
        "CompressionBudget",
        "GradientThresholding",
        "ModelExport",
        "EmbeddingTrafficMonitor",
        "ReshardOnImbalance",
        "CompressionCallback",
    ),
    "Settings": (
        "PruningSchedule",
        "Granularity",
        "PrecisionSearch",
        "RowQuantization",
        "CounterSettings",
        "BudgetControl",
        "ErrorFeedback",
        "ThresholdSettings",
    ),
    "Several processes": (
        "TorchRecStrategy",
        "PooledThresholding",
        "comm_codecs",
        "CompressionAwarePlanner",
        "TableFootprint",
    ),
}
"""Sections of the first page; errors and what is new come after them."""


def pages() -> dict[str, str]:
    """All pages.

    Returns:
        Markdown by page.
    """
    shown: dict[str, str] = {}
    made = {}
    for slug, area in _AREAS.items():
        uri = f"api/{slug}.md"
        names = [f"{area.module}.{name}" for name in public_names(area.module)] if slug != "surgery" else []
        fresh = [name for name in [*names, *area.more] if origin(name) not in shown]
        known = [name for name in names if name not in fresh]
        shown |= {origin(name): name for name in fresh}
        made[uri] = _page(area, fresh, {name: shown[origin(name)] for name in known}, grouped=slug == "index")
    return made


def _page(area: Area, fresh: list[str], known: dict[str, str], *, grouped: bool) -> str:
    parts = [f"# {area.title}", area.intro]
    if known:
        links = ", ".join(f"[`{name.rpartition('.')[2]}`][{at}]" for name, at in sorted(known.items()))
        parts.append(f"Described elsewhere, and also found in `{area.module}`: {links}.")
    if not grouped:
        parts += [f"::: {name}" for name in fresh]
        return "\n\n".join(parts)
    left = {name.rpartition(".")[2]: name for name in fresh}
    for title, names in _GROUPS.items():
        parts += [f"## {title}", *(_entry(left.pop(name)) for name in names)]
    errors = [name for name in left if name.endswith("Error")]
    for title, names in ((_ERRORS, tuple(errors)), ("More", tuple(name for name in left if name not in errors))):
        if names:
            parts += [f"## {title}", *(_entry(left[name]) for name in names)]
    return "\n\n".join(parts)


def _entry(name: str) -> str:
    """A name below a section of the first page."""
    members = _MEMBERS.get(name.rpartition(".")[2])
    chosen = f"\n      members: [{', '.join(members)}]" if members else ""
    return f"::: {name}\n    options:\n      heading_level: 3{chosen}"


def method_table() -> str:
    """Table of the methods, one line per card: what its title and its first paragraph say.

    Returns:
        Markdown.

    Raises:
        PluginError: If a card has no title or no text.
    """
    lines = ["| Method | In short |", "|---|---|"]
    for card in sorted((ROOT / _PACKAGE / "methods").glob("*/README.md")):
        title, _, rest = card.read_text(encoding="utf-8").partition("\n\n")
        first = " ".join(rest.strip().split("\n\n")[0].split())
        if not title.startswith("# ") or not first:
            raise PluginError(f"{card}: a card begins with a title and a paragraph")
        lines.append(f"| [{title.removeprefix('# ')}](methods/{card.parent.name}.md) | {first} |")
    return "\n".join(lines)


@cache
def public_names(module: str) -> tuple[str, ...]:
    """Names in ``__all__`` of a module, read from its source.

    Args:
        module: Dotted name.

    Returns:
        The names, in their order.

    Raises:
        PluginError: If the module has no ``__all__``.
    """
    for node in _parsed(module).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return tuple(ast.literal_eval(node.value))
    raise PluginError(f"{module} has no __all__: its public names are not known")


def origin(name: str) -> str:
    """Where a name is defined, followed through imports.

    Args:
        name: Dotted name with its module.

    Returns:
        Dotted name with the module that defines it.
    """
    module, _, own = name.rpartition(".")
    for node in ast.walk(_parsed(module)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(_PACKAGE):
            for alias in node.names:
                if (alias.asname or alias.name) == own:
                    return origin(f"{node.module}.{alias.name}")
    return name


@cache
def _parsed(module: str) -> ast.Module:
    path = ROOT.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"))

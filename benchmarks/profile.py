"""Every hot path against the memory of this machine: bytes that must move, and how near to its limit each one is.

::

    python -m benchmarks.profile             # writes benchmarks/results/profile.json; 3 minutes, 3 GB
    python -m benchmarks.profile --quick     # small cases, whose figures mean nothing; writes nothing

One thread, one table, uniform ids. What a path must move, however it is written, is counted as

- ``streamed_bytes``, read or written in order: N ids of 8 bytes, a route of 5 bytes per id (class and slot), pooled
  rows and gradients of 4 B D bytes, rows of a batch that is rounded, everything that an event or an export reads and
  writes;
- ``lines``, of 64 bytes, from random places: one of the router and one of the utilities per id; those of a row (its
  bytes over 64, rounded up) per id for lookups, and per distinct row, with one for the optimizer state, for updates.

Nothing that a path writes only to read it again is counted: the hash table of an update, slabs of an event, buffers of
an export. A line that is changed counts once, and so does a cached one that is needed twice.

``limit_seconds`` is the time in which this machine does that: a copy of 256 MB gives bytes per second (read and
written) for what is streamed; a loop that prefetches one random line after the other, in a memory of the same size,
gives seconds per line. ``share_of_limit`` is that over the time taken. It can pass 1, since lines share pages and rows
lie in the cache.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch

from benchmarks.machine import describe
from benchmarks.serving import host, look_up, precision
from benchmarks.speed import RESULTS, interleaved, pruned_engine
from lightning_embcomp.engine.memory import engine_bytes
from lightning_embcomp.export import build, folder_bytes, write
from lightning_embcomp.export.expansion import expand
from lightning_embcomp.export.serving import ServedTables
from lightning_embcomp.kernels.assemble import assemble, disassemble
from lightning_embcomp.kernels.intrinsics import prefetch
from lightning_embcomp.kernels.pool import pool
from lightning_embcomp.kernels.quantize import Rounding, round_rows
from lightning_embcomp.kernels.route import find, route
from lightning_embcomp.kernels.threshold import select_large
from lightning_embcomp.kernels.types import NO_CLASS
from lightning_embcomp.kernels.update import UpdateRule, update_rows

LINE = 64
AHEAD = 16
ID, ROUTE, FLOAT, UTILITY = 8, 5, 4, 2
"""Bytes of an id, of its class and slot, of a value, of a utility."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large the cases are."""

    rows: int = 2_000_000
    dim: int = 64
    batch: int = 2048
    pooling: int = 20
    vector: int = 4_000_000
    exported: int = 200_000
    copied: int = 1 << 28

    @property
    def ids(self) -> int:
        """Ids of a batch."""
        return self.batch * self.pooling


QUICK = Sizes(rows=2_000, dim=16, batch=32, pooling=4, vector=4_000, exported=1_000, copied=1 << 20)


@dataclass(frozen=True, kw_only=True)
class HotPath:
    """A hot path, and what it must move."""

    name: str
    step: Callable[[int], object]
    streamed: float
    lines: float = 0
    memory: int = 0
    """Bytes of what the lines are taken from."""
    items: int = 0
    unit: str = "ids"


@numba.njit(cache=True, boundscheck=False)
def fetch(words: np.ndarray, lines: np.ndarray, ahead: int) -> int:
    """Read a word of one cache line after the other."""
    total = 0
    for i in range(lines.shape[0]):
        prefetch(words, np.intp(lines[np.uint64(min(i + ahead, lines.shape[0] - 1))] * 8))  # type: ignore[call-arg]
        total += words[np.uint64(lines[np.uint64(i)] * 8)]
    return total


def lines_of(row_bytes: np.ndarray) -> int:
    """Cache lines of rows that begin at the start of a line.

    Args:
        row_bytes: Bytes of each row.

    Returns:
        The sum; rows without bytes have none.

    Example:
        >>> lines_of(np.array([0, 32, 64, 65]))
        4
    """
    return int((-(-row_bytes // LINE)).sum())


def limit(path: HotPath, bytes_per_second: float, seconds_per_line: float) -> float:
    """Seconds that this machine needs for what a path must move.

    Example:
        >>> limit(HotPath(name="", step=print, streamed=2e9, lines=1e6), 4e9, 5e-9)
        0.505
    """
    return path.streamed / bytes_per_second + path.lines * seconds_per_line


def training(sizes: Sizes) -> Iterator[HotPath]:
    """Routing, lookup, class outputs, utilities, update and event of one table at 35 % of its bytes."""
    rows, dim, batch, n = sizes.rows, sizes.dim, sizes.batch, sizes.ids
    engine, pruner = pruned_engine(1, rows, dim, 0.65)
    ids = [torch.randint(0, rows, (n,), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    offsets = torch.arange(0, n + 1, sizes.pooling)
    grad = torch.randn(batch, dim) * 1e-3
    layout, router, classes = engine.features.pooled(batch), engine.router.tensors, len(engine.classes)
    tables, columns, utility = engine.split_embedding_weights(), engine.columns, engine.utility
    states = [state["momentum1"] for state in engine.get_optimizer_state()]
    rules = [UpdateRule(kind="rowwise_adagrad", learning_rate=0.02)] * classes
    routes = [find(part, offsets, layout, router, classes) for part in ids]
    row_bytes = np.zeros(NO_CLASS + 1, np.int64)
    row_bytes[:classes] = FLOAT * columns.width.numpy()
    stored = lines_of(row_bytes[routes[0].row_class.numpy()])
    distinct = np.unique(ids[0].numpy(), return_index=True)[1]
    classes_of_distinct = routes[0].row_class.numpy()[distinct]
    touched = lines_of(row_bytes[classes_of_distinct]) + int((classes_of_distinct != NO_CLASS).sum())
    weights, moments = sum(t.nbytes for t in tables), sum(s.nbytes for s in states)
    pooled_bytes, words = FLOAT * batch * dim, router.words.nbytes

    yield HotPath(
        name="routing",
        step=lambda turn: find(ids[turn % 4], offsets, layout, router, classes),
        streamed=(ID + ROUTE) * n,
        lines=n,
        memory=words,
        items=n,
    )
    yield HotPath(
        name="pooled lookup",
        step=lambda turn: pool(tables, routes[turn % 4], offsets, None, layout, columns),
        streamed=ROUTE * n + pooled_bytes,
        lines=stored,
        memory=weights,
        items=n,
    )
    lists = route(ids[0], offsets, layout, router, classes)
    bags = np.diff(lists.bag_start)
    parts = [torch.randn(b, w) if b else None for b, w in zip(bags.tolist(), columns.width.tolist(), strict=True)]
    parts_bytes = sum(part.nbytes for part in parts if part is not None)

    def outputs(turn: int) -> None:
        assemble(parts, offsets, lists, layout, columns)
        disassemble(grad, offsets, lists, layout, columns)

    yield HotPath(
        name="class outputs, there and back",
        step=outputs,
        streamed=2 * (parts_bytes + pooled_bytes + int(bags.sum()) * FLOAT),
        items=int(bags.sum()),
        unit="class bags",
    )
    assert utility is not None
    yield HotPath(
        name="utilities",
        step=lambda turn: utility.observe(grad, ids[turn % 4], offsets, layout, None, None),
        streamed=ID * n + pooled_bytes,
        lines=n,
        memory=UTILITY * rows,
        items=n,
    )
    yield HotPath(
        name="grouping and update",
        step=lambda turn: update_rows(tables, states, rules, grad, routes[turn % 4], offsets, None, layout, columns),
        streamed=ROUTE * n + pooled_bytes,
        lines=touched,
        memory=weights + moments,
        items=n,
    )
    assert engine_bytes(engine) >= weights + moments
    yield HotPath(
        name="pruning event",
        step=lambda turn: pruner.step(0.98),
        # Utilities decay, and are read to decide; router, weights and state are read and written.
        streamed=3 * UTILITY * rows + 2 * (words + weights + moments),
        items=rows,
        unit="rows",
    )


def rounding(sizes: Sizes) -> Iterator[HotPath]:
    """The fake quantiser at six widths, rows of a batch read and written."""
    n, dim = sizes.ids, sizes.dim
    rows, widths = torch.randn(n, dim), torch.tensor([2, 3, 4, 5, 6, 8])
    settings = Rounding(
        group=torch.randint(0, 128, (n,)),
        table=torch.zeros(128, dtype=torch.int64),
        widths=widths,
        shares=torch.full((128, len(widths)), 1 / len(widths)),
        steps=torch.full((1, len(widths)), 0.1),
        offset=torch.zeros(1, dim),
    )
    yield HotPath(
        name="fake quantiser, six widths",
        step=lambda turn: round_rows(rows, settings),
        streamed=n * (2 * FLOAT * dim + ID),
        items=n,
        unit="rows",
    )


def thresholding(sizes: Sizes) -> Iterator[HotPath]:
    """What reaches a threshold of a gradient with a residual: one entry in a hundred."""
    n = sizes.vector
    grad, residual = torch.randn(n), torch.randn(n)
    yield HotPath(
        name="threshold selection, 1 %",
        # A factor of 0 leaves the residual as it is, so that every round selects the same entries.
        step=lambda turn: select_large(grad, residual, factor=0.0, threshold=2.576),
        streamed=FLOAT * n * 3 + 0.01 * n * 2 * FLOAT,
        items=n,
        unit="entries",
    )


def serving(sizes: Sizes) -> Iterator[HotPath]:
    """Served lookups, the packed form brought into the one that is served, and the export itself."""
    rows, dim, n = sizes.rows, sizes.dim, sizes.ids
    ids = [torch.randint(0, rows, (n,), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    offsets = torch.arange(0, n + 1, sizes.pooling)
    pooled = FLOAT * sizes.batch * dim
    for name, bits, mixed in (("lookup of 4-bit rows", 4, False), ("lookup of rows of mixed bits", 8, True)):
        rounded = precision(rows, dim, by_row=True) if mixed else None
        found = expand(build([host(1, rows, dim, rounded)], bits))
        router = sum(tensor.nbytes for tensor in found.tensors.values()) if mixed else 0
        per_row = np.array([part.shape[1] for part in found.rows])
        share = found.counts.sum(0).numpy() / rows
        lines = n * float((share[: len(per_row)] * -(-per_row // LINE)).sum()) + (n if mixed else 0)
        yield HotPath(
            name=name,
            step=partial(look_up, ServedTables(found, [0]), ids, offsets),
            streamed=ID * n + pooled,
            lines=lines,
            memory=sum(part.nbytes for part in found.rows) + router,
            items=n,
        )
        del found
    rows = sizes.exported
    source = [host(1, rows, dim, precision(rows, dim, by_row=False))]
    packed = build(source, 8, format="packed")
    stored = sum(tensor.nbytes for tensor in packed.tensors.values())
    opened = sum(part.nbytes for part in expand(packed).rows)
    yield HotPath(
        name="expansion of packed rows",
        step=lambda turn: expand(packed),
        streamed=stored + opened,
        items=rows,
        unit="rows",
    )
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "out"

        def export(turn: int) -> None:
            write(build(source, 8, format="packed"), target, overwrite=True)

        export(0)
        yield HotPath(
            name="export to a file, packed",
            step=export,
            streamed=FLOAT * rows * dim + sum(folder_bytes(target).values()),
            items=rows,
            unit="rows",
        )


PARTS: tuple[Callable[[Sizes], Iterator[HotPath]], ...] = (training, rounding, thresholding, serving)


def measure(path: HotPath, sizes: Sizes, rounds: int) -> dict[str, Any]:
    """Seconds of a path, in turn with a copy and a gather, and how near to their sum it is.

    Args:
        path: The path.
        sizes: Bytes to copy.
        rounds: Timed rounds.
    """
    source = torch.ones(sizes.copied // FLOAT)
    target = torch.empty_like(source)
    count = max(1, round(path.lines))
    # From PyTorch, as tables are: NumPy asks for huge pages, in which a random line costs less.
    words = torch.ones(max(8, path.memory // 64 * 8), dtype=torch.int64).numpy()
    lines = np.random.default_rng(0).integers(0, len(words) // 8, count)
    steps = [path.step, lambda turn: target.copy_(source), lambda turn: fetch(words, lines, AHEAD)]
    taken, copied, fetched = interleaved(steps, rounds)
    bandwidth, per_line = 2 * source.nbytes / copied, fetched / count
    least = limit(path, bandwidth, per_line)
    return {
        "path": path.name,
        "items": path.items,
        "unit": path.unit,
        "seconds": taken,
        "items_per_second": path.items / taken,
        "streamed_bytes": round(path.streamed),
        "lines": round(path.lines),
        "bytes_per_second": (path.streamed + LINE * path.lines) / taken,
        "copy_bytes_per_second": bandwidth,
        "gather_lines_per_second": 1 / per_line if path.lines else None,
        "limit_seconds": least,
        "share_of_limit": least / taken,
    }


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11, help="timed rounds per path (default: 11)")
    parser.add_argument("--quick", action="store_true", help="small cases, to see whether it runs; writes nothing")
    args = parser.parse_args()
    logging.getLogger().setLevel(logging.WARNING)
    torch.set_num_threads(1)
    sizes, rounds = (QUICK, 1) if args.quick else (Sizes(), args.rounds)
    results = []
    for part in PARTS:
        for path in part(sizes):
            results.append(measure(path, sizes, rounds))
            print(json.dumps(results[-1]), flush=True)
    if not args.quick:
        report = {"machine": describe(), "threads": 1, "rounds": rounds, "paths": results}
        (RESULTS / "profile.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""How the cost of a step, of routing and of a pruning event grows with rows, dims, batch, pooling, tables and ranks.

::

    python -m benchmarks.scale        # writes benchmarks/results/scale.json; 25 minutes, 12 GB

Every sweep changes one size, gives seconds per size, and the exponent of the power law that fits them (least squares of
the logarithms): 0 does not grow, 1 grows in proportion; how well it fits stands beside. ``routing`` compares the
routing kernel with the least that any router must do: fetch one cache line per id from a random place of the same
memory. ``ranks`` is :mod:`benchmarks.scale_ranks`.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch

from benchmarks import scale_ranks
from benchmarks.machine import describe
from benchmarks.speed import interleaved, look_up, pruned_engine, zipf_ids
from lightning_embcomp.engine.routed import RoutedEmbeddings
from lightning_embcomp.kernels.intrinsics import prefetch
from lightning_embcomp.kernels.route import find

RESULTS = Path(__file__).parent / "results"
SHARE = 0.35
BASE: dict[str, int] = {"tables": 8, "rows": 100_000, "dim": 16, "pooling": 4, "batch": 1024}
SWEEPS: dict[str, tuple[int, ...]] = {
    "tables": (1, 4, 16, 64),
    "dim": (16, 32, 64, 128),
    "pooling": (1, 4, 16, 64),
    "batch": (256, 1024, 4096, 16384),
}
ROWS = (1_000_000, 10_000_000, 100_000_000)
LINE_WORDS = 8


def fit(sizes: Sequence[float], seconds: Sequence[float]) -> dict[str, float]:
    """How well a power law fits.

    Args:
        sizes: What grows.
        seconds: What it costs.

    Returns:
        ``exponent``, the share of the variance of log seconds that it explains (``r_squared``, which says little where
        the cost hardly grows), and the largest factor between a measurement and the law (``worst_factor``).

    Example:
        >>> fit([1, 10, 100], [2, 20, 200])
        {'exponent': 1.0, 'r_squared': 1.0, 'worst_factor': 1.0}
    """
    x, y = np.log(sizes), np.log(seconds)
    slope, start = np.polyfit(x, y, 1)
    off = y - slope * x - start
    spread = float(((y - y.mean()) ** 2).sum())
    explained = 1 - float((off**2).sum()) / spread if spread else 1.0
    found = {"exponent": slope, "r_squared": explained, "worst_factor": np.exp(np.abs(off).max())}
    return {name: round(float(value), 6) + 0.0 for name, value in found.items()}


def batches(
    tables: int, rows: int, dim: int, pooling: int, batch: int, *, uniform: bool = False
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Ids of a few batches, offsets, and a gradient."""
    rng = np.random.default_rng(0)
    count = batch * pooling

    def ids() -> np.ndarray:
        return rng.integers(0, rows, count) if uniform else zipf_ids(rng, rows, count)

    given = [torch.from_numpy(np.concatenate([ids() for _ in range(tables)])) for _ in range(8)]
    return given, torch.arange(0, tables * count + 1, pooling), torch.randn(batch, tables * dim) * 1e-3


def sweep(name: str, rounds: int) -> dict[str, Any]:
    """Seconds of forward + backward + update as one size grows."""
    seconds = []
    for size in SWEEPS[name]:
        case = {**BASE, name: size}
        engine, _ = pruned_engine(case["tables"], case["rows"], case["dim"], 1 - SHARE)
        step = partial(look_up, engine, *batches(**case))
        seconds += interleaved([step], rounds)
        print(name, size, f"{seconds[-1] * 1e3:.2f} ms", flush=True)
    return {"sizes": SWEEPS[name], "seconds": seconds, **fit(SWEEPS[name], seconds)}


def rows_sweep(rounds: int, most: int) -> dict[str, Any]:
    """A step, routing and a pruning event as one table grows."""
    found: dict[str, Any] = {"sizes": [rows for rows in ROWS if rows <= most], "dim": 16, "ids": 65536}
    kinds = ("step_zipf", "step_uniform", "event")
    found |= {kind: [] for kind in kinds}
    for rows in found["sizes"]:
        engine, pruner = pruned_engine(1, rows, 16, 1 - SHARE)
        for kind, uniform in (("step_zipf", False), ("step_uniform", True)):
            step = partial(look_up, engine, *batches(1, rows, 16, 4, 16384, uniform=uniform))
            found[kind] += interleaved([step], rounds)
        pruner.step(0.98)
        taken = []
        for turn in range(3):
            step(turn)
            started = time.perf_counter()
            pruner.step(0.98)
            taken.append(time.perf_counter() - started)
        found["event"].append(float(np.median(taken)))
        print(rows, {kind: f"{found[kind][-1] * 1e3:.2f} ms" for kind in kinds}, flush=True)
        del engine, pruner
    found["fit"] = {kind: fit(found["sizes"], found[kind]) for kind in kinds}
    found["event_ns_per_row"] = [s / n * 1e9 for s, n in zip(found["event"], found["sizes"], strict=True)]
    return found


@numba.njit(cache=True, boundscheck=False)
def fetch_lines(words: np.ndarray, ids: np.ndarray, ahead: int) -> int:
    """Read all of one cache line per id, of those that hold a block of 64 rows."""
    total = 0
    for i in range(ids.shape[0]):
        if i + ahead < ids.shape[0]:
            prefetch(words, np.intp((ids[i + ahead] >> 6) * LINE_WORDS))
        first = (ids[i] >> 6) * LINE_WORDS
        for word in range(LINE_WORDS):
            total += words[first + word]
    return total


def routing(rounds: int, most: int) -> list[dict[str, Any]]:
    """Ids per second of the routing kernel, and of a gather of the same cache lines, on one thread."""
    results = []
    for rows in (rows for rows in ROWS if rows <= most):
        engine, _ = pruned_engine(1, rows, 4 * 4, 1 - SHARE)
        ids, offsets, _ = batches(1, rows, 16, 1, 1 << 18, uniform=True)
        words = engine.router.tensors.words.numpy()
        layout = engine.features.pooled(1 << 18)

        def gather(turn: int, words: np.ndarray = words, ids: list[torch.Tensor] = ids) -> None:
            fetch_lines(words, ids[turn % len(ids)].numpy(), 16)

        def route(turn: int, engine: RoutedEmbeddings = engine, ids: list[torch.Tensor] = ids) -> None:
            find(ids[turn % len(ids)], offsets, layout, engine.router.tensors, len(engine.classes))  # noqa: B023

        least, taken = interleaved([gather, route], rounds)
        count = 1 << 18
        results.append(
            {
                "rows": rows,
                "router_bytes": words.nbytes,
                "gather_ids_per_second": count / least,
                "route_ids_per_second": count / taken,
                "share_of_limit": least / taken,
            }
        )
        print(json.dumps(results[-1]), flush=True)
        del engine
    return results


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds per case (default: 15)")
    parser.add_argument("--most-rows", type=int, default=ROWS[-1], help="largest table (default: 100 million rows)")
    parts: dict[str, Callable[[], Any]] = {
        **{name: partial(lambda n: sweep(n, args.rounds), name) for name in SWEEPS},
        "rows": lambda: rows_sweep(args.rounds, args.most_rows),
        "routing": lambda: routing(args.rounds, args.most_rows),
        "ranks": scale_ranks.ranks,
    }
    parser.add_argument("--only", choices=list(parts), nargs="*", default=list(parts), help="parts to run")
    args = parser.parse_args()
    logging.getLogger().setLevel(logging.WARNING)
    torch.set_num_threads(1)
    path = RESULTS / "scale.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    report |= {"machine": describe(), "base": BASE, "bytes_share": SHARE, "rounds": args.rounds}
    for name in args.only:
        report[name] = parts[name]()
    path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

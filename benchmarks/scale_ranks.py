"""How a step with sharded compressed tables grows with the number of processes; ``benchmarks.scale`` runs it.

::

    python -m benchmarks.scale_ranks               # prints; 3 minutes
    python -m benchmarks.scale_ranks --smoke       # a few steps on small tables

The model of ``benchmarks.strategy`` under ``TorchRecStrategy`` with ``DimensionPruning``, tables spread table-wise,
over gloo, one thread per process. ``per_rank`` keeps the batch of a process, ``whole`` that of all together.

Wall time is that of the slowest process. Processes that share cores wait for each other, so beside it stands
``cpu_seconds``: processor time per step and process, of all its threads, which does not count that wait but counts
gloo's polling. On a machine with fewer cores than processes only the latter says anything.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import time
import warnings
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist

from benchmarks.strategy import Model, loader, make_batches, run_workers
from lightning_embcomp import DimensionPruning, PruningSchedule, TorchRecStrategy

RANKS = (1, 2, 4)
BATCH = 512
"""Rows of a process, and a quarter of the rows of all."""
SKIPPED = 5
"""First steps, in which DDP rebuilds its buckets and kernels are loaded."""


class Clocks(pl.Callback):
    """Wall and processor seconds of each step."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def on_train_batch_start(self, *args: object) -> None:
        """Note the time."""
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())

    def on_train_end(self, *args: object) -> None:
        """Note the time."""
        self.on_train_batch_start()

    def medians(self) -> dict[str, float]:
        """Of the steps after the first ones."""
        found = {"seconds": self.wall, "cpu_seconds": self.cpu}
        return {name: float(np.median(np.diff(times)[SKIPPED:])) for name, times in found.items()}


def work(size: int, steps: int) -> None:
    """One process; prints its medians as JSON.

    Args:
        size: Rows of its batches.
        steps: Timed steps.
    """
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    clocks = Clocks()
    pruning = DimensionPruning(target=0.65, schedule=PruningSchedule(every_n_steps=1_000_000))
    trainer = pl.Trainer(
        strategy=TorchRecStrategy(sharding={"*": "table_wise"}),
        accelerator="cpu",
        devices=int(os.environ["WORLD_SIZE"]),
        max_epochs=1,
        callbacks=[pruning, clocks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Model(), loader(make_batches(size, int(os.environ["RANK"])), steps + SKIPPED))
    print(json.dumps(clocks.medians()), flush=True)
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


def together(found: list[dict[str, float]]) -> dict[str, float]:
    """What several processes took: the wall time of the slowest, the mean of processor times.

    Example:
        >>> together([{"seconds": 1.0, "cpu_seconds": 0.5}, {"seconds": 2.0, "cpu_seconds": 1.0}])
        {'seconds': 2.0, 'cpu_seconds': 0.75}
    """
    return {
        "seconds": max(one["seconds"] for one in found),
        "cpu_seconds": statistics.mean(one["cpu_seconds"] for one in found),
    }


def ranks(steps: int = 60, counts: tuple[int, ...] = RANKS) -> dict[str, Any]:
    """Seconds per step by number of processes.

    Args:
        steps: Timed steps of each case.
        counts: Numbers of processes.
    """
    most = max(RANKS)
    found: dict[str, Any] = {"sizes": list(counts), "batch_per_rank": BATCH, "batch_whole": most * BATCH}
    found["cores"] = os.cpu_count()
    for kind in ("per_rank", "whole"):
        cases = []
        for count in counts:
            size = BATCH if kind == "per_rank" else most * BATCH // count
            said = run_workers("benchmarks.scale_ranks", f"{size},{steps}", count)
            cases.append(together([json.loads(text.strip().splitlines()[-1]) for text in said]))
            rows = size * count / cases[-1]["seconds"]
            print(kind, count, json.dumps(cases[-1]), f"{rows:.0f} rows/s", flush=True)
        found[kind] = {name: [case[name] for case in cases] for name in cases[0]}
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="timed steps per case (default: 60)")
    parser.add_argument("--smoke", action="store_true", help="a few steps on one and two processes")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(*map(int, args.worker.split(",")))
    print(json.dumps(ranks(4, (1, 2)) if args.smoke else ranks(args.steps), indent=1))


if __name__ == "__main__":
    main()

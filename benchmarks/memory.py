"""Peak resident memory of whole training processes, each in a process of its own.

::

    python -m benchmarks.memory              # writes benchmarks/results/memory.json

``large``: 100 M rows × 64 float32 (25.6 GB of weights) at target 0.95. ``pair``: 20 M rows × 32, plain against 0.65.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from benchmarks.machine import describe, peak_rss, rss
from benchmarks.speed import zipf_ids
from lightning_embcomp import DimensionPruning
from lightning_embcomp.models import ClickModel

RESULTS = Path(__file__).parent / "results"
CASES: dict[str, dict[str, Any]] = {
    "large 100M x 64, target 0.95": {"rows": 100_000_000, "dim": 64, "target": 0.95},
    "pair 20M x 32, plain": {"rows": 20_000_000, "dim": 32, "target": None},
    "pair 20M x 32, target 0.65": {"rows": 20_000_000, "dim": 32, "target": 0.65},
}


class ZipfBatches(IterableDataset):  # type: ignore[type-arg]
    """Batches of 2048 examples with one id each."""

    def __init__(self, rows: int, batches: int) -> None:
        self.rows, self.batches = rows, batches

    def __iter__(self) -> Iterator[Any]:
        rng = np.random.default_rng(0)
        for _ in range(self.batches):
            ids = torch.from_numpy(zipf_ids(rng, self.rows, 2048))
            sparse = KeyedJaggedTensor(["item"], ids, lengths=torch.ones(2048, dtype=torch.int64))
            yield torch.randn(2048, 4), sparse, torch.from_numpy((rng.random(2048) < 0.3).astype(np.float32))


def train(rows: int, dim: int, target: float | None, steps: int) -> None:
    """Train in this process and print what it took."""
    warnings.filterwarnings("ignore")
    logging.getLogger().setLevel(logging.WARNING)
    torch.set_num_threads(1)
    baseline = rss()
    model = ClickModel(embedding_dim=dim, features=[{"name": "item", "num_embeddings": rows}], num_dense=4)
    callback = None if target is None else DimensionPruning(target=target)
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[] if callback is None else [callback],
    )
    started = time.perf_counter()
    trainer.fit(model, DataLoader(ZipfBatches(rows, steps), batch_size=None))
    live = None if callback is None or callback.pruner is None else callback.pruner.live_ratio()
    print(
        json.dumps(
            {
                "rows": rows,
                "dim": dim,
                "target": target,
                "steps": trainer.global_step,
                "plain_weight_bytes": rows * dim * 4,
                "live_ratio": live,
                "import_rss": baseline,
                "peak_rss": peak_rss(),
                "peak_over_import": peak_rss() - baseline,
                "end_rss": rss(),
                "seconds": time.perf_counter() - started,
            }
        )
    )


def main() -> None:
    """Run every case in a fresh process and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=320, help="training steps; events at 3, 6, 9, 30, 60, 90, 100, …")
    parser.add_argument("--case", choices=sorted(CASES), default=None, help="train this case in this process")
    args = parser.parse_args()
    if args.case:
        train(**CASES[args.case], steps=args.steps)
        return
    results = {}
    for name in CASES:
        command = [sys.executable, "-m", "benchmarks.memory", "--case", name, "--steps", str(args.steps)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        results[name] = json.loads(done.stdout.strip().splitlines()[-1])
        print(name, json.dumps(results[name]), flush=True)
    plain, pruned = (results[f"pair 20M x 32, {kind}"]["peak_over_import"] for kind in ("plain", "target 0.65"))
    report = {"machine": describe(), "results": results, "pair_saving": 1 - pruned / plain}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "memory.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"20M x 32: {report['pair_saving']:.1%} less peak memory over import")


if __name__ == "__main__":
    main()

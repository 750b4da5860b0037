"""What Lightning and the strategy add to a hand-written TorchRec loop, and what a second process brings.

::

    python -m benchmarks.strategy                  # writes benchmarks/results/strategy.json
    python -m benchmarks.strategy --smoke          # a few steps, writes nothing

The same model, tables, plan and batches in the same processes; blocks of steps of each kind take turns, and medians
over all steps are compared. ``hand`` is ``DistributedModelParallel`` in a plain loop, ``strategy`` is the Trainer.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from benchmarks.machine import describe
from lightning_embcomp.strategies import TorchRecStrategy
from lightning_embcomp.strategies.sharders import BagSharder

RESULT = Path(__file__).parent / "results" / "strategy.json"
TABLES, ROWS, DIM, POOLING, DENSE, BATCHES = 8, 200_000, 64, 10, 13, 16
KINDS = ("hand", "strategy")
Batch = tuple[Tensor, KeyedJaggedTensor, Tensor]


class Model(pl.LightningModule):
    """Bags of ids and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        tables = [
            EmbeddingBagConfig(name=f"t{t}", num_embeddings=ROWS, embedding_dim=DIM, feature_names=[f"f{t}"])
            for t in range(TABLES)
        ]
        self.bags = EmbeddingBagCollection(tables=tables, device=torch.device("meta"))
        _apply_optimizer_in_backward(RowWiseAdagrad, self.bags.parameters(), {"lr": 0.02})
        self.over = nn.Sequential(
            nn.Linear(TABLES * DIM + DENSE, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 1)
        )

    def forward(self, batch: Batch) -> Tensor:
        """Loss of a batch."""
        dense, ids, label = batch
        rows = self.bags(ids).to_dict()
        pooled = torch.cat([dense, *(rows[f"f{t}"] for t in range(TABLES))], dim=1)
        return nn.functional.binary_cross_entropy_with_logits(self.over(pooled).squeeze(1), label)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of a batch."""
        return self(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam for the MLP."""
        return torch.optim.Adam(self.over.parameters(), lr=1e-3)


class Timer(pl.Callback):
    """Seconds from one batch to the next."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_start(self, *args: object) -> None:
        """Note the time."""
        self.times.append(time.perf_counter())

    def on_train_end(self, *args: object) -> None:
        """Note the time."""
        self.times.append(time.perf_counter())


def make_batches(size: int, rank: int) -> list[Batch]:
    """Batches with Zipf-distributed ids."""
    rng = np.random.default_rng(rank)
    batches = []
    for _ in range(BATCHES):
        ids = np.minimum(rng.zipf(1.2, size * POOLING * TABLES) - 1, ROWS - 1)
        lengths = torch.full((TABLES * size,), POOLING)
        features = KeyedJaggedTensor([f"f{t}" for t in range(TABLES)], torch.from_numpy(ids), lengths=lengths)
        batches.append((torch.randn(size, DENSE), features, torch.rand(size).round()))
    return batches


class Endless(torch.utils.data.IterableDataset[Batch]):
    """The same batches, again and again."""

    def __init__(self, batches: list[Batch], steps: int) -> None:
        self.batches, self.steps = batches, steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        for step in range(self.steps):
            yield self.batches[step % len(self.batches)]


def loader(batches: list[Batch], steps: int) -> torch.utils.data.DataLoader[Batch]:
    """What both loops iterate over."""
    return torch.utils.data.DataLoader(Endless(batches, steps), batch_size=None)


class Hand:
    """A loop without Lightning."""

    def __init__(self, plan: ShardingPlan) -> None:
        device = torch.device("cpu")
        self.model = DistributedModelParallel(Model(), device=device, plan=plan, sharders=[BagSharder()])  # type: ignore[list-item]
        self.optimizer = torch.optim.Adam([p for n, p in self.model.named_parameters() if ".over." in f".{n}"], lr=1e-3)

    def run(self, batches: list[Batch], steps: int) -> list[float]:
        """Seconds of each step."""
        times = []
        for batch in loader(batches, steps):
            times.append(time.perf_counter())
            self.optimizer.zero_grad()
            self.model(batch).backward()
            self.optimizer.step()
        times.append(time.perf_counter())
        return list(np.diff(times))


class Trained:
    """The Trainer; the module stays sharded between blocks."""

    def __init__(self) -> None:
        self.model = Model()
        self.plan: ShardingPlan | None = None

    def run(self, batches: list[Batch], steps: int) -> list[float]:
        """Seconds of each step."""
        timer = Timer()
        sharding = {"t[0-3]": "table_wise", "t[4-7]": "row_wise"}
        strategy = TorchRecStrategy(sharding=sharding)
        trainer = pl.Trainer(
            strategy=strategy,
            accelerator="cpu",
            devices=int(os.environ["WORLD_SIZE"]),
            max_epochs=1,
            callbacks=[timer],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(self.model, loader(batches, steps))
        self.plan = self.plan or strategy.plan
        return list(np.diff(timer.times))


def work(size: int, rounds: int, steps: int) -> None:
    """One process; process 0 prints medians as JSON."""
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    batches = make_batches(size, rank)
    runs: dict[str, Any] = {"strategy": Trained()}
    for run in runs.values():
        run.run(batches, 3)
    runs["hand"] = Hand(runs["strategy"].plan)
    runs["hand"].run(batches, 3)
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(rounds):
        for kind in KINDS[turn % 2 :] + KINDS[: turn % 2]:
            dist.barrier()
            # DDP rebuilds its buckets, and the first steps of a fit are not like the others.
            seconds[kind] += runs[kind].run(batches, steps + 3)[3:]
    if rank == 0:
        print(json.dumps({kind: statistics.median(found) for kind, found in seconds.items()}), flush=True)
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


def run_workers(module: str, argument: str, processes: int) -> list[str]:
    """Start processes of one benchmark, each with one thread, that talk to each other by gloo.

    Args:
        module: Dotted name.
        argument: What they are given as ``--worker``.
        processes: How many.

    Returns:
        What each of them printed.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", module, "--worker", argument],
            env={
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "NODE_RANK": "0",
                "WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
                "PYTHONHASHSEED": "0",
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        return [worker.communicate(timeout=1800)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()


def measure(processes: int, size: int, rounds: int, steps: int) -> dict[str, float]:
    """Medians of process 0, in seconds per step."""
    said = run_workers("benchmarks.strategy", f"{size},{rounds},{steps}", processes)
    found: dict[str, float] = json.loads(said[0].strip().splitlines()[-1])
    return found


def main() -> None:
    """Measure with one and two processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=1024, help="rows per process")
    parser.add_argument("--rounds", type=int, default=9, help="blocks of each kind")
    parser.add_argument("--steps", type=int, default=30, help="steps of a block")
    parser.add_argument("--smoke", action="store_true", help="two short blocks, nothing is written")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(*map(int, args.worker.split(",")))
    rounds, steps = (2, 4) if args.smoke else (args.rounds, args.steps)
    medians = {processes: measure(processes, args.batch_size, rounds, steps) for processes in (1, 2)}
    result = {
        "machine": describe(),
        "settings": {"tables": TABLES, "rows": ROWS, "dim": DIM, "pooling": POOLING, "batch_size": args.batch_size},
        "seconds_per_step": medians,
        "overhead": {p: found["strategy"] / found["hand"] - 1 for p, found in medians.items()},
        "samples_per_second_of_2_over_1": 2 * medians[1]["strategy"] / medians[2]["strategy"],
    }
    print(json.dumps(result, indent=1))
    if not args.smoke:
        RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

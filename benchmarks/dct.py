"""Gradient thresholding on two processes: quality against bytes on real click logs, and the cost of selection.

Every run trains DLRM with sharded tables and is tested once, at its best validation. ``run`` starts both processes; a
run that exists is not repeated::

    python -m benchmarks.dct run --dataset criteo_80k --feedback dense --shards iid --seed 0
    python -m benchmarks.dct run --dataset criteo_80k --feedback ec --density 0.01 --shards iid --seed 0
    python -m benchmarks.dct grid --dataset criteo_80k --seed 0        # all cells, in one pair of processes
    python -m benchmarks.dct grid --dataset criteo_80k --seed 0 1 2 --density 0.01
    python -m benchmarks.dct summary     # writes benchmarks/results/dct.json
    python -m benchmarks.dct overhead    # writes benchmarks/results/dct-overhead.json
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from datetime import timedelta
from operator import itemgetter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.datasets import CACHE, DATASETS, REPOSITORY
from benchmarks.machine import describe
from benchmarks.quality import DIM, MODEL, BestEpoch, normalized_entropy, paired_bootstrap
from lightning_embcomp.data.batches import Columns, RowSource
from lightning_embcomp.data.datamodule import ClickLogDataModule
from lightning_embcomp.data.loader import BatchLoader
from lightning_embcomp.methods.dct.callback import GradientThresholding
from lightning_embcomp.methods.dct.config import FEEDBACK_KINDS, VALUE_TYPES, ErrorFeedback, ThresholdSettings
from lightning_embcomp.methods.dct.exchange import GradientExchange
from lightning_embcomp.methods.dct.hook import gradient_thresholding_hook
from lightning_embcomp.models import ClickModel
from lightning_embcomp.strategies import TorchRecStrategy

RESULTS = REPOSITORY / "benchmarks" / "results"
RUNS = CACHE / "dct-runs"
WORLD = 2
SETTLING = 30
"""Rounds before costs are measured."""
WARMUP = GradientThresholding().warmup_steps
SHARDS = ("iid", "unlike")
DENSITIES = (0.25, 0.1, 0.05, 0.01, 0.001)
SHARD_KEYS = {"criteo_80k": None, "movielens_1m": "user"}
"""What unlike shards are split by: None for the time, else a feature."""
BATCH = {"criteo_80k": 64, "movielens_1m": 2048}
"""Rows of both processes: 813 and 391 steps in an epoch."""
EPOCHS = {"criteo_80k": 1, "movielens_1m": 2}
"""After which dense runs are at their best; later their tables overfit."""
DENSE_LR = {"adagrad": 0.01, "adam": 1e-3}
"""By optimizer of the dense layers; chosen by test AUC of dense and of 1 % runs in simulation."""


class RowsOf:
    """Some rows of a source.

    Args:
        source: The source.
        rows: Which of its rows, int64.
    """

    def __init__(self, source: RowSource, rows: np.ndarray) -> None:
        self.source, self.rows = source, rows
        self.num_rows, self.block_rows, self.window_rows = len(rows), source.block_rows, source.window_rows

    def read(self, rows: np.ndarray) -> Columns:
        """Read rows in that order."""
        return self.source.read(self.rows[rows])


class UnlikeShards(pl.LightningDataModule):
    """Gives each process training rows of its own: one half of the time, or the users with odd ids.

    Args:
        data: The data.
        key: Feature to split by; None for the time.
    """

    def __init__(self, data: ClickLogDataModule, key: str | None) -> None:
        super().__init__()
        self.data, self.key = data, key

    def prepare_data(self) -> None:
        """Encode the data."""
        self.data.prepare_data()

    def setup(self, stage: str) -> None:
        """Open the data."""
        self.data.trainer = self.trainer
        self.data.setup(stage)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - features, loaders and the rest are those of the data
        if name == "data":
            raise AttributeError(name)
        return getattr(self.data, name)

    def val_dataloader(self) -> Any:  # noqa: ANN401
        """Validation rows, shared out as usual."""
        return self.data.val_dataloader()

    def test_dataloader(self) -> Any:  # noqa: ANN401
        """Test rows, shared out as usual."""
        return self.data.test_dataloader()

    def train_dataloader(self) -> BatchLoader:
        """Rows of this process; as many batches on both."""
        assert self.trainer is not None
        source = self.data.log.part("train")
        rows = np.arange(source.num_rows)
        if self.key is None:
            halves = np.array_split(rows, WORLD)
        else:
            names = [feature.name for feature in self.data.features]
            ids = source.read(rows).ids[:, names.index(self.key)]
            halves = [rows[ids % WORLD == rank] for rank in range(WORLD)]
        mine = halves[self.trainer.global_rank][: min(map(len, halves))]
        loader = BatchLoader(
            RowsOf(source, mine), self.data.features, self.data.batch_size, shuffle=True, seed=self.data._seed
        )
        loader.sampler.set_epoch(self.trainer.current_epoch)
        return loader


class BestSharded(BestEpoch):
    """The same with predictions gathered from all processes."""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare, predict, perhaps stop; metrics are those of all processes, so all decide alike."""
        if trainer.sanity_checking:
            return
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val_")}
        self.history.append(metrics)
        if self.best < 0 or metrics["val_ne"] < self.history[self.best]["val_ne"]:
            self.best = len(self.history) - 1
            parts: list[Any] = [None] * WORLD
            dist.all_gather_object(parts, predict_mine(pl_module, trainer.datamodule))  # type: ignore[attr-defined]
            # Each process has a piece of every batch: put the pieces of a batch side by side.
            batches = [piece for pieces in zip(*parts, strict=True) for piece in pieces]
            self.predictions = np.concatenate([scores for scores, _ in batches])
            self.labels = np.concatenate([labels for _, labels in batches])
        elif len(self.history) - 1 - self.best >= self.patience:
            trainer.should_stop = True


def predict_mine(model: pl.LightningModule, data: Any) -> list[tuple[np.ndarray, np.ndarray]]:  # noqa: ANN401
    """Probabilities and labels of this process's test rows, by batch."""
    data.setup("test")
    model.eval()
    with torch.no_grad():
        found = [
            (torch.sigmoid(model(dense, sparse)).double().numpy(), label.numpy())
            for dense, sparse, label in data.test_dataloader()
        ]
    model.train()
    return found


def variant(args: argparse.Namespace) -> str:
    """Name of a run without its seed."""
    if args.feedback == "dense":
        return dense_name(args.shards, args.optimizer)
    parts = [args.feedback, f"{100 * args.density:g}%", args.shards]
    if args.optimizer != "adagrad":
        parts.append(args.optimizer)
    if args.momentum is not None:
        parts.append(f"momentum{args.momentum:g}")
    if args.value_dtype != "fp32":
        parts.append(args.value_dtype)
    if args.life_span != ThresholdSettings().life_span:
        parts.append(f"life{args.life_span}")
    if args.warmup != WARMUP:
        parts.append(f"warmup{args.warmup}")
    return "-".join(parts)


def dense_name(shards: str, optimizer: str) -> str:
    """Name of the dense runs that a run is compared with."""
    return f"dense-{shards}" + ("" if optimizer == "adagrad" else f"-{optimizer}")


def output(args: argparse.Namespace) -> Path:
    """Where a run is kept, without a suffix."""
    return RUNS / args.dataset / f"{variant(args)}-s{args.seed}"


def run(args: argparse.Namespace) -> None:
    """Train once."""
    start([args])


def grid(args: argparse.Namespace) -> None:
    """All cells of a data set; dense first, then by the densities as given."""
    cells = [("dense", 1.0)] + [(kind, density) for density in args.densities for kind in FEEDBACK_KINDS]
    settings = [
        {"feedback": feedback, "density": density, "shards": shards, "seed": seed}
        for feedback, density in cells
        for shards in args.shards
        for seed in args.seeds
        if feedback in ("dense", *args.kinds)
    ]
    start([argparse.Namespace(**{**vars(args), **cell}) for cell in settings])


def start(cells: list[argparse.Namespace]) -> None:
    """Train what has not been trained, one after the other, in one pair of processes."""
    pending = [cell for cell in cells if cell.force or not Path(f"{output(cell)}.json").exists()]
    print(f"{len(cells) - len(pending)} of {len(cells)} runs exist", flush=True)
    if not pending:
        return
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    plain = [{name: value for name, value in vars(cell).items() if name != "action"} for cell in pending]
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.dct", "worker", json.dumps(plain)]
    common = {"WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(WORLD), "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    workers = [
        subprocess.Popen(command, env={**os.environ, **common, "RANK": str(r), "LOCAL_RANK": str(r)}, cwd=REPOSITORY)
        for r in range(WORLD)
    ]
    try:
        failed = [rank for rank, worker in enumerate(workers) if worker.wait()]
    finally:
        for process in workers:
            process.kill()
    if failed:
        raise SystemExit(f"rank {failed[0]} has failed")


def worker(args: argparse.Namespace) -> None:
    """Train as one of the processes."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    for cell in json.loads(args.cells):
        train(argparse.Namespace(**cell))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # an interpreter that has run collectives aborts at exit now and then


def train(args: argparse.Namespace) -> None:
    """Train once on both processes; the first one writes the result."""
    pl.seed_everything(args.seed, verbose=False)
    data: Any = DATASETS[args.dataset](args.seed)
    data.batch_size = BATCH[args.dataset] // WORLD
    if args.shards == "unlike":
        data = UnlikeShards(data, SHARD_KEYS[args.dataset])
    settings = MODEL[args.dataset] | {"dense_optimizer": args.optimizer, "dense_lr": DENSE_LR[args.optimizer]}
    model = ClickModel(embedding_dim=DIM, over_layers=(256, 128), **settings)
    best = BestSharded(patience=99)
    thresholding = None
    if args.feedback != "dense":
        thresholding = GradientThresholding(
            args.density,
            feedback=ErrorFeedback(kind=args.feedback, momentum=args.momentum),
            thresholds=ThresholdSettings(life_span=args.life_span),
            value_dtype=args.value_dtype,
            warmup_steps=args.warmup,
            log_every_n_steps=0,
        )
    trainer = pl.Trainer(
        max_epochs=EPOCHS[args.dataset],
        accelerator="cpu",
        devices=WORLD,
        strategy=TorchRecStrategy(sharding={"*": "table_wise"}, timeout=timedelta(minutes=5)),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        val_check_interval=0.5,
        callbacks=[best] if thresholding is None else [thresholding, best],
    )
    started = time.perf_counter()
    trainer.fit(model, data)
    if trainer.global_rank == 0:
        write(args, best, thresholding, time.perf_counter() - started)


def write(
    args: argparse.Namespace, best: BestSharded, thresholding: GradientThresholding | None, seconds: float
) -> None:
    """Write the result and the test predictions."""
    traffic = None if thresholding is None else thresholding.total
    steps, later = 0, 1.0
    if traffic is not None and thresholding is not None and thresholding.exchange is not None:
        steps = thresholding.exchange.steps
        first = traffic.dense / steps * args.warmup
        later = (traffic.dense - first) / (traffic.sent - first)
    result = {
        "dataset": args.dataset,
        "name": variant(args),
        "feedback": args.feedback,
        "shards": args.shards,
        "optimizer": args.optimizer,
        "density": 1.0 if args.feedback == "dense" else args.density,
        "seed": args.seed,
        "settings": {
            "life_span": args.life_span,
            "momentum": args.momentum,
            "value_dtype": args.value_dtype,
            "warmup_steps": args.warmup,
        },
        "test_auc": float(roc_auc_score(best.labels, best.predictions)),
        "test_ne": normalized_entropy(best.labels, best.predictions),
        "val_ne": best.history[best.best]["val_ne"],
        "best_check": best.best,
        "history": best.history,
        "fewer_bytes": 1.0 if traffic is None else traffic.dense / traffic.sent,
        "fewer_bytes_after_warmup": later,
        "exchanges": steps,
        "sent_density": 1.0 if traffic is None else traffic.entries / traffic.numel,
        "seconds_per_step": float(np.median(best.seconds)),
        "seconds": seconds,
        "machine": describe(),
    }
    out = output(args)
    out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(Path(f"{out}.npz"), scores=best.predictions.astype(np.float32), labels=best.labels)
    Path(f"{out}.json").write_text(json.dumps(result, indent=1))
    print(
        f"{args.dataset} {result['name']} s{args.seed}: val ne {result['val_ne']:.4f} test auc"
        f" {result['test_auc']:.4f} ne {result['test_ne']:.4f} best {best.best}/{len(best.history)} fewer bytes"
        f" {result['fewer_bytes']:.1f} density {result['sent_density']:.4f} {seconds:.0f} s",
        flush=True,
    )


def summary(args: argparse.Namespace) -> None:
    """Compare with dense runs on the same shards and seeds, on the same test rows; write JSON, print a table."""
    table: dict[str, list[dict[str, Any]]] = {}
    for dataset in SHARD_KEYS:
        runs: dict[str, dict[int, dict[str, Any]]] = {}
        for path in sorted((RUNS / dataset).glob("*.json")):
            found = json.loads(path.read_text()) | {"path": str(path)}
            runs.setdefault(found["name"], {})[found["seed"]] = found
        rows = [row for by_seed in runs.values() if (row := _row(by_seed, runs)) is not None]
        if rows:
            order = itemgetter("optimizer", "shards")
            kinds = ("dense", *FEEDBACK_KINDS)
            table[dataset] = sorted(
                rows, key=lambda row: (*order(row), kinds.index(row["feedback"]), -row["density"], row["name"])
            )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "dct.json").write_text(json.dumps({"machine": describe(), "results": table}, indent=1) + "\n")
    print("| data | shards | run | AUC | ΔAUC [95 %] | ΔNE | bytes |\n|---|---|---|---|---|---|---|")
    for dataset, rows in table.items():
        for row in rows:
            print(_line(dataset, row))


def _line(dataset: str, row: dict[str, Any]) -> str:
    """A run in Markdown."""
    name = "dense" if row["feedback"] == "dense" else f"`{row['feedback']}` {100 * row['density']:g} %"
    momentum = row["settings"].get("momentum")
    name += "" if momentum is None else f", momentum {momentum:g}"
    name += "" if row["optimizer"] == "adagrad" else ", Adam"
    name += f" ({len(row['seeds'])} seeds)" if len(row["seeds"]) > 1 else ""
    line = f"| {dataset} | {row['shards']} | {name} | {row['auc']:.4f} |"
    if row["feedback"] == "dense":
        return f"{line}  |  |  |"
    low, high = row["interval"]["auc"]
    fewer = f"{row['fewer_bytes_after_warmup']:.{1 if row['fewer_bytes_after_warmup'] < 10 else 0}f}×"
    return f"{line} {row['delta_auc']:+.4f} [{low:+.4f}, {high:+.4f}] | {row['delta_ne']:+.4f} | {fewer} |"


def _row(mine: dict[int, dict[str, Any]], runs: dict[str, dict[int, dict[str, Any]]]) -> dict[str, Any] | None:
    first = next(iter(mine.values()))
    base = runs.get(dense_name(first["shards"], first["optimizer"]), {})
    seeds = sorted(set(mine) & set(base))
    if not seeds:
        return None

    def loaded(found: dict[str, Any]) -> Any:  # noqa: ANN401
        return np.load(found["path"].removesuffix(".json") + ".npz")

    labels = loaded(mine[seeds[0]])["labels"]
    scores, reference = ([loaded(found[seed])["scores"].astype(np.float64) for seed in seeds] for found in (mine, base))
    kept = {name: first[name] for name in ("name", "feedback", "shards", "optimizer", "density", "settings")}
    means = {
        name: float(np.mean([mine[s][name] for s in seeds]))
        for name in ("fewer_bytes", "fewer_bytes_after_warmup", "sent_density", "test_ne")
    }
    return {
        **kept,
        "seeds": seeds,
        "auc": float(np.mean([mine[s]["test_auc"] for s in seeds])),
        "ne": means.pop("test_ne"),
        "delta_auc": float(np.mean([mine[s]["test_auc"] - base[s]["test_auc"] for s in seeds])),
        "delta_ne": float(np.mean([mine[s]["test_ne"] - base[s]["test_ne"] for s in seeds])),
        "interval": paired_bootstrap(labels, scores, reference),
        **means,
    }


def overhead(args: argparse.Namespace) -> None:
    """Selection and packing against the backward pass of an MLP of 10 M parameters, on one thread, in turn.

    Beside it, what memory allows: adding gradients to buffers of their size reads and writes as much as adding them to
    residuals, 12 bytes per entry.
    """
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    results = []
    for kind in FEEDBACK_KINDS:
        plain, hooked = mlp(), mlp()
        model = DistributedDataParallel(hooked)
        parameters = dict(hooked.named_parameters())
        exchange = GradientExchange(
            parameters,
            [name for name, parameter in parameters.items() if parameter.numel() >= 256],
            density=args.density,
            feedback=ErrorFeedback(kind=kind),  # type: ignore[arg-type]
            thresholds=ThresholdSettings(),
            value_type="fp32",
            warmup_steps=0,
        )
        model.register_comm_hook(exchange, gradient_thresholding_hook)
        optimizers = [torch.optim.SGD(module.parameters(), lr=0.01) for module in (plain, model)]
        sums = [torch.zeros_like(parameter) for parameter in plain.parameters()]
        for batch in args.batch:
            # The first rounds are left out: thresholds and estimates have to settle.
            count = args.rounds + SETTLING
            rounds = [round_of((plain, model), optimizers, exchange, sums, batch) for _ in range(count)]
            backward, selection, addition = np.median(np.array(rounds)[SETTLING:], axis=0)
            results.append(
                {
                    "feedback": kind,
                    "batch": batch,
                    "parameters": sum(parameter.numel() for parameter in parameters.values()),
                    "backward_ms": 1e3 * backward,
                    "selection_ms": 1e3 * selection,
                    "addition_ms": 1e3 * addition,
                    "ratio": selection / backward,
                    "sent_density": exchange.last.entries / exchange.last.numel,
                }
            )
            print(json.dumps(results[-1]), flush=True)
    dist.destroy_process_group()
    report = {"machine": describe(), "threads": 1, "rounds": args.rounds, "density": args.density, "results": results}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "dct-overhead.json").write_text(json.dumps(report, indent=1) + "\n")


def mlp() -> nn.Module:
    """Four layers of 1600 × 1600."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Linear(1600, 1600), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(1600, 1))


def round_of(
    models: tuple[nn.Module, nn.Module],
    optimizers: Sequence[torch.optim.Optimizer],
    exchange: GradientExchange,
    sums: Sequence[Tensor],
    batch: int,
) -> tuple[float, float, float]:
    """Seconds of a plain backward pass, of the selection in one with the hook, and of adding up the gradients."""
    x = torch.randn(batch, 1600)
    seconds = 0.0
    for model, optimizer in zip(models, optimizers, strict=True):
        optimizer.zero_grad()
        loss = ((model(x) - x[:, :1].relu()) ** 2).mean()
        started = time.perf_counter()
        loss.backward()
        seconds = seconds or time.perf_counter() - started
        optimizer.step()
    exchange.count()
    started = time.perf_counter()
    for total, parameter in zip(sums, models[0].parameters(), strict=True):
        assert parameter.grad is not None
        total.add_(parameter.grad)
    return seconds, exchange.last.selection_seconds, time.perf_counter() - started


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, action, text in (("run", run, "train once"), ("grid", grid, "train every cell of a data set")):
        one = commands.add_parser(name, help=text)
        one.add_argument("--dataset", choices=sorted(SHARD_KEYS), required=True)
        if name == "grid":
            one.add_argument("--seed", dest="seeds", type=int, nargs="+", default=[0])
            one.add_argument("--density", dest="densities", type=float, nargs="+", default=DENSITIES)
            one.add_argument("--feedback", dest="kinds", choices=FEEDBACK_KINDS, nargs="+", default=FEEDBACK_KINDS)
            one.add_argument("--shards", choices=SHARDS, nargs="+", default=SHARDS)
        else:
            one.add_argument("--feedback", choices=["dense", *FEEDBACK_KINDS], required=True)
            one.add_argument("--density", type=float, default=0.01)
            one.add_argument("--shards", choices=SHARDS, default="iid", help="unlike: by time or user")
            one.add_argument("--seed", type=int, default=0)
        one.add_argument("--optimizer", choices=sorted(DENSE_LR), default="adagrad", help="of the dense layers")
        one.add_argument("--momentum", type=float, help="of ef21 and econtrol; by default their own")
        one.add_argument("--value-dtype", choices=VALUE_TYPES, default="fp32")
        one.add_argument("--life-span", type=int, default=ThresholdSettings().life_span)
        one.add_argument("--warmup", type=int, default=WARMUP, help="dense steps")
        one.add_argument("--force", action="store_true")
        one.set_defaults(action=action)
    inner = commands.add_parser("worker", help="one process of these")
    inner.add_argument("cells", help="runs as JSON")
    inner.set_defaults(action=worker)
    commands.add_parser("summary", help="compare, write results/dct.json").set_defaults(action=summary)
    cost = commands.add_parser("overhead", help="cost of selection, writes results/dct-overhead.json")
    cost.add_argument("--density", type=float, default=0.01)
    cost.add_argument("--batch", type=int, nargs="+", default=[256, 512, 1024])
    cost.add_argument("--rounds", type=int, default=15)
    cost.set_defaults(action=overhead)
    args = parser.parse_args()
    args.action(args)


if __name__ == "__main__":
    main()

"""Quality against true bytes on real click logs: one JSON per run, test predictions beside it.

Every run is stopped by validation NE and tested once, at its best validation epoch::

    python -m benchmarks.quality run --dataset criteo_80k --method plain --seed 0
    python -m benchmarks.quality run --dataset criteo_80k --method fiited --target 0.8 --seed 0
    python -m benchmarks.quality summary
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from sklearn.metrics import log_loss, roc_auc_score

from benchmarks.datasets import CACHE, DATASETS, REPOSITORY
from benchmarks.machine import describe
from lightning_embcomp import DimensionPruning, Granularity, PruningSchedule
from lightning_embcomp.engine.hosts import RoutedHost
from lightning_embcomp.engine.memory import table_memory
from lightning_embcomp.models import ClickModel

RESULTS = REPOSITORY / "benchmarks" / "results"
RUNS = CACHE / "quality-runs"
DIM = 16
MODEL: dict[str, dict[str, Any]] = {
    "criteo_80k": {"embedding_lr": 0.02, "dense_lr": 1e-3},
    "book_crossing": {"embedding_lr": 0.05, "dense_lr": 1e-3},
    "movielens_1m": {"embedding_lr": 0.05, "dense_lr": 1e-3},
    "us_flights": {"embedding_lr": 0.05, "dense_lr": 1e-3},
}


class BestEpoch(pl.Callback):
    """Keeps the test predictions at the lowest validation NE, and stops after ``patience`` worse validations."""

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.history: list[dict[str, float]] = []
        self.best = -1
        self.predictions = np.empty(0)
        self.labels = np.empty(0)
        self.seconds: list[float] = []
        self._started = 0.0

    def on_train_batch_start(self, *args: object) -> None:
        """Start the clock of the step."""
        self._started = time.perf_counter()

    def on_train_batch_end(self, *args: object) -> None:
        """Stop it."""
        self.seconds.append(time.perf_counter() - self._started)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare, predict, perhaps stop."""
        if trainer.sanity_checking:
            return
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val_")}
        self.history.append(metrics)
        if self.best < 0 or metrics["val_ne"] < self.history[self.best]["val_ne"]:
            self.best = len(self.history) - 1
            self.predictions, self.labels = predict(pl_module, trainer.datamodule)
        elif len(self.history) - 1 - self.best >= self.patience:
            trainer.should_stop = True


def quiet_trainer(callbacks: list[pl.Callback], *, epochs: int, check: float) -> pl.Trainer:
    """A trainer that trains and validates, and does nothing else.

    Args:
        callbacks: What is under test, and who keeps the results.
        epochs: Epochs at most.
        check: Epochs between validations.
    """
    return pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        val_check_interval=check,
        callbacks=callbacks,
    )


def predict(model: pl.LightningModule, data: pl.LightningDataModule) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and labels of the test rows."""
    data.setup("test")
    model.eval()
    scores, labels = [], []
    with torch.no_grad():
        for dense, sparse, label in data.test_dataloader():
            scores.append(torch.sigmoid(model(dense, sparse)).double())
            labels.append(label)
    model.train()
    return torch.cat(scores).numpy(), torch.cat(labels).numpy()


def normalized_entropy(labels: np.ndarray, scores: np.ndarray) -> float:
    """Log loss over the entropy of the mean click rate."""
    rate = labels.mean()
    return float(log_loss(labels, scores) / -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate)))


def callbacks_for(args: argparse.Namespace) -> list[pl.Callback]:
    """The method under test."""
    if args.method == "plain":
        return []
    granularity = Granularity(
        chunks=args.chunks,
        layout=args.layout,
        utility=args.utility,
        falloff=args.falloff,
        prior_occurrences=args.prior,
        rate_power=args.rate_power,
        hysteresis=args.hysteresis,
    )
    schedule = PruningSchedule(every_n_steps=args.every, early_steps=tuple(args.early), decay=args.decay)
    return [
        DimensionPruning(
            target=args.target,
            scope=args.scope,
            schedule=schedule,
            granularity=granularity,
            normalize=args.normalize,
        )
    ]


def embedding_bytes(model: torch.nn.Module) -> dict[str, float]:
    """Bytes held in training, from the storages; plain fused collections hold one float32 per row of state."""
    routed = [m for m in model.modules() if isinstance(m, RoutedHost)]
    if routed:
        tables = [table_memory(host.engine, t) for host in routed for t in range(len(host.engine.tables))]
        return {
            "weights": sum(t.weights for t in tables),
            "optimizer_state": sum(t.optimizer_state for t in tables),
            "router": sum(t.router for t in tables),
            "statistics": sum(t.statistics for t in tables),
            "total": sum(t.total for t in tables),
            "plain_total": sum(t.plain_total for t in tables),
            "nominal_ratio": sum(t.plain_weights for t in tables) / sum(t.weights for t in tables),
            "true_ratio": sum(t.plain_total for t in tables) / sum(t.total for t in tables),
        }
    weights = state = 0
    for module in model.modules():
        for lookup in getattr(module, "_emb_modules", []):
            weights += sum(w.numel() * w.element_size() for w in lookup.split_embedding_weights())
            for table_state in lookup._emb_module.split_optimizer_states():
                state += sum(s.numel() * s.element_size() for s in table_state)
    total = weights + state
    return {
        "weights": weights,
        "optimizer_state": state,
        "router": 0,
        "statistics": 0,
        "total": total,
        "plain_total": total,
        "nominal_ratio": 1.0,
        "true_ratio": 1.0,
    }


def run(args: argparse.Namespace) -> None:
    """Train once and write the result."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    name = args.name or ("plain" if args.method == "plain" else f"{args.method}-{args.target:g}")
    out = RUNS / args.dataset / f"{name}-s{args.seed}"
    if Path(f"{out}.json").exists() and not args.force:
        print("have", out)
        return
    pl.seed_everything(args.seed, verbose=False)
    data = DATASETS[args.dataset](args.seed)
    settings = {**MODEL[args.dataset]}
    if args.embedding_lr:
        settings["embedding_lr"] = args.embedding_lr
    model = ClickModel(embedding_dim=DIM, over_layers=(256, 128), **settings)
    best = BestEpoch(args.patience)
    trainer = quiet_trainer([*callbacks_for(args), best], epochs=args.epochs, check=args.check)
    started = time.perf_counter()
    trainer.fit(model, data)
    result = {
        "dataset": args.dataset,
        "method": args.method,
        "name": name,
        "seed": args.seed,
        "settings": {k: v for k, v in vars(args).items() if k not in ("command", "action", "force", "name")} | settings,
        "test_auc": float(roc_auc_score(best.labels, best.predictions)),
        "test_ne": normalized_entropy(best.labels, best.predictions),
        "best_epoch": best.best,
        "history": best.history,
        "bytes": embedding_bytes(model),
        "seconds_per_step": float(np.median(best.seconds)),
        "seconds": time.perf_counter() - started,
        "machine": describe(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(Path(f"{out}.npz"), scores=best.predictions.astype(np.float32), labels=best.labels)
    Path(f"{out}.json").write_text(json.dumps(result, indent=1))
    print(
        f"{args.dataset} {name} s{args.seed}: test auc {result['test_auc']:.4f} ne {result['test_ne']:.4f}"
        f" val ne {[round(h['val_ne'], 4) for h in best.history]} best {best.best}"
        f" true {result['bytes']['true_ratio']:.2f}x nominal {result['bytes']['nominal_ratio']:.2f}x"
        f" {result['seconds_per_step'] * 1e3:.1f} ms/step {result['seconds']:.0f} s",
        flush=True,
    )


def paired_bootstrap(
    labels: np.ndarray, scores: list[np.ndarray], reference: list[np.ndarray], draws: int = 300
) -> dict[str, list[float]]:
    """95 % interval of the mean difference (method minus plain) over seeds, resampling test rows.

    Args:
        labels: ``(n,)``.
        scores: Predictions of the method, one array per seed.
        reference: Predictions of the plain model for the same seeds.
        draws: Bootstrap samples.
    """
    rng = np.random.default_rng(0)
    pairs = [(Resampled(labels, a), Resampled(labels, b)) for a, b in zip(scores, reference, strict=True)]
    auc, ne = [], []
    for _ in range(draws):
        weights = np.bincount(rng.integers(0, labels.size, labels.size), minlength=labels.size)
        auc.append(np.mean([a.auc(weights) - b.auc(weights) for a, b in pairs]))
        ne.append(np.mean([a.ne(weights) - b.ne(weights) for a, b in pairs]))
    return {
        "auc": [float(np.percentile(auc, q)) for q in (2.5, 97.5)],
        "ne": [float(np.percentile(ne, q)) for q in (2.5, 97.5)],
    }


class Resampled:
    """Metrics of one prediction under many row weights: sorted once, linear after that."""

    def __init__(self, labels: np.ndarray, scores: np.ndarray) -> None:
        self.order = np.argsort(scores, kind="stable")
        self.positive = labels[self.order] > 0.5
        clipped = np.clip(scores[self.order], 1e-12, 1 - 1e-12)
        self.loss = -np.where(self.positive, np.log(clipped), np.log1p(-clipped))

    def auc(self, weights: np.ndarray) -> float:
        """AUC with rows repeated ``weights`` times; ties are broken by position."""
        w = weights[self.order].astype(np.float64)
        negatives = np.where(self.positive, 0.0, w)
        below, total = np.cumsum(negatives), negatives.sum()
        return float((w * self.positive) @ below / ((w.sum() - total) * total))

    def ne(self, weights: np.ndarray) -> float:
        """Normalised entropy with rows repeated ``weights`` times."""
        w = weights[self.order]
        rate = w[self.positive].sum() / w.sum()
        return float((w @ self.loss / w.sum()) / -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate)))


def summary(args: argparse.Namespace) -> None:
    """Average over seeds, compare with plain on the same rows, write JSON and a table."""
    table: dict[str, list[dict[str, Any]]] = {}
    for dataset in DATASETS:
        runs: dict[str, dict[int, dict[str, Any]]] = {}
        for path in sorted((RUNS / dataset).glob("*.json")):
            result = json.loads(path.read_text())
            result["path"] = path
            runs.setdefault(result["name"], {})[result["seed"]] = result
        if "plain" not in runs:
            continue
        table[dataset] = [_summarise(name, by_seed, runs["plain"]) for name, by_seed in sorted(runs.items())]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "quality.json").write_text(json.dumps({"machine": describe(), "results": table}, indent=1) + "\n")
    for dataset, rows in table.items():
        print(f"\n{dataset}")
        print(
            f"{'run':32} {'seeds':>5} {'AUC':>6} {'±':>6} {'ΔAUC [95 %]':>26} {'NE':>6} {'ΔNE [95 %]':>26}"
            f" {'nom.':>6} {'true':>6}"
        )
        for r in rows:
            print(
                f"{r['name']:32} {len(r['seeds']):5} {r['auc']:.4f} {r['auc_std']:.4f} {_interval(r, 'auc')}"
                f" {r['ne']:.4f} {_interval(r, 'ne')} {r['nominal_ratio']:6.2f} {r['true_ratio']:6.2f}"
            )


def _predictions(result: dict[str, Any]) -> Path:
    return Path(str(result["path"]).removesuffix(".json") + ".npz")


def _interval(row: dict[str, Any], metric: str) -> str:
    if row["interval"] is None:
        return " " * 26
    low, high = row["interval"][metric]
    return f"{row['delta_' + metric]:+.4f} [{low:+.4f}, {high:+.4f}]"


def _summarise(name: str, runs: dict[int, dict[str, Any]], plain: dict[int, dict[str, Any]]) -> dict[str, Any]:
    seeds = sorted(set(runs) & set(plain))
    auc, ne = [runs[s]["test_auc"] for s in seeds], [runs[s]["test_ne"] for s in seeds]
    interval = None
    if name != "plain":
        loaded = [np.load(_predictions(runs[s])) for s in seeds]
        base = [np.load(_predictions(plain[s])) for s in seeds]
        interval = paired_bootstrap(
            loaded[0]["labels"],
            [x["scores"].astype(np.float64) for x in loaded],
            [x["scores"].astype(np.float64) for x in base],
        )
    first = runs[seeds[0]]
    return {
        "name": name,
        "method": first["method"],
        "settings": first["settings"],
        "seeds": seeds,
        "auc": float(np.mean(auc)),
        "auc_std": float(np.std(auc)),
        "ne": float(np.mean(ne)),
        "ne_std": float(np.std(ne)),
        "delta_auc": float(np.mean(auc) - np.mean([plain[s]["test_auc"] for s in seeds])),
        "delta_ne": float(np.mean(ne) - np.mean([plain[s]["test_ne"] for s in seeds])),
        "interval": interval,
        "best_epochs": [runs[s]["best_epoch"] for s in seeds],
        "bytes": first["bytes"],
        "nominal_ratio": float(np.mean([runs[s]["bytes"]["nominal_ratio"] for s in seeds])),
        "true_ratio": float(np.mean([runs[s]["bytes"]["true_ratio"] for s in seeds])),
        "seconds_per_step": float(np.median([runs[s]["seconds_per_step"] for s in seeds])),
    }


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="train once")
    one.add_argument("--dataset", choices=sorted(DATASETS), required=True)
    one.add_argument("--method", choices=["plain", "fiited"], required=True)
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--target", type=float, default=0.8)
    one.add_argument("--chunks", type=int, default=4)
    one.add_argument("--layout", default="prefix")
    one.add_argument("--utility", default="gradient")
    one.add_argument("--scope", default="global")
    one.add_argument("--falloff", type=float, default=Granularity().falloff)
    one.add_argument("--prior", type=float, default=Granularity().prior_occurrences)
    one.add_argument("--rate-power", type=float, default=Granularity().rate_power)
    one.add_argument("--hysteresis", type=float, default=Granularity().hysteresis)
    one.add_argument("--every", type=int, default=PruningSchedule().every_n_steps)
    one.add_argument("--decay", type=float, default=PruningSchedule().decay)
    one.add_argument("--early", type=int, nargs="*", default=list(PruningSchedule().early_steps))
    one.add_argument("--normalize", action="store_true")
    one.add_argument("--embedding_lr", type=float, default=None)
    one.add_argument("--epochs", type=int, default=12)
    one.add_argument("--patience", type=int, default=4)
    one.add_argument("--check", type=float, default=0.25, help="epochs between validations")
    one.add_argument("--name", default=None)
    one.add_argument("--force", action="store_true")
    one.set_defaults(action=run)
    commands.add_parser("summary", help="average, compare, write results/quality.json").set_defaults(action=summary)
    args = parser.parse_args()
    args.action(args)


if __name__ == "__main__":
    main()

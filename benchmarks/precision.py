"""Precision against bytes on disk and in serving memory: post-training, quantisation-aware, and searched.

Every run is stopped by validation NE and tested once, at its best validation, on tables that were exported to disk and
loaded again. The search phase of a run takes no part::

    python -m benchmarks.precision run --dataset criteo_80k --method plain --seed 0
    python -m benchmarks.precision run --dataset criteo_80k --method qat --bits 4 --seed 0
    python -m benchmarks.precision run --dataset criteo_80k --method mpe --ratio 50 --seed 0
    python -m benchmarks.precision summary      # writes benchmarks/results/precision.json
    python -m benchmarks.precision step         # writes benchmarks/results/precision-step.json

A plain run also tests its tables rounded after training to 8, 4 and 2 bits, row by row.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from benchmarks.datasets import CACHE, DATASETS
from benchmarks.machine import describe
from benchmarks.quality import (
    DIM,
    MODEL,
    RESULTS,
    BestEpoch,
    normalized_entropy,
    paired_bootstrap,
    predict,
    quiet_trainer,
)
from benchmarks.speed import ClickBatch, click_batches, click_model, interleaved, train
from lightning_embcomp import MixedPrecisionSearch, PrecisionSearch, RowQuantization
from lightning_embcomp.engine.plan import SamePlan
from lightning_embcomp.export import build, hosts_of, load, write
from lightning_embcomp.export.accounting import disk_bytes, plain_bytes, serving_bytes
from lightning_embcomp.export.evaluation import swapped
from lightning_embcomp.export.files import read
from lightning_embcomp.methods.mpe.training import QuantizerTraining
from lightning_embcomp.models import ClickModel

RUNS = CACHE / "precision-runs"
POST_TRAINING = (8, 4, 2)
RATES = {"criteo_80k": 0.05, "book_crossing": 0.1, "movielens_1m": 0.1, "us_flights": 0.4}
"""Rates of the tables: for the plain model the best of four by validation NE on seed 0, as in frequency_lr.py."""


def logit(scores: np.ndarray) -> np.ndarray:
    """Inverse of the sigmoid."""
    return np.log(scores) - np.log1p(-scores)


def test_export(
    model: pl.LightningModule, data: pl.LightningDataModule, *, bits: int, file_format: str
) -> tuple[np.ndarray, dict[str, Any]]:
    """Export the tables, load them again, and predict the test rows with them.

    Args:
        model: The trained model, which stays as it is.
        data: Its data.
        bits: Width of rows that were not rounded in training.
        file_format: ``fbgemm`` or ``packed``.

    Returns:
        Predictions, and bytes of the tables.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "export"
        write(build(hosts_of(model), bits, format=file_format), path)  # type: ignore[arg-type]
        artefact = read(path)
        started = time.perf_counter()
        served = load(path)
        seconds = time.perf_counter() - started
        [host] = artefact.manifest.hosts
        with swapped(model, {host.path: served}):
            scores, _ = predict(model, data)
        plain = plain_bytes(artefact.manifest)
        disk, serving = disk_bytes(artefact, path)[0].total, serving_bytes(served, artefact.manifest).total
    return scores, {
        "plain": plain,
        "disk": disk,
        "serving": serving,
        "disk_ratio": plain / disk,
        "serving_ratio": plain / serving,
        "load_seconds": seconds,
    }


class BestExport(BestEpoch):
    """Keeps the predictions of the exported tables at the best validation outside the search."""

    def __init__(self, patience: int, search: MixedPrecisionSearch | None) -> None:
        super().__init__(patience)
        self.search = search
        self.exports: dict[str, tuple[np.ndarray, dict[str, Any]]] = {}
        self.search_seconds: list[float] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare, export, predict, perhaps stop."""
        if self.search is not None and self.search.training is not None and self.search.training.searching:
            self.search_seconds, self.seconds = self.search_seconds + self.seconds, []
            return
        before = self.best
        super().on_validation_end(trainer, pl_module)
        if self.best == before:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        if self.search is None:
            self.exports = {
                f"post-training-{bits}": test_export(pl_module, data, bits=bits, file_format="fbgemm")
                for bits in POST_TRAINING
            }
        else:
            self.exports = {
                file_format: test_export(pl_module, data, bits=8, file_format=file_format)
                for file_format in ("packed", "fbgemm")
            }


def run(args: argparse.Namespace) -> None:
    """Train once and write the results."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    name = args.name or {"plain": "plain", "qat": f"qat-{args.bits}", "mpe": f"mpe-{args.ratio:g}"}[args.method]
    out = RUNS / args.dataset / f"{name}-s{args.seed}"
    if Path(f"{out}.json").exists() and not args.force:
        print("have", out)
        return
    pl.seed_everything(args.seed, verbose=False)
    search = None
    if args.method == "qat":
        search = MixedPrecisionSearch(bits=args.bits)
    elif args.method == "mpe":
        search = MixedPrecisionSearch(
            ratio=None if args.penalty else args.ratio,
            penalty=args.penalty,
            search=PrecisionSearch(
                epochs=args.search_epochs, method=args.search, widths=tuple(args.widths), groups=args.groups
            ),
            quantization=RowQuantization(offset=args.offset),
        )
    settings = {**MODEL[args.dataset], "embedding_lr": args.lr or RATES[args.dataset]}
    model = ClickModel(embedding_dim=DIM, over_layers=(256, 128), **settings)
    best = BestExport(args.patience, search)
    epochs = args.epochs + (args.search_epochs if args.method == "mpe" else 0)
    trainer = quiet_trainer([best] if search is None else [search, best], epochs=epochs, check=args.check)
    started = time.perf_counter()
    trainer.fit(model, DATASETS[args.dataset](args.seed))
    elapsed = time.perf_counter() - started
    common = {
        "dataset": args.dataset,
        "seed": args.seed,
        "settings": {k: v for k, v in vars(args).items() if k not in ("command", "action", "force", "name")} | settings,
        "best_epoch": best.best,
        "history": best.history,
        "search_step_seconds": float(np.median(best.search_seconds)) if best.search_seconds else None,
        "step_seconds": float(np.median(best.seconds)),
        "seconds": elapsed,
        "average_bits": search.training.average_bits() if search is not None and search.training is not None else 32.0,
        "machine": describe(),
    }
    variants: dict[str, tuple[np.ndarray, dict[str, Any]]] = {}
    if search is None:
        plain = best.exports["post-training-8"][1]["plain"]
        whole = {"plain": plain, "disk": plain, "serving": plain, "disk_ratio": 1.0, "serving_ratio": 1.0}
        variants = {name: (best.predictions, whole), **best.exports}
    else:
        packed, fbgemm = best.exports["packed"], best.exports["fbgemm"]
        delta = {
            kind: float(np.abs(logit(scores) - logit(best.predictions)).max())
            for kind, (scores, _) in best.exports.items()
        }
        size = {**packed[1], "fbgemm_disk_ratio": fbgemm[1]["disk_ratio"], "max_logit_difference": delta}
        variants = {name: (packed[0], size)}
    out.parent.mkdir(parents=True, exist_ok=True)
    for variant, (scores, size) in variants.items():
        result = {
            **common,
            "name": variant,
            "test_auc": float(roc_auc_score(best.labels, scores)),
            "test_ne": normalized_entropy(best.labels, scores),
            "bytes": size,
        }
        path = out.parent / f"{variant}-s{args.seed}"
        np.savez_compressed(Path(f"{path}.npz"), scores=scores.astype(np.float32), labels=best.labels)
        Path(f"{path}.json").write_text(json.dumps(result, indent=1))
        print(
            f"{args.dataset} {variant} s{args.seed}: auc {result['test_auc']:.4f} ne {result['test_ne']:.4f}"
            f" disk {size['disk_ratio']:.1f}x serving {size['serving_ratio']:.1f}x"
            f" {size.get('max_logit_difference', '')} best {best.best} of {len(best.history)}"
            f" val {min(h['val_ne'] for h in best.history):.4f} {elapsed:.0f} s",
            flush=True,
        )


def _train_both(
    model: ClickModel,
    optimizer: torch.optim.Optimizer,
    training: QuantizerTraining | None,
    batches: list[ClickBatch],
    turn: int,
) -> None:
    """One step of the model, and of the settings of its rounding."""
    train(model, optimizer, batches[turn % 8])
    if training is not None:
        training.step()


def step(args: argparse.Namespace) -> None:
    """A whole DLRM step in either phase against the plain one, one thread, interleaved medians; writes the results."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    results = []
    for dim, batch in ((16, 2048), (64, 2048), (16, 256)):
        batches = click_batches(batch)
        by_rank, softmax = PrecisionSearch(frequency="rank"), PrecisionSearch(frequency="rank", method="softmax")
        callbacks = {
            "plain": None,
            "search": MixedPrecisionSearch(ratio=20, search=by_rank),
            "search, softmax": MixedPrecisionSearch(ratio=20, search=softmax),
            "retrain": MixedPrecisionSearch(ratio=20, search=by_rank),
            "8 bits": MixedPrecisionSearch(bits=8),
        }
        steps: list[Callable[[int], None]] = []
        for name, callback in callbacks.items():
            model, optimizer = click_model(dim, callback)
            training = None if callback is None else callback.training

            one = partial(_train_both, model, optimizer, training, batches)
            if name == "retrain":
                assert training is not None and callback is not None
                for turn in range(8):
                    one(turn)
                training.settle(training.choose())
                for owned in callback.owned[:1]:
                    owned.host.engine.move(SamePlan())
            steps.append(one)
        seconds = interleaved(steps, args.rounds)
        ms = {name: taken * 1e3 for name, taken in zip(callbacks, seconds, strict=True)}
        ratios = {name: taken / seconds[0] for name, taken in zip(callbacks, seconds, strict=True)}
        results.append({"dim": dim, "batch": batch, "ms": ms, "ratio": ratios})
        print(json.dumps(results[-1]), flush=True)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "precision-step.json"
    path.write_text(json.dumps({"machine": describe(), "rounds": args.rounds, "results": results}, indent=1) + "\n")


def summary(args: argparse.Namespace) -> None:
    """Average over seeds, compare with plain on the same rows, write JSON and a table."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for dataset in DATASETS:
        runs: dict[str, dict[int, dict[str, Any]]] = {}
        for path in sorted((RUNS / dataset).glob("*.json")):
            result = json.loads(path.read_text())
            result["predictions"] = path.with_suffix("").as_posix() + ".npz"
            runs.setdefault(result["name"], {})[result["seed"]] = result
        if "plain" in runs:
            rows = [_summarise(name, by_seed, runs["plain"]) for name, by_seed in runs.items()]
            tables[dataset] = sorted(rows, key=lambda row: (row["name"].split("-")[0], row["disk_ratio"]))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "precision.json").write_text(json.dumps({"machine": describe(), "results": tables}, indent=1) + "\n")
    for dataset, rows in tables.items():
        print(
            f"\n{dataset}\n{'run':20} seeds   AUC     ±    ΔAUC [95 %]                 NE     ΔNE      disk"
            "  serving   bits"
        )
        for r in rows:
            low, high = r["interval"]["auc"] if r["interval"] else (0.0, 0.0)
            print(
                f"{r['name']:20} {len(r['seeds']):5} {r['auc']:.4f} {r['auc_std']:.4f} {r['delta_auc']:+.4f}"
                f" [{low:+.4f}, {high:+.4f}] {r['ne']:.4f} {r['delta_ne']:+.4f} {r['disk_ratio']:7.1f}"
                f" {r['serving_ratio']:7.1f} {r['average_bits']:7.3f}"
            )


def _summarise(name: str, runs: dict[int, dict[str, Any]], plain: dict[int, dict[str, Any]]) -> dict[str, Any]:
    seeds = sorted(set(runs) & set(plain))
    mine, base = [runs[s] for s in seeds], [plain[s] for s in seeds]

    def mean(values: list[float]) -> float:
        return float(np.mean(values))

    interval = None
    if name != "plain":
        loaded, reference = ([np.load(r["predictions"]) for r in group] for group in (mine, base))
        interval = paired_bootstrap(
            loaded[0]["labels"],
            [x["scores"].astype(np.float64) for x in loaded],
            [x["scores"].astype(np.float64) for x in reference],
        )
    auc, ne = [r["test_auc"] for r in mine], [r["test_ne"] for r in mine]
    return {
        "name": name,
        "settings": mine[0]["settings"],
        "seeds": seeds,
        "auc": mean(auc),
        "auc_std": float(np.std(auc)),
        "ne": mean(ne),
        "ne_std": float(np.std(ne)),
        "val_ne": mean([min(h["val_ne"] for h in r["history"]) for r in mine]),
        "delta_auc": mean(auc) - mean([r["test_auc"] for r in base]),
        "delta_ne": mean(ne) - mean([r["test_ne"] for r in base]),
        "interval": interval,
        "average_bits": mean([r["average_bits"] for r in mine]),
        "disk_ratio": mean([r["bytes"]["disk_ratio"] for r in mine]),
        "serving_ratio": mean([r["bytes"]["serving_ratio"] for r in mine]),
        "bytes": mine[0]["bytes"],
        "max_logit_difference": max(
            (v for r in mine for v in (r["bytes"].get("max_logit_difference") or {}).values()), default=None
        ),
        "best_epochs": [r["best_epoch"] for r in mine],
    }


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="train once")
    one.add_argument("--dataset", choices=sorted(DATASETS), required=True)
    one.add_argument("--method", choices=["plain", "qat", "mpe"], required=True)
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--lr", type=float, default=None, help="rate of the tables")
    one.add_argument("--bits", type=int, default=8)
    one.add_argument("--ratio", type=float, default=40.0)
    one.add_argument("--penalty", type=float, default=None)
    one.add_argument("--search", default=PrecisionSearch().method)
    one.add_argument("--search-epochs", type=int, default=PrecisionSearch().epochs)
    one.add_argument("--widths", type=int, nargs="*", default=list(PrecisionSearch().widths))
    one.add_argument("--groups", type=int, default=PrecisionSearch().groups)
    one.add_argument("--offset", action="store_true")
    one.add_argument("--epochs", type=int, default=12, help="epochs outside the search")
    one.add_argument("--patience", type=int, default=1)
    one.add_argument("--check", type=float, default=1.0, help="epochs between validations")
    one.add_argument("--name", default=None)
    one.add_argument("--force", action="store_true")
    one.set_defaults(action=run)
    commands.add_parser("summary", help="average, compare, write the results").set_defaults(action=summary)
    steps = commands.add_parser("step", help="time of a training step, write the results")
    steps.add_argument("--rounds", type=int, default=60)
    steps.set_defaults(action=step)
    args = parser.parse_args()
    args.action(args)


if __name__ == "__main__":
    main()

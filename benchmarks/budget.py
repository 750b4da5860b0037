"""Pruning and precision under one byte budget: what is reached inside the NE guard, and how a drift is followed.

A plain run gives the NE that losses are counted from; it is made once per data set and seed, and kept::

    python -m benchmarks.budget run --dataset criteo_80k --ratio 10 --seed 0
    python -m benchmarks.budget run --dataset movielens_1m --ratio 5 --seed 0 --reference run
    python -m benchmarks.budget drift --dataset movielens_1m --ratio 8     # writes a figure to benchmarks/results
    python -m benchmarks.budget summary                                    # writes benchmarks/results/budget.json

``--reference plain`` counts losses from the lowest validation NE of the plain run: no step is made before the run is
as good. ``--reference run`` counts them from the lowest NE of the run itself. In ``drift``, the ids of every feature
are permuted half-way, in training and validation alike: what the tables hold is then worth nothing.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from typing import Any

import lightning.pytorch as pl
import matplotlib
import numpy as np
import torch
from matplotlib import pyplot as plt
from sklearn.metrics import roc_auc_score
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from benchmarks.datasets import CACHE, DATASETS
from benchmarks.machine import describe
from benchmarks.precision import RATES, test_export
from benchmarks.quality import DIM, MODEL, RESULTS, normalized_entropy, predict, quiet_trainer
from lightning_embcomp import PrecisionSearch, PruningSchedule
from lightning_embcomp.callbacks.budget import CompressionBudget
from lightning_embcomp.export.evaluation import evaluate
from lightning_embcomp.export.validation import validation_batches
from lightning_embcomp.methods.budget.config import BudgetControl
from lightning_embcomp.models import ClickModel

RUNS = CACHE / "budget-runs"
CHECKS = 8
"""Control events, and validations of the plain run, per epoch."""


class Trace(pl.Callback):
    """Keeps what the budget logs at every event, and tests the model that the run ends with.

    Args:
        budget: The budget; listed before this callback.
        tests: Whether to test.
    """

    def __init__(self, budget: CompressionBudget, tests: bool) -> None:
        self.budget, self.tests = budget, tests
        self.rows: list[dict[str, float]] = []
        self.end: dict[str, Any] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: object) -> None:
        """Copy the last values."""
        if trainer.global_step % self.budget.control.every_n_steps or self.budget.report is None:
            return
        found = {k.partition("/")[2]: float(v) for k, v in trainer.callback_metrics.items() if "budget" in k}
        self.rows.append({"step": float(trainer.global_step), **found})

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What the exported tables predict, and how large they are."""
        report, controller = self.budget.report, self.budget.controller
        assert report is not None and controller is not None
        self.end = {
            "met": self.budget.met,
            "bytes": report.size,
            "of_budget": report.size / controller.budget,
            "ne": report.ne,
            "reference_ne": controller.reference,
            "ne_loss": report.ne / controller.reference - 1,
            "returned": report.rolled_back,
            "rollbacks": controller.rollbacks,
            "average_bits": self.rows[-1]["average_bits"],
            "share": self.rows[-1]["share"],
        }
        if self.tests:
            data = trainer.datamodule  # type: ignore[attr-defined]
            data.setup("test")
            labels = torch.cat([label for *_, label in data.test_dataloader()]).numpy()
            scores, exported = test_export(pl_module, data, bits=8, file_format="fbgemm")
            self.end |= {
                "exported": exported,
                "test_auc": float(roc_auc_score(labels, scores)),
                "test_ne": normalized_entropy(labels, scores),
            }


class LowestNE(pl.Callback):
    """The lowest validation NE of a plain run, measured as the budget measures it, and test AUC there."""

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.history: list[float] = []
        self.test_auc = 0.0

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure, perhaps stop."""
        self.history.append(evaluate(pl_module, validation_batches(trainer)).ne)
        if self.history[-1] == min(self.history):
            scores, labels = predict(pl_module, trainer.datamodule)  # type: ignore[attr-defined]
            self.test_auc = float(roc_auc_score(labels, scores))
        if len(self.history) - 1 - int(np.argmin(self.history)) >= self.patience:
            trainer.should_stop = True


class PermutedModel(ClickModel):
    """A click model whose ids are permuted, in training and evaluation alike, from some step on."""

    permute_from: int | None = None

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:  # noqa: ANN401
        """Permute the ids of every feature."""
        if self.permute_from is None or self.trainer.global_step < self.permute_from:
            return batch
        dense, sparse, label = batch
        return dense, self._permuted(sparse), label

    def _permuted(self, sparse: KeyedJaggedTensor) -> KeyedJaggedTensor:
        rows = {f["name"]: f["num_embeddings"] for f in self.hparams["features"]}
        values = sparse.values().clone()
        first = 0
        for key, count in zip(sparse.keys(), sparse.length_per_key(), strict=True):
            generator = torch.Generator().manual_seed(rows[key])
            ids = torch.randperm(rows[key], generator=generator)[values[first : first + count].long()]
            values[first : first + count] = ids.to(values.dtype)
            first += count
        return KeyedJaggedTensor(sparse.keys(), values, lengths=sparse.lengths())


def model_for(dataset: str) -> PermutedModel:
    """The model of the quality benchmark, at the rate that suits the plain one best."""
    return PermutedModel(
        embedding_dim=DIM, over_layers=(256, 128), **{**MODEL[dataset], "embedding_lr": RATES[dataset]}
    )


def plain_run(args: argparse.Namespace) -> dict[str, Any]:
    """Lowest validation NE of the plain run, and its test AUC there; from an earlier call if there was one."""
    path = RUNS / args.dataset / f"plain-s{args.seed}.json"
    if not path.exists():
        pl.seed_everything(args.seed, verbose=False)
        lowest = LowestNE(patience=CHECKS)
        trainer = quiet_trainer([lowest], epochs=args.epochs, check=1 / CHECKS)
        trainer.fit(model_for(args.dataset), DATASETS[args.dataset](args.seed))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"val_ne": lowest.history, "test_auc": lowest.test_auc}))
    found = json.loads(path.read_text())
    return {"plain_ne": min(found["val_ne"]), "plain_auc": found["test_auc"]}


def steps_per_epoch(data: pl.LightningDataModule) -> int:
    """Batches of an epoch."""
    data.prepare_data()
    data.setup("fit")
    return len(data.train_dataloader())


def budget_for(args: argparse.Namespace, every: int, reference: float | None) -> CompressionBudget:
    """The callback under test."""
    return CompressionBudget(
        ratio=args.ratio,
        max_ne_loss=args.max_ne_loss,
        reference_ne=reference,
        control=BudgetControl(
            every_n_steps=every,
            step=args.step,
            window=args.window,
            recovery=args.recovery,
            price_rate=args.price_rate,
        ),
        schedule=PruningSchedule(every_n_steps=every),
        search=PrecisionSearch(epochs=args.search_epochs, steps=args.search_steps, reset=not args.keep),
    )


def fit(args: argparse.Namespace, drift: bool) -> tuple[Trace, dict[str, Any]]:
    """Train once under the budget."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    reference = plain_run(args)["plain_ne"] if args.reference == "plain" and not drift else None
    pl.seed_everything(args.seed, verbose=False)
    data = DATASETS[args.dataset](args.seed)
    epoch = steps_per_epoch(data)
    every = max(1, epoch // args.checks)
    model = model_for(args.dataset)
    if drift:
        model.permute_from = epoch * args.epochs // 2
    callback = budget_for(args, every, reference)
    trace = Trace(callback, tests=not drift)
    started = time.perf_counter()
    quiet_trainer([callback, trace], epochs=args.epochs, check=1.0).fit(model, data)
    assert callback.controller is not None and callback.report is not None
    return trace, {
        "dataset": args.dataset,
        "seed": args.seed,
        "settings": {k: v for k, v in vars(args).items() if k not in ("command", "action", "force")},
        "budget": callback.controller.budget,
        "end": trace.end,
        "trace": trace.rows,
        "seconds": time.perf_counter() - started,
        "machine": describe(),
    }


def run(args: argparse.Namespace) -> None:
    """Train once and write the result."""
    kind = args.name or f"{args.reference}{'-keep' if args.keep else ''}"
    out = RUNS / args.dataset / f"{kind}-{args.ratio:g}-s{args.seed}.json"
    if out.exists() and not args.force:
        print("have", out)
        return
    _, found = fit(args, drift=False)
    found |= plain_run(args)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1))
    print(line(found), flush=True)


def line(found: dict[str, Any]) -> str:
    """One result as text."""
    end = found["end"]
    return (
        f"{found['dataset']} {found['settings']['ratio']:g}x ({found['settings']['reference']}) s{found['seed']}:"
        f" {'met' if end['met'] else 'NOT met'} with {end['bytes']:,} bytes, {100 * end['of_budget']:.1f} % of the"
        f" budget; NE {end['ne']:.5f}, {100 * end['ne_loss']:+.3f} % of the reference {end['reference_ne']:.5f}, plain"
        f" {found['plain_ne']:.5f}; {end['rollbacks']} rolled back{', ends with an earlier state' * end['returned']};"
        f" share {end['share']:.2f}, {end['average_bits']:.2f} bits;"
        f" exported {end['exported']['serving']:,} bytes ({end['exported']['serving_ratio']:.2f}x), test AUC"
        f" {end['test_auc']:.4f}, plain {found['plain_auc']:.4f}; {found['seconds']:.0f} s"
    )


def drift(args: argparse.Namespace) -> None:
    """Train through a permutation of all ids, and plot bytes, NE and the price."""
    matplotlib.use("Agg")
    trace, found = fit(args, drift=True)
    steps = [row["step"] for row in trace.rows]
    figure, axes = plt.subplots(3, 1, sharex=True, figsize=(8, 8), constrained_layout=True)

    def draw(axis: Any, name: str, label: str, **style: Any) -> None:  # noqa: ANN401 - matplotlib's own
        axis.plot(steps, [row.get(name, np.nan) for row in trace.rows], label=label, **style)

    draw(axes[0], "serving_bytes", "serving")
    draw(axes[0], "training_bytes", "training")
    axes[0].axhline(found["budget"], color="gray", linestyle="--", label="budget")
    axes[0].set(ylabel="bytes", yscale="log")
    draw(axes[1], "ne", "validation NE")
    draw(axes[1], "limit", "guard", color="gray", linestyle="--")
    axes[1].set(ylabel="NE")
    draw(axes[2], "multiplier", "price: relative NE per e-fold of bytes")
    axes[2].set(ylabel="multiplier", yscale="log", xlabel="step")
    for axis in axes:
        axis.axvline(steps[-1] / 2, color="tab:red", linestyle=":", label="ids are permuted")
        axis.legend(loc="best", fontsize="small")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"budget-drift-{args.dataset}"
    figure.savefig(path.with_suffix(".svg"))
    path.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"wrote {path}.svg; {found['end']['bytes']:,} bytes of {found['budget']:,}, NE {found['end']['ne']:.5f}")


def summary(args: argparse.Namespace) -> None:
    """Collect the results of all runs."""
    results = [json.loads(path.read_text()) for path in sorted(RUNS.glob("*/*.json")) if "plain-s" not in path.name]
    for found in results:
        print(line(found))
        del found["trace"]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "budget.json").write_text(json.dumps({"machine": describe(), "results": results}, indent=1) + "\n")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, action, text in (("run", run, "train once"), ("drift", drift, "train through a drift, and plot")):
        one = commands.add_parser(name, help=text)
        one.add_argument("--dataset", choices=sorted(DATASETS), required=True)
        one.add_argument("--ratio", type=float, required=True, help="plain over serving bytes")
        one.add_argument("--seed", type=int, default=0)
        one.add_argument("--epochs", type=int, default=4)
        one.add_argument("--search-epochs", type=int, default=1)
        one.add_argument("--search-steps", type=int, default=None, help="instead of epochs")
        one.add_argument("--checks", type=int, default=CHECKS, help="control events per epoch")
        one.add_argument("--keep", action="store_true", help="do not start tables anew after the search")
        one.add_argument("--max-ne-loss", type=float, default=0.0005)
        one.add_argument("--reference", choices=["plain", "run"], default="plain")
        one.add_argument("--step", type=float, default=BudgetControl().step)
        one.add_argument("--recovery", type=float, default=BudgetControl().recovery)
        one.add_argument("--price-rate", type=float, default=BudgetControl().price_rate)
        one.add_argument("--window", type=int, default=None, help="events whose lowest NE is the reference")
        one.add_argument("--name", default=None, help="of a variant")
        one.add_argument("--force", action="store_true")
        one.set_defaults(action=action)
    commands.add_parser("summary", help="collect, write results/budget.json").set_defaults(action=summary)
    args = parser.parse_args()
    args.action(args)


if __name__ == "__main__":
    main()

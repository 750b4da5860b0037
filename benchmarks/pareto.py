"""Pareto fronts: this project's methods and their peers on the same data, with the same model and budget of tuning.

    python -m benchmarks pareto list                                  # all runs of the queue, in order
    python -m benchmarks pareto run --dataset criteo_80k --method pruning --level 10 --seed 0
    python -m benchmarks pareto queue                                 # makes those that are missing
    python -m benchmarks pareto summary                               # writes benchmarks/results/pareto.json
    python -m benchmarks pareto quick                                 # a few points on a made-up log, no data needed

A run trains DLRM once, on one thread, until validation NE is worse than before, and tests each form of the tables
(as trained, rounded after training, sparse) at the best validation outside a search. A run that exists is not repeated.

*Training* is plain bytes of weights and optimizer state over all bytes that the tables hold at their peak while they
train; *serving* is plain float32 weights over all bytes of the served form.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from benchmarks.combined import COUNTED_RATES, SEARCH_EPOCHS
from benchmarks.datasets import DATASETS
from benchmarks.large import large, made_up
from benchmarks.machine import describe
from benchmarks.peers.cases import ADAGRAD, ADAM, COUNTED, LEVELS, METHODS, Case, Task, held_bytes, make
from benchmarks.peers.folded import Unreachable
from benchmarks.peers.fronts import DRAWS, TOLERANCE, compare, points_of, read, record
from benchmarks.peers.published import NOT_RUN, ops_missing
from benchmarks.peers.runs import RUNS, SCALES, TUNED, TUNING_LEVEL, Run, queue_of, tuned_scale
from benchmarks.precision import RATES
from benchmarks.quality import RESULTS, BestEpoch, normalized_entropy, quiet_trainer
from lightning_embcomp.methods.fiited.module import BudgetError
from lightning_embcomp.models.features import feature_records

SETS = {**DATASETS, "large": large, "made_up": made_up}
ADAM_RATES = {"criteo_80k": 0.01, "book_crossing": 0.01, "movielens_1m": 0.03, "us_flights": 0.03}
OTHER_RATES = {ADAGRAD: 0.1, COUNTED: 1024.0, ADAM: 0.01}
"""Rates of the tables on made-up logs; they were not tuned."""
EPOCHS, PATIENCE, CHECK = 12, 2, 0.5
MORE = 75
"""Exit status of a queue that has stopped before its end."""


class BestForms(BestEpoch):
    """Keeps what every form predicts at the best validation outside a search, and the peak of the bytes.

    Args:
        case: What is trained.
        patience: Worse validations after which the run stops.
    """

    def __init__(self, case: Case, patience: int) -> None:
        super().__init__(patience)
        self.case = case
        self.forms: dict[str, dict[str, Any]] = {}
        self.scores: dict[str, np.ndarray] = {}
        self.unreachable: dict[str, str] = {}
        self.peak = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Bytes before the first step."""
        self.peak = held_bytes(trainer, pl_module)

    def on_train_batch_end(self, *args: Any) -> None:  # noqa: ANN401
        """Bytes after the first steps, and now and then."""
        super().on_train_batch_end(*args)
        trainer, pl_module = args[:2]
        if trainer.global_step in (1, 2, 10) or trainer.global_step % 100 == 0:
            self.peak = max(self.peak, held_bytes(trainer, pl_module))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare, try every form, perhaps stop."""
        if self.case.searching():
            return
        before = self.best
        super().on_validation_end(trainer, pl_module)
        if self.best == before:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        for name, form in self.case.forms.items():
            try:
                with form() as size:
                    validation, labels = predictions(pl_module, data.val_dataloader())
                    scores, self.labels = predictions(pl_module, data.test_dataloader())
            except Unreachable as error:
                self.unreachable[name] = str(error)
                continue
            self.scores[name] = scores.astype(np.float32)
            self.forms[name] = {
                "serving_bytes": size,
                "val_ne": normalized_entropy(labels, validation),
                "test_auc": float(roc_auc_score(self.labels, scores)),
                "test_ne": normalized_entropy(self.labels, scores),
            }


def predictions(model: pl.LightningModule, batches: Any) -> tuple[np.ndarray, np.ndarray]:  # noqa: ANN401
    """Probabilities and labels of all rows."""
    model.eval()
    scores, labels = [], []
    with torch.no_grad():
        for dense, sparse, label in batches:
            scores.append(torch.sigmoid(model(dense, sparse).double()))
            labels.append(label)
    model.train()
    return torch.cat(scores).numpy(), torch.cat(labels).numpy()


def task_of(dataset: str, data: Any) -> Task:  # noqa: ANN401 - a data module of this project
    """What every method is given on a data set."""
    by_optimizer = {ADAGRAD: RATES, COUNTED: COUNTED_RATES, ADAM: ADAM_RATES}
    rates = {name: known.get(dataset, OTHER_RATES[name]) for name, known in by_optimizer.items()}
    return Task(
        features=feature_records(data.features),
        num_dense=data.num_dense,
        steps=len(data.train_dataloader()),
        rates=rates,
        search=SEARCH_EPOCHS.get(dataset, 1),
        sparse_levels=(10, 50) if dataset == "large" else LEVELS,
    )


def execute(run: Run) -> None:
    """Train once and write the result; what cannot get so small leaves the reason."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    pl.seed_everything(run.seed, verbose=False)
    data = SETS[run.dataset](run.seed)
    data.prepare_data()
    data.setup("fit")
    task = task_of(run.dataset, data)
    result: dict[str, Any] = {"run": asdict(run), "plain": {"weights": task.weights, "training": task.training}}
    run.path.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    try:
        case = make(run.method, run.level, task, run.scale)
        best = BestForms(case, PATIENCE)
        epochs = 1 if run.dataset == "large" else EPOCHS
        check = 1.0 if run.dataset == "large" else CHECK
        trainer = quiet_trainer([*case.callbacks, best], epochs=epochs + case.extra_epochs, check=check)
        trainer.fit(case.model, data)
    except (Unreachable, BudgetError) as error:
        result["unreachable"] = str(error)
        print(f"{run.path.name}: {error}", flush=True)
    else:
        result |= {
            "training_bytes": best.peak,
            "training_bytes_at_end": held_bytes(trainer, case.model),
            "best_check": best.best,
            "history": best.history,
            "forms": best.forms,
            "unreachable_forms": best.unreachable,
            "seconds_per_step": float(np.median(best.seconds)),
        }
        arrays: dict[str, Any] = {"labels": best.labels.astype(np.uint8), **best.scores}
        np.savez_compressed(Path(f"{run.path}.npz"), **arrays)
        print(line(run, result), flush=True)
    result |= {"seconds": time.perf_counter() - started, "machine": describe()}
    Path(f"{run.path}.json").write_text(json.dumps(result, indent=1))


def line(run: Run, result: dict[str, Any]) -> str:
    """One result as text."""
    plain = result["plain"]
    forms = "  ".join(
        f"{name} {plain['weights'] / form['serving_bytes']:.1f}x {form['test_auc']:.4f}"
        for name, form in result["forms"].items()
    )
    checks = result["history"]
    return (
        f"{run.dataset} {run.path.name} training {plain['training'] / result['training_bytes']:.2f}x"
        f" best {result['best_check']} of {len(checks)}: {forms}"
    )


def run(args: argparse.Namespace) -> None:
    """Train once."""
    one = Run(dataset=args.dataset, method=args.method, level=args.level, seed=args.seed, scale=args.scale)
    if one.exists and not args.force:
        print("have", one.path)
        return
    execute(one)


def queue(args: argparse.Namespace) -> None:
    """Make the runs that are missing, one after the other."""
    started = time.monotonic()
    for one in queue_of():
        if time.monotonic() - started > 60 * args.minutes:
            raise SystemExit(MORE)
        if not one.exists and args.dataset in (None, one.dataset):
            execute(one)


QUICK = (("plain", 1), ("pruning", 5), ("hashing", 5), ("precision", 20))


def quick(args: argparse.Namespace) -> None:
    """A few points on the made-up log, as a table; nothing is written to the results."""
    runs = [Run(dataset="made_up", method=method, level=level, seed=0) for method, level in QUICK]
    for one in runs:
        if not one.exists:
            execute(one)
    found = [(json.loads(Path(f"{one.path}.json").read_text()), Path(f"{one.path}.npz")) for one in runs]
    points = points_of(found, dict.fromkeys(METHODS, 1.0))
    print(f"{'method':32} {'form':12} {'training':>9} {'serving':>9}  test AUC")
    for point in (record(point) for point in points):
        print(
            f"{point['label']:32} {point['form']:12} {point['training_ratio']:8.1f}x {point['serving_ratio']:8.1f}x"
            f"  {point['auc']:.4f}"
        )


def listing(args: argparse.Namespace) -> None:
    """Print the queue."""
    runs = list(dict.fromkeys(queue_of()))
    for one in runs:
        print("have   " if one.exists else "missing", one.dataset, one.path.name)
    print(f"{sum(one.exists for one in runs)} of {len(runs)}")


def summary(args: argparse.Namespace) -> None:
    """Average, compare, write the results and print a table."""
    results: dict[str, Any] = {}
    missing = [one for one in dict.fromkeys(queue_of()) if not one.exists]
    for dataset in (name for name in SETS if name != "made_up"):
        found = read(RUNS / dataset)
        points = points_of(found, {method: tuned_scale(dataset, method) for method in METHODS})
        if not any(point.family == "plain" for point in points):
            continue
        [plain] = [point for point in points if point.family == "plain"]
        results[dataset] = {
            "plain_bytes": found[0][0]["plain"],
            "points": [record(point, plain) for point in points],
            "comparisons": compare(points, LEVELS),
            "out_of_reach": [
                {**result["run"], "reason": result["unreachable"]} for result, _ in found if "unreachable" in result
            ],
            "seconds": sum(result["seconds"] for result, _ in found),
            "runs": len(found),
            "missing": [one.path.name for one in missing if one.dataset == dataset],
        }
        print_table(dataset, results[dataset])
    protocol = {
        "epochs": EPOCHS,
        "patience": PATIENCE,
        "check": CHECK,
        "tuned": TUNED,
        "scales": SCALES,
        "tuning_level": TUNING_LEVEL,
        "tolerance": TOLERANCE,
        "draws": DRAWS,
    }
    RESULTS.mkdir(exist_ok=True)
    report = {
        "machine": describe(),
        "protocol": protocol,
        "itep_operators_missing": ops_missing(),
        "not_run": NOT_RUN,
        "results": results,
    }

    (RESULTS / "pareto.json").write_text(json.dumps(report, indent=1) + "\n")


def print_table(dataset: str, found: dict[str, Any]) -> None:
    """Our best against every other method, at every level, by what was run so far."""
    print(f"\n{dataset}: {found['runs']} runs, {len(found['missing'])} of the queue are missing")
    points = {point["name"]: point for point in found["points"]}
    for axis in ("training", "serving"):
        print(f"\n{dataset}, {axis} bytes\n{'level':>5}  {'ours':44} {'against':52} {'ΔAUC [95 %]':26} ΔNE")
        for row in (row for row in found["comparisons"] if row["axis"] == axis):
            ours, theirs, gap = points.get(row["ours"]), points.get(row["theirs"]), row.get("difference")
            if theirs is None:
                continue
            end = "no point of ours"
            if gap is not None:
                low, high = gap["auc_interval"]
                end = f"{gap['auc']:+.4f} [{low:+.4f}, {high:+.4f}] {gap['ne']:+.4f} {row['verdict']}"
            print(f"{row['level']:>4}x  {_described(ours, axis):44} {_described(theirs, axis):52} {end}")


def _described(point: dict[str, Any] | None, axis: str) -> str:
    if point is None:
        return "-"
    return f"{point['label']}, {point['form']} {point[axis + '_ratio']:.1f}x {point['auc']:.4f}"


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="train once")
    one.add_argument("--dataset", choices=sorted(SETS), required=True)
    one.add_argument("--method", choices=list(METHODS), required=True)
    one.add_argument("--level", type=int, default=1, help="plain over held bytes")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--scale", type=float, default=1.0, help="factor on the rate of the tables")
    one.add_argument("--force", action="store_true")
    one.set_defaults(action=run)
    many = commands.add_parser("queue", help="make the runs that are missing, about two hours in all")
    many.add_argument("--dataset", choices=sorted(SETS), default=None)
    many.add_argument(
        "--minutes", type=float, default=float("inf"), help="start no run after this time; then exit with 75"
    )
    many.set_defaults(action=queue)
    commands.add_parser("quick", help="a few points on a made-up log, about a minute").set_defaults(action=quick)
    commands.add_parser("list", help="print the queue").set_defaults(action=listing)
    commands.add_parser("summary", help="average, compare, write results/pareto.json").set_defaults(action=summary)
    args = parser.parse_args()
    args.action(args)


if __name__ == "__main__":
    main()

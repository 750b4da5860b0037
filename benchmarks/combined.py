"""Pruning, mixed precision and frequency-aware rates together, against each of them alone at equal true bytes.

Every run is stopped by validation NE and tested once, at its best validation outside the search, on the tables as they
are served: exported, written, loaded again::

    python -m benchmarks.combined run --dataset criteo_80k --method plain --seed 0
    python -m benchmarks.combined run --dataset criteo_80k --method rates
    python -m benchmarks.combined run --dataset criteo_80k --method pruning --target 0.65
    python -m benchmarks.combined run --dataset criteo_80k --method pruning --serving 10
    python -m benchmarks.combined run --dataset criteo_80k --method precision --serving 10
    python -m benchmarks.combined run --dataset criteo_80k --method together --target 0.65 --serving 10
    python -m benchmarks.combined summary      # writes benchmarks/results/combined.json

``--serving`` is the size that loaded tables are to be smaller by. With a search, its ratio is chosen when the search
ends, so that they are; pruning alone moves its target at every event. ``--target`` is what pruning removes from the
weights in training. A run with ``--target`` and without a search also tests its tables rounded to 8 bits, row by row.
``--bits`` serves rows that no search rounds with fewer bits, rounded row by row after training. ``pair`` is
``together`` without the rates.
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
from sklearn.metrics import roc_auc_score

from benchmarks.datasets import CACHE, DATASETS
from benchmarks.machine import describe
from benchmarks.precision import RATES, test_export
from benchmarks.quality import (
    DIM,
    MODEL,
    RESULTS,
    BestEpoch,
    embedding_bytes,
    normalized_entropy,
    paired_bootstrap,
    quiet_trainer,
)
from lightning_embcomp import DimensionPruning, FrequencyAwareLR, MixedPrecisionSearch, PrecisionSearch
from lightning_embcomp.methods.budget.accounting import TablesBytes, serving_bytes
from lightning_embcomp.models import ClickModel

RUNS = CACHE / "combined-runs"
METHODS = ("plain", "rates", "pruning", "precision", "pair", "together")
SEARCH_EPOCHS = {"criteo_80k": 1, "book_crossing": 2, "movielens_1m": 3, "us_flights": 1}
COUNTED_RATES = {"criteo_80k": 256.0, "book_crossing": 1024.0, "movielens_1m": 4096.0, "us_flights": 1024.0}
"""Rates of the tables with frequency-aware rates: the best of four by validation, as in frequency_lr.py."""
PLAIN_ROW = 4 * DIM + 4
"""Bytes of a plain row in training: weights and the state of row-wise Adagrad."""
FLOAT = 32
Runs = dict[int, dict[str, Any]]
"""Runs of one name by seed."""
_HALVINGS = 16
_TRIES, _CLOSE = 4, 0.01
_SMALLEST, _LARGEST = 4.0, 2000.0


class SearchedLevel(pl.Callback):
    """Chooses the ratio of a search when it ends, so that tables are served in a number of bytes.

    Args:
        search: The search; listed after this callback.
        serving: Plain over served bytes.
    """

    def __init__(self, search: MixedPrecisionSearch, serving: float) -> None:
        self.search, self.serving = search, serving

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the ratio by halving."""
        training = self.search.training
        assert training is not None
        if not training.searching or trainer.current_epoch < self.search.search.epochs:
            return
        low, high = np.log(_SMALLEST), np.log(_LARGEST)
        for _ in range(_HALVINGS):
            training.ratio = float(np.exp((low + high) / 2))
            found = self._served(pl_module, training.choose())
            low, high = ((low + high) / 2, high) if found.held > found.plain / self.serving else (low, (low + high) / 2)
        training.ratio = float(np.exp(high))

    def _served(self, module: pl.LightningModule, bits: list[torch.Tensor]) -> TablesBytes:
        """Bytes that tables would be served in at some widths."""
        training = self.search.training
        assert training is not None
        searched = [state.bits.clone() for state in training.states]
        try:
            for state, chosen in zip(training.states, bits, strict=True):
                state.bits.copy_(chosen)
            return serving_bytes(module, {table.name for table in self.search.owned})
        finally:
            for state, before in zip(training.states, searched, strict=True):
                state.bits.copy_(before)


class PrunedLevel(pl.Callback):
    """Moves the target of pruning after each of its events, so that tables are served in a number of bytes.

    Args:
        pruning: The callback that prunes; listed before this one.
        serving: Plain over served bytes.
        bits: Bits of rows that are not rounded in training.
        search: The search of widths beside it, if there is one: bytes are held once it is over, and no more are taken
            in training than while it ran.
    """

    def __init__(
        self, pruning: DimensionPruning, serving: float, bits: int, search: MixedPrecisionSearch | None
    ) -> None:
        self.pruning, self.serving, self.bits, self.search = pruning, serving, bits, search
        self.most = 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: object) -> None:
        """Scale the share of the weights that is kept."""
        pruner = self.pruning.pruner
        assert pruner is not None and pruner.target is not None
        if not self.pruning.schedule.is_event(trainer.global_step):
            return
        if self.search is not None and self.search.training is not None and self.search.training.searching:
            self.most = max(self.most, pruner.held_bytes())
            return
        for _ in range(_TRIES):
            found = serving_bytes(pl_module, {table.name for table in pruner.tables}, bits=self.bits)
            factor = found.plain / self.serving / found.held
            if factor > 1 and self.search is not None:
                factor = min(factor, self.most / pruner.held_bytes())
            if abs(factor - 1) < _CLOSE:
                return
            pruner.target = 1 - min(1.0, (1 - pruner.target) * factor)
            pruner.step(1.0, trainer.optimizers)


class BestServed(BestEpoch):
    """Keeps what the served tables predict at the best validation outside the search, and the bytes of training.

    Args:
        patience: Worse validations after which the run stops.
        search: The search of widths, if there is one.
        bits: Widths of rows that the run did not round, by name of the variant.
    """

    def __init__(self, patience: int, search: MixedPrecisionSearch | None, bits: dict[str, int]) -> None:
        super().__init__(patience)
        self.search, self.bits = search, bits
        self.exports: dict[str, tuple[np.ndarray, dict[str, Any]]] = {}
        self.held: list[float] = []
        self.at_best: dict[str, float] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Bytes before the first step."""
        self.held.append(embedding_bytes(pl_module)["total"])

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare, export, predict, perhaps stop."""
        held = embedding_bytes(pl_module)
        self.held.append(held["total"])
        if self.search is not None and self.search.training is not None and self.search.training.searching:
            return
        before = self.best
        super().on_validation_end(trainer, pl_module)
        if self.best == before:
            return
        self.at_best = held
        data = trainer.datamodule  # type: ignore[attr-defined]
        self.exports = {
            name: test_export(pl_module, data, bits=bits, file_format="fbgemm") for name, bits in self.bits.items()
        }


def name_of(args: argparse.Namespace) -> str:
    """Name of a run."""
    parts = [args.method]
    if args.target is not None:
        parts.append(f"t{args.target:g}")
    if args.serving is not None:
        parts.append(f"s{args.serving:g}")
    if args.bits != FLOAT:
        parts.append(f"int{args.bits}")
    if args.lr is not None:
        parts.append(f"lr{args.lr:g}")
    return "-".join(parts)


def check(args: argparse.Namespace) -> None:
    """Refuse settings that do not belong to a method."""
    wanted = {
        "plain": ("none",),
        "rates": ("none",),
        "pruning": ("target", "serving"),
        "precision": ("serving",),
        "pair": ("both",),
        "together": ("both",),
    }[args.method]
    given = (args.target is not None, args.serving is not None)
    found = {(False, False): "none", (True, False): "target", (False, True): "serving", (True, True): "both"}[given]
    if found not in wanted:
        raise SystemExit(f"{args.method} takes of --target and --serving: {' or '.join(wanted)}, not {found}")


def callbacks_for(args: argparse.Namespace) -> tuple[list[pl.Callback], MixedPrecisionSearch | None]:
    """The methods under test, and the search among them."""
    callbacks: list[pl.Callback] = []
    search = None
    if args.method in ("precision", "pair", "together"):
        epochs = args.search_epochs or SEARCH_EPOCHS[args.dataset]
        search = MixedPrecisionSearch(ratio=_SMALLEST, search=PrecisionSearch(epochs=epochs))
    if args.method in ("pruning", "pair", "together"):
        pruning = DimensionPruning(target=1 - 1 / args.serving if args.target is None else args.target)
        callbacks.append(pruning)
        if args.serving is not None:
            callbacks.append(PrunedLevel(pruning, args.serving, args.bits, search))
    if search is not None:
        callbacks = [SearchedLevel(search, args.serving), *callbacks, search]
    if args.method in ("rates", "together"):
        callbacks.append(FrequencyAwareLR())
    return callbacks, search


def model_for(args: argparse.Namespace) -> ClickModel:
    """The model of the quality benchmark, with rates that suit the plain tables best."""
    counted = args.method in ("rates", "together")
    return ClickModel(
        embedding_dim=DIM,
        over_layers=(256, 128),
        dense_lr=MODEL[args.dataset]["dense_lr"],
        embedding_lr=args.lr or (COUNTED_RATES if counted else RATES)[args.dataset],
        embedding_optimizer="sgd" if counted else "rowwise_adagrad",
    )


def run(args: argparse.Namespace) -> None:
    """Train once and write the results."""
    check(args)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    name = args.name or name_of(args)
    folder = RUNS / args.dataset
    if (folder / f"{name}-r{args.seed}.json").exists() and not args.force:
        print("have", args.dataset, name, args.seed)
        return
    pl.seed_everything(args.seed, verbose=False)
    callbacks, search = callbacks_for(args)
    bits = {"": args.bits}
    if args.method == "pruning" and args.target is not None:
        bits["-int8"] = 8
    model = model_for(args)
    best = BestServed(args.patience, search, bits)
    epochs = args.epochs + (0 if search is None else search.search.epochs)
    started = time.perf_counter()
    quiet_trainer([*callbacks, best], epochs=epochs, check=args.check).fit(model, DATASETS[args.dataset](args.seed))
    elapsed = time.perf_counter() - started
    plain_serving = best.exports[""][1]["plain"]
    plain_training = plain_serving // (4 * DIM) * PLAIN_ROW
    common = {
        "dataset": args.dataset,
        "method": args.method,
        "seed": args.seed,
        "settings": {k: v for k, v in vars(args).items() if k not in ("command", "action", "force", "name")},
        "best_check": best.best,
        "history": best.history,
        "training": {
            "plain": plain_training,
            "peak": max(best.held),
            "peak_ratio": plain_training / max(best.held),
            "at_best": best.at_best,
            "at_best_ratio": plain_training / best.at_best["total"],
        },
        "average_bits": None if search is None or search.training is None else search.training.average_bits(),
        "ratio": None if search is None or search.training is None else search.training.ratio,
        "seconds": elapsed,
        "machine": describe(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for variant in reversed(bits):  # the one that says that a run is complete comes last
        scores, size = best.exports[variant]
        result = {
            **common,
            "name": name + variant,
            "test_auc": float(roc_auc_score(best.labels, scores)),
            "test_ne": normalized_entropy(best.labels, scores),
            "val_ne": best.history[best.best]["val_ne"],
            "serving": size,
        }
        path = folder / f"{name}{variant}-r{args.seed}"
        np.savez_compressed(Path(f"{path}.npz"), scores=scores.astype(np.float32), labels=best.labels)
        Path(f"{path}.json").write_text(json.dumps(result, indent=1))
        print(
            f"{args.dataset} {result['name']} seed {args.seed}: auc {result['test_auc']:.4f} ne {result['test_ne']:.4f}"
            f" val {result['val_ne']:.4f} serving {size['serving_ratio']:.2f}x disk {size['disk_ratio']:.2f}x training"
            f" {common['training']['peak_ratio']:.2f}x at peak {common['training']['at_best_ratio']:.2f}x at best;"
            f" best {best.best} of {len(best.history)}; {elapsed:.0f} s",
            flush=True,
        )


def summary(args: argparse.Namespace) -> None:
    """Average over seeds, compare with plain on the same rows, write JSON and tables."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for dataset in DATASETS:
        runs: dict[str, Runs] = {}
        for path in sorted((RUNS / dataset).glob("*.json")):
            result = json.loads(path.read_text()) | {"predictions": path.with_suffix(".npz").as_posix()}
            runs.setdefault(result["name"], {})[result["seed"]] = result
        if "plain" in runs:
            runs = {name: by_seed for name, by_seed in runs.items() if set(by_seed) & set(runs["plain"])}
            tables[dataset] = [_summarise(name, by_seed, runs) for name, by_seed in runs.items()]
            tables[dataset].sort(key=lambda row: (METHODS.index(row["method"]), row["serving_ratio"]))
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "combined.json"
    path.write_text(json.dumps({"machine": describe(), "results": tables}, indent=1) + "\n")
    for dataset, rows in tables.items():
        print(f"\n{dataset}\n{'run':28} seeds AUC    ±      ΔAUC [95 %]               ΔNE     serving  peak  at best")
        for r in rows:
            low, high = r["interval"]["auc"] if r["interval"] else (0.0, 0.0)
            print(
                f"{r['name']:28} {len(r['seeds']):5} {r['auc']:.4f} {r['auc_std']:.4f} {r['delta_auc']:+.4f}"
                f" [{low:+.4f}, {high:+.4f}] {r['delta_ne']:+.4f} {r['serving_ratio']:7.2f} {r['peak_ratio']:6.2f}"
                f" {r['at_best_ratio']:6.2f}"
            )
            for name, other in r["against"].items():
                low, high = other["interval"]["auc"]
                seeds, delta = len(other["seeds"]), other["delta_auc"]
                print(f"    against {name:20} {seeds:3} seeds {delta:+.4f} [{low:+.4f}, {high:+.4f}]")


def _compare(mine: Runs, base: Runs) -> dict[str, Any] | None:
    """Differences of test figures over common seeds, with intervals; None without a common seed."""
    seeds = sorted(set(mine) & set(base))
    if not seeds:
        return None
    loaded, reference = ([np.load(runs[s]["predictions"]) for s in seeds] for runs in (mine, base))

    def delta(figure: str) -> float:
        return float(np.mean([mine[s][figure] - base[s][figure] for s in seeds]))

    return {
        "seeds": seeds,
        "delta_auc": delta("test_auc"),
        "delta_ne": delta("test_ne"),
        "interval": paired_bootstrap(
            loaded[0]["labels"],
            [x["scores"].astype(np.float64) for x in loaded],
            [x["scores"].astype(np.float64) for x in reference],
        ),
    }


def _summarise(name: str, runs: Runs, every: dict[str, Runs]) -> dict[str, Any]:
    """One row of the table; methods together are also compared with each alone at the same served bytes."""
    seeds = sorted(set(runs) & set(every["plain"]))
    mine = [runs[s] for s in seeds]
    to_plain = None if name == "plain" else _compare(runs, every["plain"])
    serving = mine[0]["settings"]["serving"]
    against = {}
    if mine[0]["method"] in ("pair", "together"):
        for other in (
            f"precision-s{serving:g}",
            f"pruning-s{serving:g}",
            f"pruning-t{mine[0]['settings']['target']:g}",
            f"pair-t{mine[0]['settings']['target']:g}-s{serving:g}",
        ):
            found = _compare(runs, every.get(other, {})) if other != name else None
            if found is not None:
                against[other] = found

    def mean(*keys: str) -> float:
        found: list[Any] = list(mine)
        for key in keys:
            found = [r[key] for r in found]
        return float(np.mean(found))

    return {
        "name": name,
        "method": mine[0]["method"],
        "settings": mine[0]["settings"],
        "seeds": seeds,
        "auc": mean("test_auc"),
        "auc_std": float(np.std([r["test_auc"] for r in mine])),
        "ne": mean("test_ne"),
        "val_ne": mean("val_ne"),
        "delta_auc": 0.0 if to_plain is None else to_plain["delta_auc"],
        "delta_ne": 0.0 if to_plain is None else to_plain["delta_ne"],
        "interval": None if to_plain is None else to_plain["interval"],
        "against": against,
        "serving_ratio": mean("serving", "serving_ratio"),
        "disk_ratio": mean("serving", "disk_ratio"),
        "peak_ratio": mean("training", "peak_ratio"),
        "at_best_ratio": mean("training", "at_best_ratio"),
        "training": mine[0]["training"],
        "serving": mine[0]["serving"],
        "best_checks": [r["best_check"] for r in mine],
    }


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="train once")
    one.add_argument("--dataset", choices=sorted(DATASETS), required=True)
    one.add_argument("--method", choices=METHODS, required=True)
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--target", type=float, default=None, help="share of the weights that pruning removes")
    one.add_argument("--serving", type=float, default=None, help="plain over served bytes")
    one.add_argument("--bits", type=int, default=FLOAT, choices=[4, 8, FLOAT], help="of rows that no search rounds")
    one.add_argument("--lr", type=float, default=None, help="rate of the tables")
    one.add_argument("--search-epochs", type=int, default=None)
    one.add_argument("--epochs", type=int, default=12, help="epochs outside the search")
    one.add_argument("--patience", type=int, default=2)
    one.add_argument("--check", type=float, default=0.5, help="epochs between validations")
    one.add_argument("--name", default=None)
    one.add_argument("--force", action="store_true")
    one.set_defaults(action=run)
    commands.add_parser("summary", help="average, compare, write results/combined.json").set_defaults(action=summary)
    args = parser.parse_args()
    args.action(args)


if __name__ == "__main__":
    main()

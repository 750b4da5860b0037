"""Frequency-aware learning rates against SGD and adaptive optimizers: quality, state bytes, and step time.

Every run is stopped by validation NE and tested once, at its best validation. ``summary`` takes, for every method, the
rate whose validation NE is lowest on the tuning seed, and tests that one on all seeds::

    python -m benchmarks.frequency_lr run --dataset criteo_80k --method cf_sgd --lr 1.0 --seed 0
    python -m benchmarks.frequency_lr run --dataset criteo_80k --method cf_sgd --counter exact --half-life 1000 --lr 1.0
    python -m benchmarks.frequency_lr summary     # writes benchmarks/results/frequency_lr.json
    python -m benchmarks.frequency_lr step        # writes benchmarks/results/frequency_lr-step.json

Log loss by decile: test rows are ordered by how often the rarest of their ids occurs in the training rows (ids that do
not occur count 0), and cut into ten equal parts, the rarest first.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    EmbeddingLocation,
    PoolingMode,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from sklearn.metrics import log_loss, roc_auc_score
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from benchmarks.datasets import CACHE, DATASETS
from benchmarks.machine import describe
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
from benchmarks.speed import look_up, zipf_ids
from lightning_embcomp import CounterSettings, FrequencyAwareLR
from lightning_embcomp.data import ClickLogDataModule
from lightning_embcomp.engine.host import HeldTable, OneEngine
from lightning_embcomp.engine.layout import LogicalTable
from lightning_embcomp.engine.optimizer import FusedOptimizerSpec
from lightning_embcomp.engine.plan import FixedPlan
from lightning_embcomp.engine.routed import RoutedEmbeddings, RoutedOptions
from lightning_embcomp.methods.frequency_lr.config import Form
from lightning_embcomp.methods.frequency_lr.module import FrequencyRates
from lightning_embcomp.models import ClickModel
from lightning_embcomp.models.collections import EmbeddingOptimizer

RUNS = CACHE / "frequency-lr-runs"
METHODS = ("sgd", "rowwise_adagrad", "adam", "fa_sgd", "cf_sgd")
ADAPTIVE = ("rowwise_adagrad", "adam")
EMBEDDING_OPTIMIZER: dict[str, EmbeddingOptimizer] = {"rowwise_adagrad": "rowwise_adagrad", "adam": "none"}


def variant(args: argparse.Namespace) -> str:
    """Name of a method with what differs from its defaults."""
    parts = [args.method]
    if args.method in ("fa_sgd", "cf_sgd"):
        parts.append(args.counter)
        if args.counted != CounterSettings().counted:
            parts.append(args.counted)
    if args.method == "cf_sgd":
        if args.form != "running":
            parts.append(args.form)
        if args.half_life is not None:
            parts.append(f"h{args.half_life:g}")
    if args.max_rate is not None:
        parts.append(f"cap{args.max_rate:g}")
    return "-".join(parts)


def callbacks_for(args: argparse.Namespace) -> list[pl.Callback]:
    """The method under test."""
    if args.method not in ("fa_sgd", "cf_sgd"):
        return []
    counter = CounterSettings(encoding=args.counter, counted=args.counted, half_life=args.half_life)
    form: Form = "known" if args.method == "fa_sgd" else args.form
    return [FrequencyAwareLR(form=form, max_rate=args.max_rate, counter=counter)]


def rarest_counts(data: ClickLogDataModule) -> np.ndarray:
    """How often the rarest id of every test row occurs in the training rows."""
    counts = [data.id_counts(feature.name).numpy() for feature in data.features]
    parts = []
    loader: Any = data.test_dataloader()
    for _, sparse, label in loader:
        rarest = np.full(label.numel(), np.iinfo(np.int64).max)
        for f, values in enumerate(sparse.to_dict().values()):
            offsets, found = values.offsets().numpy(), counts[f][values.values().numpy()]
            filled = np.flatnonzero(np.diff(offsets))
            if filled.size:
                rarest[filled] = np.minimum(rarest[filled], np.minimum.reduceat(found, offsets[filled]))
        parts.append(rarest)
    return np.concatenate(parts)


def decile_losses(labels: np.ndarray, scores: np.ndarray, counts: np.ndarray) -> list[dict[str, float]]:
    """Log loss of each tenth of the rows, the rarest first."""
    parts = np.array_split(np.argsort(counts, kind="stable"), 10)
    return [
        {
            "log_loss": float(log_loss(labels[part], scores[part], labels=[0, 1])),
            "count_from": int(counts[part[0]]),
            "count_to": int(counts[part[-1]]),
        }
        for part in parts
    ]


def state_bytes(model: pl.LightningModule, trainer: pl.Trainer) -> dict[str, float]:
    """Bytes beside the weights, per row of all tables, from the storages."""
    held = embedding_bytes(model)
    rows = held["weights"] / (4 * DIM)
    state = held["optimizer_state"] + held["statistics"]
    if not held["weights"]:  # stock tables: their state is in the optimizer of configure_optimizers
        [optimizer] = trainer.optimizers
        tables = [p for name, p in model.named_parameters() if "embedding_bags" in name]
        rows = sum(table.shape[0] for table in tables)
        values = [value for table in tables for value in optimizer.state[table].values()]
        state = sum(value.numel() * value.element_size() for value in values)
    return {"state": state / rows, "router": held["router"] / rows, "rows": rows}


def run(args: argparse.Namespace) -> None:
    """Train once and write the result."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    name = args.name or variant(args)
    out = RUNS / args.dataset / f"{name}-lr{args.lr:g}-s{args.seed}"
    if Path(f"{out}.json").exists() and not args.force:
        print("have", out)
        return
    pl.seed_everything(args.seed, verbose=False)
    data = DATASETS[args.dataset](args.seed)
    model = ClickModel(
        embedding_dim=DIM,
        over_layers=(256, 128),
        embedding_optimizer=EMBEDDING_OPTIMIZER.get(args.method, "sgd"),
        embedding_lr=args.lr,
        dense_lr=MODEL[args.dataset]["dense_lr"],
    )
    best = BestEpoch(args.patience)
    trainer = quiet_trainer([*callbacks_for(args), best], epochs=args.epochs, check=args.check)
    started = time.perf_counter()
    trainer.fit(model, data)
    ignored = ("command", "action", "force", "name")
    result = {
        "dataset": args.dataset,
        "method": args.method,
        "name": name,
        "lr": args.lr,
        "seed": args.seed,
        "settings": {k: v for k, v in vars(args).items() if k not in ignored} | {"dense": MODEL[args.dataset]},
        "val_ne": best.history[best.best]["val_ne"],
        "val_auc": best.history[best.best]["val_auc"],
        "test_auc": float(roc_auc_score(best.labels, best.predictions)),
        "test_log_loss": float(log_loss(best.labels, best.predictions)),
        "test_ne": normalized_entropy(best.labels, best.predictions),
        "deciles": decile_losses(best.labels, best.predictions, rarest_counts(data)),
        "best_check": best.best,
        "checks": len(best.history),
        "history": best.history,
        "state_bytes_per_row": state_bytes(model, trainer),
        "rates": {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("frequency_lr/")},
        "seconds_per_step": float(np.median(best.seconds)),
        "seconds": time.perf_counter() - started,
        "machine": describe(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(Path(f"{out}.npz"), scores=best.predictions.astype(np.float32), labels=best.labels)
    Path(f"{out}.json").write_text(json.dumps(result, indent=1))
    print(
        f"{args.dataset} {name} lr {args.lr:g} s{args.seed}: val ne {result['val_ne']:.4f} test auc"
        f" {result['test_auc']:.4f} log loss {result['test_log_loss']:.4f} best {best.best}/{len(best.history)}"
        f" state {result['state_bytes_per_row']['state']:.2f} B/row {result['seconds']:.0f} s",
        flush=True,
    )


def summary(args: argparse.Namespace) -> None:
    """Choose rates by validation, average over seeds, compare on the same rows, write JSON and tables."""
    table: dict[str, Any] = {}
    for dataset in DATASETS:
        runs = [
            json.loads(path.read_text()) | {"path": str(path)} for path in sorted((RUNS / dataset).glob("*-s*.json"))
        ]
        names = sorted({run["name"] for run in runs}, key=lambda name: (METHODS.index(name.split("-")[0]), name))
        chosen = {name: _chosen([run for run in runs if run["name"] == name], args.tuning_seed) for name in names}
        adaptive = [name for name in names if name in ADAPTIVE and chosen[name]]
        if not adaptive:
            continue
        best = min(adaptive, key=lambda name: np.mean([run["val_ne"] for run in chosen[name].values()]))
        table[dataset] = {
            "best_adaptive": best,
            "rows": [_row(name, chosen[name], chosen[best], runs) for name in names if chosen[name]],
        }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "frequency_lr.json"
    path.write_text(json.dumps({"machine": describe(), "results": table}, indent=1) + "\n")
    for dataset, found in table.items():
        print(f"\n{dataset}, differences to {found['best_adaptive']}")
        print(
            f"{'run':32} {'rate':>6} {'tried':>5} {'seeds':>5} {'AUC':>6} {'±':>6} {'ΔAUC [95 %]':>26}"
            f" {'loss':>6} {'B/row':>6}  log loss by decile"
        )
        for row in found["rows"]:
            low, high = row["interval"]["auc"]
            print(
                f"{row['name']:32} {row['lr']:6g} {len(row['rates_tried']):5} {len(row['seeds']):5} {row['auc']:.4f}"
                f" {row['auc_std']:.4f} {row['delta_auc']:+.4f} [{low:+.4f}, {high:+.4f}] {row['log_loss']:.4f}"
                f" {row['state_bytes_per_row']:6.2f}  {' '.join(f'{loss:.3f}' for loss in row['decile_log_loss'])}"
            )


def _chosen(runs: list[dict[str, Any]], tuning_seed: int) -> dict[int, dict[str, Any]]:
    """Runs by seed of the rate that was best by validation on the tuning seed."""
    tuned = [run for run in runs if run["seed"] == tuning_seed]
    if not tuned:
        return {}
    rate = min(tuned, key=lambda run: run["val_ne"])["lr"]
    return {run["seed"]: run for run in runs if run["lr"] == rate}


def _row(
    name: str, mine: dict[int, dict[str, Any]], base: dict[int, dict[str, Any]], runs: list[dict[str, Any]]
) -> dict[str, Any]:
    seeds = sorted(set(mine) & set(base))

    def loaded(run: dict[str, Any]) -> Any:  # noqa: ANN401
        return np.load(run["path"].removesuffix(".json") + ".npz")

    labels = loaded(mine[seeds[0]])["labels"]
    scores, reference = ([loaded(found[seed])["scores"].astype(np.float64) for seed in seeds] for found in (mine, base))
    auc = [mine[seed]["test_auc"] for seed in seeds]
    deciles = np.array([[part["log_loss"] for part in mine[seed]["deciles"]] for seed in seeds])
    return {
        "name": name,
        "method": mine[seeds[0]]["method"],
        "lr": mine[seeds[0]]["lr"],
        "rates_tried": sorted({run["lr"] for run in runs if run["name"] == name}),
        "seeds": seeds,
        "auc": float(np.mean(auc)),
        "auc_std": float(np.std(auc)),
        "log_loss": float(np.mean([mine[seed]["test_log_loss"] for seed in seeds])),
        "ne": float(np.mean([mine[seed]["test_ne"] for seed in seeds])),
        "val_ne": float(np.mean([mine[seed]["val_ne"] for seed in seeds])),
        "delta_auc": float(np.mean(auc) - np.mean([base[seed]["test_auc"] for seed in seeds])),
        "delta_log_loss": float(np.mean([mine[s]["test_log_loss"] - base[s]["test_log_loss"] for s in seeds])),
        "interval": paired_bootstrap(labels, scores, reference),
        "decile_log_loss": deciles.mean(0).tolist(),
        "decile_counts": [[part["count_from"], part["count_to"]] for part in mine[seeds[0]]["deciles"]],
        "state_bytes_per_row": mine[seeds[0]]["state_bytes_per_row"]["state"],
        "router_bytes_per_row": mine[seeds[0]]["state_bytes_per_row"]["router"],
        "seconds_per_step": float(np.median([mine[seed]["seconds_per_step"] for seed in seeds])),
    }


def interleaved(steps: list[Callable[[int], None]], rounds: int) -> list[float]:
    """Median processor seconds of each step function, run in turn in changing order.

    Processor time, on one thread, so that other people's work on the machine does not count.
    """
    rng = np.random.default_rng(0)
    seconds = np.empty((rounds + 5, len(steps)))
    for turn in range(rounds + 5):
        for which in rng.permutation(len(steps)):
            started = time.process_time()
            steps[which](turn)
            seconds[turn, which] = time.process_time() - started
    return [float(median) for median in np.median(seconds[5:], axis=0)]


COUNTERS = {
    "cf log": ("running", CounterSettings()),
    "cf exact": ("running", CounterSettings(encoding="exact")),
    "cf log, half-life": ("running", CounterSettings(half_life=1000.0)),
    "cf exact, half-life": ("running", CounterSettings(encoding="exact", half_life=1000.0)),
    "fa log": ("known", CounterSettings()),
}


def sgd_engine(tables: int, rows: int, dim: int, counter: str | None) -> RoutedEmbeddings:
    """Whole rows with fused SGD in the engine, with or without step sizes of their own."""
    logical = [LogicalTable(name=f"t{t}", rows=rows, dim=dim) for t in range(tables)]
    options = RoutedOptions(optimizer=FusedOptimizerSpec(kind="sgd", options={"learning_rate": 0.02}))
    engine = RoutedEmbeddings(logical, options=options)
    engine.move(FixedPlan([1] * tables))
    for t in range(tables):
        engine.initialise(t, lambda weight: weight.uniform_(-0.01, 0.01))
    if counter is not None:
        form, settings = COUNTERS[counter]
        host = OneEngine(engine)
        rated = [HeldTable(host, t, f"t{t}") for t in range(tables)]
        FrequencyRates(rated, form=form, counter=settings, max_rate=None, owner="benchmark")  # type: ignore[arg-type]
    return engine


def fbgemm_sgd(tables: int, rows: int, dim: int) -> SplitTableBatchedEmbeddingBagsCodegen:
    """Plain FBGEMM tables with fused SGD."""
    plain = SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, dim, EmbeddingLocation.HOST, ComputeDevice.CPU)] * tables,
        optimizer=EmbOptimType.EXACT_SGD,
        pooling_mode=PoolingMode.SUM,
        learning_rate=0.02,
    )
    plain.init_embedding_weights_uniform(-0.01, 0.01)
    return plain


def embedding_step(rounds: int, batch: int = 2048) -> list[dict[str, Any]]:
    """Forward, backward and update of one embedding collection."""
    results = []
    for tables, rows, dim, pooling in ((1, 2_000_000, 64, 20), (26, 200_000, 64, 1), (26, 200_000, 16, 1)):
        rng = np.random.default_rng(0)
        ids = [
            torch.from_numpy(np.concatenate([zipf_ids(rng, rows, batch * pooling) for _ in range(tables)]))
            for _ in range(8)
        ]
        offsets = torch.arange(0, tables * batch * pooling + 1, pooling)
        grad = torch.randn(batch, tables * dim) * 1e-3
        modules: dict[str, torch.nn.Module] = {"fbgemm sgd": fbgemm_sgd(tables, rows, dim)}
        modules |= {name or "engine sgd": sgd_engine(tables, rows, dim, name) for name in (None, *COUNTERS)}
        seconds = interleaved([partial(look_up, module, ids, offsets, grad) for module in modules.values()], rounds)
        case = {"tables": tables, "rows": rows, "dim": dim, "pooling": pooling, "batch": batch}
        results.append(case | {"steps": _ratios(modules, seconds)})
        print(json.dumps(results[-1]), flush=True)
    return results


def _ratios(names: Any, seconds: list[float]) -> dict[str, dict[str, float]]:  # noqa: ANN401
    return {
        name: {"cpu_ms": taken * 1e3, "to_fbgemm": taken / seconds[0], "to_engine_sgd": taken / seconds[1]}
        for name, taken in zip(names, seconds, strict=True)
    }


def model_step(rounds: int) -> list[dict[str, Any]]:
    """A whole DLRM step with fused SGD, plain against the callback."""
    results = []
    features = [{"name": f"c{i}", "num_embeddings": 100_000} for i in range(26)]
    for dim, batch in ((16, 2048), (16, 256)):
        rng = np.random.default_rng(0)
        batches = []
        for _ in range(8):
            ids = torch.from_numpy(np.concatenate([zipf_ids(rng, 100_000, batch) for _ in features]))
            names = [str(feature["name"]) for feature in features]
            sparse = KeyedJaggedTensor(names, ids, lengths=torch.ones(ids.numel(), dtype=torch.int64))
            label = torch.from_numpy((rng.random(batch) < 0.25).astype(np.float32))
            batches.append((torch.randn(batch, 13), sparse, label))
        steps: dict[str, Callable[[int], None]] = {}
        for name in ("fbgemm sgd", "cf log"):
            torch.manual_seed(0)
            model = ClickModel(embedding_dim=dim, features=features, num_dense=13, embedding_optimizer="sgd")
            if name != "fbgemm sgd":
                callback = FrequencyAwareLR()
                callback.setup(pl.Trainer(callbacks=[callback], accelerator="cpu", logger=False), model, "fit")
            model.configure_model()
            optimizer = torch.optim.Adam([p for n, p in model.named_parameters() if "embedding" not in n], lr=1e-3)
            steps[name] = partial(_train, model, optimizer, batches)
        seconds = interleaved(list(steps.values()), rounds)
        results.append({"model": "DLRM, 26 tables of 100 000 rows", "dim": dim, "batch": batch})
        results[-1] |= {
            "plain_cpu_ms": seconds[0] * 1e3,
            "cf_cpu_ms": seconds[1] * 1e3,
            "ratio": seconds[1] / seconds[0],
        }
        print(json.dumps(results[-1]), flush=True)
    return results


def _train(model: ClickModel, optimizer: torch.optim.Optimizer, batches: list[Any], turn: int) -> None:
    dense, sparse, label = batches[turn % len(batches)]
    loss = torch.nn.functional.binary_cross_entropy_with_logits(model(dense, sparse), label)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def step(args: argparse.Namespace) -> None:
    """Processor time of steps on one thread, interleaved medians."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    report = {"machine": describe(), "threads": 1, "rounds": args.rounds}
    report |= {"embedding": embedding_step(args.rounds), "model": model_step(args.rounds)}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "frequency_lr-step.json").write_text(json.dumps(report, indent=1) + "\n")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="train once")
    one.add_argument("--dataset", choices=sorted(DATASETS), required=True)
    one.add_argument("--method", choices=METHODS, required=True)
    one.add_argument("--lr", type=float, required=True, help="rate of the tables")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--counter", choices=["log", "exact"], default="log")
    one.add_argument("--counted", choices=["presence", "occurrence"], default=CounterSettings().counted)
    one.add_argument("--form", choices=["running", "horizon"], default="running", help="of cf_sgd")
    one.add_argument("--half-life", type=float, default=None, help="of cf_sgd, in steps")
    one.add_argument("--max-rate", type=float, default=None)
    one.add_argument("--epochs", type=int, default=12)
    one.add_argument("--patience", type=int, default=4)
    one.add_argument("--check", type=float, default=0.25, help="epochs between validations")
    one.add_argument("--name", default=None)
    one.add_argument("--force", action="store_true")
    one.set_defaults(action=run)
    two = commands.add_parser("summary", help="choose, average, compare, write results/frequency_lr.json")
    two.add_argument("--tuning-seed", type=int, default=0)
    two.set_defaults(action=summary)
    three = commands.add_parser("step", help="step times, writes results/frequency_lr-step.json")
    three.add_argument("--rounds", type=int, default=40)
    three.set_defaults(action=step)
    args = parser.parse_args()
    args.action(args)


if __name__ == "__main__":
    main()

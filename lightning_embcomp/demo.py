"""Train one model plain and compressed, and compare: ``python -m lightning_embcomp.demo``.

Writes ``report.html`` (to look at) and ``result.json`` (to read by program) into the output folder.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from rich.console import Console

import lightning_embcomp
from lightning_embcomp.callbacks import DimensionPruning
from lightning_embcomp.data import ClickLogDataModule, SyntheticClickLog, SyntheticClickLogDataModule
from lightning_embcomp.models import ClickModel
from lightning_embcomp.report.comparison import Comparison, Run, render_comparison
from lightning_embcomp.report.html import render_html
from lightning_embcomp.report.live import live_fractions
from lightning_embcomp.report.popularity import PopularityGroups, by_popularity
from lightning_embcomp.report.recorder import RunRecorder, auc_standard_error
from lightning_embcomp.stack import quiet_third_party

Data = ClickLogDataModule | SyntheticClickLogDataModule

EMBEDDING_DIM = 16
BATCH_SIZE = 1024
FILE_BATCH_SIZE = 256
"""Small, since files people try first are: a tenth of a million rows must still give some hundred steps."""
VALIDATIONS_PER_EPOCH = 4
SEED = 0
_TABLE_SIZES = (50, 200, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000)
_console = Console()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demonstration.

    Args:
        argv: Arguments after the program's name; by default those of the process.

    Returns:
        Exit status: 0, or 2 if the data cannot be read or a setting is out of range.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    if args.epochs < 1:
        parser.error(f"--epochs must be at least 1, not {args.epochs}")
    quiet_third_party()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as scratch:
        return _run(args, Path(scratch))


def _run(args: argparse.Namespace, scratch: Path) -> int:
    try:
        callback = DimensionPruning(target=args.target)
        data = _open_data(args.data, args.rows, scratch)
    except (OSError, ValueError) as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 2
    _console.print(_describe(data, args.data), style="dim")
    plain, _, recorder = _train("plain", data, args.epochs, [])
    compressed, model, _ = _train(f"DimensionPruning(target={args.target:g})", data, args.epochs, [callback])
    positives = recorder.test_positives
    comparison = Comparison(
        plain=plain,
        compressed=compressed,
        popularity=_popularity(callback, data),
        auc_error=auc_standard_error(plain.auc, positives, recorder.test_rows - positives),
        facts=_facts(args, data, model, recorder),
    )
    _write(comparison, args.out)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lightning_embcomp.demo",
        description="Train the same DLRM with ordinary and with pruned embedding tables, and compare.",
    )
    parser.add_argument("--data", type=Path, help="click log in Criteo's layout; by default rows are made up")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for report.html and result.json")
    parser.add_argument("--target", type=float, default=0.9, help="fraction of the embedding weights to remove")
    parser.add_argument("--epochs", type=int, default=3, help="epochs of each run")
    parser.add_argument("--rows", type=int, default=600_000, help="rows to use at most, so that it stays short")
    return parser


def _open_data(path: Path | None, rows: int, scratch: Path) -> Data:
    data: Data
    if path is None:
        log = SyntheticClickLog(
            num_rows=rows, num_embeddings=_TABLE_SIZES, exponent=1.1, validation=0.05, test=0.1, seed=SEED
        )
        data = SyntheticClickLogDataModule(log, batch_size=BATCH_SIZE)
    else:
        # A demonstration leaves nothing behind beside the user's data.
        data = ClickLogDataModule(
            path, format="criteo", batch_size=FILE_BATCH_SIZE, max_rows=rows, seed=SEED, cache_dir=scratch
        )
    data.prepare_data()
    data.setup("fit")
    return data


def _train(name: str, data: Data, epochs: int, callbacks: list[pl.Callback]) -> tuple[Run, ClickModel, RunRecorder]:
    """Train, and test the weights of the best validation."""
    _console.rule(f"[bold]{name}", align="left")
    pl.seed_everything(SEED, verbose=False)
    model = ClickModel(
        architecture="dlrm", embedding_dim=EMBEDDING_DIM, features=data.features, num_dense=data.num_dense
    )
    # Built here and not by the trainer: both runs then start from the very same weights.
    model.configure_model()
    recorder = RunRecorder()
    with tempfile.TemporaryDirectory() as folder:
        best = ModelCheckpoint(dirpath=folder, monitor="val_ne", filename="best")
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            val_check_interval=1 / VALIDATIONS_PER_EPOCH,
            num_sanity_val_steps=0,
            logger=False,
            enable_model_summary=False,
            default_root_dir=folder,
            callbacks=[*callbacks, best, RichProgressBar(), recorder],
        )
        trainer.fit(model, data)
        [metrics] = trainer.test(model, data, ckpt_path=best.best_model_path, verbose=False, weights_only=True)
    assert recorder.memory is not None  # there was a validation
    run = Run(
        name=name,
        auc=metrics["test_auc"],
        ne=metrics["test_ne"],
        memory=recorder.memory,
        seconds_per_step=recorder.median_seconds,
        mean_seconds=recorder.mean_seconds,
        curve=tuple(recorder.curve),
    )
    return run, model, recorder


def _popularity(callback: DimensionPruning, data: Data) -> PopularityGroups:
    live, counts = [], []
    for table in callback.owned:
        live += [live_fractions(shard.engine, shard.index) for shard in table.shards]
        # ClickModel calls the table of feature `x` `t_x`.
        counts.append(data.id_counts(table.logical.name.removeprefix("t_")).numpy())
    return by_popularity(np.concatenate(live), np.concatenate(counts))


def _describe(data: Data, path: Path | None) -> str:
    rows = sum(feature.num_embeddings for feature in data.features)
    source = "synthetic click log" if path is None else str(path)
    return f"{source}: {len(data.features)} categorical features, {rows:,} embedding rows of {EMBEDDING_DIM} columns"


def _facts(args: argparse.Namespace, data: Data, model: ClickModel, recorder: RunRecorder) -> dict[str, str]:
    hparams = model.hparams
    seen = [data.id_counts(feature.name) > 0 for feature in data.features]
    unseen = 1 - float(torch.cat(seen).float().mean())
    made = "made up: Zipf-distributed ids, labels drawn from a planted model"
    facts = {
        "Data": made if args.data is None else f"{args.data.name}, at most {args.rows:,} rows, split by position",
        "Rows": f"batches of {data.batch_size}; {recorder.test_rows:,} test rows, {recorder.test_positives:,} positive",
        "Tables": f"{_describe(data, args.data).partition(': ')[2]}; {unseen:.0%} of the rows never occur in training",
        "Model": f"DLRM, top MLP {'-'.join(map(str, hparams['over_layers']))}, {args.epochs} epochs, seed {SEED}",
        "Tables' optimizer": f"{hparams['embedding_optimizer']}, fused into backward, rate {model.embedding_lr:g}",
        "Other optimizer": f"{hparams['dense_optimizer']}, rate {hparams['dense_lr']:g}",
        "Software": f"lightning-embcomp {lightning_embcomp.__version__}, torch {torch.__version__},"
        f" lightning {pl.__version__}, Python {platform.python_version()}, {torch.get_num_threads()} threads",
    }
    if isinstance(data, SyntheticClickLogDataModule):
        facts["Best possible AUC"] = f"{data.best_auc:.4f}, by a model that knows the planted probabilities"
    return facts


def _write(comparison: Comparison, folder: Path) -> None:
    _console.rule("[bold]result", align="left")
    _console.print(render_comparison(comparison))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(comparison.as_dict(), indent=2) + "\n", encoding="utf-8")
    (folder / "report.html").write_text(render_html(comparison), encoding="utf-8")
    _console.print(f"{folder / 'report.html'}  {folder / 'result.json'}", style="dim")


if __name__ == "__main__":
    raise SystemExit(main())

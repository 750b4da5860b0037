"""Speed as ratios to plain FBGEMM in the same process, interleaved, medians.

::

    python -m benchmarks.speed --threads 1      # writes benchmarks/results/speed-1-threads.json

``embedding`` is forward + backward + update of one embedding collection, utilities measured; ``matrix`` the same over
dims, pooling factors and dtypes. ``step`` is a whole DLRM training step. ``event`` is one pruning event, with the peak
of extra memory while it runs.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    EmbeddingLocation,
    PoolingMode,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from benchmarks.machine import describe, peak_rss, reset_peak_rss, rss
from lightning_embcomp import CompressionCallback
from lightning_embcomp.engine.host import HeldTable, OneEngine
from lightning_embcomp.engine.layout import LogicalTable
from lightning_embcomp.engine.memory import engine_bytes
from lightning_embcomp.engine.optimizer import FusedOptimizerSpec
from lightning_embcomp.engine.placement import RowPlacement
from lightning_embcomp.engine.routed import RoutedEmbeddings, RoutedOptions
from lightning_embcomp.methods.fiited.callback import DimensionPruning
from lightning_embcomp.methods.fiited.module import DimensionPruner
from lightning_embcomp.models import ClickModel

RESULTS = Path(__file__).parent / "results"
RATE = {"learning_rate": 0.02, "eps": 1e-8}


def zipf_ids(rng: np.random.Generator, rows: int, count: int, exponent: float = 1.05) -> np.ndarray:
    """Ids with Zipf popularity, by the inverse of its continuous distribution."""
    u = rng.random(count)
    ids = ((rows ** (1 - exponent) - 1) * u + 1) ** (1 / (1 - exponent))
    return np.clip(ids.astype(np.int64) - 1, 0, rows - 1)


def plain_tables(
    tables: int, rows: int, dim: int, dtype: torch.dtype = torch.float32
) -> SplitTableBatchedEmbeddingBagsCodegen:
    """Plain FBGEMM tables with fused row-wise Adagrad."""
    plain = SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, dim, EmbeddingLocation.HOST, ComputeDevice.CPU)] * tables,
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        pooling_mode=PoolingMode.SUM,
        weights_precision=SparseType.FP16 if dtype == torch.float16 else SparseType.FP32,
        **RATE,
    )
    plain.init_embedding_weights_uniform(-0.01, 0.01)
    return plain


def pruned_engine(
    tables: int,
    rows: int,
    dim: int,
    target: float,
    dtype: torch.dtype = torch.float32,
    placement: RowPlacement | None = None,
) -> tuple[RoutedEmbeddings, DimensionPruner]:
    """The engine at the given share of the bytes, rows placed by popularity."""
    logical = [LogicalTable(name=f"t{t}", rows=rows, dim=dim, chunks=4) for t in range(tables)]
    spec = FusedOptimizerSpec(kind="rowwise_adagrad", options=RATE)
    engine = RoutedEmbeddings(
        logical, options=RoutedOptions(optimizer=spec, dtype=dtype, placement=placement or RowPlacement())
    )
    pruner = DimensionPruner([HeldTable(OneEngine(engine), t, f"t{t}") for t in range(tables)], target=target)
    pruner.start()
    for t in range(tables):
        engine.initialise(t, lambda weight: weight.uniform_(-0.01, 0.01))
    engine.clear_row_state()
    return engine, pruner


def interleaved(steps: Sequence[Callable[[int], object]], rounds: int) -> list[float]:
    """Median seconds of each step function, run in turn."""
    seconds: list[list[float]] = [[] for _ in steps]
    for turn in range(rounds + 5):
        for step, taken in zip(steps, seconds, strict=True):
            started = time.perf_counter()
            step(turn)
            if turn >= 5:
                taken.append(time.perf_counter() - started)
    return [float(np.median(taken)) for taken in seconds]


def look_up(
    module: torch.nn.Module, ids: list[torch.Tensor], offsets: torch.Tensor, grad: torch.Tensor, turn: int
) -> None:
    """Forward, backward and update on one of the batches."""
    module(ids[turn % len(ids)], offsets).backward(grad)


def compare(
    rounds: int,
    *,
    tables: int,
    rows: int,
    dim: int,
    pooling: int,
    batch: int = 2048,
    dtype: torch.dtype = torch.float32,
) -> list[dict[str, Any]]:
    """Embedding forward + backward + update at three shares of the bytes against plain tables."""
    rng = np.random.default_rng(0)
    ids = [
        torch.from_numpy(np.concatenate([zipf_ids(rng, rows, batch * pooling) for _ in range(tables)]))
        for _ in range(8)
    ]
    offsets = torch.arange(0, tables * batch * pooling + 1, pooling)
    grad = torch.randn(batch, tables * dim) * 1e-3
    plain = plain_tables(tables, rows, dim, dtype)
    case = {"tables": tables, "rows": rows, "dim": dim, "pooling": pooling, "batch": batch, "dtype": str(dtype)[6:]}
    results = []
    for share in (1.0, 0.35, 0.1):
        engine, _ = pruned_engine(tables, rows, dim, 1 - share, dtype)
        steps = [partial(look_up, module, ids, offsets, grad) for module in (plain, engine)]
        seconds = interleaved(steps, rounds)
        times = {"plain_ms": seconds[0] * 1e3, "engine_ms": seconds[1] * 1e3, "ratio": seconds[1] / seconds[0]}
        results.append({**case, "bytes_share": share, **times})
        print(json.dumps(results[-1]), flush=True)
        del engine
    return results


def embedding(rounds: int) -> list[dict[str, Any]]:
    """One large table with long bags, and the 26 tables of a click log with one id each."""
    one, many = {"tables": 1, "rows": 2_000_000, "pooling": 20}, {"tables": 26, "rows": 200_000, "pooling": 1}
    cases = ({**one, "dim": 64}, {**many, "dim": 64}, {**many, "dim": 16}, {**one, "dim": 16})
    return [result for case in cases for result in compare(rounds, **case)]


def matrix(rounds: int) -> list[dict[str, Any]]:
    """Dims, pooling factors and dtypes, eight tables each."""
    return [
        result
        for dtype in (torch.float32, torch.float16)
        for dim in (16, 64, 128)
        for pooling in (1, 10, 50)
        for result in compare(
            rounds, tables=8, rows=250_000, dim=dim, pooling=pooling, batch=4096 if pooling == 1 else 512, dtype=dtype
        )
    ]


FEATURES = [{"name": f"c{i}", "num_embeddings": 100_000} for i in range(26)]
"""Features of the whole model: one id each, Zipf."""

ClickBatch = tuple[torch.Tensor, KeyedJaggedTensor, torch.Tensor]


def click_batches(batch: int) -> list[ClickBatch]:
    """Eight batches of made-up clicks."""
    rng = np.random.default_rng(0)
    batches = []
    for _ in range(8):
        ids = torch.from_numpy(np.concatenate([zipf_ids(rng, 100_000, batch) for _ in FEATURES]))
        lengths = torch.ones(ids.numel(), dtype=torch.int64)
        sparse = KeyedJaggedTensor([str(f["name"]) for f in FEATURES], ids, lengths=lengths)
        label = torch.from_numpy((rng.random(batch) < 0.25).astype(np.float32))
        batches.append((torch.randn(batch, 13), sparse, label))
    return batches


def click_model(dim: int, callback: CompressionCallback | None) -> tuple[ClickModel, torch.optim.Optimizer]:
    """A DLRM with fused tables and Adam for the rest, as a callback leaves it."""
    torch.manual_seed(0)
    model = ClickModel(embedding_dim=dim, features=FEATURES, num_dense=13)
    if callback is not None:
        callback.setup(pl.Trainer(callbacks=[callback], accelerator="cpu", logger=False), model, "fit")
    model.configure_model()
    return model, torch.optim.Adam([p for n, p in model.named_parameters() if "embedding" not in n], lr=1e-3)


def train(model: ClickModel, optimizer: torch.optim.Optimizer, batch: ClickBatch) -> None:
    """One step."""
    dense, sparse, label = batch
    loss = torch.nn.functional.binary_cross_entropy_with_logits(model(dense, sparse), label)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def step(rounds: int) -> list[dict[str, Any]]:
    """A whole DLRM step, plain against pruned, one dense optimizer step included."""
    results = []
    for dim, batch in ((16, 2048), (64, 2048), (16, 256)):
        batches, callback = click_batches(batch), DimensionPruning(target=0.65)
        models = [click_model(dim, None), click_model(dim, callback)]
        steps = [lambda turn, m=m: train(*m, batches[turn % 8]) for m in models]  # type: ignore[misc]  # noqa: B023
        seconds = interleaved(steps, rounds)
        pruner = callback.pruner
        assert pruner is not None
        every = callback.schedule.every_n_steps
        event_seconds = interleaved([lambda turn, p=pruner: p.step(0.98)], 5)[0]  # type: ignore[misc]
        results.append(
            {
                "model": "DLRM, 26 tables of 100 000 rows",
                "dim": dim,
                "batch": batch,
                "target": 0.65,
                "plain_ms": seconds[0] * 1e3,
                "pruned_ms": seconds[1] * 1e3,
                "ratio": seconds[1] / seconds[0],
                "event_ms": event_seconds * 1e3,
                "ratio_with_events": (seconds[1] + event_seconds / every) / seconds[0],
                "event_every_n_steps": every,
            }
        )
        print(json.dumps(results[-1]), flush=True)
    return results


def event(repeats: int = 3) -> list[dict[str, Any]]:
    """One pruning event on 10 M rows: seconds, and the peak of resident memory above what was held before."""
    results = []
    for dim in (16, 64):
        engine, pruner = pruned_engine(1, 10_000_000, dim, 0.65)
        rng = np.random.default_rng(0)
        grad = torch.randn(65536, dim) * 1e-3
        offsets = torch.arange(65537)
        engine(torch.from_numpy(zipf_ids(rng, 10_000_000, 65536)), offsets).backward(grad)
        pruner.step(0.98)  # compile
        for _ in range(repeats):
            for _ in range(8):
                engine(torch.from_numpy(zipf_ids(rng, 10_000_000, 65536)), offsets).backward(grad)
            live, before = engine_bytes(engine), rss()
            reset_peak_rss()
            started = time.perf_counter()
            moved = pruner.step(0.98)
            seconds = time.perf_counter() - started
            results.append(
                {
                    "rows": 10_000_000,
                    "dim": dim,
                    "seconds": seconds,
                    "churn": moved.churn,
                    "live_bytes": live,
                    "extra_peak_bytes": peak_rss() - before,
                    "allowed_bytes": round(0.1 * live) + 64 * 2**20,
                }
            )
            print(json.dumps(results[-1]), flush=True)
        del engine, pruner
    return results


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "embedding": lambda: embedding(args.rounds),
        "matrix": lambda: matrix(args.rounds),
        "step": lambda: step(args.rounds),
        "event": event,
    }
    parser.add_argument("--only", choices=list(parts), nargs="*", default=list(parts))
    args = parser.parse_args()
    logging.getLogger().setLevel(logging.WARNING)
    torch.set_num_threads(args.threads)
    path = RESULTS / f"speed-{args.threads}-threads.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    report |= {"machine": describe(), "threads": args.threads, "rounds": args.rounds}
    for name in args.only:
        report[name] = parts[name]()
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Further parts of the benchmark on a GPU: served tables, pruning events, a whole training step, selection."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen

from benchmarks import serving as on_cpu
from benchmarks.clock import Clock
from benchmarks.machine import peak_rss, reset_peak_rss, rss
from benchmarks.speed import FEATURES, click_batches, look_up, pruned_engine, train, zipf_ids
from lightning_embcomp import CompressionCallback
from lightning_embcomp.engine.memory import engine_bytes
from lightning_embcomp.kernels.threshold import Packed, select_packed
from lightning_embcomp.kernels.utility import decay_utility
from lightning_embcomp.methods.fiited.callback import DimensionPruning
from lightning_embcomp.models import ClickModel

COPY = 1 << 30
"""Bytes of the copy that bandwidth is measured by."""


def say(results: list[dict[str, Any]], **found: Any) -> None:  # noqa: ANN401 - figures
    """Add a result and print it."""
    results.append(found)
    print(json.dumps(found), flush=True)


def fbgemm(rows: int, dim: int, kind: SparseType, device: torch.device) -> torch.nn.Module:
    """FBGEMM's inference table with random values on the device."""
    place = EmbeddingLocation.DEVICE if device.type == "cuda" else EmbeddingLocation.HOST
    table = IntNBitTableBatchedEmbeddingBagsCodegen(
        [("t0", rows, dim, kind, place)], device=device, output_dtype=SparseType.FP32
    )
    table.initialize_weights()
    table.fill_random_weights()
    return table


def serving(clock: Clock, quick: bool) -> list[dict[str, Any]]:
    """Served lookups as ratios to FBGEMM's float32 inference table, FBGEMM's own integers beside."""
    results: list[dict[str, Any]] = []
    device, rows = clock.device, 20_000 if quick else 4_000_000
    bandwidth = clock.bandwidth(1 << 20 if quick else COPY)
    for dim in (64,) if quick else (64, 128):
        plain = fbgemm(rows, dim, SparseType.FP32, device)
        rounding = on_cpu.precision(rows, dim, by_row=False)
        kinds: dict[str, tuple[float, Callable[[], torch.nn.Module]]] = {
            "fbgemm_int8": (1.0, partial(fbgemm, rows, dim, SparseType.INT8, device)),
            "fbgemm_int4": (0.5, partial(fbgemm, rows, dim, SparseType.INT4, device)),
            "int8": (1.0, partial(on_cpu.served, 1, rows, dim, 8)),
            "int4": (0.5, partial(on_cpu.served, 1, rows, dim, 4)),
            "mixed": (1.0, partial(on_cpu.served, 1, rows, dim, 8, rounding)),
        }
        for name, (item, make) in kinds.items():
            module = make().to(device)
            for batch, pooling in ((64, 5),) if quick else ((8192, 1), (8192, 20), (65536, 20)):
                rng = np.random.default_rng(0)
                ids = [torch.from_numpy(zipf_ids(rng, rows, batch * pooling)).to(device) for _ in range(4)]
                offsets = torch.arange(0, batch * pooling + 1, pooling, device=device)
                short = [part.int() for part in ids]
                theirs = (short, offsets.int())
                steps = [
                    partial(on_cpu.look_up, plain, *theirs),
                    partial(on_cpu.look_up, module, *(theirs if name.startswith("fbgemm") else (ids, offsets))),
                ]
                plain_ms, taken = clock.medians(steps)
                least = batch * pooling * (item * dim + 4 + 8) + 4 * batch * dim
                say(
                    results,
                    kind=name,
                    rows=rows,
                    dim=dim,
                    batch=batch,
                    pooling=pooling,
                    fp32_ms=plain_ms,
                    ms=taken,
                    ratio=taken / plain_ms,
                    # Rows of the mixed table have 0 to 8 bits: no floor.
                    of_floor=None if name == "mixed" else least / bandwidth / taken,
                    extra_bytes=clock.extra(partial(steps[1], 0)),
                )
            del module, steps
        del plain
    return results


def event(clock: Clock, quick: bool) -> list[dict[str, Any]]:
    """A pruning event: seconds, and the peak of memory on the device and of the host above what was held."""
    results: list[dict[str, Any]] = []
    device, rows = clock.device, 200_000 if quick else 20_000_000
    for dim in (16, 64):
        engine, pruner = pruned_engine(1, rows, dim, 0.65)
        engine.to(device)
        rng, grad = np.random.default_rng(0), torch.randn(65536, dim, device=device) * 1e-3
        offsets = torch.arange(65537, device=device)
        for repeat in range(2 if quick else 4):
            for _ in range(8):
                ids = torch.from_numpy(zipf_ids(rng, rows, 65536)).to(device)
                look_up(engine, [ids], offsets, grad, 0)
            held, before = engine_bytes(engine), rss()
            reset_peak_rss()
            moved, times = [], []

            def one(moved: list[Any] = moved, times: list[float] = times, pruner: Any = pruner) -> None:  # noqa: ANN401
                times.append(clock.time(lambda: moved.append(pruner.step(0.98))))

            extra = clock.extra(one)
            if repeat:  # the first compiles
                say(
                    results,
                    rows=rows,
                    dim=dim,
                    ms=times[0],
                    ns_per_row=1e6 * times[0] / rows,
                    churn=moved[0].churn,
                    held_bytes=held,
                    extra_device_bytes=extra,
                    extra_host_bytes=peak_rss() - before,
                )
        del engine, pruner
    return results


def click_model(dim: int, callback: CompressionCallback | None, device: torch.device) -> Any:  # noqa: ANN401
    """A DLRM with fused tables and Adam for the rest, built on the device as a trainer does it."""
    torch.manual_seed(0)
    model = ClickModel(embedding_dim=dim, features=FEATURES, num_dense=13)
    accelerator = "gpu" if device.type == "cuda" else "cpu"
    callbacks = [] if callback is None else [callback]
    trainer = pl.Trainer(callbacks=callbacks, accelerator=accelerator, devices=1, logger=False)  # type: ignore[arg-type]
    model.trainer = trainer
    if callback is not None:
        callback.setup(trainer, model, "fit")
    model.configure_model()
    model.to(device)
    return model, torch.optim.Adam([p for n, p in model.named_parameters() if "embedding" not in n], lr=1e-3)


def step(clock: Clock, quick: bool) -> list[dict[str, Any]]:
    """A whole step of a DLRM with 26 tables, plain against pruned, the dense optimizer included."""
    results: list[dict[str, Any]] = []
    device = clock.device
    for dim, batch in ((16, 64),) if quick else ((16, 8192), (64, 8192), (64, 65536)):
        batches = [tuple(part.to(device) for part in parts) for parts in click_batches(batch)]
        callback = DimensionPruning(target=0.65)
        models = [click_model(dim, None, device), click_model(dim, callback, device)]

        def one(turn: int, model: Any, batches: Sequence[Any] = batches) -> None:  # noqa: ANN401
            train(*model, batches[turn % 8])

        steps = [partial(one, model=model) for model in models]
        plain_ms, pruned_ms = clock.medians(steps)
        assert callback.pruner is not None
        event_ms = float(np.median([clock.time(lambda: callback.pruner.step(0.98)) for _ in range(3)]))  # type: ignore[union-attr]  # noqa: B023
        every = callback.schedule.every_n_steps
        say(
            results,
            dim=dim,
            batch=batch,
            plain_ms=plain_ms,
            pruned_ms=pruned_ms,
            ratio=pruned_ms / plain_ms,
            event_ms=event_ms,
            ratio_with_events=(pruned_ms + event_ms / every) / plain_ms,
            event_every_n_steps=every,
            plain_extra_bytes=clock.extra(partial(steps[0], 0)),
            pruned_extra_bytes=clock.extra(partial(steps[1], 0)),
        )
        del models, steps
    return results


def streams(clock: Clock, quick: bool) -> list[dict[str, Any]]:
    """Kernels that read and write everything once, against a copy of as many bytes."""
    results: list[dict[str, Any]] = []
    n = 1 << 14 if quick else 1 << 26
    bandwidth = clock.bandwidth(1 << 20 if quick else COPY)
    grad, residual = (torch.randn(n, device=clock.device) for _ in range(2))
    values = torch.rand(n, 1, device=clock.device).bfloat16()

    def select(turn: int) -> Packed:
        """1 % of the entries; a factor of 0 leaves the residual as it is, so that every round selects the same."""
        return select_packed(grad, residual, factor=0.0, threshold=2.576, capacity=n // 50)

    cases: dict[str, tuple[int, Callable[[int], object]]] = {
        # The second pass reads the residual again in blocks where anything is selected: at 2048 entries in all of them.
        "select_packed": (16, select),
        "decay_utility": (4, lambda turn: decay_utility(values, 0.98, turn)),
    }
    for name, (least, run) in cases.items():
        taken = clock.medians([run])[0]
        say(results, kernel=name, values=n, ms=taken, bytes=least * n, of_bandwidth=least * n / bandwidth / taken)
    return results

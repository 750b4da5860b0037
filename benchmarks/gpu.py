"""On a GPU: lookups, updates, kernels, serving, whole steps and events against plain tables and memory bandwidth.

::

    python -m benchmarks.gpu                     # writes benchmarks/results/gpu.json; 12 minutes on a large GPU, 32 GB
    python -m benchmarks.gpu --only large        # a table that would not fit plain

Results are written after every part; a part that fails is named under ``failed``, and the others run. Times are
medians by CUDA events, cases in turn. ``floor_ms`` is the time that a copy of the bytes that a case must move takes at
the bandwidth that a large copy reaches in the same run; ``of_floor`` is that over the time taken. Extra bytes are the
most that a step allocates beside what is there. Without a GPU, ``--device cpu --quick`` runs the same code on small
cases, whose figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    EmbeddingLocation,
    PoolingMode,
    SplitTableBatchedEmbeddingBagsCodegen,
)

from benchmarks.clock import Clock
from benchmarks.gpu_parts import event, serving, step, streams
from benchmarks.machine import describe
from benchmarks.speed import RATE, look_up, pruned_engine, zipf_ids
from lightning_embcomp.engine.memory import engine_bytes
from lightning_embcomp.engine.placement import PLACEMENTS, Placement, RowPlacement
from lightning_embcomp.kernels.quantize import Rounding, round_rows
from lightning_embcomp.kernels.route import find

RESULTS = Path(__file__).parent / "results"
SHARES = (1.0, 0.35, 0.1)
WIDTHS = (2, 3, 4, 5, 6, 8)


def plain_tables(rows: int, dim: int, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """FBGEMM's own tables on the device."""
    on_gpu = device.type == "cuda"
    plain = SplitTableBatchedEmbeddingBagsCodegen(
        [
            (
                rows,
                dim,
                EmbeddingLocation.DEVICE if on_gpu else EmbeddingLocation.HOST,
                ComputeDevice.CUDA if on_gpu else ComputeDevice.CPU,
            )
        ],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        pooling_mode=PoolingMode.SUM,
        weights_precision=SparseType.FP16 if dtype == torch.float16 else SparseType.FP32,
        device=device,
        **RATE,
    )
    plain.init_embedding_weights_uniform(-0.01, 0.01)
    return plain


def peak(device: torch.device) -> int:
    """Most bytes allocated since the last call, and start anew."""
    if device.type != "cuda":
        return 0
    found = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return found


def embedding(clock: Clock, quick: bool) -> list[dict[str, Any]]:
    """Forward + backward + update of one table against FBGEMM's."""
    device, results = clock.device, []
    rows = 20_000 if quick else 4_000_000
    bandwidth = clock.bandwidth(1 << 20 if quick else 1 << 30)
    for dtype in (torch.float32, torch.float16):
        for dim in (64, 128):
            plain = plain_tables(rows, dim, device, dtype)
            for share in SHARES:
                engine, _ = pruned_engine(1, rows, dim, 1 - share, dtype)
                engine.to(device)
                for batch in (64,) if quick else (8192, 65536):
                    for pooling in (1, 20):
                        rng = np.random.default_rng(0)
                        ids = [torch.from_numpy(zipf_ids(rng, rows, batch * pooling)).to(device) for _ in range(4)]
                        offsets = torch.arange(0, batch * pooling + 1, pooling, device=device)
                        grad = torch.randn(batch, dim, device=device) * 1e-3
                        steps = [partial(look_up, module, ids, offsets, grad) for module in (plain, engine)]
                        plain_ms, engine_ms = clock.medians(steps)
                        # Rows read forward; distinct rows read and written backward, with a moment each; output and
                        # gradient written and read.
                        item = 2 if dtype == torch.float16 else 4
                        distinct = float(np.mean([part.unique().numel() for part in ids]))
                        least = share * dim * item * (batch * pooling + 2 * distinct) + 8 * distinct + 16 * batch * dim
                        results.append(
                            {
                                "dtype": str(dtype)[6:],
                                "dim": dim,
                                "bytes_share": share,
                                "batch": batch,
                                "pooling": pooling,
                                "plain_ms": plain_ms,
                                "engine_ms": engine_ms,
                                "ratio": engine_ms / plain_ms,
                                "floor_ms": least / bandwidth,
                                "of_floor": least / bandwidth / engine_ms,
                                "least_bytes": round(least),
                                "plain_extra_bytes": clock.extra(partial(steps[0], 0)),
                                "engine_extra_bytes": clock.extra(partial(steps[1], 0)),
                            }
                        )
                        print(json.dumps(results[-1]), flush=True)
                del engine, steps
            del plain
    return results


def routing(clock: Clock, quick: bool) -> list[dict[str, Any]]:
    """The routing kernel against a copy of the bytes that it moves at least."""
    results = []
    count = 4096 if quick else 1 << 22
    bandwidth = clock.bandwidth(1 << 20 if quick else 1 << 30)
    for rows in (10_000,) if quick else (1_000_000, 10_000_000, 100_000_000):
        engine, _ = pruned_engine(1, rows, 16, 0.65)
        engine.to(clock.device)
        ids = torch.randint(0, rows, (count,), device=clock.device)
        offsets = torch.arange(count + 1, device=clock.device)
        layout = engine.features.pooled(count)
        tensors, classes = engine.router.tensors, len(engine.classes)
        taken = clock.medians([lambda turn: find(ids, offsets, layout, tensors, classes)])[0]  # noqa: B023
        least = count * (8 + 5 + 32)  # the id, its route, one sector of the router
        results.append({"rows": rows, "ids": count, "ms": taken, "of_bandwidth": least / bandwidth / taken})
        print(json.dumps(results[-1]), flush=True)
        del engine
    return results


def rounding(clock: Clock, quick: bool) -> list[dict[str, Any]]:
    """Rounding to several widths at once against one pass per width."""
    device, results = clock.device, []
    count = 512 if quick else 1 << 18
    for dim in (16, 64, 128):
        rows = torch.randn(count, dim, device=device)

        def settings(widths: Sequence[int], dim: int = dim) -> Rounding:
            several = len(widths)
            return Rounding(
                group=torch.randint(0, 128, (count,), device=device),
                table=torch.zeros(128, dtype=torch.int64, device=device),
                widths=torch.tensor(list(widths), device=device),
                shares=torch.full((128, several), 1 / several, device=device),
                steps=torch.full((1, several), 0.1, device=device),
                offset=torch.zeros(1, dim, device=device),
            )

        together, alone = settings(WIDTHS), [settings((width,)) for width in WIDTHS]

        def apart(turn: int, rows: torch.Tensor = rows, alone: Sequence[Rounding] = alone) -> torch.Tensor:
            return torch.stack([round_rows(rows, one) for one in alone]).mean(0)

        one, many = clock.medians([lambda turn: round_rows(rows, together), apart])  # noqa: B023
        results.append({"dim": dim, "rows": count, "widths": WIDTHS, "ms": one, "apart_ms": many, "ratio": one / many})
        print(json.dumps(results[-1]), flush=True)
    return results


def large(clock: Clock, quick: bool, placements: Sequence[Placement] = ("device",)) -> list[dict[str, Any]]:
    """A table that plain training could not hold: its plain size, what it takes on the device and elsewhere, a step."""
    rows, dim = (20_000, 64) if quick else (800_000_000, 64)
    batch = 64 if quick else 65536
    ids = [torch.randint(0, rows, (batch,), device=clock.device)]
    offsets = torch.arange(batch + 1, device=clock.device)
    grad = torch.randn(batch, dim, device=clock.device)
    results = []
    for placement in placements:
        engine, _ = pruned_engine(1, rows, dim, 0.9, placement=RowPlacement(kind=placement))
        engine.to(clock.device)
        peak(clock.device)
        taken = clock.medians([partial(look_up, engine, ids, offsets, grad)])[0]
        results.append(
            {
                "placement": placement,
                "rows": rows,
                "dim": dim,
                "plain_bytes": rows * (dim + 1) * 4,
                "held_bytes": engine_bytes(engine),
                "peak_bytes": peak(clock.device),  # of the device; rows in unified memory are not part of it
                "step_ms": taken,
            }
        )
        print(json.dumps(results[-1]), flush=True)
        del engine
    return results


PARTS: dict[str, Callable[[Clock, bool], list[dict[str, Any]]]] = {
    "embedding": embedding,
    "routing": routing,
    "rounding": rounding,
    "streams": streams,
    "serving": serving,
    "step": step,
    "event": event,
    "large": large,
}


def main(arguments: Sequence[str] | None = None, results: Path = RESULTS) -> None:
    """Run and write.

    Args:
        arguments: Those of the command line by default.
        results: Folder of the results.

    Raises:
        SystemExit: With 1 if a part has failed, else with 0.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="device to run on (default: cuda)")
    parser.add_argument("--rounds", type=int, default=30, help="timed rounds per case (default: 30)")
    parser.add_argument("--quick", action="store_true", help="small cases, to see whether it runs; writes nothing")
    parser.add_argument("--only", choices=list(PARTS), nargs="*", default=list(PARTS), help="parts to run")
    parser.add_argument(
        "--placement",
        choices=PLACEMENTS,
        nargs="*",
        default=["device"],
        help="where the rows of the part 'large' live, one case each (default: device)",
    )
    args = parser.parse_args(arguments)
    parts = PARTS | {"large": partial(large, placements=args.placement)}
    clock = Clock(torch.device(args.device), args.rounds)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    path = results / "gpu.json"
    report = json.loads(path.read_text()) if path.exists() and not args.quick else {}
    report |= {"machine": describe(), "rounds": args.rounds}
    if clock.device.type == "cuda":
        report["gpu"] = torch.cuda.get_device_name()
        report["bandwidth_gb_per_s"] = clock.bandwidth(1 << 20 if args.quick else 1 << 30) / 1e6
    seconds, failed = report.setdefault("seconds", {}), report.setdefault("failed", {})
    for name in args.only:
        started = time.perf_counter()
        try:
            report[name] = parts[name](clock, args.quick)
            failed.pop(name, None)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"
            print(traceback.format_exc(), file=sys.stderr, flush=True)
        seconds[name] = round(time.perf_counter() - started, 1)
        print(f"{name}: {seconds[name]} s", flush=True)
        if not args.quick:
            path.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()

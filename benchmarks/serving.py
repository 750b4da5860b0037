"""Served lookups as ratios to FBGEMM's tables in float32, interleaved, medians; load time and resident bytes.

::

    python -m benchmarks.serving      # writes benchmarks/results/serving.json

``lookup`` compares with two FBGEMM tables of the same shape in float32: the inference table, and the training table
without its backward pass; FBGEMM's own integer tables stand beside. ``mixed`` has rows of 8, 4, 2 and 0 bits in 128
groups by popularity, where ids are numbered by it; in ``mixed_by_row`` the groups are shuffled, so that every row has a
code of its own. ``load`` writes an export of one table and loads it.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import logging
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen

from benchmarks.machine import describe, rss
from benchmarks.speed import RESULTS, interleaved, plain_tables, zipf_ids
from lightning_embcomp.engine.precision import TablePrecision
from lightning_embcomp.export import ExportHost, ExportTable, build, folder_bytes, load, write
from lightning_embcomp.export.accounting import serving_bytes
from lightning_embcomp.export.expansion import expand
from lightning_embcomp.export.serving import ServedTables

SHAPES = ((1, 2_000_000, 64, 20), (1, 2_000_000, 16, 20), (26, 200_000, 16, 1), (26, 200_000, 64, 1))
"""Tables, rows, dim, pooling factor."""
BATCH = 2048
GROUPS = 128
BITS = [8] * 16 + [4] * 24 + [2] * 24 + [0] * 64


def fbgemm(tables: int, rows: int, dim: int, kind: SparseType) -> IntNBitTableBatchedEmbeddingBagsCodegen:
    """FBGEMM's inference tables with random values."""
    found = IntNBitTableBatchedEmbeddingBagsCodegen(
        [(f"t{t}", rows, dim, kind, EmbeddingLocation.HOST) for t in range(tables)],
        device="cpu",
        output_dtype=SparseType.FP32,
        row_alignment=1,
    )
    found.initialize_weights()
    found.fill_random_weights()
    return found


def precision(rows: int, dim: int, *, by_row: bool) -> TablePrecision:
    """Half of the groups live; the popular ones have more bits."""
    generator = torch.Generator().manual_seed(0)
    return TablePrecision(
        bounds=torch.linspace(0, rows, GROUPS + 1).long(),
        bits=torch.tensor(BITS, dtype=torch.uint8),
        steps={8: 2.0**-12, 4: 2.0**-8, 2: 2.0**-7},
        offset=0.001 * torch.randn(dim, generator=generator),
        group=torch.randint(0, GROUPS, (rows,), dtype=torch.uint8, generator=generator) if by_row else None,
    )


def host(tables: int, rows: int, dim: int, rounding: TablePrecision | None = None) -> ExportHost:
    """Tables with random values, each the same."""
    weight = 0.01 * torch.randn(rows, dim, generator=torch.Generator().manual_seed(1))
    exported = tuple(
        ExportTable(
            name=f"t{t}",
            rows=rows,
            dim=dim,
            read_rows=lambda start, stop: weight[start:stop],
            features=(f"f{t}",),
            precision=rounding,
        )
        for t in range(tables)
    )
    return ExportHost(path="", kind="bag_collection", tables=exported)


def served(tables: int, rows: int, dim: int, bits: int, rounding: TablePrecision | None = None) -> ServedTables:
    """Our served tables."""
    return ServedTables(expand(build([host(tables, rows, dim, rounding)], bits)), range(tables))


def look_up(module: torch.nn.Module, ids: list[torch.Tensor], offsets: torch.Tensor, turn: int) -> None:
    """One of the batches, without gradients."""
    with torch.no_grad():
        module(ids[turn % len(ids)], offsets)


def keep_freed_memory() -> None:
    """Let glibc reuse what was freed, as the allocators of servers do.

    By chance of the layout of its heap it hands the outputs of some tables back to the system after every call, which
    then costs a page fault per 4 kB.
    """
    libc = ctypes.CDLL(None)
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    libc.mallopt(trim_threshold, 1 << 30)
    libc.mallopt(mmap_threshold, 1 << 30)


def makers(
    tables: int, rows: int, dim: int, ids: list[torch.Tensor], offsets: torch.Tensor
) -> dict[str, Callable[[], Callable[[int], None]]]:
    """What is compared with FBGEMM in float32, by name; built when called."""
    # FBGEMM's inference tables take 32-bit ids only.
    short, short_offsets = [batch.int() for batch in ids], offsets.int()

    def theirs(kind: SparseType) -> Callable[[int], None]:
        return partial(look_up, fbgemm(tables, rows, dim, kind), short, short_offsets)

    def ours(bits: int, by_row: bool | None = None) -> Callable[[int], None]:
        rounding = None if by_row is None else precision(rows, dim, by_row=by_row)
        return partial(look_up, served(tables, rows, dim, bits, rounding), ids, offsets)

    return {
        "fbgemm_fp32": partial(theirs, SparseType.FP32),
        "fbgemm_int8": partial(theirs, SparseType.INT8),
        "fbgemm_int4": partial(theirs, SparseType.INT4),
        "fp16": partial(ours, 16),
        "int8": partial(ours, 8),
        "int4": partial(ours, 4),
        "int2": partial(ours, 2),
        "mixed": partial(ours, 8, by_row=False),
        "mixed_by_row": partial(ours, 8, by_row=True),
    }


def lookup(rounds: int) -> list[dict[str, Any]]:
    """Seconds of every kind of table, in turn with FBGEMM's two in float32."""
    keep_freed_memory()
    results = []
    for tables, rows, dim, pooling in SHAPES:
        rng = np.random.default_rng(0)
        batches = [np.concatenate([zipf_ids(rng, rows, BATCH * pooling) for _ in range(tables)]) for _ in range(8)]
        ids = [torch.from_numpy(batch) for batch in batches]
        offsets = torch.arange(0, tables * BATCH * pooling + 1, pooling)
        kinds = makers(tables, rows, dim, ids, offsets)
        inference = kinds.pop("fbgemm_fp32")()
        training = partial(look_up, plain_tables(tables, rows, dim), ids, offsets)
        for name, make in kinds.items():
            # One kind at a time: more would push each other out of the caches.
            seconds = interleaved([inference, training, make()], rounds)
            results.append(
                {
                    "kind": name,
                    "tables": tables,
                    "rows": rows,
                    "dim": dim,
                    "pooling": pooling,
                    "batch": BATCH,
                    "inference_fp32_ms": seconds[0] * 1e3,
                    "training_fp32_ms": seconds[1] * 1e3,
                    "ms": seconds[2] * 1e3,
                    "ratio_to_inference_fp32": seconds[2] / seconds[0],
                    "ratio_to_training_fp32": seconds[2] / seconds[1],
                }
            )
            print(json.dumps(results[-1]), flush=True)
        del inference, training, kinds, make
        gc.collect()
    return results


def settle() -> None:
    """Give freed memory back to the system (glibc), so that resident bytes are those in use."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def loading() -> list[dict[str, Any]]:
    """Write, load and look everything up once; resident bytes are what the process grew by."""
    rows, dim = 2_000_000, 64
    results = []
    rounding = precision(rows, dim, by_row=False)
    served(1, 100, dim, 8).read_rows(0, 0, 100)  # the kernel is compiled and loaded before anything is counted
    for name, bits, chosen in (("int8", 8, None), ("int4", 4, None), ("mixed", 8, rounding)):
        for format in ("fbgemm", "packed"):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "out"
                artefact = build([host(1, rows, dim, chosen)], bits, format=format)  # type: ignore[arg-type]
                write(artefact, path)
                manifest = artefact.manifest
                del artefact
                settle()
                before, started = rss(), time.perf_counter()
                module: Any = load(path)
                seconds = time.perf_counter() - started
                for start in range(0, rows, 100_000):  # pages of a mapped file count once they were read
                    module.served.read_rows(0, start, start + 100_000)
                settle()
                results.append(
                    {
                        "table": name,
                        "format": format,
                        "rows": rows,
                        "dim": dim,
                        "plain_bytes": 4 * rows * dim,
                        "disk_bytes": sum(folder_bytes(path).values()),
                        "serving_bytes": serving_bytes(module, manifest).total,
                        "resident_bytes": rss() - before,
                        "load_seconds": seconds,
                    }
                )
                print(json.dumps(results[-1]), flush=True)
                del module
    return results


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--only", choices=["load", "lookup"], nargs="*", default=["load", "lookup"])
    args = parser.parse_args()
    logging.getLogger().setLevel(logging.WARNING)
    torch.set_num_threads(args.threads)
    path = RESULTS / "serving.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    report |= {"machine": describe(), "threads": args.threads, "rounds": args.rounds}
    for name in args.only:
        report[name] = {"load": loading, "lookup": lambda: lookup(args.rounds)}[name]()
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

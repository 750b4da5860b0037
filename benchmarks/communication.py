"""Bytes on the wire and step times of two processes across a shaped link, each way of exchanging in turn.

::

    python -m benchmarks.communication          # as root; writes benchmarks/results/communication.json

Sections: ``data_parallel`` exchanges the gradients of an MLP, ``model_parallel`` the pooled embeddings of table-wise
sharded tables and their gradients, ``whole`` does both in one step. Bytes are those of the interface's counters on rank
0, headers, ids and acknowledgements included; ``fewer_bytes`` and ``faster`` are ratios to the first variant.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, table_wise
from torchrec.distributed.types import ShardingEnv
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from benchmarks.link import Link, interface_bytes
from benchmarks.machine import describe
from lightning_embcomp.methods.dct.codecs import PooledThresholding, comm_codecs

RESULTS = Path(__file__).parent / "results"
SEED, BATCH, TABLES, ROWS, DIM, DENSE = 0, 512, 26, 20_000, 64, 13
HIDDEN = (1024, 512, 256)
SENT_COLUMNS = TABLES // 2 * DIM
"""Columns that each process sends per sample."""
DCT_DENSITY, TOPK_DENSITY = 0.01, 0.05
WARMUP = 8
"""Steps before counting: hooks and allocators settle, and thresholds are refreshed at least once."""

Step = Callable[[int], None]
Wrapped = Callable[[nn.Module], DistributedDataParallel]

CODECS: dict[str, PooledThresholding | None] = {
    "fp32": None,
    "fp16": PooledThresholding(forward="fp16", backward="fp16"),
    "int8": PooledThresholding(forward="int8", backward="int8", row_dim=DIM),
    "topk": PooledThresholding(row_dim=SENT_COLUMNS, forward_density=TOPK_DENSITY),
    "topk_both_ways": PooledThresholding(
        row_dim=SENT_COLUMNS, forward_density=TOPK_DENSITY, backward="topk", backward_density=TOPK_DENSITY
    ),
}


def mlp() -> nn.Sequential:
    """The dense part: 2.4 M parameters."""
    sizes = (DENSE + TABLES * DIM, *HIDDEN)
    layers: list[nn.Module] = []
    for wide, narrow in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(wide, narrow), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(HIDDEN[-1], 1))


def plain(model: nn.Module, bucket_cap_mb: int | None = None) -> DistributedDataParallel:
    """DDP on a process group of its own: its collectives and those of the tables then need no common order."""
    return DistributedDataParallel(model, process_group=dist.new_group(), bucket_cap_mb=bucket_cap_mb)


def fp16(model: nn.Module) -> DistributedDataParallel:
    """PyTorch's hook that reduces float16."""
    wrapped = plain(model)
    wrapped.register_comm_hook(wrapped.process_group, fp16_compress_hook)
    return wrapped


def power_sgd(model: nn.Module) -> DistributedDataParallel:
    """PyTorch's low-rank hook with error feedback."""
    # One bucket: the hook starts collectives from callbacks, which gloo runs in any order when there are several.
    wrapped = plain(model, bucket_cap_mb=100)
    state = PowerSGDState(wrapped.process_group, matrix_approximation_rank=4, start_powerSGD_iter=3)
    wrapped.register_comm_hook(state, powerSGD_hook)
    return wrapped


def thresholding(model: nn.Module) -> DistributedDataParallel:
    """Thresholded gradients."""
    from lightning_embcomp.methods.dct.config import ErrorFeedback, ThresholdSettings
    from lightning_embcomp.methods.dct.exchange import GradientExchange
    from lightning_embcomp.methods.dct.hook import gradient_thresholding_hook

    wrapped = plain(model)
    parameters = dict(model.named_parameters())
    state = GradientExchange(
        parameters,
        [name for name, parameter in parameters.items() if parameter.numel() >= 256],
        density=DCT_DENSITY,
        feedback=ErrorFeedback(),
        thresholds=ThresholdSettings(),
        value_type="fp16",
        warmup_steps=2,
        group=wrapped.process_group,
    )
    wrapped.register_comm_hook(state, gradient_thresholding_hook)
    return wrapped


def tables(codecs: PooledThresholding | None) -> nn.Module:
    """Tables, every other one on rank 0, with fused row-wise Adagrad."""
    collection = EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(name=f"t{t}", num_embeddings=ROWS, embedding_dim=DIM, feature_names=[f"f{t}"])
            for t in range(TABLES)
        ]
    )
    sharder = EmbeddingBagCollectionSharder(
        fused_params={"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.02},
        qcomm_codecs_registry=None if codecs is None else comm_codecs(codecs),
    )
    plan = construct_module_sharding_plan(
        collection,
        {f"t{t}": table_wise(rank=t % 2, compute_kernel="fused") for t in range(TABLES)},
        sharder=sharder,
        local_size=1,
        world_size=2,
        device_type="cpu",
    )
    env = ShardingEnv.from_process_group(dist.GroupMember.WORLD)
    sharded: nn.Module = sharder.shard(collection, plan, env, torch.device("cpu"))
    return sharded


class Batches:
    """Eight batches of this process: Zipf ids, and clicks that depend on the dense features."""

    def __init__(self) -> None:
        rng = np.random.default_rng(SEED + dist.get_rank())
        names = [f"f{t}" for t in range(TABLES)]
        one_each = torch.ones(TABLES * BATCH, dtype=torch.int64)
        ids = [(rng.zipf(1.2, TABLES * BATCH) - 1) % ROWS for _ in range(8)]
        self.sparse = [KeyedJaggedTensor(names, torch.from_numpy(batch), lengths=one_each) for batch in ids]
        self.dense = [torch.from_numpy(rng.standard_normal((BATCH, DENSE), np.float32)) for _ in range(8)]
        self.pooled = [torch.from_numpy(rng.standard_normal((BATCH, TABLES * DIM), np.float32)) for _ in range(8)]
        self.label = [(dense.sum(1) > 0).float() for dense in self.dense]


def train(
    batches: Batches,
    collection: nn.Module | None,
    dense: DistributedDataParallel | None,
    optimizer: torch.optim.Optimizer | None,
    step: int,
) -> None:
    """One step of whatever parts there are."""
    turn = step % 8
    pooled = batches.pooled[turn] if collection is None else collection(batches.sparse[turn]).wait().values()
    if dense is None or optimizer is None:
        (pooled * batches.pooled[turn]).mean().backward()
        return
    logit: Tensor = dense(torch.cat([batches.dense[turn], pooled], dim=1)).squeeze(1)
    loss = nn.functional.binary_cross_entropy_with_logits(logit, batches.label[turn])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def make(batches: Batches, codecs: str | None, wrap: Wrapped | None) -> Step:
    """A step of new tables, a new MLP, or both."""
    torch.manual_seed(SEED)
    collection = None if codecs is None else tables(CODECS[codecs])
    dense = None if wrap is None else wrap(mlp())
    optimizer = None if dense is None else torch.optim.SGD(dense.parameters(), lr=0.01)
    return partial(train, batches, collection, dense, optimizer)


SECTIONS: dict[str, dict[str, tuple[str | None, Wrapped | None]]] = {
    "data_parallel": {
        "plain": (None, plain),
        "fp16": (None, fp16),
        "powersgd_rank_4": (None, power_sgd),
        "dct_1_percent": (None, thresholding),
    },
    "model_parallel": {
        "fp32": ("fp32", None),
        "fp16": ("fp16", None),
        "int8": ("int8", None),
        "topk_5_percent": ("topk", None),
        "topk_5_percent_both_ways": ("topk_both_ways", None),
    },
    "whole": {
        "plain": ("fp32", plain),
        "fp16": ("fp16", fp16),
        "powersgd_and_int8": ("int8", power_sgd),
        "dct_1_percent": ("fp32", thresholding),
        "dct_1_percent_and_topk_5_percent": ("topk", thresholding),
    },
}
"""Codecs of the tables and hook of the MLP, by section and variant."""


def measure(steps: dict[str, Step], rounds: int) -> dict[str, dict[str, float]]:
    """Medians over rounds in which every variant takes one step."""
    taken: dict[str, list[tuple[float, int, int]]] = {name: [] for name in steps}
    for turn in range(WARMUP + rounds):
        for name, step in steps.items():
            dist.barrier()
            received, sent = interface_bytes()
            started = time.perf_counter()
            step(turn)
            dist.barrier()
            seconds = time.perf_counter() - started
            now = interface_bytes()
            if turn >= WARMUP:
                taken[name].append((seconds, now[1] - sent, now[0] - received))
    results = {}
    for name, figures in taken.items():
        medians = [float(np.median(column)) for column in zip(*figures, strict=True)]
        results[name] = {"step_ms": medians[0] * 1e3, "sent_bytes": medians[1], "received_bytes": medians[2]}
    first = next(iter(results.values()))
    for result in results.values():
        total = result["sent_bytes"] + result["received_bytes"]
        result["fewer_bytes"] = (first["sent_bytes"] + first["received_bytes"]) / total
        result["faster"] = first["step_ms"] / result["step_ms"]
    return results


def worker(rounds: int, only: list[str], output: Path) -> None:
    """Measure on one side of the link; rank 0 writes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    batches = Batches()
    results = {}
    for section in only:
        steps = {name: make(batches, *variant) for name, variant in SECTIONS[section].items()}
        results[section] = measure(steps, rounds)
    if dist.get_rank() == 0:
        output.write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # PyTorch's threads sometimes abort a normal exit


def run(mbit: float | None, rounds: int, only: list[str]) -> dict[str, Any]:
    """Measure across a link of one speed."""
    with tempfile.TemporaryDirectory() as folder, Link(mbit) as link:
        output = Path(folder) / "results.json"
        arguments = ["worker", "--rounds", str(rounds), "--only", *only, "--output", str(output)]
        link.run([sys.executable, "-W", "ignore", "-m", "benchmarks.communication", *arguments], timeout=600)
        results: dict[str, Any] = json.loads(output.read_text())
    for section, variants in results.items():
        for name, result in variants.items():
            print(
                f"{f'{mbit:g} Mbit/s' if mbit else 'unshaped':12}{section:16}{name:34}{result['step_ms']:9.1f} ms"
                f"{result['sent_bytes']:12.0f} B sent{result['fewer_bytes']:8.1f} x fewer"
                f"{result['faster']:7.2f} x faster",
                flush=True,
            )
    return {"mbit": mbit, **results}


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("role", nargs="?", choices=["all", "worker"], default="all", help=argparse.SUPPRESS)
    parser.add_argument("--mbit", type=float, nargs="*", default=[100, 1000, 0], help="link speeds; 0 is unshaped")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--only", choices=list(SECTIONS), nargs="*", default=list(SECTIONS))
    parser.add_argument("--output", type=Path, default=RESULTS / "communication.json")
    args = parser.parse_args()
    if args.role == "worker":
        worker(args.rounds, args.only, args.output)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # an exception, so that the link is taken down
    topk = CODECS["topk"]
    assert topk is not None
    report = {
        "machine": describe(),
        "seed": SEED,
        "rounds": args.rounds,
        "processes": 2,
        "threads": 1,
        "model": {
            "dense_parameters": sum(parameter.numel() for parameter in mlp().parameters()),
            "tables": TABLES,
            "rows": ROWS,
            "dim": DIM,
            "batch_per_process": BATCH,
            "ids_per_feature": 1,
        },
        "dct": {"density": DCT_DENSITY, "values": "fp16"},
        "topk": {"density": TOPK_DENSITY, "row_dim": topk.row_dim, "kept": topk.forward_kept},
        "links": [run(mbit or None, args.rounds, args.only) for mbit in args.mbit],
    }
    args.output.parent.mkdir(exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

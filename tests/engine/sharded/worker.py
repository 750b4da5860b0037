"""One of several processes that compare a sharded collection with an unsharded one; run with sharding types."""

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
    data_parallel,
    row_wise,
    table_wise,
)
from torchrec.distributed.types import ShardingEnv
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim import RowWiseAdagrad
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from lightning_embcomp.engine.host import EngineHost
from lightning_embcomp.engine.hosts import RoutedHost
from lightning_embcomp.engine.layout import LogicalTable
from lightning_embcomp.engine.plan import FixedPlan, ReadPlan
from lightning_embcomp.engine.sharded.collection import RoutedBagsSharder, ShardedRoutedBags
from lightning_embcomp.engine.statistics import RowUtility
from lightning_embcomp.surgery import build_host, fill, part_of, sharded_spec
from lightning_embcomp.tables import find_hosts

ROWS, DIM, CHUNKS, BATCH = (70, 131, 3), 16, 4, 6
FEATURES = [["a", "shared"], ["b"], ["shared"]]
POOLING = [PoolingType.SUM, PoolingType.MEAN, PoolingType.SUM]
KEYS = ["a", "shared@t0", "b", "shared@t2"]
CPU = torch.device("cpu")


def collection(optimizer: type[torch.optim.Optimizer], poolings: list[PoolingType] = POOLING) -> EmbeddingBagCollection:
    torch.manual_seed(3)
    configs = [
        EmbeddingBagConfig(name=f"t{t}", num_embeddings=rows, embedding_dim=DIM, feature_names=names, pooling=pooling)
        for t, (rows, names, pooling) in enumerate(zip(ROWS, FEATURES, poolings, strict=True))
    ]
    plain = EmbeddingBagCollection(tables=configs, device=CPU)
    _apply_optimizer_in_backward(optimizer, plain.parameters(), {"lr": 0.2})
    return plain


def plan(kind: str, world: int) -> dict[str, Any]:
    every = list(range(world))
    return {
        "table_wise": {f"t{t}": table_wise(rank=t % world) for t in range(3)},
        "row_wise": {f"t{t}": row_wise() for t in range(3)},
        "column_wise": {
            f"t{t}": column_wise(ranks=every if world == 4 else [0, 1, 1, 0][: 2 + 2 * (t % 2)]) for t in range(3)
        },
        "data_parallel": {f"t{t}": data_parallel() for t in range(3)},
        "mixed": {"t0": column_wise(ranks=[world - 1, 0]), "t1": row_wise(), "t2": data_parallel()},
    }[kind]


def sharded(kind: str, optimizer: type[torch.optim.Optimizer], device: torch.device = CPU) -> ShardedRoutedBags:
    plain = collection(optimizer)
    host = find_hosts(plain)[0]
    spec = sharded_spec(host, {table.name: (CHUNKS, "prefix") for table in host.tables}, device)
    sharder = RoutedBagsSharder(spec)
    env = ShardingEnv.from_process_group(dist.GroupMember.WORLD)
    bags = sharder.shard(plain, dict(_plan(plain, kind)), env, device)
    start(bags, host)
    return bags


def _plan(plain: EmbeddingBagCollection, kind: str) -> Any:
    world = dist.get_world_size()
    return construct_module_sharding_plan(plain, plan(kind, world), sharder=_Any(), local_size=world, device_type="cpu")


class _Any(EmbeddingBagCollectionSharder):
    """Lets the test plan what planners leave out."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return ["table_wise", "row_wise", "column_wise", "data_parallel"]


def reference(optimizer: type[torch.optim.Optimizer]) -> RoutedHost:
    """The same tables in one process."""
    view = find_hosts(collection(optimizer))[0]
    host = build_host(view, {table.name: (CHUNKS, "prefix") for table in view.tables}, CPU)
    start(host, view)
    return host


def start(host: EngineHost, view: Any) -> None:
    """Cut rows by their numbers, then give them their values."""
    for engine in host.engines:
        engine.move(ReadPlan(lambda t, a, b, engine=engine: codes_of(engine.tables[t])[a:b]))
        engine.clear_row_state()
        engine.scale_rates(0.5)
        engine.track_utility(RowUtility(engine.tables, device=engine.options.device))
    for t in range(len(ROWS)):
        fill(host, t, view)


def codes_of(table: LogicalTable) -> torch.Tensor:
    first = 0 if table.shard is None else table.shard.first_row
    whole = (torch.arange(table.rows) + first) * 7 % (CHUNKS + 1)
    return (whole - table.first_chunk).clamp(min=0).to(torch.uint8)


def batch(step: int, samples: slice | None = None, world: int = 2) -> KeyedJaggedTensor:
    generator = torch.Generator().manual_seed(step)
    values, lengths = [], []
    for _, limit in zip("abs", (ROWS[0], ROWS[1], ROWS[2]), strict=True):
        counts = torch.randint(0, 4, (world * BATCH,), generator=generator)
        ids = torch.randint(0, limit, (int(counts.sum()),), generator=generator).split(counts.tolist())
        mine = samples or slice(None)
        lengths.append(counts[mine])
        values += ids[mine]
    return KeyedJaggedTensor(["a", "b", "shared"], torch.cat(values), lengths=torch.cat(lengths))


def compare_with_torchrec(kind: str, steps: int = 12) -> None:
    """Row-wise Adagrad has an accumulator per part where columns are cut, with TorchRec and here."""
    rank, world = dist.get_rank(), dist.get_world_size()
    env = ShardingEnv.from_process_group(dist.GroupMember.WORLD)
    mine = slice(rank * BATCH, (rank + 1) * BATCH)
    found, modules = [], []
    for ours in (True, False):
        plain = collection(RowWiseAdagrad, [PoolingType.SUM] * 3)
        view = find_hosts(plain)[0]
        spec = sharded_spec(view, {table.name: (CHUNKS, "prefix") for table in view.tables}, CPU)
        sharder = RoutedBagsSharder(spec) if ours else EmbeddingBagCollectionSharder()
        module_plan = dict(_plan(plain, kind))
        bags = sharder.shard(plain, module_plan, env, CPU)
        if isinstance(bags, ShardedRoutedBags):
            for engine in bags.engines:
                engine.move(FixedPlan([table.full_code for table in engine.tables]))
                engine.clear_row_state()
            for t in range(len(ROWS)):
                fill(bags, t, view)
        else:
            bags.load_state_dict(plain.state_dict(), strict=False)
        modules.append(bags)
    for step in range(steps):
        signs = torch.randn(world * BATCH, 4 * DIM, generator=torch.Generator().manual_seed(900 + step))
        found = []
        for bags in modules:
            pooled = bags(batch(step, mine, world)).wait().to_dict()
            values = torch.cat([pooled[key] for key in KEYS], 1)
            (world * values * signs[mine]).sum().backward()
            found.append(values.detach())
        torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


def compare(
    kind: str,
    optimizer: type[torch.optim.Optimizer],
    steps: int = 12,
    device: torch.device = CPU,
    before_step: Callable[[int], None] = lambda step: None,
) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    bags = sharded(kind, optimizer, device)
    bags.norms.wanted = True
    unsharded = reference(optimizer)
    mine = slice(rank * BATCH, (rank + 1) * BATCH)
    for step in range(steps):
        before_step(step)
        signs = torch.randn(world * BATCH, len(KEYS), DIM, generator=torch.Generator().manual_seed(900 + step))
        whole = unsharded(batch(step, world=world)).to_dict()
        found = bags(batch(step, mine, world).to(device)).wait().to_dict()
        assert all(rows.device == device for rows in found.values())
        for key in KEYS:
            torch.testing.assert_close(found[key].cpu(), whole[key][mine], rtol=1e-5, atol=1e-6)
        sum((whole[key] * signs[:, k]).sum() for k, key in enumerate(KEYS)).backward()
        mine_signs = signs[mine].to(device)
        (world * sum((found[key] * mine_signs[:, k]).sum() for k, key in enumerate(KEYS))).backward()
    before_step(steps)
    tolerance = {"rtol": 1e-5, "atol": 1e-5}
    held = torch.zeros(len(ROWS), dtype=torch.int64)
    for t in range(len(ROWS)):
        for shard in bags.shards(t):
            rows = shard.engine.read_rows(shard.index, 0, shard.logical.rows).cpu()
            wanted = part_of(unsharded.engine.read_rows(t, 0, ROWS[t]), shard.logical)
            torch.testing.assert_close(rows, wanted, **tolerance)
            assert unsharded.engine.utility is not None and shard.engine.utility is not None
            if shard.primary:
                utility = unsharded.engine.utility.of_table(t)[shard.first_row :][: shard.logical.rows]
                found_utility = shard.engine.utility.of_table(shard.index).cpu()
                torch.testing.assert_close(found_utility, utility, rtol=1e-2, atol=1e-5)
                held[t] += shard.logical.rows
    assert bags.group.sum(held).tolist() == list(ROWS)


if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    for kind in sys.argv[1:]:
        compare(kind, torch.optim.SGD)
        if kind in ("column_wise", "mixed"):
            compare_with_torchrec("column_wise")  # of data-parallel tables TorchRec ignores the fused optimizer
        else:
            compare(kind, RowWiseAdagrad)
    print("equal", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)

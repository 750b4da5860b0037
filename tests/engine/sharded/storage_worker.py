"""One of several processes that save or load a sharded collection.

Run with ``save`` or ``load``, sharding types with commas between them, the type of the saved run, a folder, and
``gpu`` for a pretended one.
"""

import os
import sys
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torchrec.optim import RowWiseAdagrad

from lightning_embcomp.checkpoints import CheckpointReader, save_checkpoint
from lightning_embcomp.engine.host import EngineHost
from lightning_embcomp.engine.row_class import WEIGHT
from lightning_embcomp.engine.sharded.collection import ShardedRoutedBags
from lightning_embcomp.surgery import part_of
from tests.engine.sharded.worker import CPU, KEYS, ROWS, batch, codes_of, reference, sharded
from tests.pretend import GPU, pretended_gpu

STEPS, SAMPLES = 6, 12


def optimizer_of(kind: str) -> type[torch.optim.Optimizer]:
    return torch.optim.SGD if kind in ("column_wise", "mixed") else RowWiseAdagrad


def train(host: EngineHost, first: int, last: int) -> None:
    """Train on the same samples, however many processes there are."""
    rank, world = host.group.rank, host.group.size
    mine = slice(rank * SAMPLES // world, (rank + 1) * SAMPLES // world)
    for step in range(first, last):
        signs = torch.randn(SAMPLES, len(KEYS), 16, generator=torch.Generator().manual_seed(900 + step))
        mine_signs = signs[mine].to(host.options.device)
        pooled = host(batch(step, mine).to(host.options.device))  # type: ignore[operator]
        found = (pooled.wait() if isinstance(host, ShardedRoutedBags) else pooled).to_dict()
        (world * sum((found[key] * mine_signs[:, k]).sum() for k, key in enumerate(KEYS))).backward()


def same(host: ShardedRoutedBags, wanted: EngineHost, exact_state: bool) -> None:
    for t in range(len(ROWS)):
        whole = wanted.shards(t)[0].engine
        for shard in host.shards(t):
            engine, index, part = shard.engine, shard.index, shard.logical
            rows = engine.read_rows(index, 0, part.rows).cpu()
            torch.testing.assert_close(rows, part_of(whole.read_rows(t, 0, ROWS[t]), part), rtol=1e-5, atol=1e-6)
            assert torch.equal(engine.router.read(index, 0, part.rows)[0].cpu(), codes_of(part))
            if exact_state:
                torch.testing.assert_close(state_of(engine, index), state_of(whole, t)[shard.first_row :][: part.rows])
            assert engine.utility is not None and whole.utility is not None
            utility = whole.utility.of_table(t)[shard.first_row :][: part.rows]
            if shard.primary:
                torch.testing.assert_close(engine.utility.of_table(index).cpu(), utility, rtol=1e-2, atol=1e-5)
            assert engine.utility.step == whole.utility.step
    gains = torch.zeros(len(ROWS), 2, dtype=torch.float64)
    for t in range(len(ROWS)):
        for shard in host.shards(t):
            if shard.primary:
                assert shard.engine.utility is not None
                gains[t] += shard.engine.utility.gain[shard.index].cpu()
    utility = wanted.engines[0].utility
    assert utility is not None
    torch.testing.assert_close(host.group.sum(gains), utility.gain, rtol=1e-5, atol=1e-5)


def state_of(engine: object, index: int) -> torch.Tensor:
    """Accumulators of the rows of a table, by row; zero where nothing is stored."""
    codes, slots = (t.cpu() for t in engine.router.read(index, 0, engine.tables[index].rows))  # type: ignore[attr-defined]
    found = torch.zeros(codes.numel())
    for code in range(1, engine.tables[index].codes):  # type: ignore[attr-defined]
        storages = engine.classes[engine.class_map.class_of_code[index][code]].storages()  # type: ignore[attr-defined]
        if "momentum1" in storages:
            found[codes == code] = storages["momentum1"].tensor.cpu()[slots[codes == code].long()]
    return found


def bits(host: ShardedRoutedBags) -> list[torch.Tensor]:
    found = []
    for engine in host.engines:
        found += [storage.tensor for rows in engine.classes for storage in rows.storages().values()]
        assert engine.utility is not None
        found += [engine.router.tensors.words, engine.utility.values, engine.utility.gain]
        assert WEIGHT in engine.classes[0].storages()
    return [tensor.cpu().clone() for tensor in found]


def save(kind: str, folder: Path, device: torch.device = CPU) -> None:
    host = sharded(kind, optimizer_of(kind), device)
    host.norms.wanted = True
    train(host, 0, STEPS)
    state = {f"bags.{name}": tensor for name, tensor in host.distributed_state().items()}
    save_checkpoint(folder / "last.ckpt", tensors=state, common={}, per_rank={})
    train(host, STEPS, STEPS + 2)
    torch.save(bits(host), bits_file(kind, folder))


def load(kind: str, saved_kind: str, folder: Path, device: torch.device = CPU) -> None:
    optimizer = optimizer_of(saved_kind)
    host = sharded(kind, optimizer, device)
    host.norms.wanted = True
    for engine in host.engines:
        engine.initialise(0, torch.nn.init.zeros_)
    host.load_distributed_state("bags.", CheckpointReader(folder / "last.ckpt"))
    unsharded = reference(optimizer)
    train(unsharded, 0, STEPS)
    # Row-wise Adagrad has an accumulator per part where columns are cut: other runs cannot be compared.
    comparable = optimizer is RowWiseAdagrad and kind not in ("column_wise", "mixed")
    same(host, unsharded, comparable)
    train(host, STEPS, STEPS + 2)
    train(unsharded, STEPS, STEPS + 2)
    if optimizer is torch.optim.SGD or comparable:
        same(host, unsharded, comparable)
    if kind == saved_kind and bits_file(kind, folder).exists():
        for found, wanted in zip(bits(host), torch.load(bits_file(kind, folder)), strict=True):
            assert torch.equal(found, wanted)
        print("bit for bit", flush=True)


def bits_file(kind: str, folder: Path) -> Path:
    return folder / f"{kind}_{dist.get_rank()}_of_{dist.get_world_size()}.pt"


if __name__ == "__main__":
    action, kinds, saved_kind, folder = sys.argv[1], sys.argv[2].split(","), sys.argv[3], Path(sys.argv[4])
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    gpu = sys.argv[5:] == ["gpu"]
    with pretended_gpu() if gpu else nullcontext():
        for kind in kinds:
            if action == "save":
                save(kind, folder, GPU if gpu else CPU)
            else:
                load(kind, saved_kind, folder, GPU if gpu else CPU)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)

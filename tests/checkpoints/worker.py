"""One rank of test_distributed; run with a stage and a folder."""

import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder, ShardedEmbeddingBagCollection
from torchrec.distributed.sharding_plan import column_wise, construct_module_sharding_plan, row_wise, table_wise
from torchrec.distributed.types import ShardingEnv
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from lightning_embcomp.checkpoints import (
    CheckpointReader,
    CheckpointSaveError,
    Slice,
    read_common,
    read_rank,
    save_checkpoint,
    saving_group,
    world_size_of,
)
from lightning_embcomp.checkpoints import saving as saving_module
from tests.checkpoints.tables import DIM, ROWS, filled, plain_slices, whole_slices

FUSED = {"compute_kernel": "fused"}
# Two column shards everywhere: row-wise Adagrad has one state per column shard.
PLANS = {
    "first": {"t0": table_wise(rank=0, **FUSED), "t1": row_wise(**FUSED), "t2": column_wise(ranks=[0, 1], **FUSED)},
    "other": {"t0": table_wise(rank=1, **FUSED), "t1": row_wise(**FUSED), "t2": column_wise(ranks=[1, 0], **FUSED)},
    "wide": {"t0": table_wise(rank=3, **FUSED), "t1": row_wise(**FUSED), "t2": column_wise(ranks=[2, 1], **FUSED)},
}


def collection(plan: str, as_dtensor: bool = False) -> ShardedEmbeddingBagCollection:
    """Tables under row-wise Adagrad, of which every weight and state is -1."""
    configs = [
        EmbeddingBagConfig(name=f"t{t}", num_embeddings=rows, embedding_dim=DIM, feature_names=[f"f{t}"])
        for t, rows in enumerate(ROWS)
    ]
    plain = EmbeddingBagCollection(tables=configs, device=torch.device("meta"))
    sharder = EmbeddingBagCollectionSharder(
        fused_params={"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.1}
    )
    world = dist.get_world_size()
    module_plan = construct_module_sharding_plan(
        plain, PLANS[plan], sharder=sharder, local_size=world, world_size=world, device_type="cpu"
    )
    env = ShardingEnv(world, dist.get_rank(), dist.group.WORLD, output_dtensor=as_dtensor)
    sharded = sharder.shard(plain, module_plan, env, torch.device("cpu"))
    for _, part in parts(tensors_of(sharded)):
        part.fill_(-1)
    return sharded


def tensors_of(sharded: ShardedEmbeddingBagCollection) -> dict[str, Any]:
    tensors = {f"state_dict/{key}": value for key, value in sharded.state_dict().items()}
    for table, states in sharded.fused_optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{table}/{name}": value for name, value in states.items()}
    return tensors


def parts(tensors: Mapping[str, Any]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What each local shard should hold, and the shard, by TorchRec's own account."""
    for key, value in tensors.items():
        full = filled(key, tuple(value.size()))
        if isinstance(value, ShardedTensor):
            found = [(shard.metadata.shard_offsets, shard.tensor) for shard in value.local_shards()]
        else:
            local = value.to_local()
            found = list(zip(local.local_offsets(), local.local_shards(), strict=False))
        for offsets, tensor in found:
            wanted = full
            for dim, (offset, length) in enumerate(zip(offsets, tensor.shape, strict=True)):
                wanted = wanted.narrow(dim, offset, length)
            yield wanted, tensor


def fill(sharded: ShardedEmbeddingBagCollection) -> None:
    for wanted, tensor in parts(tensors_of(sharded)):
        tensor.copy_(wanted)


def check_read(path: Path, plan: str, as_dtensor: bool = False) -> None:
    """Every shard of a fresh collection, bit for bit; the lookups see it."""
    sharded = collection(plan, as_dtensor)
    tensors = tensors_of(sharded)
    reader = CheckpointReader(path)
    assert set(tensors) <= reader.keys()
    if dist.get_rank():
        reader.read_into(tensors)
    else:
        for key, value in tensors.items():  # other calls than the other ranks
            reader.read_into({key: value})
    count = 0
    for wanted, tensor in parts(tensors_of(sharded)):
        assert torch.equal(wanted, tensor)
        count += 1
    total = torch.tensor(count)
    dist.all_reduce(total)
    # Per table-wise table 1 part, row-wise `world`, column-wise 2; weight and state each.
    assert int(total) == 2 * (1 + dist.get_world_size() + 2), int(total)
    rows = torch.cat([emb_module.weights_dev for emb_module in emb_modules(sharded)])
    assert rows.numel() == 0 or float(rows.min()) >= 0


def emb_modules(sharded: ShardedEmbeddingBagCollection) -> list[Any]:
    return [kernel._emb_module for lookup in sharded._lookups for kernel in lookup._emb_modules]


def first(folder: Path) -> None:
    rank = dist.get_rank()
    sharded = collection("first")
    fill(sharded)
    tensors = {**tensors_of(sharded), **plain_slices(rank, 2), "dense": torch.full((3,), float(rank))}
    save_checkpoint(folder / "two", tensors=tensors, common={"epoch": rank}, per_rank={"rng": torch.tensor(rank)})
    assert read_common(folder / "two") == {"epoch": 0}
    assert [read_rank(folder / "two", k) for k in range(3)] == [{"rng": 0}, {"rng": 1}, None]
    check_read(folder / "two", "other")
    failing(folder)


def failing(folder: Path) -> None:
    """One rank fails in one place after the other: both raise the same, and nothing is left."""
    rank = dist.get_rank()

    def full_disk(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    places = [
        (saving_module, "save_object"),
        (saving_module, "_check_visible"),
        (saving_module.dcp.FileSystemWriter, "write_data"),
    ]
    for place, name in places:
        original = getattr(place, name)
        if rank == 1:
            setattr(place, name, full_disk)
        said = refused(folder / "two", {"a": torch.zeros(2)})
        setattr(place, name, original)
        assert "rank 1 on" in said and "No space left" in said and "rank 0 on" not in said, said
    said = refused(folder / "two", {"a": torch.zeros(2 + rank)})
    assert "tensor 'a': rank 0 says shape (2,), rank 1 says (3,)" in said, said
    said = refused(folder / "two", {"a": torch.zeros(2, dtype=[torch.uint8, torch.int8][rank])})
    assert "rank 0 says dtype torch.uint8, rank 1 says torch.int8" in said, said
    said = refused(folder / "two", {"a": Slice((5,), (rank,), torch.zeros(2))})
    assert "hold 4 of its 5 elements" in said, said
    said = refused(folder / "two", {"a": Slice((5,), (0,), torch.zeros(2 + 3 * rank))})
    assert "must not overlap" in said, said
    said = refused(folder / "two", {"a": Slice((5,), (rank,), torch.zeros(4))})
    assert "overlapping" in said, said
    dist.barrier()
    assert os.listdir(folder) == ["two"]
    assert world_size_of(folder / "two") == 2


def refused(path: Path, tensors: dict[str, Any]) -> str:
    try:
        save_checkpoint(path, tensors=tensors, common={}, per_rank={})
    except CheckpointSaveError as error:
        said: list[Any] = [None, None]
        dist.all_gather_object(said, str(error))
        assert said[0] == said[1], said
        return str(error)
    raise AssertionError("nothing was raised")


def second(folder: Path) -> None:
    check_read(folder / "two", "wide")
    rank, reader = dist.get_rank(), CheckpointReader(folder / "two")
    held = plain_slices(rank, 4)
    wanted = {key: [tensor.clone() for _, tensor in value.pieces] for key, value in held.items()}
    for value in held.values():
        for _, tensor in value.pieces:
            tensor.zero_()
    reader.read_into(held)
    for key, value in held.items():
        assert all(torch.equal(a, b) for (_, a), b in zip(value.pieces, wanted[key], strict=True)), key
    sharded = collection("wide", as_dtensor=True)
    fill(sharded)
    tensors = {**tensors_of(sharded), **plain_slices(rank, 4)}
    group = saving_group(timedelta(minutes=5))
    assert group is saving_group() is saving_group(timedelta(minutes=5))
    save_checkpoint(folder / "four", tensors=tensors, common={}, per_rank={})


def third(folder: Path) -> None:
    check_read(folder / "four", "first", as_dtensor=True)
    check_read(folder / "four", "other")
    check_read(folder / "one", "first")
    reader, full = CheckpointReader(folder / "four"), whole_slices()
    targets = {key: torch.zeros_like(value) for key, value in full.items()}
    reader.read_into(targets)
    assert all(torch.equal(targets[key], full[key]) for key in full)


def killed(folder: Path) -> None:
    """The last rank dies while it writes; the others stay alive until all of them have given up."""
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    save_checkpoint(folder / "ckpt", tensors={"a": torch.ones(4)}, common={"epoch": 1}, per_rank={})
    write = saving_module.dcp.FileSystemWriter.write_data

    def dies(*args: Any) -> Any:
        written = write(*args)
        os.kill(os.getpid(), signal.SIGKILL)
        return written

    if rank == last:
        saving_module.dcp.FileSystemWriter.write_data = dies
    try:
        save_checkpoint(folder / "ckpt", tensors={"a": torch.zeros(4)}, common={"epoch": 2}, per_rank={})
    except CheckpointSaveError as error:
        said = str(error)
    assert f"rank {rank} lost contact" in said, said
    (folder / f"gave_up_{rank}").touch()
    while not all((folder / f"gave_up_{k}").exists() for k in range(last)):
        time.sleep(0.05)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    globals()[sys.argv[1]](Path(sys.argv[2]))
    print("all checks passed", flush=True)
    if sys.argv[1] != "killed":
        dist.barrier()
        dist.destroy_process_group()
    os._exit(0)

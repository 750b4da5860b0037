"""One of two processes of test_sharded; run with the half-life and a folder."""

import os
import sys
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
    data_parallel,
    row_wise,
    table_wise,
)
from torchrec.distributed.types import ShardingEnv
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from lightning_embcomp import CounterSettings, FrequencyAwareLR, SetupError
from lightning_embcomp.engine.optimizer import UnsupportedOptimizerError
from tests.methods.frequency_lr.reference import NumpySGD

ROWS, DIM, LR, BATCH, WORLD = (20, 30, 12), 8, 0.3, 4, 2
FEATURES = [f"f{t}" for t in range(3)]
NAMES = [f"t{t}" for t in range(3)]
FUSED = {"compute_kernel": "fused"}
FIRST = {"t0": table_wise(rank=0, **FUSED), "t1": row_wise(**FUSED), "t2": column_wise(ranks=[0, 1], **FUSED)}
SECOND = {"t0": table_wise(rank=1, **FUSED), "t1": row_wise(**FUSED), "t2": column_wise(ranks=[1, 0], **FUSED)}


def starting_weights() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, DIM, generator=generator) for rows in ROWS]


def sharded(plan: dict[str, Any], optimizer: EmbOptimType = EmbOptimType.EXACT_SGD) -> pl.LightningModule:
    """A module with a sharded collection that has the starting weights."""
    configs = [
        EmbeddingBagConfig(name=name, num_embeddings=rows, embedding_dim=DIM, feature_names=[feature])
        for name, rows, feature in zip(NAMES, ROWS, FEATURES, strict=True)
    ]
    plain = EmbeddingBagCollection(tables=configs, device=torch.device("cpu"))
    sharder = EmbeddingBagCollectionSharder(fused_params={"optimizer": optimizer, "learning_rate": LR})
    module_plan = construct_module_sharding_plan(
        plain, plan, sharder=sharder, local_size=WORLD, world_size=WORLD, device_type="cpu"
    )
    root = pl.LightningModule()
    env = ShardingEnv.from_process_group(dist.GroupMember.WORLD)
    root.bags = sharder.shard(plain, module_plan, env, torch.device("cpu"))
    bags: nn.Module = root.bags  # type: ignore[assignment]
    for (_, tensor), weight in zip(sorted(bags.state_dict().items()), starting_weights(), strict=True):
        for shard in getattr(tensor, "local_shards", list)():
            shard.tensor.copy_(shard_of(weight, shard))
    return root


def shard_of(full: torch.Tensor, shard: Any) -> torch.Tensor:
    (row, column), (rows, columns) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
    return full[row : row + rows, column : column + columns]


def use(callback: FrequencyAwareLR, root: pl.LightningModule) -> nn.Module:
    trainer = pl.Trainer(
        callbacks=[callback], accelerator="cpu", logger=False, enable_checkpointing=False, barebones=False
    )
    callback.setup(trainer, root, "fit")
    return root.bags  # type: ignore[return-value]


def train(bags: nn.Module, numpy: list[NumpySGD], first: int, last: int) -> None:
    """Every process takes its half of the batch; NumPy takes all of it."""
    rank = dist.get_rank()
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        ids = [(torch.rand(WORLD * BATCH, generator=generator) ** 2 * rows).long() for rows in ROWS]
        signs = torch.randn(3, WORLD * BATCH, DIM, generator=generator)
        mine = slice(rank * BATCH, (rank + 1) * BATCH)
        values = torch.cat([part[mine] for part in ids])
        batch = KeyedJaggedTensor(FEATURES, values, lengths=torch.ones(values.numel(), dtype=torch.int64))
        pooled = bags(batch).wait().to_dict()
        # TorchRec divides gradients by the number of processes.
        loss = WORLD * sum((pooled[f] * signs[t, mine]).sum() for t, f in enumerate(FEATURES))
        loss.backward()
        for t, reference in enumerate(numpy):
            reference.step(ids[t].tolist(), signs[t].double().numpy())


def compare(bags: nn.Module, numpy: list[NumpySGD]) -> None:
    for t, name in enumerate(NAMES):
        tensor = bags.state_dict()[f"embedding_bags.{name}.weight"]
        for shard in getattr(tensor, "local_shards", list)():
            wanted = shard_of(torch.from_numpy(numpy[t].weight), shard)
            np.testing.assert_allclose(shard.tensor.numpy(), wanted.numpy(), rtol=1e-4, atol=1e-5)


def refusals() -> None:
    callback = FrequencyAwareLR(backend="fbgemm")
    for plan, optimizer, message in (
        ({**FIRST, "t1": data_parallel()}, EmbOptimType.EXACT_SGD, "t1' is sharded as data_parallel with the 'dense'"),
        (FIRST, EmbOptimType.EXACT_ROWWISE_ADAGRAD, "COUNTER_SGD takes the place of SGD only"),
    ):
        try:
            use(callback, sharded(plan, optimizer))
        except UnsupportedOptimizerError as error:
            assert message in str(error), error
        else:
            raise AssertionError(f"not refused: {message}")
    try:
        use(FrequencyAwareLR(), sharded(FIRST))
    except SetupError as error:
        assert "give backend='fbgemm'" in str(error)
    else:
        raise AssertionError("the lean backend was not refused")


def main() -> None:
    """Train, save, place shards elsewhere, load, train."""
    half_life = None if sys.argv[1] == "none" else float(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    numpy = [NumpySGD(weight.numpy(), lr=LR, half_life=half_life) for weight in starting_weights()]
    counter = CounterSettings(encoding="exact", counted="presence", half_life=half_life)
    callback = FrequencyAwareLR(backend="fbgemm", counter=counter)
    bags: Any = use(callback, sharded(FIRST))
    train(bags, numpy, 0, 20)
    compare(bags, numpy)
    assert callback.sharded is not None and callback.sharded.bytes_per_row() == 12.0
    rates = callback.sharded.rate_deciles()
    assert float(rates[-1]) < float(rates[0]) <= LR + 1e-6

    saved = {"weights": bags.state_dict(), "optimizer": bags.fused_optimizer.state_dict()}
    dcp.save(saved, checkpoint_id=sys.argv[2])
    kept = callback.state_dict()
    again = FrequencyAwareLR(backend="fbgemm", counter=counter)
    moved: Any = use(again, sharded(SECOND))
    into = {"weights": moved.state_dict(), "optimizer": moved.fused_optimizer.state_dict()}
    dcp.load(into, checkpoint_id=sys.argv[2])
    moved.load_state_dict(into["weights"])
    moved.fused_optimizer.load_state_dict(into["optimizer"])
    again.load_state_dict(kept)
    assert again.sharded is not None and again._saved_steps == 20
    again.sharded.restore_steps(20)
    train(moved, numpy, 20, 40)
    compare(moved, numpy)
    refusals()
    print("all checks passed", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


if __name__ == "__main__":
    main()

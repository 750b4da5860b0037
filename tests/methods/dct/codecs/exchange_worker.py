"""One of two processes of test_exchange: sharded tables with codecs against plain PyTorch on the whole batch."""

import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
    row_wise,
    table_wise,
)
from torchrec.distributed.types import ShardingEnv, ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from lightning_embcomp.methods.dct.codecs import (
    CodecRegistry,
    PooledThresholding,
    UnsupportedShardingError,
    comm_codecs,
)

ROWS, DIM, LR, BATCH, WORLD = (20, 30, 12), 8, 0.3, 4, 2
FEATURES = ["f0", "f1", "f2"]
FUSED = {"compute_kernel": "fused"}
TABLE_WISE = {"t0": table_wise(rank=0, **FUSED), "t1": table_wise(rank=1, **FUSED), "t2": table_wise(rank=0, **FUSED)}
COLUMN_WISE = {name: column_wise(ranks=[0, 1], **FUSED) for name in TABLE_WISE}
MIXED = {"t0": table_wise(rank=1, **FUSED), "t1": column_wise(ranks=[1, 0], **FUSED), "t2": table_wise(rank=1, **FUSED)}
ROW_WISE = {**TABLE_WISE, "t1": row_wise(**FUSED)}

Cut = Callable[[Tensor], Tensor]
"""Which entries of what is exchanged count: ``(B, 3, D)`` to 0/1."""


def starting_weights() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, DIM, generator=generator) for rows in ROWS]


def sharded(plan: dict[str, Any], codecs: CodecRegistry | None, sequence: bool = False, check: bool = True) -> Any:
    """A sharded collection with the starting weights and fused SGD."""
    fused = {"optimizer": EmbOptimType.EXACT_SGD, "learning_rate": LR}
    plain: Any
    sharder: Any
    settings = [
        {"name": f"t{t}", "num_embeddings": rows, "embedding_dim": DIM, "feature_names": [FEATURES[t]]}
        for t, rows in enumerate(ROWS)
    ]
    if sequence:
        plain = EmbeddingCollection(tables=[EmbeddingConfig(**s) for s in settings])  # type: ignore[arg-type]
        sharder = EmbeddingCollectionSharder(fused, qcomm_codecs_registry=codecs)
    else:
        plain = EmbeddingBagCollection(tables=[EmbeddingBagConfig(**s) for s in settings])  # type: ignore[arg-type]
        sharder = EmbeddingBagCollectionSharder(fused, qcomm_codecs_registry=codecs)
    module_plan = construct_module_sharding_plan(
        plain, plan, sharder=sharder, local_size=WORLD, world_size=WORLD, device_type="cpu"
    )
    if codecs is not None and check:
        codecs.check_plan(ShardingPlan(plan={"": module_plan}), plain)
    module = sharder.shard(
        plain, module_plan, ShardingEnv.from_process_group(dist.GroupMember.WORLD), torch.device("cpu")
    )
    for (_, tensor), weight in zip(sorted(module.state_dict().items()), starting_weights(), strict=True):
        for shard in tensor.local_shards():
            (row, column), (rows, columns) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
            shard.tensor.copy_(weight[row : row + rows, column : column + columns])
    return module


def ids_of(step: int) -> Tensor:
    """One id per sample and table, of all processes: ``(3, WORLD · BATCH)``."""
    generator = torch.Generator().manual_seed(step)
    return torch.stack([(torch.rand(WORLD * BATCH, generator=generator) * rows).long() for rows in ROWS])


def target_of(step: int) -> Tensor:
    return torch.randn(WORLD * BATCH, 3, DIM, generator=torch.Generator().manual_seed(1000 + step))


def my_share() -> slice:
    return slice(dist.get_rank() * BATCH, (dist.get_rank() + 1) * BATCH)


def forward(module: Any, step: int, sequence: bool = False) -> Tensor:
    """What this process gets: ``(BATCH, 3, DIM)``."""
    values = ids_of(step)[:, my_share()].reshape(-1)
    batch = KeyedJaggedTensor(FEATURES, values, lengths=torch.ones(values.numel(), dtype=torch.int64))
    out = module(batch).wait()
    found = {f: out[f].values() for f in FEATURES} if sequence else out.to_dict()
    return torch.stack([found[f] for f in FEATURES], dim=1)


def backward(out: Tensor, step: int) -> None:
    """Squared distance to a target, so that gradients depend on what arrived."""
    # TorchRec divides gradients by the number of processes.
    (WORLD * 0.5 * (out - target_of(step)[my_share()]).square().sum()).backward()


def largest(kept: int, rows: list[list[tuple[int, int, int]]]) -> Cut:
    """Mark the ``kept`` largest of each row; a row is a list of (table, first column, last column) side by side."""

    def cut(values: Tensor) -> Tensor:
        mask = np.zeros(values.shape, np.float32)
        for sample in range(values.shape[0]):
            for row in rows:
                at = [(t, d) for t, first, last in row for d in range(first, last)]
                order = sorted(at, key=lambda where: -abs(float(values[sample][where])))
                for t, d in order[:kept]:
                    mask[sample, t, d] = 1
        return torch.from_numpy(mask)

    return cut


def everything(values: Tensor) -> Tensor:
    return torch.ones_like(values)


class Reference:
    """Dense tables and hand-written steps of SGD."""

    def __init__(self, sent: Cut, learns: Callable[[Tensor, Tensor], Tensor]) -> None:
        """``learns(mask of forward, gradient)`` marks the gradients that come back."""
        self.weight, self.sent, self.learns = starting_weights(), sent, learns

    def look_up(self, step: int) -> tuple[Tensor, Tensor]:
        pooled = torch.stack([w[i] for w, i in zip(self.weight, ids_of(step), strict=True)], dim=1)
        mask = self.sent(pooled)
        return pooled * mask, mask

    def train(self, step: int, arrived: tuple[Tensor, Tensor] | None = None) -> Tensor:
        out, mask = arrived or self.look_up(step)
        grad = out - target_of(step)
        grad = grad * self.learns(mask, grad)
        for t, ids in enumerate(ids_of(step)):
            self.weight[t].index_add_(0, ids, -LR * grad[:, t])
        return out[my_share()]


def compare(module: Any, reference: Reference, tolerance: float = 1e-6) -> None:
    for (_, tensor), weight in zip(sorted(module.state_dict().items()), reference.weight, strict=True):
        for shard in tensor.local_shards():
            (row, column), (rows, columns) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
            wanted = weight[row : row + rows, column : column + columns]
            torch.testing.assert_close(shard.tensor, wanted, rtol=0, atol=tolerance)


def run(plan: dict[str, Any], config: PooledThresholding, reference: Reference, sequence: bool = False) -> None:
    module = sharded(plan, comm_codecs(config), sequence)
    for step in range(6):
        out = forward(module, step, sequence)
        torch.testing.assert_close(out, reference.train(step), rtol=0, atol=1e-6)
        backward(out, step)
    compare(module, reference)


def settings(**changed: Any) -> PooledThresholding:
    defaults = {"row_dim": DIM, "forward_density": 0.25, "forward_values": "fp32", "backward_values": "fp32"}
    return PooledThresholding(**{**defaults, **changed})  # type: ignore[arg-type]


PER_TABLE = [[(t, 0, DIM)] for t in range(3)]
HALVES = [[(t, first, first + DIM // 2)] for t in range(3) for first in (0, DIM // 2)]


def everything_sent_changes_nothing() -> None:
    """Against the same sharding without codecs."""
    for sequence in (False, True):
        for plan, row_dim in ((TABLE_WISE, DIM), (COLUMN_WISE, DIM // 2), (MIXED, DIM // 2)):
            for backward_codec in ("kept", "topk", "fp32"):
                density = {"backward_density": 1} if backward_codec == "topk" else {}
                config = settings(row_dim=row_dim, forward_density=1, backward=backward_codec, **density)
                plain, coded = sharded(plan, None, sequence), sharded(plan, comm_codecs(config), sequence)
                for step in range(3):
                    out = [forward(module, step, sequence) for module in (plain, coded)]
                    torch.testing.assert_close(out[0], out[1], rtol=0, atol=1e-7)
                    for part in out:
                        backward(part, step)
                for one, other in zip(plain.state_dict().values(), coded.state_dict().values(), strict=True):
                    for a, b in zip(one.local_shards(), other.local_shards(), strict=True):
                        torch.testing.assert_close(a.tensor, b.tensor, rtol=0, atol=1e-7)


def quantised() -> None:
    """TorchRec's codecs, near what no codec gives; table 1 by rows where the codec can be summed."""
    for precision, plan, tolerance in (
        ("fp32", ROW_WISE, 1e-7),
        ("fp16", ROW_WISE, 5e-3),
        ("bf16", ROW_WISE, 5e-2),
        ("int8", TABLE_WISE, 5e-2),
    ):
        rows = {"row_dim": DIM} if precision == "int8" else {}
        codecs = comm_codecs(PooledThresholding(forward=precision, backward=precision, **rows))  # type: ignore[arg-type]
        plain, coded = sharded(plan, None), sharded(plan, codecs)
        out = [forward(module, 0) for module in (plain, coded)]
        torch.testing.assert_close(out[0], out[1], rtol=0, atol=tolerance)
        assert torch.equal(out[0], out[1]) == (precision == "fp32")
        for part in out:
            backward(part, 0)
        for one, other in zip(plain.state_dict().values(), coded.state_dict().values(), strict=True):
            for a, b in zip(one.local_shards(), other.local_shards(), strict=True):
                torch.testing.assert_close(a.tensor, b.tensor, rtol=0, atol=tolerance)
        assert (codecs.traffic().get("pooled_sum/forward") is None) == (precision == "int8")


def gradients_by_hand() -> None:
    """Each kind of backward codec."""
    for plan, row_dim, rows in (
        (TABLE_WISE, DIM, PER_TABLE),
        (COLUMN_WISE, DIM // 2, HALVES),
        ({**TABLE_WISE, "t1": column_wise(ranks=[1, 1], **FUSED)}, DIM // 2, HALVES),
    ):
        kept = row_dim // 4
        cut = largest(kept, rows)
        run(plan, settings(row_dim=row_dim), Reference(cut, lambda mask, grad: mask))
        run(plan, settings(row_dim=row_dim, backward="fp32"), Reference(cut, lambda mask, grad: everything(grad)))
        config = settings(row_dim=row_dim, backward="topk", backward_density=0.5)
        chosen = largest(2 * kept, rows)
        run(plan, config, Reference(cut, lambda mask, grad, chosen=chosen: chosen(grad)))  # type: ignore[misc]


def rows_over_tables() -> None:
    """A process that sends three tables picks the largest of all."""
    plan = {name: table_wise(rank=1, **FUSED) for name in TABLE_WISE}
    cut = largest(6, [[(0, 0, DIM), (1, 0, DIM), (2, 0, DIM)]])
    run(plan, settings(row_dim=3 * DIM), Reference(cut, lambda mask, grad: mask))


def sequences() -> None:
    for plan, row_dim, rows in (
        (TABLE_WISE, DIM, PER_TABLE),
        (COLUMN_WISE, DIM // 2, HALVES),
        (ROW_WISE, DIM, PER_TABLE),
    ):
        cut = largest(row_dim // 4, rows)
        run(plan, settings(row_dim=row_dim), Reference(cut, lambda mask, grad: mask), sequence=True)


def forwards_ahead_of_backwards() -> None:
    """Two batches in flight, an evaluation between, and backwards in both orders."""
    for order in ((0, 1), (1, 0)):
        reference = Reference(largest(2, PER_TABLE), lambda mask, grad: mask)
        module = sharded(TABLE_WISE, comm_codecs(settings()))
        ahead = [forward(module, step) for step in (0, 1)]
        arrived = [reference.look_up(step) for step in (0, 1)]
        with torch.no_grad():
            forward(module, 2)
        forward(module, 3)  # no backward follows
        for step in order:
            backward(ahead[step], step)
            reference.train(step, arrived[step])
        compare(module, reference)


def a_batch_size_per_feature() -> None:
    """Everything sent equals no codec."""
    config = settings(forward_density=1, backward="topk", backward_density=1)
    results = []
    for codecs in (None, comm_codecs(config), comm_codecs(settings(forward_density=1))):
        module = sharded(TABLE_WISE, codecs)
        strides = [[3], [1], [2]]
        values = torch.tensor([1, 2, 3, 4, 5, 6]) + dist.get_rank()
        batch = KeyedJaggedTensor(
            FEATURES,
            values,
            lengths=torch.ones(6, dtype=torch.int64),
            stride_per_key_per_rank=strides,
            inverse_indices=(FEATURES, torch.tensor([[0, 1, 2], [0, 0, 0], [1, 0, 1]])),
        )
        out = module(batch).wait().values()
        (out.square().sum()).backward()
        shards = [shard.tensor.clone() for t in module.state_dict().values() for shard in t.local_shards()]
        results.append([out.detach(), *shards])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-7)


def nan_reaches_the_others() -> None:
    module = sharded(TABLE_WISE, comm_codecs(settings(forward_density=0.125, forward_values="fp16")))
    ids = ids_of(0)
    if dist.get_rank() == 1:
        module.state_dict()["embedding_bags.t1.weight"].local_shards()[0].tensor[ids[1, 0], 5] = float("nan")
    hit = ids[1, my_share()] == ids[1, 0]
    assert torch.equal(forward(module, 0)[:, 1, 5].isnan(), hit)


def sizes_and_refusals() -> None:
    codecs = comm_codecs(settings(forward_values="fp16", backward_values="bf16"))
    module = sharded(TABLE_WISE, codecs)
    backward(forward(module, 0), 0)
    tables_sent = 2 if dist.get_rank() == 0 else 1
    traffic = codecs.traffic()
    samples, arrived = tables_sent * WORLD * BATCH, 3 * BATCH
    assert set(traffic) == {"pooled/forward", "pooled/backward"}
    assert (traffic["pooled/forward"].encoded, traffic["pooled/forward"].dense) == (samples * 6, samples * DIM * 4)
    assert (traffic["pooled/backward"].encoded, traffic["pooled/backward"].dense) == (arrived * 4, arrived * DIM * 4)

    for check in (True, False):
        try:
            forward(sharded(ROW_WISE, comm_codecs(settings()), check=check), 0)
        except UnsupportedShardingError as error:
            assert "reduce-scatter" in str(error) and ("t1" in str(error)) == check, error
        else:
            raise AssertionError("row-wise was not refused")


CHECKS = {
    check.__name__: check
    for check in (
        everything_sent_changes_nothing,
        quantised,
        gradients_by_hand,
        rows_over_tables,
        sequences,
        forwards_ahead_of_backwards,
        a_batch_size_per_feature,
        nan_reaches_the_others,
        sizes_and_refusals,
    )
}


def main() -> None:
    """Run all checks in one start of the processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for name, check in CHECKS.items():
        print(name, flush=True)
        check()
        dist.barrier()
    print("all checks passed", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()

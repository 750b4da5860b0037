"""Small engines, batches for them, and the plain FBGEMM table that they must equal."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    EmbeddingLocation,
    PoolingMode,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor

from lightning_embcomp.engine.layout import LogicalTable
from lightning_embcomp.engine.optimizer import FusedKind, FusedOptimizerSpec
from lightning_embcomp.engine.plan import FixedPlan, ReadPlan
from lightning_embcomp.engine.routed import RoutedEmbeddings, RoutedOptions

TABLES = (
    LogicalTable(name="a", rows=130, dim=16, chunks=4),
    LogicalTable(name="b", rows=1, dim=8),
    LogicalTable(name="c", rows=67, dim=12, chunks=3, layout="chunks"),
)
FEATURES = (0, 0, 1, 2)  # FBGEMM needs the features of one table side by side
KINDS: tuple[FusedKind, ...] = ("sgd", "rowwise_adagrad", "adagrad")


class Batch(NamedTuple):
    ids: Tensor
    offsets: Tensor
    weights: Tensor | None


def batch(
    seed: int,
    *,
    size: int = 8,
    weighted: bool = False,
    tables: Sequence[LogicalTable] = TABLES,
    features: Sequence[int] = FEATURES,
) -> Batch:
    """Bags of 0 to 5 ids for every feature."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 6, (size * len(features),), generator=generator)
    counts = lengths.view(len(features), size).sum(1).tolist()
    ids = [torch.randint(0, tables[t].rows, (n,), generator=generator) for t, n in zip(features, counts, strict=True)]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    weights = torch.rand(int(offsets[-1]), generator=generator) + 0.5 if weighted else None
    return Batch(torch.cat(ids), offsets, weights)


def full_weights(tables: Sequence[LogicalTable] = TABLES, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(t.rows, t.dim, generator=generator) for t in tables]


def random_codes(seed: int, tables: Sequence[LogicalTable] = TABLES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, t.codes, (t.rows,), generator=generator, dtype=torch.uint8) for t in tables]


def plan_of(codes: Sequence[Tensor]) -> ReadPlan:
    return ReadPlan(lambda t, start, stop: codes[t][start:stop])


def make_engine(
    kind: FusedKind | None = "rowwise_adagrad",
    codes: Sequence[Tensor] | None = None,
    *,
    mean: bool = False,
    dtype: torch.dtype = torch.float32,
    sparse: bool = False,
    tables: Sequence[LogicalTable] = TABLES,
    features: Sequence[int] = FEATURES,
    **options: Any,
) -> RoutedEmbeddings:
    """An engine with the values of :func:`full_weights`; whole rows unless ``codes`` are given."""
    spec = None if kind is None else FusedOptimizerSpec(kind=kind, options={"learning_rate": 0.05, **options})
    engine = RoutedEmbeddings(
        tables, features, [mean] * len(features), RoutedOptions(optimizer=spec, dtype=dtype, sparse=sparse)
    )
    engine.move(FixedPlan([t.full_code for t in tables]) if codes is None else plan_of(codes))
    for t, weights in enumerate(full_weights(tables)):
        engine.load_rows(t, 0, weights)
    engine.clear_row_state()
    return engine


def read_all(engine: RoutedEmbeddings) -> list[Tensor]:
    return [engine.read_rows(t, 0, table.rows) for t, table in enumerate(engine.tables)]


def snapshot(engine: RoutedEmbeddings) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in engine.state_dict().items()}


def assert_same_state(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        # Bit patterns, so that NaN compares equal to itself.
        assert value.dtype == other[key].dtype and value.shape == other[key].shape, key
        assert torch.equal(value.contiguous().view(torch.uint8), other[key].contiguous().view(torch.uint8)), key


def train(engine: RoutedEmbeddings, steps: int, *, first: int = 0, weighted: bool = False) -> None:
    for step in range(first, first + steps):
        engine(*batch(step, weighted=weighted)).sin().sum().backward()


def plain_tables(kind: FusedKind, *, mean: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    """FBGEMM's table over whole rows, with the same values."""
    plain = SplitTableBatchedEmbeddingBagsCodegen(
        [(t.rows, t.dim, EmbeddingLocation.HOST, ComputeDevice.CPU) for t in TABLES],
        feature_table_map=list(FEATURES),
        optimizer=getattr(EmbOptimType, f"EXACT_{kind.upper()}"),
        pooling_mode=PoolingMode.MEAN if mean else PoolingMode.SUM,
        weights_precision=SparseType.FP16 if dtype == torch.float16 else SparseType.FP32,
        learning_rate=0.05,
        device=torch.device("cpu"),
    )
    for target, weights in zip(plain.split_embedding_weights(), full_weights(), strict=True):
        target.copy_(weights)
    return plain

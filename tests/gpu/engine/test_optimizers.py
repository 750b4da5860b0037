"""Fused optimizers with two moments on a GPU: against FBGEMM's own tables, and against the CPU."""

from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    EmbeddingLocation,
    PoolingMode,
    SplitTableBatchedEmbeddingBagsCodegen,
)

from lightning_embcomp.engine.layout import LogicalTable
from lightning_embcomp.engine.optimizer import FusedKind
from lightning_embcomp.engine.routed import RoutedEmbeddings
from tests.engine.engines import Batch, batch, full_weights, make_engine, plan_of, random_codes, read_all

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")
MOMENTS: tuple[FusedKind, ...] = ("adam", "lamb", "partial_rowwise_adam", "partial_rowwise_lamb")
OPTIONS: dict[str, Any] = {"beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "weight_decay": 0.02}
TABLES = (LogicalTable(name="a", rows=130, dim=16, chunks=4), LogicalTable(name="b", rows=67, dim=8))
FEATURES = (0, 0, 1)


def on_gpu(given: Batch) -> Batch:
    return Batch(given.ids.to(GPU), given.offsets.to(GPU), None if given.weights is None else given.weights.to(GPU))


def train(engine: RoutedEmbeddings, steps: int, *, first: int = 0) -> None:
    device = engine.split_embedding_weights()[0].device
    for step in range(first, first + steps):
        given = batch(step, weighted=True)
        engine(*(on_gpu(given) if device.type == "cuda" else given)).sin().sum().backward()


@pytest.mark.filterwarnings("ignore:(?s).*EXPERIMENTAL")
@pytest.mark.parametrize("kind", MOMENTS)
def test_training_equals_fbgemm(kind: FusedKind) -> None:
    """Twenty steps over whole rows, weights and both moments; rows repeat within a batch."""
    plain = SplitTableBatchedEmbeddingBagsCodegen(
        [(table.rows, table.dim, EmbeddingLocation.DEVICE, ComputeDevice.CUDA) for table in TABLES],
        feature_table_map=list(FEATURES),
        optimizer=getattr(EmbOptimType, kind.upper()),
        pooling_mode=PoolingMode.SUM,
        learning_rate=0.05,
        device=GPU,
        **OPTIONS,
    )
    for target, weights in zip(plain.split_embedding_weights(), full_weights(TABLES), strict=True):
        target.copy_(weights)
    engine = make_engine(kind, tables=TABLES, features=FEATURES, **OPTIONS).to(GPU)
    for step in range(20):
        given = on_gpu(batch(step, weighted=True, tables=TABLES, features=FEATURES))
        found, wanted = engine(*given), plain(given.ids, given.offsets, per_sample_weights=given.weights)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        found.sin().sum().backward()
        wanted.sin().sum().backward()
    for one, other in zip(read_all(engine), plain.split_embedding_weights(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    for t, moments in enumerate(plain.split_optimizer_states()):
        row_class = engine.class_map.class_of_code[t][TABLES[t].full_code]
        first, last = engine.class_span(t, row_class)
        state = engine.get_optimizer_state()[row_class]
        for name, moment in zip(("momentum1", "momentum2"), moments, strict=True):
            mine = state[name][first:last]
            torch.testing.assert_close(mine, moment.view(mine.shape), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", MOMENTS)
def test_training_equals_the_cpu(kind: FusedKind, dtype: torch.dtype) -> None:
    """Through a pruning event; float16 is rounded at random, with the same draws on both."""
    options = {**OPTIONS, "stochastic_rounding": dtype == torch.float16}
    engines = [make_engine(kind, random_codes(1), dtype=dtype, **options) for _ in range(2)]
    engines[1].to(GPU)
    for engine in engines:
        train(engine, 8)
        engine.move(plan_of([codes.to(engine.split_embedding_weights()[0].device) for codes in random_codes(2)]))
        train(engine, 4, first=8)
    close: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-4}
    if dtype == torch.float16:
        close = {"rtol": 2.0**-7, "atol": 5e-3}
    for one, two in zip(read_all(engines[0]), read_all(engines[1]), strict=True):
        torch.testing.assert_close(one, two.cpu(), **close)


@pytest.mark.parametrize("kind", MOMENTS)
def test_resume_is_bit_for_bit(kind: FusedKind) -> None:
    engine, other = (
        make_engine(kind, random_codes(seed), dtype=torch.float16, stochastic_rounding=True).to(GPU) for seed in (1, 2)
    )
    train(engine, 3)
    other.load_state_dict({key: value.clone() for key, value in engine.state_dict().items()})
    for one in (engine, other):
        train(one, 3, first=3)
    saved = other.state_dict()
    assert all(torch.equal(value, saved[key]) for key, value in engine.state_dict().items())


@pytest.mark.parametrize("kind", MOMENTS)
def test_a_step_does_not_wait(kind: FusedKind) -> None:
    engine = make_engine(kind, random_codes(1), dtype=torch.float16, stochastic_rounding=True).to(GPU)
    train(engine, 2)  # compile
    ids, offsets, _ = on_gpu(batch(5))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine(ids, offsets).sin().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")

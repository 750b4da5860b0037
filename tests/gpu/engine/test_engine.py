"""The engine on a GPU against the engine on the CPU, and what it must not do there: wait, or hold rows twice."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_embcomp import DimensionPruning, PruningSchedule
from lightning_embcomp.data import SyntheticClickLog, SyntheticClickLogDataModule
from lightning_embcomp.engine.layout import LogicalTable
from lightning_embcomp.engine.memory import engine_bytes
from lightning_embcomp.engine.optimizer import FusedKind
from lightning_embcomp.engine.plan import FixedPlan
from lightning_embcomp.engine.routed import RoutedEmbeddings
from lightning_embcomp.engine.statistics import RowUtility
from lightning_embcomp.models import ClickModel
from tests.engine.engines import KINDS, TABLES, batch, make_engine, plan_of, random_codes, read_all

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


def train(engine: RoutedEmbeddings, steps: int, device: torch.device, *, first: int = 0) -> None:
    for step in range(first, first + steps):
        ids, offsets, weights = batch(step, weighted=step % 2 == 1)
        given = (ids.to(device), offsets.to(device), None if weights is None else weights.to(device))
        engine(*given).sin().sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_training_equals_the_cpu(kind: FusedKind, dtype: torch.dtype) -> None:
    engines = [make_engine(kind, random_codes(1), dtype=dtype) for _ in range(2)]
    for engine in engines:
        engine.track_utility(RowUtility(TABLES, device=torch.device("cpu")))
    engines[1].to(GPU)
    assert all(weights.is_cuda for weights in engines[1].split_embedding_weights())
    tolerance = CLOSE if dtype == torch.float32 else {"rtol": 2.0**-8, "atol": 2e-3}
    for device, engine in zip((torch.device("cpu"), GPU), engines, strict=True):
        train(engine, 10, device)
        engine.move(plan_of([codes.to(device) for codes in random_codes(2)]))
        train(engine, 10, device, first=10)
    for one, two in zip(read_all(engines[0]), read_all(engines[1]), strict=True):
        torch.testing.assert_close(one, two.cpu(), **tolerance)
    utilities = [engine.utility.values.float().cpu() for engine in engines if engine.utility is not None]
    torch.testing.assert_close(utilities[0], utilities[1], rtol=2.0**-6, atol=1e-3)


def test_checkpoints_pass_between_devices() -> None:
    one = make_engine("rowwise_adagrad", random_codes(1)).to(GPU)
    train(one, 3, GPU)
    two = make_engine("rowwise_adagrad", random_codes(2))
    two.load_state_dict({key: value.cpu() for key, value in one.state_dict().items()})
    for rows, others in zip(read_all(one), read_all(two), strict=True):
        assert torch.equal(rows.cpu(), others)
    three = make_engine("rowwise_adagrad", random_codes(3)).to(GPU)
    three.load_state_dict(two.state_dict())
    for rows, others in zip(read_all(one), read_all(three), strict=True):
        assert torch.equal(rows, others)


def test_a_step_does_not_wait() -> None:
    engine = make_engine("rowwise_adagrad", random_codes(1)).to(GPU)
    engine.track_utility(RowUtility(TABLES, device=GPU))
    train(engine, 2, GPU)  # compile
    ids, offsets, _ = (None if t is None else t.to(GPU) for t in batch(5))
    assert ids is not None and offsets is not None
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine(ids, offsets).sin().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_bad_batches_are_reported_late_and_hurt_nothing() -> None:
    engine = make_engine("sgd").to(GPU)
    before = [rows.clone() for rows in read_all(engine)]
    ids, offsets, _ = batch(0)
    ids = ids.clone()
    ids[3] = 10**6
    with pytest.raises(IndexError, match="id 1000000"):
        for _ in range(3):
            with torch.no_grad():
                engine(ids.to(GPU), offsets.to(GPU))
            torch.cuda.synchronize()
    bad = offsets.clone()
    bad[3] = offsets[-1] + 10**6
    good, _, _ = batch(0)
    with pytest.raises(ValueError, match="offsets"):
        for _ in range(3):
            with torch.no_grad():
                engine(good.to(GPU), bad.to(GPU))
            torch.cuda.synchronize()
    assert all(torch.equal(one, two) for one, two in zip(before, read_all(engine), strict=True))


def test_a_pruning_event_does_not_hold_rows_twice() -> None:
    table = LogicalTable(name="big", rows=2_000_000, dim=64, chunks=4)
    engine = make_engine("rowwise_adagrad", tables=(table,), features=(0,)).to(GPU)
    before = engine_bytes(engine)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    engine.move(FixedPlan([3]))
    assert torch.cuda.max_memory_allocated() - held < 0.25 * before
    assert engine_bytes(engine) < 0.8 * before
    assert torch.cuda.memory_allocated() < held - 0.2 * before


def test_many_rows_move_as_on_the_cpu() -> None:
    """Several slabs, the last of them short; router, weights and state to the bit."""
    tables = (LogicalTable(name="big", rows=300_001, dim=16, chunks=4),)
    engines = [make_engine("rowwise_adagrad", random_codes(1, tables), tables=tables, features=(0,)) for _ in range(2)]
    engines[1].to(GPU)
    for engine in engines:
        for seed, rows in enumerate(state["momentum1"] for state in engine.get_optimizer_state()):
            rows.copy_(torch.rand(rows.shape, generator=torch.Generator().manual_seed(seed)))
        engine.move(plan_of(random_codes(2, tables)))
    assert torch.equal(engines[0].router.tensors.words, engines[1].router.tensors.words.cpu())
    for one, two in zip(engines[0].split_embedding_weights(), engines[1].split_embedding_weights(), strict=True):
        assert torch.equal(one, two.cpu())
    for one, two in zip(engines[0].get_optimizer_state(), engines[1].get_optimizer_state(), strict=True):
        assert torch.equal(one["momentum1"], two["momentum1"].cpu())


def test_a_trainer_prunes_on_a_gpu() -> None:
    log = SyntheticClickLog(num_rows=20_000, num_embeddings=(5000, 300), num_dense=2)
    data = SyntheticClickLogDataModule(log, batch_size=512)
    model = ClickModel(embedding_dim=16)
    callback = DimensionPruning(target=0.6, schedule=PruningSchedule(every_n_steps=5, early_steps=()))
    trainer = pl.Trainer(
        accelerator="gpu",
        devices=1,
        max_steps=30,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, data)
    engines = [module for module in model.modules() if isinstance(module, RoutedEmbeddings)]
    assert engines and all(weights.is_cuda for engine in engines for weights in engine.split_embedding_weights())
    held = sum(engine_bytes(engine) for engine in engines)
    assert held < 0.5 * (5000 + 300) * (16 + 1) * 4

"""Rows in device and in unified memory, and behind FBGEMM's cache, against the engine on the CPU."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from lightning_embcomp import DimensionPruning, PruningSchedule
from lightning_embcomp.data import SyntheticClickLog, SyntheticClickLogDataModule
from lightning_embcomp.engine.cached_rows import StaleCacheError
from lightning_embcomp.engine.layout import LogicalTable
from lightning_embcomp.engine.memory import engine_bytes
from lightning_embcomp.engine.optimizer import FusedKind, FusedOptimizerSpec
from lightning_embcomp.engine.placement import CACHED_KINDS, CacheSettings, Placement, RowPlacement
from lightning_embcomp.engine.plan import FixedPlan
from lightning_embcomp.engine.routed import RoutedEmbeddings, RoutedOptions
from lightning_embcomp.models import ClickModel
from tests.engine.engines import FEATURES, TABLES, batch, full_weights, plan_of, random_codes, read_all

pytestmark = pytest.mark.gpu
CPU, GPU = torch.device("cpu"), torch.device("cuda")
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
CASES: list[tuple[Placement, FusedKind]] = [
    ("device", "rowwise_adagrad"),
    ("managed", "sgd"),
    ("managed", "rowwise_adagrad"),
    ("managed", "adagrad"),
    ("managed_caching", "sgd"),
    ("managed_caching", "rowwise_adagrad"),
]


def placed(kind: FusedKind, place: Placement, dtype: torch.dtype = torch.float32, **options: Any) -> RoutedEmbeddings:
    """An engine whose rows go to a place once it is on a GPU; its cache holds a tenth of them."""
    spec = FusedOptimizerSpec(kind=kind, options={"learning_rate": 0.05, **options})
    placement = RowPlacement(kind=place, cache=CacheSettings(load_factor=0.1))
    engine = RoutedEmbeddings(TABLES, FEATURES, None, RoutedOptions(optimizer=spec, dtype=dtype, placement=placement))
    engine.move(plan_of(random_codes(1)))
    for t, weights in enumerate(full_weights()):
        engine.load_rows(t, 0, weights)
    engine.clear_row_state()
    return engine


def train(engine: RoutedEmbeddings, steps: int, device: torch.device, *, first: int = 0) -> None:
    for step in range(first, first + steps):
        ids, offsets, weights = batch(step, weighted=step % 2 == 1)
        given = (ids.to(device), offsets.to(device), None if weights is None else weights.to(device))
        engine(*given).sin().sum().backward()


def is_unified(tensor: Tensor) -> bool:
    found: bool = torch.ops.fbgemm.is_uvm_tensor(tensor)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("place", "kind"), CASES)
def test_training_equals_the_cpu(place: Placement, kind: FusedKind, dtype: torch.dtype) -> None:
    engines = [placed(kind, place, dtype) for _ in range(2)]
    engines[1].to(GPU)
    tolerance = CLOSE if dtype == torch.float32 else {"rtol": 2.0**-8, "atol": 4e-3}
    for device, engine in zip((CPU, GPU), engines, strict=True):
        train(engine, 10, device)
        engine.move(plan_of([codes.to(device) for codes in random_codes(2)]))
        train(engine, 10, device, first=10)
    for one, two in zip(read_all(engines[0]), read_all(engines[1]), strict=True):
        torch.testing.assert_close(one, two.cpu(), **tolerance)
    weights = [tensor for tensor in engines[1].split_embedding_weights() if tensor.numel()]
    assert {is_unified(tensor) for tensor in weights} == {place != "device"}
    for state in engines[1].get_optimizer_state():
        for tensor in state.values():
            assert not tensor.numel() or is_unified(tensor) == (place != "device" and tensor.dim() == 2)


@pytest.mark.parametrize("place", ["device", "managed"])
def test_options_that_only_fbgemm_has_equal_the_cpu(place: Placement) -> None:
    engines = [placed("rowwise_adagrad", place, weight_decay=0.01) for _ in range(2)]
    engines[1].to(GPU)
    for device, engine in zip((CPU, GPU), engines, strict=True):
        train(engine, 5, device)
        engine.move(plan_of([codes.to(device) for codes in random_codes(2)]))
        train(engine, 5, device, first=5)
    for one, two in zip(read_all(engines[0]), read_all(engines[1]), strict=True):
        torch.testing.assert_close(one, two.cpu(), **CLOSE)


@pytest.mark.parametrize("place", ["device", "managed", "managed_caching"])
def test_gradients_of_sample_weights_equal_the_cpu(place: Placement) -> None:
    grads = []
    for device in (CPU, GPU):
        engine = placed("sgd", place).to(device)
        ids, offsets, weights = batch(1, weighted=True)
        assert weights is not None
        leaf = weights.to(device).requires_grad_()
        engine(ids.to(device), offsets.to(device), leaf).sin().sum().backward()
        assert leaf.grad is not None
        grads.append(leaf.grad.cpu())
    torch.testing.assert_close(*grads, **CLOSE)


@pytest.mark.parametrize("kind", CACHED_KINDS)
def test_checkpoints_pass_between_placements(kind: FusedKind) -> None:
    one = placed(kind, "managed_caching").to(GPU)
    train(one, 5, GPU)
    saved = {key: value.cpu().clone() for key, value in one.state_dict().items()}
    others = [placed(kind, "device"), placed(kind, "managed").to(GPU), placed(kind, "managed_caching").to(GPU)]
    for other in others:
        other.move(FixedPlan([table.full_code for table in TABLES]))
        other.load_state_dict({key: value.clone() for key, value in saved.items()})
        for rows, found in zip(read_all(one), read_all(other), strict=True):
            assert torch.equal(rows.cpu(), found.cpu())
    for engine, device in ((one, GPU), *zip(others, (CPU, GPU, GPU), strict=True)):
        train(engine, 3, device, first=5)
    for other in others:
        for rows, found in zip(read_all(one), read_all(other), strict=True):
            torch.testing.assert_close(rows.cpu(), found.cpu(), **CLOSE)


def test_updates_through_a_changed_cache_are_refused() -> None:
    engine = placed("sgd", "managed_caching").to(GPU)
    given = [tuple(t.to(GPU) for t in batch(step)[:2]) for step in range(2)]
    first, second = (engine(*one).sum() for one in given)
    second.backward()
    with pytest.raises(StaleCacheError):
        first.backward()


@pytest.mark.parametrize("place", ["managed", "managed_caching"])
def test_a_pruning_event_leaves_the_device_alone(place: Placement) -> None:
    table = LogicalTable(name="big", rows=1_000_000, dim=64, chunks=4)
    spec = FusedOptimizerSpec(kind="rowwise_adagrad")
    engine = RoutedEmbeddings([table], options=RoutedOptions(optimizer=spec, placement=RowPlacement(kind=place)))
    engine.move(FixedPlan([table.full_code]))
    engine.clear_row_state()
    engine.to(GPU)
    before = engine_bytes(engine)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    assert held < 0.1 * before
    engine.move(FixedPlan([3]))
    assert torch.cuda.max_memory_allocated() - held < 0.05 * before
    assert engine_bytes(engine) < 0.8 * before
    assert all(is_unified(weights) for weights in engine.split_embedding_weights() if weights.numel())


def test_a_table_larger_than_the_device_may_hold_trains() -> None:
    """What PyTorch may take of the device is cut down, which unified memory is no part of."""
    table = LogicalTable(name="big", rows=2_000_000, dim=64)
    spec = FusedOptimizerSpec(kind="rowwise_adagrad")
    total = torch.cuda.get_device_properties(GPU).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(((256 << 20) + torch.cuda.memory_reserved()) / total)
    try:
        for place in ("device", "managed", "managed_caching"):
            placement = RowPlacement(kind=place, cache=CacheSettings(load_factor=0.05))
            engine = RoutedEmbeddings([table], options=RoutedOptions(optimizer=spec, placement=placement))
            engine.move(FixedPlan([table.full_code]))
            engine.initialise(0, lambda weight: weight.uniform_(-0.01, 0.01))
            engine.clear_row_state()
            if place == "device":
                with pytest.raises(torch.OutOfMemoryError):
                    engine.to(GPU)
                del engine
                torch.cuda.empty_cache()
                continue
            engine.to(GPU)
            ids = torch.randint(0, table.rows, (4096,), device=GPU)
            offsets = torch.arange(4097, device=GPU)
            before = engine(ids, offsets).detach().clone()
            engine(ids, offsets).sum().backward()
            assert not torch.equal(before, engine(ids, offsets))
            del engine
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("place", ["managed", "managed_caching"])
def test_a_trainer_prunes_rows_in_unified_memory(place: Placement) -> None:
    log = SyntheticClickLog(num_rows=20_000, num_embeddings=(5000, 300), num_dense=2)
    model = ClickModel(embedding_dim=16)
    callback = DimensionPruning(target=0.6, schedule=PruningSchedule(every_n_steps=5, early_steps=()), placement=place)
    trainer = pl.Trainer(
        accelerator="gpu",
        devices=1,
        max_steps=30,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, SyntheticClickLogDataModule(log, batch_size=512))
    engines = [module for module in model.modules() if isinstance(module, RoutedEmbeddings)]
    assert engines and sum(engine_bytes(engine) for engine in engines) < 0.5 * (5000 + 300) * (16 + 1) * 4

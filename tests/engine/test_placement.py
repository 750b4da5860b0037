"""Placements of rows, rehearsed without a GPU: tensors without data, FBGEMM's own tables over them, and stand-ins."""

import inspect
import pickle
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    CacheAlgorithm,
    ComputeDevice,
    EmbeddingLocation,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection

from lightning_embcomp import DimensionPruning, SetupError
from lightning_embcomp.compat import table_over
from lightning_embcomp.engine import relocation, row_class
from lightning_embcomp.engine.cached_rows import CachedRows, StaleCacheError
from lightning_embcomp.engine.optimizer import FusedKind, FusedOptimizerSpec, UnsupportedOptimizerError
from lightning_embcomp.engine.placement import CacheSettings, Placement, RowPlacement
from lightning_embcomp.engine.rates import set_rates
from lightning_embcomp.engine.routed import RoutedEmbeddings, RoutedOptions
from lightning_embcomp.engine.row_class import FusedRows
from lightning_embcomp.installation import install
from lightning_embcomp.surgery import UnsupportedTableError, sharded_spec
from lightning_embcomp.tables import find_hosts
from tests.pretend import pretended_gpu

from .cached_table import Cached
from .engines import (
    FEATURES,
    TABLES,
    assert_same_state,
    batch,
    full_weights,
    plan_of,
    random_codes,
    snapshot,
    train,
)

GPU = torch.device("cuda", 0)


def placed_engine(kind: FusedKind, placement: RowPlacement, **options: Any) -> RoutedEmbeddings:
    spec = FusedOptimizerSpec(kind=kind, options={"learning_rate": 0.05, **options})
    engine = RoutedEmbeddings(TABLES, FEATURES, None, RoutedOptions(optimizer=spec, placement=placement))
    engine.move(plan_of(random_codes(1)))
    for t, weights in enumerate(full_weights(TABLES)):
        engine.load_rows(t, 0, weights)
    engine.clear_row_state()
    return engine


@pytest.fixture
def far_away(monkeypatch: pytest.MonkeyPatch) -> FakeTensorMode:
    """The mode in which there seems to be a GPU with 8 GB."""
    memory = SimpleNamespace(total_memory=8 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    return FakeTensorMode(allow_non_fake_inputs=True)


@pytest.fixture
def unified(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Sizes of what is allocated in unified memory."""
    sizes: list[tuple[int, ...]] = []

    def record(prototype: Tensor, size: list[int]) -> Tensor:
        assert prototype.device == GPU and prototype.numel() == 0
        sizes.append(tuple(size))
        return prototype.new_empty(size)

    monkeypatch.setattr(torch.ops.fbgemm, "new_managed_tensor", record)
    monkeypatch.setattr(
        Tensor, "copy_", lambda target, source: target
    )  # autograd asks for a GPU before it copies to it
    return sizes


def test_fbgemm_has_the_operator_that_allocates(far_away: FakeTensorMode) -> None:
    with far_away:
        found = RowPlacement(kind="managed").empty((3, 4), torch.float16, GPU)
    assert (found.shape, found.dtype, found.device) == ((3, 4), torch.float16, GPU)


@pytest.mark.parametrize("kind", ["rowwise_adagrad", "adagrad"])
@pytest.mark.parametrize("place", ["device", "managed"])
def test_what_is_kept_per_weight_goes_to_unified_memory(
    place: Placement, kind: FusedKind, far_away: FakeTensorMode, unified: list[tuple[int, ...]]
) -> None:
    engine = placed_engine(kind, RowPlacement(kind=place))
    assert unified == []  # not on the CPU
    sizes = [tuple(weights.shape) for weights in engine.split_embedding_weights() if weights.numel()]
    with far_away:
        engine.to(GPU)
        tensors = [storage.tensor for rows in engine.classes for storage in rows.storages().values()]
    assert {tensor.device for tensor in tensors} == {GPU}
    expected = sizes if kind == "rowwise_adagrad" else [size for size in sizes for _ in range(2)]
    assert unified == ([] if place == "device" else expected)


@pytest.mark.parametrize("place", ["device", "managed", "managed_caching"])
@pytest.mark.parametrize(
    ("kind", "states"),
    [("EXACT_SGD", {}), ("EXACT_ROWWISE_ADAGRAD", {"momentum1": 1}), ("EXACT_ADAGRAD", {"momentum1": 8})],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_fbgemm_keeps_our_tensors_and_allocates_none(
    place: Placement, kind: str, states: dict[str, int], dtype: torch.dtype, far_away: FakeTensorMode
) -> None:
    """By FBGEMM's own constructor."""
    placement = RowPlacement(kind=place)
    with far_away:
        given = {"weights": torch.empty(800, dtype=dtype, device=GPU)}
        given |= {name: torch.empty(100 * columns, device=GPU) for name, columns in states.items()}
        table = table_over(
            SplitTableBatchedEmbeddingBagsCodegen,
            [(100, 8, placement.location(GPU), ComputeDevice.CUDA)],
            given,
            optimizer=getattr(EmbOptimType, kind),
            weights_precision=SparseType.FP16 if dtype == torch.float16 else SparseType.FP32,
            device=GPU,
            cache_load_factor=0.32,
        )
    held: dict[str, Any] = dict(table.named_buffers())
    where = "weights_dev" if place == "device" else "weights_uvm"
    assert held[where] is given["weights"]
    if "momentum1" in given:
        rowwise = states["momentum1"] == 1
        assert held["momentum1_dev" if place == "device" or rowwise else "momentum1_uvm"] is given["momentum1"]
    others = {name: tensor for name, tensor in held.items() if not any(tensor is one for one in given.values())}
    large = {name for name, tensor in others.items() if tensor.numel() >= 100}
    cached = {"lxu_cache_weights", "cache_index_table_map"} if place == "managed_caching" else set()
    assert large == cached
    assert held["lxu_cache_weights"].shape == ((32, 8) if cached else (0, 0))


def test_tensors_of_another_size_are_refused(far_away: FakeTensorMode) -> None:
    with far_away, pytest.raises(ValueError, match=r"FBGEMM keeps 800 numbers of torch.float32 in weights_dev, not 80"):
        table_over(
            SplitTableBatchedEmbeddingBagsCodegen,
            [(100, 8, EmbeddingLocation.DEVICE, ComputeDevice.CUDA)],
            {"weights": torch.empty(80, device=GPU)},
            optimizer=EmbOptimType.EXACT_SGD,
            device=GPU,
        )


def built(rows: object) -> Any:
    assert isinstance(rows, FusedRows)
    return rows._build_table()


def test_options_of_fbgemm_alone_build_its_table_over_the_rows(far_away: FakeTensorMode) -> None:
    engine = placed_engine("rowwise_adagrad", RowPlacement(), weight_decay=0.1, max_norm=1.0)
    with far_away:
        engine.to(GPU)
        assert engine._direct_rules(None) is None
        rows = engine.classes[0]
        table = built(rows)
        assert table.weights_dev.shape == (rows.rows * rows.width,)
        assert table.momentum1_dev.shape == (rows.rows,)
    assert table.optimizer_args.weight_decay == 0.1 and table.optimizer_args.max_norm == 1.0
    assert not table.optimizer_args.stochastic_rounding


@pytest.mark.usefixtures("unified")
def test_cached_rows_build_the_cache_that_was_asked_for(far_away: FakeTensorMode) -> None:
    settings = CacheSettings(load_factor=0.5, algorithm="lfu")
    engine = placed_engine("rowwise_adagrad", RowPlacement(kind="managed_caching", cache=settings))
    with far_away:
        engine.to(GPU)
        assert engine._direct_rules(None) is None
        rows = max(engine.classes, key=lambda rows: rows.rows)
        table = built(rows)
    assert table.cache_algorithm == CacheAlgorithm.LFU
    assert table.lxu_cache_weights.shape == (32 * -(-(rows.rows // 2) // 32), rows.width)
    assert table.weights_uvm.shape == (rows.rows * rows.width,) and table.momentum1_dev.shape == (rows.rows,)


class Pretending(RowPlacement):
    """Unified memory on the CPU, where it counts what lives in it."""

    def is_unified(self, device: torch.device) -> bool:
        return True

    def empty(self, size: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(tuple(size), dtype=dtype, device=device)

    def carry(self, tensor: Tensor, device: torch.device) -> Tensor:
        return tensor.clone()


@pytest.mark.parametrize("kind", ["sgd", "rowwise_adagrad", "adagrad"])
def test_rows_in_unified_memory_leave_it_while_they_move(kind: FusedKind, monkeypatch: pytest.MonkeyPatch) -> None:
    engines = [placed_engine(kind, placement) for placement in (RowPlacement(), Pretending(kind="managed"))]
    for engine in engines:
        train(engine, 3)
    move_rows, held = relocation.move_rows, []

    def watched(*args: Any, **options: Any) -> None:
        held.append(sum(rows.rows for rows in engines[1].classes))
        move_rows(*args, **options)

    moved = [engines[0].move(plan_of(random_codes(7)))]
    monkeypatch.setattr(relocation, "move_rows", watched)
    moved.append(engines[1].move(plan_of(random_codes(7))))
    assert moved[0] == moved[1]
    assert held and set(held) == {0}
    for engine in engines:
        train(engine, 2, first=3)
    assert_same_state(snapshot(engines[0]), snapshot(engines[1]))


CACHE = CacheSettings(load_factor=0.5, algorithm="lfu")
KNOWN = set(inspect.signature(SplitTableBatchedEmbeddingBagsCodegen.__init__).parameters)


def build_cached(table_type: type, specs: list[Any], buffers: dict[str, Tensor], **options: Any) -> Cached:
    """In place of :func:`lightning_embcomp.compat.table_over`."""
    assert table_type is SplitTableBatchedEmbeddingBagsCodegen and list(buffers) == ["weights"]
    assert set(options) <= KNOWN
    assert specs[0][2:] == (EmbeddingLocation.MANAGED_CACHING, ComputeDevice.CUDA)
    assert options["cache_load_factor"] == 0.5 and options["cache_algorithm"] == CacheAlgorithm.LFU
    return Cached(specs[0], buffers["weights"], options["learning_rate"])


@pytest.fixture
def cached(monkeypatch: pytest.MonkeyPatch) -> Iterator[RoutedEmbeddings]:
    """An engine whose rows believe that they are on a GPU."""
    monkeypatch.setattr(row_class, "table_over", build_cached)
    engine = placed_engine("sgd", RowPlacement(kind="managed_caching", cache=CACHE))
    for rows in engine.classes:
        assert isinstance(rows, CachedRows)
        rows.device = GPU
    yield engine


def test_cached_rows_train_move_and_are_saved_as_others(cached: RoutedEmbeddings) -> None:
    plain = placed_engine("sgd", RowPlacement())
    for engine in (plain, cached):
        train(engine, 3, weighted=True)
        engine.set_learning_rate(0.1)
        train(engine, 2, first=3)
    before = snapshot(plain)
    for key, value in snapshot(cached).items():
        torch.testing.assert_close(value, before[key], rtol=1e-5, atol=1e-6)
    for engine in (plain, cached):
        engine.move(plan_of(random_codes(7)))
        train(engine, 2, first=5)
    after = snapshot(plain)
    for key, value in snapshot(cached).items():
        torch.testing.assert_close(value, after[key], rtol=1e-5, atol=1e-6)
    cached.load_state_dict(before)
    plain.load_state_dict(before)
    assert_same_state(before, snapshot(cached))
    for engine in (plain, cached):
        train(engine, 1, first=9)
    after = snapshot(plain)
    for key, value in snapshot(pickle.loads(pickle.dumps(cached))).items():
        torch.testing.assert_close(value, after[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("place", "kind"),
    [("managed", "rowwise_adagrad"), ("managed", "adagrad"), ("managed_caching", "sgd")],
)
def test_a_run_on_what_counts_as_a_gpu(place: Placement, kind: FusedKind, monkeypatch: pytest.MonkeyPatch) -> None:
    engines = [placed_engine(kind, RowPlacement(kind=place, cache=CACHE)) for _ in range(2)]
    sizes: list[tuple[int, ...]] = []

    def allocate(prototype: Tensor, size: list[int]) -> Tensor:
        sizes.append(tuple(size))
        return torch.empty(size, dtype=prototype.dtype, device=prototype.device)

    def run(engine: RoutedEmbeddings, device: torch.device) -> None:
        for step in range(5):
            ids, offsets, _ = batch(step)
            engine(ids.to(device), offsets.to(device)).sin().sum().backward()
            if step == 2:
                engine.move(plan_of(random_codes(7)))

    run(engines[0], torch.device("cpu"))
    expected = snapshot(engines[0])
    monkeypatch.setattr(torch.ops.fbgemm, "new_managed_tensor", allocate)
    monkeypatch.setattr(row_class, "table_over", build_cached)
    with pretended_gpu():
        engines[1].to(GPU)
        run(engines[1], GPU)
        found = {key: value.cpu() for key, value in engines[1].state_dict().items()}
        weights = engines[1].split_embedding_weights()
        assert {tensor.device for tensor in weights} == {GPU}
    states = 2 if kind == "adagrad" else 1
    assert sizes[-states:] == [tuple(weights[-1].shape)] * states
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)


def test_a_flush_brings_updates_to_storage(cached: RoutedEmbeddings) -> None:
    rows = cached.classes[-1]
    assert isinstance(rows, CachedRows)
    storage = rows._storages["weight"].tensor
    before = storage.clone()
    train(cached, 1)
    assert torch.equal(storage, before)
    cached.flush()
    assert not torch.equal(storage, before)
    cached.load_rows(0, 0, torch.zeros(TABLES[0].rows, TABLES[0].dim))  # must not hide behind old copies
    with torch.no_grad():
        assert not cached(*batch(0))[:, :16].any()


def test_an_update_through_a_changed_cache_is_refused(cached: RoutedEmbeddings) -> None:
    first, second = cached(*batch(0)).sum(), cached(*batch(1)).sum()
    second.backward()
    with pytest.raises(StaleCacheError, match="looked up again, read or set between a lookup and its backward pass"):
        first.backward()
    loss = cached(*batch(2)).sum()
    cached.state_dict()
    with pytest.raises(StaleCacheError):
        loss.backward()
    train(cached, 1)


def test_on_the_cpu_cached_rows_are_ordinary_rows() -> None:
    engines = [placed_engine("rowwise_adagrad", RowPlacement(kind=kind)) for kind in ("device", "managed_caching")]
    for engine in engines:
        train(engine, 3)
    assert_same_state(*map(snapshot, engines))


@pytest.mark.parametrize(
    ("kind", "place", "message"),
    [
        (None, "managed", "needs a fused optimizer, but this engine is trained by an optimizer of configure_optim"),
        ("adagrad", "managed_caching", "this engine has fused adagrad, but .* tested with sgd and rowwise_adagrad"),
    ],
)
def test_optimizers_that_do_not_go_with_a_placement(kind: FusedKind | None, place: Placement, message: str) -> None:
    spec = None if kind is None else FusedOptimizerSpec(kind=kind)
    with pytest.raises(UnsupportedOptimizerError, match=message):
        RoutedOptions(optimizer=spec, placement=RowPlacement(kind=place))


@pytest.mark.parametrize("data_type", [DataType.INT8, DataType.BF16])
def test_types_of_rows_that_torchrec_would_shard_are_refused(data_type: DataType) -> None:
    config = EmbeddingBagConfig(name="a", num_embeddings=40, embedding_dim=8, feature_names=["a"], data_type=data_type)
    holder = nn.ModuleDict({"bags": EmbeddingBagCollection([config], device=torch.device("cpu"))})
    with pytest.raises(UnsupportedTableError, match=f"table 'a' has data_type={data_type.name}, but rows of compress"):
        sharded_spec(find_hosts(holder)[0], {}, torch.device("cpu"))


def test_rows_with_rates_of_their_own_go_around_the_cache(cached: RoutedEmbeddings) -> None:
    with pytest.raises(UnsupportedOptimizerError, match="'t' has placement='managed_caching' on cuda:0, where FBGEMM"):
        set_rates(cached, 0, None, "t")  # type: ignore[arg-type]
    cached.counting.rates[0] = None  # type: ignore[assignment]
    with pytest.raises(UnsupportedOptimizerError, match="step sizes of their own cannot be trained with placement='m"):
        cached(*batch(0))


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="placement must be one of 'device', 'managed', 'managed_caching', not 'uvm'"):
        RowPlacement(kind="uvm")  # type: ignore[arg-type]
    for factor in (0.0, 1.5):
        with pytest.raises(ValueError, match="load_factor must be over 0 and at most 1"):
            CacheSettings(load_factor=factor)
    with pytest.raises(ValueError, match="algorithm must be 'lru' or 'lfu'"):
        CacheSettings(algorithm="fifo")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cache has no effect with placement='managed'"):
        DimensionPruning(target=0.5, placement="managed", cache=CacheSettings())


class Model(pl.LightningModule):
    def __init__(self, *, fused: bool = True) -> None:
        super().__init__()
        configs = [
            EmbeddingBagConfig(name=name, num_embeddings=40, embedding_dim=8, feature_names=[name]) for name in "ab"
        ]
        device = torch.device("cpu")
        self.bags = (
            FusedEmbeddingBagCollection(configs, torch.optim.SGD, {"lr": 0.1}, device=device)
            if fused
            else EmbeddingBagCollection(configs, device=device)
        )


def put_in(model: Model, *callbacks: DimensionPruning) -> Any:
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    install(trainer, model, find_hosts(model), callbacks)
    return model.bags


def test_the_callback_places_the_rows_of_its_collections() -> None:
    cache = CacheSettings(load_factor=0.1)
    bags = put_in(Model(), DimensionPruning(target=0.5, tables="a", placement="managed_caching", cache=cache))
    assert bags.engine.options.placement == RowPlacement(kind="managed_caching", cache=cache)
    assert all(isinstance(rows, CachedRows) for rows in bags.engine.classes)
    assert put_in(Model(), DimensionPruning(target=0.5)).engine.options.placement == RowPlacement()


def test_what_a_callback_cannot_place_is_refused() -> None:
    managed = DimensionPruning(target=0.5, tables="a", placement="managed")
    with pytest.raises(SetupError, match="'bags.a' and 'bags.b' are of one collection, but DimensionPruning"):
        put_in(Model(), managed, DimensionPruning(target=0.5, tables="b"))
    with pytest.raises(UnsupportedOptimizerError, match="needs a fused optimizer, but table 'bags.a' is trained by"):
        put_in(Model(fused=False), managed)
    trainer = pl.Trainer(accelerator="cpu", max_steps=1, logger=False, callbacks=[managed], enable_checkpointing=False)
    with pytest.raises(SetupError, match="placement='managed' is memory that a GPU shares with its host, but this run"):
        managed.setup(trainer, Model(), "fit")


def test_rows_that_have_a_place_already_keep_it() -> None:
    """In host memory a placement means nothing."""
    model = Model()
    put_in(model, DimensionPruning(target=0.5, tables="a"))
    managed = DimensionPruning(target=0.5, tables="a", placement="managed")
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    install(trainer, model, find_hosts(model), [managed])
    trainer.strategy._root_device = GPU  # type: ignore[attr-defined]
    install(trainer, model, find_hosts(model), [DimensionPruning(target=0.5, tables="a")])
    with pytest.raises(SetupError, match="'bags' were made for placement='device', but placement='managed' is asked"):
        install(trainer, model, find_hosts(model), [managed])

"""Rows that move keep what they shared; everything new starts at zero."""

import copy
import gc
import pickle
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_embcomp.engine import relocation, router
from lightning_embcomp.engine.optimizer import FusedKind
from lightning_embcomp.engine.plan import FixedPlan
from lightning_embcomp.engine.routed import RoutedEmbeddings
from lightning_embcomp.engine.row_class import FusedRows
from lightning_embcomp.engine.statistics import RowUtility
from lightning_embcomp.kernels.dispatch import force_backend

from .engines import (
    KINDS,
    TABLES,
    assert_same_state,
    batch,
    make_engine,
    plan_of,
    random_codes,
    read_all,
    snapshot,
    train,
)


def live(t: int, code: int) -> set[int]:
    width = TABLES[t].chunk_width
    return {c for k in TABLES[t].live_chunks(code) for c in range(k * width, (k + 1) * width)}


def state_of(engine: RoutedEmbeddings, t: int) -> list[torch.Tensor | None]:
    """Optimizer state of every row: one number, or one per stored column; None without storage."""
    codes, slots = engine.router.read(t, 0, TABLES[t].rows)
    states = engine.get_optimizer_state()
    return [
        states[engine.class_map.class_of_code[t][code]]["momentum1"][slot].clone() if code else None
        for code, slot in zip(codes.tolist(), slots.tolist(), strict=True)
    ]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_follows_a_row(kind: FusedKind, backend: str) -> None:
    before, after = random_codes(1), random_codes(2)
    with force_backend(backend):  # type: ignore[arg-type]
        engine = make_engine(kind, before)
        train(engine, 5)
        weights = read_all(engine)
        states = [state_of(engine, t) for t in range(3)] if kind != "sgd" else []
        summary = engine.move(plan_of(after))
    moved, states_after = read_all(engine), [state_of(engine, t) for t in range(3)] if kind != "sgd" else []
    for t in range(3):
        for row, (old, new) in enumerate(zip(before[t].tolist(), after[t].tolist(), strict=True)):
            shared = sorted(live(t, old) & live(t, new))
            wanted = torch.zeros(TABLES[t].dim)
            wanted[shared] = weights[t][row, shared]
            assert torch.equal(moved[t][row], wanted)
            if kind == "sgd" or new == 0:
                continue
            was, now = states[t][row], states_after[t][row]
            assert now is not None
            if kind == "rowwise_adagrad":
                assert torch.equal(now, torch.zeros(()) if was is None else was)
            else:
                by_column = dict(zip(sorted(live(t, old)), [] if was is None else was, strict=True))
                assert now.tolist() == [float(by_column.get(c, 0.0)) for c in sorted(live(t, new))]
    pairs = [
        (len(live(t, int(o))), len(live(t, int(n))), o, n)
        for t in range(3)
        for o, n in zip(before[t], after[t], strict=True)
    ]
    assert summary.changed_rows == sum(o != n for _, _, o, n in pairs)
    assert summary.grown_rows == sum(o < n for o, n, *_ in pairs)
    assert summary.revived_rows == sum(o == 0 < n for o, n, *_ in pairs)
    assert summary.dropped_rows == sum(n == 0 < o for o, n, *_ in pairs)
    assert summary.rows == 198


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.0}], ids=["direct", "fbgemm"])
@pytest.mark.parametrize("kind", KINDS)
def test_moving_nowhere_changes_nothing(kind: FusedKind, options: dict[str, Any]) -> None:
    codes = random_codes(3)
    moved, still = make_engine(kind, codes, **options), make_engine(kind, codes, **options)
    for step in range(10):
        train(moved, 1, first=step)
        train(still, 1, first=step)
        moved.move(plan_of(codes))
    assert_same_state(snapshot(moved), snapshot(still))


def test_revived_rows_start_from_zero_weights_and_state() -> None:
    engine = make_engine("rowwise_adagrad")
    train(engine, 5)
    engine.move(FixedPlan([0, 0, 0]))
    assert all(weights.numel() == 0 for weights in engine.split_embedding_weights())
    assert all(state["momentum1"].untyped_storage().nbytes() == 0 for state in engine.get_optimizer_state())
    engine.move(FixedPlan([t.full_code for t in TABLES]))
    assert not any(weights.any() for weights in read_all(engine))
    assert not any(state["momentum1"].any() for state in engine.get_optimizer_state())
    train(engine, 1)
    assert all(bool(weights.any()) for weights in read_all(engine))


def test_training_goes_on_in_classes_that_were_empty() -> None:
    """A grown row trains its new columns exactly as a row that had them at zero all the time."""
    codes = [torch.ones(130, dtype=torch.uint8), torch.ones(1, dtype=torch.uint8), torch.full((67,), 7).byte()]
    engine = make_engine("sgd", codes)
    train(engine, 3)
    values = read_all(engine)
    engine.move(FixedPlan([4, 1, 7]))
    other = make_engine("sgd")
    for t, weights in enumerate(values):
        other.load_rows(t, 0, weights)
    train(engine, 3, first=3)
    train(other, 3, first=3)
    assert_same_state(
        {k: v for k, v in snapshot(engine).items() if k != "steps"},
        {k: v for k, v in snapshot(other).items() if k != "steps"},
    )


def held(engine: RoutedEmbeddings, optimizers: list[Any]) -> Iterator[torch.Tensor]:
    """Storage of fused rows, and state per weight of the user's optimizers."""
    for rows in engine.classes:
        if isinstance(rows, FusedRows):
            yield from (storage.tensor for storage in rows.storages().values() if storage.tensor.numel())
    for optimizer in optimizers:
        for state in optimizer.state.values():
            yield from (value for value in state.values() if value.dim() and value.numel())


@pytest.mark.parametrize("slab", [64, 1 << 17])
@pytest.mark.parametrize("kind", [*KINDS, None])
def test_rows_that_wait_in_host_memory_arrive_the_same(
    kind: FusedKind | None, slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way that rows on an accelerator take."""
    engines = [make_engine(kind, random_codes(6)) for _ in range(2)]
    optimizers = [[torch.optim.Adagrad(engine.parameters(), lr=0.1)] if kind is None else [] for engine in engines]
    for engine, optimizer in zip(engines, optimizers, strict=True):
        train(engine, 3)
        for one in optimizer:
            one.step()
    first = engines[0].move(plan_of(random_codes(7)), optimizers[0])
    monkeypatch.setattr(router, "SLAB", slab)
    monkeypatch.setattr(relocation, "stages", lambda device: True)
    old = [weakref.ref(tensor) for tensor in held(engines[1], optimizers[1])]
    assert old
    carried, alive = relocation.carried, []

    def watched(*args: Any) -> Any:
        alive.append(sum(tensor() is not None for tensor in old))
        return carried(*args)

    monkeypatch.setattr(relocation, "carried", watched)
    gc.disable()
    try:
        assert engines[1].move(plan_of(random_codes(7)), optimizers[1]) == first
    finally:
        gc.enable()
    assert alive and not any(alive)  # all old rows and their state are gone before the first new ones come
    assert_same_state(snapshot(engines[0]), snapshot(engines[1]))
    for rows, others in zip(engines[0].classes, engines[1].classes, strict=True):
        for name, storage in rows.storages().items():
            assert torch.equal(storage.tensor, others.storages()[name].tensor), name


def test_a_plan_with_an_unknown_code_is_refused_before_anything_moves() -> None:
    engine = make_engine()
    before = snapshot(engine)
    codes = [torch.full((t.rows,), t.full_code, dtype=torch.uint8) for t in TABLES]
    codes[0][7] = 5
    with pytest.raises(ValueError, match="code 5 for table 'a', which has 5 codes"):
        engine.move(plan_of(codes))
    assert_same_state(before, snapshot(engine))


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.0}], ids=["direct", "fbgemm"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_train_on_their_own(how: str, options: dict[str, Any], tmp_path: Path) -> None:
    engine = make_engine("rowwise_adagrad", random_codes(4), **options)
    engine.track_utility(RowUtility(TABLES, device=torch.device("cpu")))
    train(engine, 3)
    if how == "deepcopy":
        copied = copy.deepcopy(engine)
    elif how == "pickle":
        copied = pickle.loads(pickle.dumps(engine))
    else:
        torch.save(engine, tmp_path / "engine.pt")
        copied = torch.load(tmp_path / "engine.pt", weights_only=False)
    before = snapshot(engine)
    assert_same_state(before, snapshot(copied))
    train(copied, 3, first=3)
    assert_same_state(before, snapshot(engine))
    train(engine, 3, first=3)
    assert_same_state(snapshot(engine), snapshot(copied))
    for one in (engine, copied):
        one.move(plan_of(random_codes(5)))
        train(one, 2, first=6)
    assert_same_state(snapshot(engine), snapshot(copied))


def test_per_table_spans_and_batches_survive_large_tables() -> None:
    """More rows than one slab: codes, slots and values still meet."""
    from lightning_embcomp.engine.layout import LogicalTable
    from lightning_embcomp.engine.router import SLAB

    table = LogicalTable(name="big", rows=SLAB + 100, dim=4)
    engine = make_engine("sgd", [torch.zeros(table.rows, dtype=torch.uint8)], tables=(table,), features=(0,))
    codes = (torch.arange(table.rows) % 3 == 0).byte()
    engine.move(plan_of([codes]))
    engine.load_rows(0, SLAB, torch.arange(100.0).unsqueeze(1).expand(-1, 4))
    wanted = torch.where(codes[SLAB:] == 1, torch.arange(100.0), 0.0)
    assert torch.equal(engine.read_rows(0, SLAB, SLAB + 100)[:, 0], wanted)
    ids = torch.arange(SLAB, SLAB + 100)
    assert torch.equal(engine(ids, torch.arange(101))[:, 3].detach(), wanted)
    assert batch(0).ids.numel()

"""An engine with whole rows is FBGEMM's table; with pruned rows it is that table with zeros."""

from typing import Any

import pytest
import torch

from lightning_embcomp.engine.layout import LogicalTable
from lightning_embcomp.engine.optimizer import FusedKind
from lightning_embcomp.engine.plan import FixedPlan
from lightning_embcomp.engine.routed import RoutedEmbeddings, RoutedOptions
from lightning_embcomp.engine.statistics import RowUtility
from lightning_embcomp.kernels.dispatch import force_backend

from .engines import (
    FEATURES,
    KINDS,
    TABLES,
    assert_same_state,
    batch,
    full_weights,
    make_engine,
    plain_tables,
    random_codes,
    read_all,
    snapshot,
)

CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}
# An option that the direct path does not know sends the lookup through FBGEMM's tables.
PATHS: dict[str, dict[str, Any]] = {"direct": {}, "fbgemm": {"weight_decay": 0.0}}


def loss(kind: FusedKind, pooled: torch.Tensor) -> torch.Tensor:
    """Small steps for SGD: a row with many occurrences overshoots otherwise, and what rounds differently runs apart."""
    return pooled.sin().sum() * (0.1 if kind == "sgd" else 1.0)


# FBGEMM's CPU backward forgets the bag length where mean pooling meets per-sample weights: see the test below.
@pytest.mark.parametrize(("mean", "weighted"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_whole_rows_equal_fbgemm_over_fifty_steps(kind: FusedKind, path: str, mean: bool, weighted: bool) -> None:
    engine, plain = make_engine(kind, mean=mean, **PATHS[path]), plain_tables(kind, mean=mean)
    assert (engine._direct_rules(None) is not None) == (path == "direct")
    for step in range(50):
        ids, offsets, weights = batch(step, weighted=weighted)
        found, wanted = engine(ids, offsets, weights), plain(ids, offsets, per_sample_weights=weights)
        torch.testing.assert_close(found, wanted, **CLOSE)
        loss(kind, found).backward()
        loss(kind, wanted).backward()
    for found, wanted in zip(read_all(engine), plain.split_embedding_weights(), strict=True):
        torch.testing.assert_close(found, wanted, **CLOSE)
    if kind == "sgd":
        return
    for t, (state, *_) in enumerate(plain.split_optimizer_states()):
        c = engine.class_map.class_of_code[t][TABLES[t].full_code]
        first, last = engine.class_span(t, c)
        found = engine.get_optimizer_state()[c]["momentum1"][first:last]
        torch.testing.assert_close(found, state.view(found.shape), **CLOSE)


ULP = {"rtol": 2.0**-9, "atol": 3e-4}
"""Two units in the last place of float16: sums over the ids of a row are taken in another order."""


@pytest.mark.parametrize("options", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_float16_equals_fbgemm(kind: FusedKind, options: dict[str, Any]) -> None:
    """Step by step from the same rows: a number that rounds the other way would lead elsewhere."""
    engine, plain = make_engine(kind, dtype=torch.float16, **options), plain_tables(kind, dtype=torch.float16)
    for step in range(50):
        for t, weights in enumerate(plain.split_embedding_weights()):
            engine.load_rows(t, 0, weights)
        ids, offsets, _ = batch(step)
        found, wanted = engine(ids, offsets), plain(ids, offsets)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
        found.sin().sum().backward()
        wanted.sin().sum().backward()
        for rows, weights in zip(read_all(engine), plain.split_embedding_weights(), strict=True):
            assert rows.dtype == torch.float16
            torch.testing.assert_close(rows, weights, **ULP)


@pytest.mark.parametrize("kind", ["sgd", "rowwise_adagrad"])
def test_float16_by_fbgemm_equals_fbgemm_over_fifty_steps(kind: FusedKind) -> None:
    engine = make_engine(kind, dtype=torch.float16, **PATHS["fbgemm"])
    plain = plain_tables(kind, dtype=torch.float16)
    for step in range(50):
        ids, offsets, _ = batch(step)
        found, wanted = engine(ids, offsets), plain(ids, offsets)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
        found.sin().sum().backward()
        wanted.sin().sum().backward()
    for found, wanted in zip(read_all(engine), plain.split_embedding_weights(), strict=True):
        assert found.dtype == torch.float16
        torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_both_paths_train_pruned_rows_alike(kind: FusedKind) -> None:
    codes = random_codes(1)
    engines = [make_engine(kind, codes, **options) for options in PATHS.values()]
    with force_backend("reference"):
        engines.append(make_engine(kind, codes))
    for step in range(20):
        given = batch(step, weighted=True)
        for engine, backend in zip(engines, ("cpu", "cpu", "reference"), strict=True):
            with force_backend(backend):  # type: ignore[arg-type]
                loss(kind, engine(*given)).backward()
    for tables in zip(*map(read_all, engines), strict=True):
        torch.testing.assert_close(tables[0], tables[1], **CLOSE)
        # The twin adds occurrences up in another order, and every step builds on the last.
        torch.testing.assert_close(tables[0], tables[2], rtol=1e-3, atol=1e-4)


def masked(codes: list[torch.Tensor]) -> list[torch.Tensor]:
    tables = full_weights()
    for table, weights, mine in zip(TABLES, tables, codes, strict=True):
        for row, code in enumerate(mine.tolist()):
            for chunk in set(range(table.chunks)) - set(table.live_chunks(code)):
                weights[row, chunk * table.chunk_width : (chunk + 1) * table.chunk_width] = 0
    return tables


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("id_type", [torch.int32, torch.int64])
@pytest.mark.parametrize("path", PATHS)
def test_pruned_columns_read_as_zero_and_take_no_gradient(path: str, id_type: torch.dtype, weighted: bool) -> None:
    codes = random_codes(2)
    engine, wanted = make_engine("sgd", codes, mean=True, **PATHS[path]), masked(codes)
    for found, table in zip(read_all(engine), wanted, strict=True):
        assert torch.equal(found, table)
    ids, offsets, weights = batch(3, weighted=weighted)
    leaves = [table.clone().requires_grad_() for table in wanted]
    outputs, size = [], (offsets.numel() - 1) // len(FEATURES)
    for f, t in enumerate(FEATURES):
        mine = offsets[f * size : (f + 1) * size + 1]
        summed = torch.nn.functional.embedding_bag(
            ids[mine[0] : mine[-1]],
            leaves[t],
            mine - mine[0],
            mode="sum",
            include_last_offset=True,
            per_sample_weights=None if weights is None else weights[mine[0] : mine[-1]],
        )
        outputs.append(summed / mine.diff().clamp(min=1).unsqueeze(1))
    plain = torch.cat(outputs, 1)
    found = engine(ids.to(id_type), offsets.to(id_type), weights)
    torch.testing.assert_close(found, plain, **CLOSE)
    plain.sin().sum().backward()
    found.sin().sum().backward()
    for t, table in enumerate(read_all(engine)):
        mask = masked_ones(codes)[t]
        gradient = leaves[t].grad
        assert gradient is not None
        torch.testing.assert_close(table, wanted[t] - 0.05 * gradient * mask, **CLOSE)


def masked_ones(codes: list[torch.Tensor]) -> list[torch.Tensor]:
    return [(table != 0).float() for table in masked(codes)]


@pytest.mark.parametrize("path", PATHS)
def test_gradient_of_per_sample_weights(path: str) -> None:
    engine, plain = make_engine("sgd", **PATHS[path]), plain_tables("sgd")
    ids, offsets, weights = batch(4, weighted=True)
    assert weights is not None
    found, wanted = weights.clone().requires_grad_(), weights.clone().requires_grad_()
    engine(ids, offsets, found).sin().sum().backward()
    plain(ids, offsets, per_sample_weights=wanted).sin().sum().backward()
    torch.testing.assert_close(found.grad, wanted.grad, **CLOSE)
    for mine, theirs in zip(read_all(engine), plain.split_embedding_weights(), strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)


def test_unpooled_rows() -> None:
    tables = (LogicalTable(name="a", rows=10, dim=8, chunks=2), LogicalTable(name="b", rows=70, dim=8))
    engine = make_engine("sgd", tables=tables, features=(0, 1))
    full = full_weights(tables)
    ids = torch.tensor([3, 3, 9, 69, 0])
    rows = engine.lookup_rows(ids, [3, 2])
    assert torch.equal(rows.detach(), torch.cat([full[0][ids[:3]], full[1][ids[3:]]]))
    rows.sum().backward()
    assert torch.equal(engine.read_rows(0, 0, 10)[3], full[0][3] - 0.05 * 2)
    assert engine.lookup_rows(ids[:0], [0, 0]).shape == (0, 8)
    assert torch.equal(engine.lookup_rows(ids[3:], [0, 2]).detach(), engine.read_rows(1, 0, 70)[ids[3:]])


def test_unpooled_rows_need_one_dim() -> None:
    with pytest.raises(ValueError, match=r"one dim for all tables, not \[8, 12, 16\]"):
        make_engine().lookup_rows(torch.tensor([0]), [1, 0, 0, 0])


@pytest.mark.parametrize("mode", ["eval", "no_grad", "inference"])
@pytest.mark.parametrize("path", PATHS)
def test_evaluation_moves_nothing(path: str, mode: str) -> None:
    engine = make_engine(codes=random_codes(5), **PATHS[path])
    engine.track_utility(RowUtility(TABLES, device=torch.device("cpu")))
    for step in range(3):
        engine(*batch(step)).sin().sum().backward()
    before = snapshot(engine)
    assert before["steps"].tolist() == [3, 3] and engine.utility is not None and engine.utility.values.any()
    if mode == "eval":
        engine.eval()
        engine(*batch(9, weighted=True))
    elif mode == "no_grad":
        with torch.no_grad():
            engine(*batch(9))
    else:
        with torch.inference_mode():
            engine(*batch(9))
    assert_same_state(before, snapshot(engine))
    engine.train()
    engine(*batch(3)).sin().sum().backward()
    assert snapshot(engine)["steps"].tolist() == [4, 4]


@pytest.mark.parametrize("path", PATHS)
def test_utilities_are_measured_where_nothing_is_stored(path: str) -> None:
    """Dead rows could not come back otherwise; the gradient of the output exists without weights."""
    engine = make_engine("sgd", [torch.zeros(t.rows, dtype=torch.uint8) for t in TABLES], **PATHS[path])
    engine.track_utility(RowUtility(TABLES, device=torch.device("cpu")))
    ids, offsets, _ = batch(6)
    out = engine(ids, offsets)
    assert not out.detach().any()
    (2 * out).sum().backward()
    assert engine.utility is not None
    expected = torch.zeros(198)
    for bag in range(offsets.numel() - 1):
        f = bag // 8
        for row in ids[offsets[bag] : offsets[bag + 1]].tolist():
            expected[sum(t.rows for t in TABLES[: FEATURES[f]]) + row] += 2 * TABLES[FEATURES[f]].dim ** 0.5
    torch.testing.assert_close(engine.utility.values.flatten().float(), expected, rtol=0.03, atol=0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("value", "table", "rows"), [(130, "a", 130), (-1, "a", 130)])
def test_id_out_of_range_names_the_table(path: str, value: int, table: str, rows: int) -> None:
    engine = make_engine(**PATHS[path])
    before = snapshot(engine)
    ids, offsets, _ = batch(7)
    ids[2] = value
    with pytest.raises(
        IndexError, match=f"id {value} at position 2 of the batch is outside table '{table}' with {rows}"
    ):
        engine(ids, offsets)
    assert_same_state(before, snapshot(engine))


def test_batches_that_do_not_fit_are_refused() -> None:
    engine = make_engine()
    ids, offsets, _ = batch(8)
    with pytest.raises(ValueError, match="31 bags cannot be split over 4 features"):
        engine(ids, offsets[:-1])
    with pytest.raises(TypeError, match="ids must be int32 or int64, not torch.float32"):
        engine(ids.float(), offsets)
    with pytest.raises(TypeError, match="offsets must be int32 or int64, not torch.int16"):
        engine(ids, offsets.short())


@pytest.mark.parametrize("path", PATHS)
def test_offsets_and_weights_that_reach_outside_the_batch_are_refused(path: str) -> None:
    engine = make_engine(**PATHS[path])
    ids, offsets, _ = batch(8)
    with pytest.raises(ValueError, match="offsets"):
        engine(ids[:-3], offsets)
    with pytest.raises(ValueError, match="offsets"):
        engine(ids, torch.where(offsets == offsets[-1], offsets + 1000, offsets))
    with pytest.raises(ValueError, match="per_sample_weights"):
        engine(ids, offsets, torch.ones(ids.numel() - 1))


def test_backward_after_rows_have_moved_is_refused() -> None:
    engine = make_engine("sgd")
    out = engine(*batch(9))
    engine.move(FixedPlan([0, 0, 0]))
    with pytest.raises(RuntimeError, match="moved"):
        out.sum().backward()


def test_learning_rate_follows_on_both_paths() -> None:
    for options in PATHS.values():
        engine = make_engine("sgd", **options)
        engine(*batch(0))  # builds FBGEMM's tables
        engine.set_learning_rate(0.5)
        before = read_all(engine)
        ids, offsets, _ = batch(1)
        engine(ids, offsets).sum().backward()
        moved = [one - other for one, other in zip(before, read_all(engine), strict=True)]
        counts = torch.bincount(ids[: offsets[16]], minlength=130)
        torch.testing.assert_close(moved[0], 0.5 * counts.float().unsqueeze(1).expand(-1, 16), rtol=1e-4, atol=1e-5)


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="float32 or float16 weights, not torch.bfloat16"):
        RoutedOptions(dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="2 features but 1 pooling modes"):
        RoutedEmbeddings(TABLES[:1], [0, 0], [True])
    with pytest.raises(ValueError, match=r"dim 12 cannot be cut into 2 chunks.*use one of chunks=\[1, 3\]"):
        LogicalTable(name="t", rows=5, dim=12, chunks=2)
    with pytest.raises(ValueError, match="must be a multiple of 4: pad it, or leave the table out"):
        LogicalTable(name="t", rows=5, dim=10)
    with pytest.raises(ValueError, match="use fewer chunks or layout 'prefix'"):
        LogicalTable(name="t", rows=5, dim=32, chunks=8, layout="chunks")
    with pytest.raises(ValueError, match="has 0 rows"):
        LogicalTable(name="t", rows=0, dim=4)

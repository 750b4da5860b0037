"""Rounded lookups of an engine against plain PyTorch over the rounded table."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from lightning_embcomp.engine.host import HeldTable, OneEngine
from lightning_embcomp.engine.layout import LogicalTable
from lightning_embcomp.engine.memory import engine_bytes, table_memory
from lightning_embcomp.engine.optimizer import FusedOptimizerSpec
from lightning_embcomp.engine.plan import FixedPlan, SamePlan
from lightning_embcomp.engine.routed import RoutedEmbeddings, RoutedOptions
from lightning_embcomp.methods.mpe.assembly import mean_magnitudes, put_in
from lightning_embcomp.methods.mpe.config import PrecisionSearch, RowQuantization
from lightning_embcomp.methods.mpe.groups import GroupBounds
from lightning_embcomp.methods.mpe.module import RowQuantizer
from lightning_embcomp.methods.mpe.state import RoundingState
from lightning_embcomp.methods.mpe.training import QuantizerTraining

ROWS, DIMS = (200, 90, 130), (8, 8, 4)
WIDTHS = (0, 2, 4, 8)


def make(
    mean: tuple[bool, ...] | None = None,
    dims: tuple[int, ...] = DIMS,
    fused: bool = True,
    owned: tuple[int, ...] = (0, 2),
    unordered: bool = False,
    feature_tables: tuple[int, ...] | None = None,
    **settings: Any,
) -> tuple[RoutedEmbeddings, RowQuantizer]:
    """An engine of three tables, of which two are rounded to random widths."""
    torch.manual_seed(0)
    tables = [LogicalTable(name=f"t{i}", rows=n, dim=d) for i, (n, d) in enumerate(zip(ROWS, dims, strict=True))]
    optimizer = FusedOptimizerSpec(kind="sgd", options={"learning_rate": 1.0}) if fused else None
    engine = RoutedEmbeddings(tables, feature_tables, mean, RoutedOptions(optimizer=optimizer))
    engine.move(FixedPlan([1, 1, 1]))
    for t, table in enumerate(tables):
        engine.initialise(t, lambda rows: torch.nn.init.normal_(rows, std=0.3))
        assert table.full_code == 1
    groups = GroupBounds(ROWS, owned, [64] * len(owned))
    by_frequency = {t: groups.by_frequency(t, torch.randperm(ROWS[t])) for t in owned} if unordered else {}
    host = OneEngine(engine)
    state = RoundingState(groups, dims, WIDTHS, **settings)
    state.start(mean_magnitudes([HeldTable(host, t, f"t{t}") for t in owned]))
    put_in(host, state, by_frequency)
    quantizer = engine.values
    assert isinstance(quantizer, RowQuantizer)
    return engine, quantizer


def fix_at_random(quantizer: RowQuantizer) -> None:
    generator = torch.Generator().manual_seed(3)
    state = quantizer.state
    index = torch.randint(0, len(WIDTHS), (state.bits.numel(),), generator=generator)
    state.fix(state.widths[index].to(torch.uint8))
    state.start_steps()


def batch(pooling: int | None, size: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    lengths = (
        torch.randint(0, 5, (3 * size,), generator=generator) if pooling is None else torch.full((3 * size,), pooling)
    )
    counts = lengths.view(3, size).sum(1).tolist()
    ids = torch.cat([torch.randint(0, n, (k,), generator=generator) for n, k in zip(ROWS, counts, strict=True)])
    return ids, torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])


def expected(
    engine: RoutedEmbeddings, ids: Tensor, offsets: Tensor, weights: Tensor | None, mean: tuple[bool, ...]
) -> Tensor:
    """Pool the rounded tables with PyTorch alone."""
    size, out = (offsets.numel() - 1) // 3, []
    for t in range(3):
        table = engine.read_rows(t, 0, ROWS[t])
        precision = engine.precision(t)
        table = table if precision is None else precision.round(table, 0)
        ends = offsets[t * size : (t + 1) * size + 1]
        mine = slice(int(ends[0]), int(ends[-1]))
        scale = torch.ones(mine.stop - mine.start) if weights is None else weights[mine]
        if mean[t]:
            lengths = ends.diff()
            scale = scale / lengths.clamp(min=1).repeat_interleave(lengths)
        out.append(
            embedding_bag(
                ids[mine], table, ends - ends[0], mode="sum", include_last_offset=True, per_sample_weights=scale
            )
        )
    return torch.cat(out, 1)


@pytest.mark.parametrize("unordered", [False, True])
@pytest.mark.parametrize("mean", [(False, False, False), (True, False, True)])
@pytest.mark.parametrize("pooling", [1, None])
@pytest.mark.parametrize("weighted", [False, True])
def test_pooled_lookup(pooling: int | None, weighted: bool, mean: tuple[bool, ...], unordered: bool) -> None:
    engine, quantizer = make(mean, unordered=unordered)
    fix_at_random(quantizer)
    ids, offsets = batch(pooling)
    weights = torch.rand(ids.numel()) if weighted else None
    engine.eval()
    found = engine(ids, offsets, weights)
    torch.testing.assert_close(found, expected(engine, ids, offsets, weights, mean), rtol=1e-6, atol=1e-6)
    if pooling == 1 and not weighted:
        assert torch.equal(found, expected(engine, ids, offsets, weights, mean))


def test_single_rows() -> None:
    engine, quantizer = make(dims=(8, 8, 8))
    fix_at_random(quantizer)
    ids = torch.tensor([0, 199, 3, 129, 64])
    found = engine.lookup_rows(ids, [2, 1, 2])
    tables = [engine.read_rows(t, 0, ROWS[t]) for t in range(3)]
    for t in (0, 2):
        precision = engine.precision(t)
        assert precision is not None
        tables[t] = precision.round(tables[t], 0)
    assert torch.equal(found, torch.stack([tables[0][0], tables[0][199], tables[1][3], tables[2][129], tables[2][64]]))


@pytest.mark.parametrize("fused", [True, False])
def test_gradients_stop_outside_the_range(fused: bool) -> None:
    """SGD with rate 1 shows the gradient: that of the output inside the range of the row's quantizer, none outside."""
    engine, quantizer = make(fused=fused)
    fix_at_random(quantizer)
    engine.train()
    ids = torch.arange(90).repeat(3)  # every id once per table
    offsets = torch.arange(271)
    before = [engine.read_rows(t, 0, 90) for t in range(3)]
    grad = torch.randn(90, sum(DIMS), generator=torch.Generator().manual_seed(1))
    engine(ids, offsets).backward(grad)
    if not fused:
        torch.optim.SGD(engine.parameters(), lr=1.0).step()
    for t, columns in enumerate(grad.split(DIMS, 1)):
        moved = before[t] - engine.read_rows(t, 0, 90)
        precision = engine.precision(t)
        inside = torch.ones(90, DIMS[t], dtype=torch.bool)
        for row, bits in enumerate([] if precision is None else precision.bits_of(0, 90).tolist()):
            assert precision is not None
            scaled = before[t][row] / precision.steps[bits] if bits else torch.full((DIMS[t],), torch.inf)
            inside[row] = (scaled >= -(2.0 ** (bits - 1))) & (scaled <= 2.0 ** (bits - 1) - 1)
        torch.testing.assert_close(moved, torch.where(inside, columns, 0.0), rtol=1e-5, atol=1e-5)


def test_evaluation_moves_nothing_but_training_does() -> None:
    engine, quantizer = make()
    ids, offsets = batch(1)
    for training in (False, True):
        engine.train(training)
        before = {name: tensor.clone() for t in (0, 2) for name, tensor in quantizer.tensors(t).items()}
        out = engine(ids, offsets)
        out.backward(torch.ones_like(out))
        same = [torch.equal(before[name], tensor) for name, tensor in quantizer.tensors(2).items()]
        assert all(same) is not training
        assert (quantizer.state.take_sums() is not None) is training


def test_search_measures_the_squared_change_of_each_sample() -> None:
    """Errors by hand for one batch: samples of a mean loss, so that each gradient counts times the batch size."""
    engine, quantizer = make(owned=(0,))
    engine.train()
    ids, offsets = torch.tensor([5, 70, 5, 0, 0, 0, 1, 1, 1]), torch.arange(10)
    grad = torch.randn(3, sum(DIMS), generator=torch.Generator().manual_seed(2))
    rows = engine.read_rows(0, 0, 200)[ids[:3]]
    engine(ids, offsets).backward(grad)
    wanted = torch.zeros(quantizer.bits.numel(), len(WIDTHS), dtype=torch.float64)
    for sample, (row, group) in enumerate(zip(rows, (0, 1, 0), strict=True)):
        for k, width in enumerate(WIDTHS):
            step, half = float(quantizer.state.steps[0, width]), 2 ** (width - 1) if width else 0
            rounded = (row / step).round().clamp(-half, half - 1) * step if width else torch.zeros(8)
            wanted[group, k] += float((grad[sample, :8] * (rounded - row)).sum()) ** 2 * 3
    torch.testing.assert_close(quantizer.state.error, wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("owned", [(0, 2), (2,)])
def test_magnitudes_follow_every_feature_in_turn(owned: tuple[int, ...]) -> None:
    """Two features of one table move its magnitude twice; tables that are not rounded may have more features."""
    engine, quantizer = make(dims=(8, 8, 8), owned=owned, feature_tables=(0, 1, 2, 1, 2, 1))
    engine.train()
    ids, offsets = torch.arange(18), torch.arange(19)
    wanted = quantizer.state.magnitude.double()
    for f, t in enumerate(engine.feature_tables):
        if t in owned:
            rows = engine.read_rows(t, 0, ROWS[t])[3 * f : 3 * f + 3]
            wanted[t] = 0.99 * wanted[t] + 0.01 * rows.abs().double().mean()
    engine(ids, offsets).sum().backward()
    torch.testing.assert_close(quantizer.state.magnitude.double(), wanted, rtol=1e-6, atol=0.0)


def test_rows_of_width_zero_are_freed() -> None:
    engine, quantizer = make(owned=(0, 1, 2))
    whole = engine_bytes(engine)
    bits = torch.full((quantizer.bits.numel(),), 4, dtype=torch.uint8)
    bits[quantizer.state.groups.of_table(0)] = torch.tensor([4, 0, 0, 0], dtype=torch.uint8)
    quantizer.state.fix(bits)
    engine.move(SamePlan())
    freed = (200 - 64) * 8 * 4
    assert table_memory(engine, 0).weights == 64 * 8 * 4
    searched = 3 * 8 * len(WIDTHS) // len(WIDTHS)  # what the search held goes as well
    assert whole - engine_bytes(engine) >= freed + searched
    assert not engine(torch.tensor([64, 199, 0, 0, 0, 0]), torch.arange(7))[:, :8].any()


@pytest.mark.parametrize("method", ["sensitivity", "softmax"])
def test_a_budget_is_kept(method: Any) -> None:
    search = PrecisionSearch(method=method)
    engine, quantizer = make(temperature=search.temperature if method == "softmax" else None, owned=(0, 1, 2))
    training = QuantizerTraining([quantizer.state], RowQuantization(), search, ratio=20.0, penalty=None)
    engine.train()
    ids, offsets = batch(None)
    for _ in range(20):
        out = engine(ids, offsets)
        (out - 1).square().mean().backward()
        training.step()
    training.settle(training.choose())
    assert 0.25 * 32 / 20 < training.average_bits() <= 32 / 20  # a group is a fifth of the budget
    assert not training.searching and set(quantizer.bits.tolist()) <= set(WIDTHS)


def test_softmax_search_follows_the_paper() -> None:
    """One step of Adam moves every logit by its rate against the sign of loss and penalty."""
    engine, quantizer = make(temperature=3e-3, owned=(0,))
    quantizer.state.counts = torch.tensor([640.0, 64.0, 64.0, 8.0])
    training = QuantizerTraining(
        [quantizer.state], RowQuantization(), PrecisionSearch(method="softmax"), ratio=None, penalty=1e9
    )
    engine.train()
    out = engine(*batch(1))
    out.sum().backward()
    training.step()
    assert torch.allclose(quantizer.state.logits.abs(), torch.tensor(1e-3), rtol=1e-3)
    assert (quantizer.state.logits[:, 0] > 0).all() and (
        quantizer.state.logits[:, -1] < 0
    ).all()  # pressed to fewer bits
    assert torch.allclose(quantizer.state.shares, torch.softmax(quantizer.state.logits / 3e-3, 1))


@pytest.mark.parametrize("unordered", [False, True])
@pytest.mark.parametrize("searching", [False, True])
def test_every_byte_is_counted(searching: bool, unordered: bool) -> None:
    """Tables add up to the storages of the engine; what is left is the lookup of the table that is not rounded."""
    engine, quantizer = make(unordered=unordered)
    if not searching:
        fix_at_random(quantizer)
    by_table = sum(table_memory(engine, t).total for t in range(3))
    unused = [
        quantizer.state.offset[1],
        quantizer.state.offset[2, 4:],
        quantizer.state.magnitude[1:2],
        *2 * [quantizer.state.steps[1]],
    ]
    assert engine_bytes(engine) - by_table == sum(4 * part.numel() for part in unused) + 2
